//! Every failpoint, failing in every way, with every kind of destination.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::time::Instant;

use serde_json::Value;

use super::{assert_first_in_order, load};
use crate::binary::{Running, relay};
use crate::harness::{column, count, eventually, sql};
use crate::readback::Subscriber;
use crate::servers::{database, redis};
use crate::stream;
use crate::stub::EventBridgeStub;
use crate::support::unique;

const POINTS: [&str; 8] =
    ["connect", "claimed", "before_publish", "acked", "before_settle", "dlq_inserted", "before_commit", "committed"];

/// Actions of the crate `fail`, and what each leaves in the log. An abort leaves nothing.
const ACTIONS: [(&str, Option<&str>); 4] =
    [("return(abort)", None), ("return", Some("failpoint ")), ("panic", Some("panicked")), ("sleep(300)", Some(""))];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Stream,
    PubSub,
    EventBridge,
    Stdout,
    StreamAndStdout,
}

const KINDS: [Kind; 5] = [Kind::Stream, Kind::PubSub, Kind::EventBridge, Kind::Stdout, Kind::StreamAndStdout];

/// Their keys are six.
const EVENTS: i64 = 60;
const BATCH: usize = 10;
const LANES: usize = 2;

/// The destination of one cell.
struct Place {
    kind: Kind,
    name: String,
    subscriber: Option<Subscriber>,
    bus: Option<EventBridgeStub>,
    /// The lines that all processes of the cell have printed.
    stdout: String,
}

impl Place {
    async fn new(kind: Kind) -> Self {
        let name = unique("matrix");
        let subscriber = (kind == Kind::PubSub).then(|| Subscriber::new(redis(), &name));
        let bus = if kind == Kind::EventBridge { Some(EventBridgeStub::start().await) } else { None };
        Self { kind, name, subscriber, bus, stdout: String::new() }
    }

    fn variables(&self) -> Vec<(&str, &str)> {
        let stream = [("REDIS_URL", redis().url()), ("RELAY_REDIS_STREAM", &self.name)];
        let stdout = ("RELAY_STDOUT", "true");
        match self.kind {
            Kind::Stream => stream.to_vec(),
            Kind::PubSub => {
                vec![("REDIS_URL", redis().url()), ("RELAY_REDIS_MODE", "pubsub"), ("RELAY_REDIS_CHANNEL", &self.name)]
            }
            Kind::EventBridge => vec![
                ("AWS_EVENTBRIDGE_BUS_NAME", "orders"),
                ("AWS_ENDPOINT_URL", self.bus.as_ref().unwrap().url()),
                ("AWS_REGION", "eu-west-1"),
                ("AWS_ACCESS_KEY_ID", "id"),
                ("AWS_SECRET_ACCESS_KEY", "secret"),
            ],
            Kind::Stdout => vec![stdout],
            Kind::StreamAndStdout => stream.into_iter().chain([stdout]).collect(),
        }
    }

    /// What arrived at each destination, as keys with ids.
    fn arrived(&mut self) -> Vec<Vec<(String, i64)>> {
        let of_json = |text: &str| {
            let event: Value = serde_json::from_str(text).unwrap();
            (event["subject"].as_str().unwrap().to_owned(), event["sequence"].as_str().unwrap().parse().unwrap())
        };
        let mut destinations = Vec::new();
        if matches!(self.kind, Kind::Stream | Kind::StreamAndStdout) {
            let entries = stream::entries(&mut stream::connect(redis().url()), &self.name);
            destinations
                .push(entries.iter().map(|entry| (entry.fields["subject"].clone(), entry.sequence())).collect());
        }
        if matches!(self.kind, Kind::Stdout | Kind::StreamAndStdout) {
            destinations.push(self.stdout.lines().map(of_json).collect());
        }
        if let Some(subscriber) = &mut self.subscriber {
            destinations.push(subscriber.messages().iter().map(|(_, message)| of_json(message)).collect());
        }
        if let Some(bus) = &self.bus {
            let requests = bus.requests();
            destinations
                .push(requests.iter().flatten().map(|entry| of_json(entry["Detail"].as_str().unwrap())).collect());
        }
        destinations
    }
}

