//! Many events, several relays, and faults in between. What arrives at a Redis Stream is judged as a consumer would judge it.

use std::collections::{HashMap, HashSet};

use crate::binary::{Running, relay, until};
use crate::harness::{column, count, eventually, sql};
use crate::servers::{Database, Server, database, database_on, redis};
use crate::stream::{self, Entry};

const KEYS: i64 = 1000;

/// Emits events of [`KEYS`] keys in turn. The payload's `n` counts from 1 within a key. `before` is the number of events
/// emitted earlier.
async fn emit(database: &Database, before: i64, events: i64) {
    let insert = format!(
        "insert into event_outbox (event_type, aggregate_type, aggregate_id, payload)
         select 'order.changed', 'order', (i % {KEYS})::text, jsonb_build_object('n', i / {KEYS} + 1)
         from generate_series({before}, {before} + {events} - 1) i"
    );
    sql(&mut database.connect().await, insert).await;
}

/// Every event has arrived, and the first copies of each key's events arrived in order. Returns how many events arrived
/// again.
#[track_caller]
fn assert_complete_and_in_order(entries: &[Entry], events: i64) -> usize {
    let mut last: HashMap<&str, i64> = HashMap::new();
    let mut ids = HashSet::new();
    for entry in entries {
        if !ids.insert(entry.fields["id"].as_str()) {
            continue;
        }
        let n = entry.fields["data"].strip_prefix("{\"n\": ").unwrap().trim_end_matches('}').parse().unwrap();
        let before = last.insert(&entry.fields["subject"], n).unwrap_or_default();
        assert_eq!(n, before + 1, "of key {} {n} came after {before}", entry.fields["subject"]);
    }
    assert_eq!(ids.len(), usize::try_from(events).unwrap(), "events that arrived");
    entries.len() - ids.len()
}

/// The outbox has no rows, nothing was dead-lettered, and the log says `published` once for each event.
async fn assert_settled(database: &Database, events: i64) {
    let mut connection = database.connect().await;
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
    assert_eq!(count(&mut connection, "event_dead_letter").await, 0);
    let log = "select concat_ws(' ', count(*), count(distinct event_id), count(distinct message_id), status)
               from event_processing_log group by status";
    assert_eq!(column(&mut connection, log).await, [format!("{events} {events} {events} published")]);
}

async fn until_empty(database: &Database) {
    let mut connection = database.connect().await;
    eventually("the outbox is empty", async || count(&mut connection, "event_outbox").await == 0).await;
}

#[tokio::test]
async fn f12_a_drain_beside_three_relays_delivers_100000_events_once_and_in_order() {
    const EVENTS: i64 = 100_000;
    let database = database().await;
    emit(&database, 0, EVENTS).await;
    let name = "endurance:calm";
    let variables = [("DATABASE_URL", database.url()), ("REDIS_URL", redis().url()), ("RELAY_REDIS_STREAM", name)];
    let running = [(); 3].map(|()| Running::start(relay(&["run"], &variables)));
    Running::start(relay(&["--once"], &variables)).finish().exited(0);
    until_empty(&database).await;
    for one in running {
        one.signal("TERM");
        one.finish().exited(0);
    }
    let entries = stream::entries(&mut stream::connect(redis().url()), name);
    let repeats = assert_complete_and_in_order(&entries, EVENTS);
    assert_eq!(repeats, 0);
    assert_settled(&database, EVENTS).await;
    // The log has, for each event, the id that Redis gave its entry.
    let logged = column(&mut database.connect().await, "select message_id from event_processing_log").await;
    let logged: HashSet<String> = logged.into_iter().collect();
    assert!(entries.iter().all(|entry| logged.contains(&entry.id)));
}

#[tokio::test]
async fn f02_of_three_relays_one_is_killed_and_at_most_what_it_had_in_flight_is_repeated() {
    const EVENTS: i64 = 100_000;
    const LANES: usize = 3;
    const BATCH: usize = 500;
    let database = database().await;
    emit(&database, 0, EVENTS).await;
    let name = "endurance:killed";
    let (lanes, batch) = (LANES.to_string(), BATCH.to_string());
    let variables = [
        ("DATABASE_URL", database.url()),
        ("REDIS_URL", redis().url()),
        ("RELAY_REDIS_STREAM", name),
        ("RELAY_LANES", &lanes),
        ("EVENT_OUTBOX_BATCH_SIZE", &batch),
    ];
    let mut connection = stream::connect(redis().url());
    let mut running = Vec::from([(); 3].map(|()| Running::start(relay(&["run"], &variables))));
    until("a third has arrived", || stream::length(&mut connection, name) > 30_000);
    let killed = running.pop().unwrap();
    killed.signal("KILL");
    assert_eq!(killed.finish().code, None, "it exited before it was killed");
    assert!(
        count(&mut database.connect().await, "event_outbox").await > 0,
        "everything was published before, so this test proves nothing"
    );
    until_empty(&database).await;
    for one in running {
        one.signal("TERM");
        one.finish().exited(0);
    }
    let repeats = assert_complete_and_in_order(&stream::entries(&mut connection, name), EVENTS);
    assert!(repeats <= LANES * BATCH, "{} repeats", repeats);
    assert_settled(&database, EVENTS).await;
}

#[tokio::test]
async fn servers_that_restart_under_three_relays_cost_time_and_nothing_else() {
    const EVENTS: i64 = 10_000; // in one insert
    const BATCH: usize = 200;
    let mut database_server = Server::start("postgres", &[]);
    let mut redis_server = Server::start("redis", &["--set", "appendonly=yes", "--set", "appendfsync=always"]);
    let database = database_on(&database_server).await;
    let name = "endurance:restarts";
    let (database_url, redis_url) = (database.url().to_owned(), redis_server.url().to_owned());
    let batch = BATCH.to_string();
    let variables = [
        ("DATABASE_URL", database_url.as_str()),
        ("REDIS_URL", &redis_url),
        ("RELAY_REDIS_STREAM", name),
        ("EVENT_OUTBOX_BATCH_SIZE", &batch),
        ("EVENT_CIRCUIT_BREAKER_RECOVERY_TIMEOUT", "100"),
    ];
    let mut running = [(); 3].map(|()| Running::start(relay(&["run"], &variables)));
    let faults = ["postgres", "redis", "postgres"];
    for (fault, time) in faults.into_iter().zip(0..) {
        emit(&database, time * EVENTS, EVENTS).await;
        let mut connection = stream::connect(&redis_url);
        let before = stream::length(&mut connection, name);
        until("it goes on", || stream::length(&mut connection, name) > before + 1000);
        match fault {
            "postgres" => database_server.restart(),
            _ => {
                redis_server.kill();
                redis_server.start_again();
            }
        }
    }
    until_empty(&database).await;
    for one in &mut running {
        assert!(one.is_running());
    }
    for one in running {
        one.signal("TERM");
        one.finish().exited(0);
    }
    assert_settled(&database, 3 * EVENTS).await;
    let entries = stream::entries(&mut stream::connect(&redis_url), name);
    let repeats = assert_complete_and_in_order(&entries, 3 * EVENTS);
    assert!(repeats <= faults.len() * 3 * 3 * BATCH, "{} repeats, at most a batch for each lane and fault", repeats);
}
