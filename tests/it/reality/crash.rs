//! Relays that end abruptly: killed while a destination hangs, killed after a signal to stop, crashed by an event some time
//! after its publishing began, and killed inside a claim.

use std::net::TcpListener;
use std::time::Duration;

use crate::binary::{Running, relay, until};
use crate::harness::{column, count, emit, eventually, sql};
use crate::servers::redis;
use crate::stores::{Postgres, Sqlite, Store};
use crate::stub::{EventBridgeStub, Reply};
use crate::support::unique;

/// A relay's variables.
type Variables = Vec<(&'static str, String)>;

fn start(command: &str, store: &impl Store, variables: &Variables, more: &[(&str, &str)]) -> Running {
    let mut all = vec![("DATABASE_URL", store.url()), ("RELAY_LOG", "warn")];
    all.extend(variables.iter().map(|(name, value)| (*name, value.as_str())));
    all.extend(more);
    Running::start(relay(&[command], &all))
}

fn eventbridge(stub: &EventBridgeStub) -> Variables {
    vec![
        ("AWS_EVENTBRIDGE_BUS_NAME", "orders".to_owned()),
        ("AWS_ENDPOINT_URL", stub.url().to_owned()),
        ("AWS_REGION", "eu-west-1".to_owned()),
        ("AWS_ACCESS_KEY_ID", "id".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "secret".to_owned()),
    ]
}

/// These events were not charged, blocked or dead-lettered.
async fn assert_undamaged(connection: &mut impl crate::stores::Client, events: i64) {
    assert_eq!(count(connection, "event_dead_letter").await, 0);
    assert_eq!(count(connection, "event_outbox where attempts = 0").await, events);
}

/// There are two events of a key. Relays are killed one after the other while their destination hangs. Then the destination
/// works.
async fn killed_while_a_destination_hangs<S: Store>(hanging: Variables, well: Variables) {
    let store = S::new().await;
    let mut connection = store.connect().await;
    emit(&mut connection, "e1", "k").await;
    emit(&mut connection, "e2", "k").await;
    for round in 0..8 {
        let past_its_first_second = "(select distinct run_id from event_crash_suspect where together < 0) as notes";
        let runs = count(&mut connection, "event_relay_run").await;
        let notes = count(&mut connection, past_its_first_second).await;
        let mut running = start("--once", &store, &hanging, &[]);
        eventually("a call hangs", async || {
            !running.is_running()
                || count(&mut connection, "event_relay_run").await > runs
                    && (round == 0 || count(&mut connection, past_its_first_second).await > notes)
        })
        .await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        if running.is_running() {
            running.signal("KILL");
        }
        running.finish();
        assert_undamaged(&mut connection, 2).await;
    }
    eventually("both arrived", async || {
        start("--once", &store, &well, &[]).finish();
        count(&mut connection, "event_outbox").await == 0
    })
    .await;
    let log =
        "select concat_ws(' ', event_type, status, attempt) from event_processing_log order by processed_at, outbox_id";
    assert_eq!(column(&mut connection, log).await, ["e1 published 1", "e2 published 1"]);
    assert_eq!(count(&mut connection, "event_crash_suspect").await, 0);
}

async fn killed_while_eventbridge_hangs<S: Store>() {
    let (hanging, well) = (EventBridgeStub::start().await, EventBridgeStub::start().await);
    hanging.script(vec![Reply::Slow(Duration::from_secs(3600)); 100]);
    killed_while_a_destination_hangs::<S>(eventbridge(&hanging), eventbridge(&well)).await;
}

async fn killed_while_redis_hangs<S: Store>(mode: &str) {
    // It accepts connections, and never answers.
    let hanging = TcpListener::bind("127.0.0.1:0").unwrap();
    let name = unique("hangs");
    let at = |url: String| {
        vec![
            ("REDIS_URL", url),
            ("RELAY_REDIS_MODE", mode.to_owned()),
            (if mode == "stream" { "RELAY_REDIS_STREAM" } else { "RELAY_REDIS_CHANNEL" }, name.clone()),
        ]
    };
    let url = format!("redis://{}", hanging.local_addr().unwrap());
    killed_while_a_destination_hangs::<S>(at(url), at(redis().url().to_owned())).await;
}

#[tokio::test]
async fn f62_relays_that_are_killed_while_eventbridge_hangs_damage_no_event() {
    killed_while_eventbridge_hangs::<Postgres>().await;
}

#[tokio::test]
async fn f62_relays_that_are_killed_while_eventbridge_hangs_damage_no_event_of_a_sqlite_file() {
    killed_while_eventbridge_hangs::<Sqlite>().await;
}

#[tokio::test]
async fn f62_relays_that_are_killed_while_redis_hangs_damage_no_event() {
    killed_while_redis_hangs::<Postgres>("stream").await;
}

#[tokio::test]
async fn f62_relays_that_are_killed_while_redis_pubsub_hangs_damage_no_event() {
    killed_while_redis_hangs::<Sqlite>("pubsub").await;
}

async fn stopped_and_then_killed<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let stub = EventBridgeStub::start().await;
    stub.script(vec![Reply::Slow(Duration::from_secs(3600)); 6]);
    emit(&mut connection, "e1", "k").await;
    emit(&mut connection, "e2", "k").await;
    for round in 0..6 {
        // A relay has crashed, so this one is careful.
        let another = format!("insert into event_relay_run (run_id, worker) values ('{}', 'x')", uuid::Uuid::new_v4());
        sql(&mut connection, another).await;
        let mut running = start("run", &store, &eventbridge(&stub), &[]);
        until("its call hangs", || stub.requests().len() > round);
        assert!(count(&mut connection, "event_crash_suspect").await > 0);
        running.signal("TERM");
        eventually("its notes are gone", async || {
            count(&mut connection, "event_crash_suspect").await == 0
                && count(&mut connection, "event_relay_run where worker <> 'x'").await == 0
        })
        .await;
        assert!(running.is_running(), "it waits for its answer");
        running.signal("KILL");
        running.finish();
        assert_undamaged(&mut connection, 2).await;
    }
    assert_eq!(count(&mut connection, "event_outbox where status = 'pending' and last_error is null").await, 2);
    start("--once", &store, &eventbridge(&stub), &[]).finish().exited(0);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
}