/// Runs one cell. Returns how many events arrived again.
async fn cell(point: &str, action: &str, trace: Option<&str>, kind: Kind) -> usize {
    let database = database().await;
    let mut connection = database.connect().await;
    load(&mut connection, EVENTS, 6).await;
    sql(&mut connection, "select emit_event('large', to_jsonb(repeat('x', 2000)), 'k', 'large')").await;
    let mut place = Place::new(kind).await;
    // There is only one dead letter, and the main thread opens two connections. All other points fail at the second time.
    let failpoints = match point {
        "dlq_inserted" => format!("{point}=1*{action}"),
        "connect" => format!("{point}=3*off->1*{action}"),
        _ => format!("{point}=1*off->1*{action}"),
    };
    let (batch, lanes) = (BATCH.to_string(), LANES.to_string());
    let settings = [
        ("DATABASE_URL", database.url()),
        ("EVENT_OUTBOX_BATCH_SIZE", &batch),
        ("RELAY_LANES", &lanes),
        ("EVENT_MAX_PAYLOAD_SIZE", "1000"),
    ];
    let start = |place: &Place, more: &[(&str, &str)]| {
        let variables: Vec<_> = settings.iter().chain(more).copied().chain(place.variables()).collect();
        Running::start(relay(&["run"], &variables))
    };
    let mut running = start(&place, &[("FAILPOINTS", &failpoints)]);
    eventually("the outbox is empty or the relay has ended", async || {
        !running.is_running() || count(&mut connection, "event_outbox").await == 0
    })
    .await;
    if let Some(trace) = trace {
        assert!(running.is_running(), "the relay ended:\n{}", running.log());
        assert!(running.log().contains(trace), "the fault never happened:\n{}", running.log());
    } else {
        eventually("it is dead", async || !running.is_running()).await;
        let dead = running.finish();
        assert_eq!(dead.code, None, "SIGABRT: {}", dead.stderr);
        place.stdout = dead.stdout;
        running = start(&place, &[]);
        eventually("the outbox is empty", async || count(&mut connection, "event_outbox").await == 0).await;
    }
    running.signal("TERM");
    place.stdout += &running.finish().exited(0).stdout;

    let mut all_repeats = 0;
    let destinations = place.arrived();
    for arrived in &destinations {
        let (distinct, repeats) = assert_first_in_order(arrived.iter().cloned());
        assert_eq!(distinct, usize::try_from(EVENTS).unwrap());
        assert!(repeats <= LANES * BATCH, "{repeats} repeats");
        all_repeats += repeats;
    }
    if action.starts_with("sleep") {
        assert_eq!(all_repeats, 0, "repeats after a delay");
    }
    let log = "select concat_ws(' ', status, attempt, count(*), count(distinct (event_id, destination)))
               from event_processing_log group by status, attempt order by 1";
    let published = EVENTS * destinations.len() as i64;
    assert_eq!(
        column(&mut connection, log).await,
        ["dead_lettered 1 1 1".to_owned(), format!("published 1 {published} {published}")]
    );
    assert_eq!(count(&mut connection, "event_dead_letter where error_code = 'payload_too_large'").await, 1);
    all_repeats
}

#[test]
fn every_failpoint_failing_in_every_way_loses_nothing_before_any_kind_of_destination() {
    let mut cells = Vec::new();
    for kind in KINDS {
        for point in POINTS {
            cells.extend(ACTIONS.map(|(action, trace)| (point, action, trace, kind)));
        }
    }
    let (number, begun) = (cells.len(), Instant::now());
    let (queue, failed, repeats) = (Mutex::new(cells), Mutex::new(Vec::new()), Mutex::new(0));
    let next = || queue.lock().unwrap().pop();
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                while let Some((point, action, trace, kind)) = next() {
                    let ran = catch_unwind(AssertUnwindSafe(|| runtime.block_on(cell(point, action, trace, kind))));
                    match ran {
                        Ok(again) => *repeats.lock().unwrap() += again,
                        Err(_) => failed.lock().unwrap().push(format!("{point}={action} before {kind:?}")),
                    }
                }
            });
        }
    });
    let (failed, repeats) = (failed.into_inner().unwrap(), repeats.into_inner().unwrap());
    println!("S3: {number} cells in {:?}, {} failed; {repeats} repeats in all", begun.elapsed(), failed.len());
    assert!(failed.is_empty(), "{failed:#?}");
}
