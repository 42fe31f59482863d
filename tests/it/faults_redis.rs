//! Faults of Redis and of the servers before it. Each fault has at least one test, named after its number in the catalogue.
//! The helpers for tests that need a relay and a load are here.

mod cluster;
mod cut;
mod failover;
mod memory;
mod password;
mod poison;
mod pooled;
mod restart;
mod scripts;
mod tls;
mod trouble;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use outbox_relay::secret::Secret;
use outbox_relay::sink::Sink;
use outbox_relay::sink::redis::RedisAddress;
use outbox_relay::sink::redis_stream::{RedisStream, RedisStreamConfig};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::harness::{Running, Setup, column, count, eventually, sql};
use crate::servers::Database;
use crate::stream::Entry;

/// Longer than any answer takes.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Keys of a [`Load`]. Event `n` has the key `n % KEYS`.
const KEYS: i64 = 60;

/// Event types of a [`Load`]. All events of a key have the same type.
const TYPES: i64 = 30;

/// A sink with exactly-once on.
fn sink(url: &str, stream: &str) -> Arc<RedisStream> {
    at(RedisAddress::Url(Secret::inline(url)), stream)
}

fn at(address: RedisAddress, stream: &str) -> Arc<RedisStream> {
    Arc::new(RedisStream::new(RedisStreamConfig {
        address,
        stream: stream.parse().unwrap(),
        max_length: None,
        source: "outbox".into(),
        timeout: TIMEOUT,
        exactly_once: true,
    }))
}

/// Starts a relay with this sink.
fn relay(database: &Database, sink: Arc<dyn Sink>) -> Running {
    let mut setup = Setup::new(database, vec![("redis", sink)]);
    setup.relay.batch_events = 300;
    setup.run()
}

/// An application that commits events of all keys in turn, in small transactions, until it is stopped.
struct Load {
    stop: CancellationToken,
    task: JoinHandle<i64>,
}

impl Load {
    async fn start(database: &Database) -> Self {
        let (stop, mut connection) = (CancellationToken::new(), database.connect().await);
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut last = 0;
            while !stopped.is_cancelled() {
                let values = format!(
                    "'type' || i % {TYPES}, 'order', 'k' || i % {KEYS}, jsonb_build_object('n', i)
                     from generate_series({}, {}) i",
                    last + 1,
                    last + KEYS
                );
                let columns = "event_type, aggregate_type, aggregate_id, payload";
                sql(&mut connection, format!("insert into event_outbox ({columns}) select {values}")).await;
                last += KEYS;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            last
        });
        Self { stop, task }
    }

    /// Stops the load and waits until the relay has settled everything. No event was charged an attempt. Returns how many
    /// events were emitted.
    async fn drained(self, database: &Database) -> i64 {
        self.stop.cancel();
        let events = self.task.await.unwrap();
        let mut connection = database.connect().await;
        eventually("everything is settled", async || count(&mut connection, "event_outbox").await == 0).await;
        let log = "select concat_ws(' ', status, attempt, count(*)) from event_processing_log group by status, attempt";
        assert_eq!(column(&mut connection, log).await, [format!("published 1 {events}")]);
        assert_eq!(count(&mut connection, "event_dead_letter").await, 0);
        events
    }
}

/// The numbers of a load's events, in the order of the stream.
fn numbers(entries: &[Entry]) -> Vec<i64> {
    let number = |entry: &Entry| {
        let data: serde_json::Value = serde_json::from_str(&entry.fields["data"]).unwrap();
        data["n"].as_i64().unwrap()
    };
    entries.iter().map(number).collect()
}

/// Every event from 1 to `events` is there exactly once, and those of each key are in order.
#[track_caller]
fn assert_once_and_in_order(mut numbers: Vec<i64>, events: i64) {
    assert_in_order(&numbers);
    numbers.sort_unstable();
    assert_eq!(numbers.len(), numbers.iter().collect::<HashSet<_>>().len(), "some events arrived twice");
    let missing: Vec<i64> = (1..=events).filter(|number| numbers.binary_search(number).is_err()).collect();
    assert!(missing.is_empty(), "{} are missing: {missing:?}", missing.len());
    assert_eq!(i64::try_from(numbers.len()).unwrap(), events);
}

/// The missing events of each key are consecutive: Redis lost them at one time, and none was skipped by itself.
#[track_caller]
fn assert_at_most_one_gap_in_each_key(numbers: &[i64], events: i64) {
    let arrived: HashSet<i64> = numbers.iter().copied().collect();
    for key in 0..KEYS {
        let is_there = (1..=events).filter(|number| number % KEYS == key).map(|number| arrived.contains(&number));
        let mut runs: Vec<bool> = is_there.collect();
        runs.dedup();
        let gaps = runs.iter().filter(|is_there| !**is_there).count();
        assert!(gaps <= 1 && runs.last() == Some(&true), "key {key} has {gaps} gaps: {runs:?}");
    }
}

/// For each key, the first copies of its events are in order.
#[track_caller]
fn assert_in_order(numbers: &[i64]) {
    let (mut seen, mut last) = (HashSet::new(), HashMap::new());
    for &number in numbers.iter().filter(|&&number| seen.insert(number)) {
        let before = last.insert(number % KEYS, number).unwrap_or(0);
        assert!(before < number, "key {}: {number} came after {before}", number % KEYS);
    }
}
