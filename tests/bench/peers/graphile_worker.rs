//! The crate graphile_worker, with the settings of its own benchmark (benches/perf_test.rs): 500 jobs at once, a local queue
//! of 5000, completions in batches of 5 ms.
//! https://docs.rs/crate/graphile_worker/latest/source/docs/src/configuration/worker-options.md ("Throughput-oriented worker")

use std::env::var;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use graphile_worker::{
    IntoTaskHandlerResult, JobSpec, LocalQueueConfig, RawJobSpec, TaskHandler, WorkerContext, WorkerOptions,
};
use redis::aio::MultiplexedConnection;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Notify;

#[derive(Serialize, Deserialize)]
struct Publish {
    r#type: String,
    key: String,
    data: Value,
}

#[derive(Clone)]
struct Sink {
    redis: MultiplexedConnection,
    left: Arc<AtomicUsize>,
    done: Arc<Notify>,
}

impl Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sink")
    }
}

impl TaskHandler for Publish {
    const IDENTIFIER: &'static str = "publish";

    async fn run(self, context: WorkerContext) -> impl IntoTaskHandlerResult {
        let mut sink = context.get_ext::<Sink>().expect("added below").clone();
        let mut xadd = redis::cmd("XADD");
        xadd.arg("events").arg("*").arg("id").arg(*context.job().id()).arg("type").arg(self.r#type);
        xadd.arg("partitionkey").arg(self.key).arg("data").arg(self.data.to_string());
        // The connection sends the commands of several jobs in one pipeline.
        xadd.query_async::<()>(&mut sink.redis).await.map_err(|error| error.to_string())?;
        if sink.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            sink.done.notify_one();
        }
        Ok::<(), String>(())
    }
}

#[tokio::main]
async fn main() {
    let number = |name| var(name).unwrap().parse::<usize>().unwrap();
    let (database, events) = (var("DATABASE_URL").unwrap(), number("EVENTS"));
    let redis = redis::Client::open(var("REDIS_URL").unwrap()).unwrap();
    let sink = Sink {
        redis: redis.get_multiplexed_async_connection().await.unwrap(),
        left: Arc::new(AtomicUsize::new(events)),
        done: Arc::new(Notify::new()),
    };
    let worker = WorkerOptions::default()
        .database_url(&database)
        .concurrency(500)
        .poll_interval(Duration::from_millis(5))
        .complete_job_batch_delay(Duration::from_millis(5))
        .local_queue(LocalQueueConfig::default().with_size(5000))
        .add_extension(sink.clone())
        .define_job::<Publish>()
        .init()
        .await
        .unwrap();

    if std::env::args().nth(1).as_deref() == Some("fill") {
        let pad = "x".repeat(number("PAYLOAD").saturating_sub(30));
        let numbers: Vec<usize> = (1..=events).collect();
        for batch in numbers.chunks(10_000) {
            let job = |n: &usize| RawJobSpec {
                identifier: "publish".to_owned(),
                payload: json!({
                    "type": "order.created",
                    "key": format!("order:{}", n % number("KEYS")),
                    "data": {"n": n, "pad": pad},
                }),
                spec: JobSpec::default(),
            };
            let jobs: Vec<RawJobSpec> = batch.iter().map(job).collect();
            worker.create_utils().add_raw_jobs(&jobs).await.unwrap();
        }
        return;
    }

    let worker = Arc::new(worker);
    let begun = Instant::now();
    let running = tokio::spawn({
        let worker = worker.clone();
        async move { worker.run().await }
    });
    sink.done.notified().await;
    worker.request_shutdown();
    running.await.unwrap().unwrap(); // the last completions are written
    println!("{}", json!({"events": events, "seconds": begun.elapsed().as_secs_f64()}));
}