#[tokio::test]
async fn f62_a_relay_that_is_told_to_stop_and_then_killed_blames_no_event() {
    stopped_and_then_killed::<Postgres>().await;
}

#[tokio::test]
async fn f62_a_relay_that_is_told_to_stop_and_then_killed_blames_no_event_of_a_sqlite_file() {
    stopped_and_then_killed::<Sqlite>().await;
}

/// An event crashes each relay some time after its publishing began. The event waits, and all others are published.
async fn killed_late_by_an_event<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    for index in 0..40 {
        emit(&mut connection, if index == 20 { "poison" } else { "ok" }, &format!("k{}", index % 5)).await;
    }
    let variables = vec![("RELAY_STDOUT", "true".to_owned())];
    let fatal = [("FAILPOINTS", "crash_late_on_event=return(poison)")];
    let lived = (0..12).find(|_| {
        let ended = start("--once", &store, &variables, &fatal).finish();
        ended.code.is_some_and(|_| ended.exited(3).stderr.contains("relay_died"))
    });
    assert!(lived.is_some_and(|crashes| crashes >= 4), "{lived:?}");
    assert_undamaged(&mut connection, 4).await; // with those of its key behind it
    let blocked =
        "select concat_ws(' ', event_type, destination, status) from event_outbox where last_error like 'relay_died:%'";
    assert_eq!(column(&mut connection, blocked).await, ["poison stdout scheduled"]);
    assert_eq!(count(&mut connection, "event_processing_log where status = 'published'").await, 36);
    // The event is not given up however often it crashes a relay, and it is published once it does not.
    sql(
        &mut connection,
        format!("update event_outbox set available_at = {} where event_type = 'poison'", S::in_ms(-1)),
    )
    .await;
    assert_eq!(start("--once", &store, &variables, &fatal).finish().code, None, "it was published more than once more");
    start("--once", &store, &variables, &fatal).finish().exited(3);
    assert_undamaged(&mut connection, 4).await;
    sql(&mut connection, format!("update event_outbox set available_at = {}", S::in_ms(-1))).await;
    eventually("all arrived", async || {
        start("--once", &store, &variables, &[]).finish();
        count(&mut connection, "event_outbox").await == 0
    })
    .await;
}

#[tokio::test]
async fn f62_an_event_that_kills_late_waits_and_is_named_and_the_others_go_on() {
    killed_late_by_an_event::<Postgres>().await;
}

#[tokio::test]
async fn f62_an_event_of_a_sqlite_file_that_kills_late_waits_and_is_named_and_the_others_go_on() {
    killed_late_by_an_event::<Sqlite>().await;
}

async fn dies_inside_its_claims<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    sql(&mut connection, format!("insert into event_outbox (event_type) select 'ok' from {}", S::numbers(400))).await;
    let variables = vec![("RELAY_STDOUT", "true".to_owned())];
    let fatal = [("FAILPOINTS", "crash_on_claim_of_more_than=return(100)")];
    let lived = (0..10).find(|_| start("--once", &store, &variables, &fatal).finish().code == Some(0));
    assert!(lived.is_some_and(|crashes| crashes > 0), "{lived:?}");
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
    assert_eq!(count(&mut connection, "event_dead_letter").await, 0);
}

#[tokio::test]
async fn f62_relays_that_die_inside_a_claim_claim_less_until_they_live() {
    dies_inside_its_claims::<Postgres>().await;
}

#[tokio::test]
async fn f62_relays_that_die_inside_a_claim_of_a_sqlite_file_claim_less_until_they_live() {
    dies_inside_its_claims::<Sqlite>().await;
}
