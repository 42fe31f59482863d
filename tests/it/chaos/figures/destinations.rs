//! Destinations that are down or slow, or that refuse some events.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::{blocking, scaled};
use crate::binary::{Running, relay};
use crate::chaos::{STREAM, World};
use crate::harness::sql;
use crate::proxy::Proxy;
use crate::readback::Subscriber;
use crate::stub::EventBridgeStub;

fn id_in(event: &str) -> String {
    serde_json::from_str::<serde_json::Value>(event).unwrap()["id"].as_str().unwrap().to_owned()
}

fn assert_each_is_there(ids: Vec<String>, events: u64) {
    assert_eq!(HashSet::<String>::from_iter(ids).len(), usize::try_from(events).unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: `make figures`"]
async fn s11_destinations_down() {
    let world = World::new(true).await;
    let seconds = scaled(600);
    let stub = EventBridgeStub::start().await;
    let (published, dead) = blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let port = stub.url().rsplit(':').next().unwrap().parse().unwrap();
        let to_eventbridge = Proxy::to(port);
        let file = tempfile::NamedTempFile::with_suffix(".toml").unwrap();
        let config = format!(
            "[destinations.stream]\ntype = \"redis-stream\"\nurl = \"{0}\"\nstream = \"{STREAM}\"\n
             [destinations.pubsub]\ntype = \"redis-pubsub\"\nurl = \"{0}\"\n
             [destinations.bus]\ntype = \"eventbridge\"\nbus = \"orders\"\nregion = \"eu-west-1\"\nendpoint_url = \"{1}\"\n",
            world.redis_url,
            to_eventbridge.url(stub.url(), port),
        );
        std::fs::write(file.path(), config).unwrap();
        let variables = [
            ("DATABASE_URL", world.database.url()),
            ("RELAY_CONFIG", file.path().to_str().unwrap()),
            ("AWS_ACCESS_KEY_ID", "k"),
            ("AWS_SECRET_ACCESS_KEY", "s"),
            ("EVENT_DEFAULT_TIMEOUT", "3000"),
            ("RELAY_LOG", "error"),
        ];
        let mut subscriber = Subscriber::new(&world.redis.lock().unwrap(), "");
        let running = Running::start(relay(&["run"], &variables));
        runtime.block_on(world.backlog(20));
        world.until_entries(10);
        // All three are down at the same time.
        for proxy in [&world.to_redis, &to_eventbridge] {
            proxy.refuse(true);
            proxy.cut();
        }
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(seconds) {
            runtime.block_on(world.backlog(20));
            std::thread::sleep(Duration::from_secs(1));
        }
        world.to_redis.heal();
        to_eventbridge.heal();
        world.drain_by(vec![running]);
        let number = |query: &'static str| -> i64 {
            runtime.block_on(async {
                sqlx::query_scalar(query).fetch_one(&mut world.database.connect().await).await.unwrap()
            })
        };
        let published = number("select count(*) from event_processing_log where status = 'published'");
        assert_eq!(number("select count(*) from event_processing_log where attempt > 1"), 0, "charged");
        let entries = world.entries();
        assert_eq!(u64::try_from(published).unwrap(), 3 * entries);
        let bus = stub.requests().concat().iter().map(|entry| id_in(entry["Detail"].as_str().unwrap())).collect();
        assert_each_is_there(bus, entries);
        assert_each_is_there(subscriber.messages().iter().map(|(_, message)| id_in(message)).collect(), entries);
        (published, number("select count(*) from event_dead_letter"))
    })
    .await;
    assert_eq!(dead, 0);
    println!(
        "S11: stream, Pub/Sub and EventBridge down for {seconds} s: {published} deliveries in all, dead-lettered 0, charged 0"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: `make figures`"]
async fn s13_a_slow_destination() {
    let world = World { timeout_ms: 5000, batch: 1000, ..World::new(true).await };
    world.backlog(scaled(200_000)).await;
    let seconds = scaled(60);
    let (before, after, longest, published) = blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let running = world.relay(&["run"], "");
        world.until_entries(5000);
        let before = resident_mib(running.id());
        world.to_redis.slow_to(10_000);
        let (begun, entries, mut longest, mut after) = (Instant::now(), world.entries(), 0.0_f64, before);
        while begun.elapsed() < Duration::from_secs(seconds) {
            let open: Option<f64> = runtime.block_on(async {
                let query =
                    "select max(extract(epoch from clock_timestamp() - xact_start))::float8 from pg_stat_activity
                             where application_name = 'relay'";
                sqlx::query_scalar(query).fetch_one(&mut world.database.connect().await).await.unwrap()
            });
            longest = longest.max(open.unwrap_or_default());
            after = after.max(resident_mib(running.id()));
            std::thread::sleep(Duration::from_millis(200));
        }
        (before, after, longest, world.entries() - entries)
    })
    .await;
    println!(
        "S13: destination at 10 kB/s for {seconds} s: {published} events, resident {before} MiB before, at most {after} MiB; \
         longest transaction {longest:.1} s with a publish timeout of 5 s"
    );
    assert!(after <= before + 16, "{before} MiB, then {after} MiB");
    assert!(longest < 7.0, "{longest} s");
}

fn resident_mib(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long: `make figures`"]
async fn s15_poison() {
    let events = scaled(200_000);
    let mut rates = [Vec::new(), Vec::new()];
    // The rounds alternate, because a machine's speed changes from minute to minute.
    for round in 0..6 {
        let poisoned = round % 2;
        let world = World { batch: 1000, ..World::new(true).await };
        sql(
            &mut world.database.connect().await,
            format!(
                "insert into event_outbox (event_type, aggregate_type, aggregate_id)
                 select '{STREAM}', 'f', (i % 1000)::text from generate_series(1, {events}) i;
                 insert into event_outbox (event_type, aggregate_type, aggregate_id)
                 select 'poison', 'p', (i % 10)::text from generate_series(1, {poisoned} * {events} / 100) i"
            ),
        )
        .await;
        let rate = blocking(move || {
            world.redis_command(&["SET", "poison", "no stream"]);
            let retries = [("EVENT_DEFAULT_MAX_RETRIES", "1"), ("EVENT_DEFAULT_BACKOFF_MS", "100")];
            let running = world.relay_with(&retries, "{event_type}");
            world.until_entries(0);
            let begun = Instant::now();
            while world.entries() < events {
                std::thread::sleep(Duration::from_millis(5));
            }
            let rate = events as f64 / begun.elapsed().as_secs_f64();
            world.drain_by(vec![running]);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let dead: i64 = runtime.block_on(async {
                let query = "select count(*) from event_dead_letter where event_type = 'poison'";
                sqlx::query_scalar(query).fetch_one(&mut world.database.connect().await).await.unwrap()
            });
            assert_eq!(u64::try_from(dead).unwrap(), poisoned * events / 100, "each dead-lettered, once");
            rate
        })
        .await;
        rates[usize::try_from(poisoned).unwrap()].push(rate);
    }
    let median = |rates: &mut Vec<f64>| {
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    };
    let [without, with] = rates.each_mut().map(median);
    println!(
        "S15: 1 % poison: {with:.0} healthy events/s, {:.2} of {without:.0} without; dead letters exact",
        with / without
    );
    assert!(with / without >= 0.95, "{rates:?}");
}
