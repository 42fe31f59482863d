//! Crash windows; and the real program, killed and stopped in the middle of its work.

use std::collections::HashSet;

use crate::binary::{Running, relay, until};
use crate::harness::{Setup, column, count, emit, eventually, sql};
use crate::scripted::{Act, Gate, ScriptedSink};
use crate::servers::{Server, redis};
use crate::stores::Store;
use crate::stream::{self, Entry};
use crate::support::unique;

pub(super) async fn f05_dead_lettering_is_one_transaction_with_the_outbox<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    sql(&mut connection, S::refuse("delete on event_outbox")).await;
    emit(&mut connection, "poison", "k").await;
    let sink = ScriptedSink::new(|_| Act::Refuse);
    let setup = || {
        let mut setup = Setup::new(&store, vec![("a", sink.clone() as std::sync::Arc<_>)]);
        setup.policy.retry.max_retries = 0;
        setup.relay()
    };
    setup().drain(Default::default()).await.unwrap_err();
    let rows = "select concat_ws(' ', (select count(*) from event_outbox), (select count(*) from event_dead_letter),
                                 (select count(*) from event_processing_log))";
    assert_eq!(column(&mut connection, rows).await, ["1 0 0"]);
    sql(&mut connection, S::allow("event_outbox")).await;
    setup().drain(Default::default()).await.unwrap();
    assert_eq!(column(&mut connection, rows).await, ["0 1 1"]);
}

pub(super) async fn f61_rows_deleted_by_an_operator_during_a_publish_are_no_trouble<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    for index in 0..5 {
        emit(&mut connection, &format!("e{index}"), "k").await;
    }
    let (sink, gate) = (ScriptedSink::accepting(), Gate::new());
    sink.hold_at(&gate);
    let running = Setup::new(&store, vec![("a", sink.clone())]).run();
    gate.entered().await;
    sql(&mut connection, "delete from event_outbox where event_type in ('e1', 'e3')").await;
    gate.open(1000);
    eventually("everything is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    emit(&mut connection, "next", "k").await;
    eventually("the next event arrived", async || sink.names().last().is_some_and(|name| name == "next")).await;
    running.stop().await;
    assert_eq!(sink.names().len(), 6);
}

/// Inserts events of 100 keys in turn. The payload is the key.
fn insert<S: Store>(events: i64) -> String {
    format!(
        "insert into event_outbox (event_type, aggregate_id, payload)
         select 'a', cast(i % 100 as text), {} from {}",
        S::json("cast(i % 100 as text)"),
        S::numbers(events)
    )
}

/// The sequences of the first copies, in order of arrival.
fn firsts(entries: &[Entry]) -> Vec<i64> {
    let mut seen = HashSet::new();
    entries.iter().map(Entry::sequence).filter(|sequence| seen.insert(*sequence)).collect()
}

/// Every event from 1 to `events` arrived, each key's in order.
#[track_caller]
fn assert_complete_and_in_order(mut sequences: Vec<i64>, events: i64) {
    for key in 0..100 {
        let of_key: Vec<i64> = sequences.iter().copied().filter(|sequence| sequence % 100 == key).collect();
        assert!(of_key.is_sorted(), "key {key} is out of order: {of_key:?}");
    }
    sequences.sort_unstable();
    assert_eq!(sequences, (1..=events).collect::<Vec<_>>());
}

pub(super) async fn f02_a_relay_killed_in_the_middle_of_a_batch_repeats_that_batch_at_most_and_another_goes_on<
    S: Store,
>() {
    const EVENTS: i64 = 5000;
    const BATCH: usize = 50;
    let store = S::new().await;
    let mut connection = store.connect().await;
    let mut redis = Server::start("redis", &[]);
    let (name, url, batch) = ("crash:killed", redis.url().to_owned(), BATCH.to_string());
    let variables = [
        ("DATABASE_URL", store.url()),
        ("REDIS_URL", &url),
        ("RELAY_REDIS_STREAM", name),
        ("RELAY_LANES", "1"),
        ("EVENT_OUTBOX_BATCH_SIZE", &batch),
        ("EVENT_DEFAULT_TIMEOUT", "600000"),
    ];
    let killed = Running::start(relay(&["run"], &variables));
    sql(&mut connection, insert::<S>(100)).await;
    eventually("it works", async || count(&mut connection, "event_outbox").await == 0).await;
    let mut heir = Running::start(relay(&["run"], &variables));
    heir.until_log("\"message\":\"ready\"");
    sql(&mut connection, insert::<S>(EVENTS - 100)).await;
    let mut stream = stream::connect(&url);
    until("a part has arrived", || stream::length(&mut stream, name) > 5 * BATCH);
    // A relay that waits for an answer is in the middle of a batch.
    redis.pause();
    killed.signal("KILL");
    assert_eq!(killed.finish().code, None, "it exited before it was killed");
    redis.resume();
    assert!(
        count(&mut connection, "event_outbox").await > 0,
        "everything was published before, so this test proves nothing"
    );
    eventually("everything is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    heir.signal("TERM");
    heir.finish().exited(0);

    let entries = stream::entries(&mut stream, name);
    let firsts = firsts(&entries);
    let repeats = entries.len() - firsts.len();
    assert!(repeats <= BATCH, "{repeats} repeats");
    assert_complete_and_in_order(firsts, EVENTS);
    for entry in &entries {
        assert_eq!(entry.fields["data"], (entry.sequence() % 100).to_string());
    }
    let log = "select concat_ws(' ', count(*), count(distinct event_id), count(distinct worker), status)
               from event_processing_log group by status";
    assert_eq!(column(&mut connection, log).await, [format!("{EVENTS} {EVENTS} 2 published")]);
}

pub(super) async fn f06_twenty_restarts_under_load_repeat_nothing<S: Store>() {
    const RESTARTS: i64 = 20;
    const EVENTS: i64 = 3000; // for each
    let store = S::new().await;
    let mut connection = store.connect().await;
    let mut redis_connection = stream::connect(redis().url());
    let name = unique("crash:restarts");
    let variables = [
        ("DATABASE_URL", store.url()),
        ("REDIS_URL", redis().url()),
        ("RELAY_REDIS_STREAM", &name),
        ("EVENT_OUTBOX_BATCH_SIZE", "50"),
    ];
    let mut interrupted = 0;
    for _ in 0..RESTARTS {
        sql(&mut connection, insert::<S>(EVENTS)).await;
        let before = stream::length(&mut redis_connection, &name);
        let running = Running::start(relay(&["run"], &variables));
        until("it publishes", || stream::length(&mut redis_connection, &name) > before);
        running.signal("TERM");
        running.finish().exited(0);
        let logged = usize::try_from(count(&mut connection, "event_processing_log").await).unwrap();
        assert_eq!(stream::length(&mut redis_connection, &name), logged, "what was published is settled");
        interrupted += usize::from(count(&mut connection, "event_outbox").await > 0);
    }
    assert!(interrupted > 0, "every relay was done before it was stopped, so this test proves nothing");
    Running::start(relay(&["--once"], &variables)).finish().exited(0);
    let sequences = stream::entries(&mut redis_connection, &name).iter().map(Entry::sequence).collect();
    assert_complete_and_in_order(sequences, RESTARTS * EVENTS);
    assert_eq!(column(&mut connection, "select distinct status from event_processing_log").await, ["published"]);
}
