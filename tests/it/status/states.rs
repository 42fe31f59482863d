//! The state of each destination, key and relay is visible within 10 s.

use std::time::Duration;

use super::{counted, of, on_each_store, until_status};
use crate::harness::{Setup, count, emit, eventually, sql};
use crate::scripted::{Act, Gate, ScriptedSink};
use crate::stores::{Postgres, Sqlite, Store};

async fn outage<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let (a, b) = (ScriptedSink::new(|_| Act::Unreachable), ScriptedSink::accepting());
    let mut setup = Setup::new(&store, vec![("a", a.clone()), ("b", b.clone())]);
    setup.policy.breaker.threshold = 1;
    let running = setup.run();
    for index in 0..5 {
        emit(&mut connection, "e", &index.to_string()).await;
    }
    let status = until_status(store.url(), "a is down, and b took all", |status| {
        of(status, "a")["state"] == "down"
            && of(status, "a")["pending"]["count"] == 5
            && of(status, "b")["published_by_minute"]
                .as_array()
                .is_some_and(|minutes| minutes.iter().filter_map(serde_json::Value::as_u64).sum::<u64>() == 5)
    })
    .await;
    let down = of(&status, "a");
    assert!(down["reason"].as_str().unwrap().contains("SCRIPTED"), "{down}");
    assert!(down["state_seconds"].as_f64().unwrap() < 15.0 && down["oldest_due_seconds"].is_f64(), "{down}");
    let up = of(&status, "b");
    assert!(up["state"] == "up" && up["published_per_second"].as_f64().unwrap() > 0.0, "{up}");
    assert_eq!(counted(&up["pending"]), 0);

    a.then(|_| Act::Misconfigured);
    until_status(store.url(), "a is misconfigured", |status| of(status, "a")["state"] == "misconfigured").await;
    a.then(|_| Act::Accept);
    until_status(store.url(), "a is back", |status| {
        of(status, "a")["state"] == "up" && of(status, "a")["pending"]["count"] == 0
    })
    .await;
    assert_eq!(count(&mut connection, "event_relay").await, 1);
    running.stop().await;
    until_status(store.url(), "no relay is left", |status| {
        of(status, "a")["state"] == "no_relay" && status["relays"].as_array().unwrap().is_empty()
    })
    .await;
}

async fn blocked_key<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let sink = ScriptedSink::new(|event| if event.event_type == "poison" { Act::Refuse } else { Act::Accept });
    let mut setup = Setup::new(&store, vec![("a", sink)]);
    setup.policy.retry.base = Duration::from_secs(3600);
    let running = setup.run();
    for name in ["poison", "behind", "behind"] {
        emit(&mut connection, name, "k").await;
    }
    let status = until_status(store.url(), "the key is blocked", |status| {
        status["blocked_keys"][0]["behind"]["count"] == 2 && of(status, "a")["retrying"]["count"] == 1
    })
    .await;
    let key = &status["blocked_keys"][0];
    assert_eq!(status["blocked_keys"].as_array().unwrap().len(), 1);
    assert_eq!((&key["aggregate_type"], &key["aggregate_id"]), (&"test".into(), &"k".into()));
    assert_eq!((&key["event_type"], &key["attempts"]), (&"poison".into(), &1.into()));
    assert!(key["error"].as_str().unwrap().contains("SCRIPTED"), "{key}");
    assert!(key["blocked_seconds"].as_f64().unwrap() < 15.0 && key["next_attempt_seconds"].as_f64().unwrap() > 1000.0);
    assert_eq!(counted(&of(&status, "a")["waiting_behind"]), 2);
    running.stop().await;
}

async fn what_waits<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let sink = ScriptedSink::new(|_| Act::Unreachable);
    let mut setup = Setup::new(&store, vec![("old", sink)]);
    setup.policy.breaker.threshold = 1;
    setup.outbox.usage.several_destinations = true;
    let running = setup.run();
    emit(&mut connection, "owed", "").await;
    until_status(store.url(), "it is down", |status| of(status, "old")["state"] == "down").await;
    running.stop().await;
    sql(&mut connection, "update event_outbox set status = 'scheduled', destination = 'old'").await;
    let refusing = ScriptedSink::new(|_| Act::Refuse);
    let mut setup = Setup::new(&store, vec![("new", refusing)]);
    setup.policy.retry.max_retries = 0;
    let running = setup.run();
    emit(&mut connection, "refused", "").await;
    let later = S::in_ms(3_600_000);
    let delayed = "insert into event_outbox (event_type, status, available_at) values ('delayed', 'scheduled',";
    sql(&mut connection, format!("{delayed} {later})")).await;
    let status = until_status(store.url(), "a dead letter, and one that nobody takes", |status| {
        of(status, "new")["dead_letters"]["count"] == 1 && of(status, "old")["state"] == "not_configured"
    })
    .await;
    assert_eq!(counted(&of(&status, "old")["pending"]), 1);
    assert_eq!(counted(&status["unrouted"]["delayed"]), 1);
    running.stop().await;
    emit(&mut connection, "pending", "").await;
    let status =
        until_status(store.url(), "one is pending", |status| status["unrouted"]["pending"]["count"] == 1).await;
    assert!(status["unrouted"]["oldest_due_seconds"].is_f64(), "{status}");
}

/// A relay that has nothing to do writes nothing for the status.
async fn idle<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let mut running = Setup::new(&store, vec![("a", ScriptedSink::accepting())]).run();
    running.until_ready().await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(count(&mut connection, "event_tally").await, 0);
    let old = "insert into event_tally values ('2020-01-01 00:00:00', 'a', 1, 0, 0)";
    sql(&mut connection, old).await;
    emit(&mut connection, "e", "").await;
    let old = "event_tally where minute < '2021-01-01 00:00:00'";
    eventually("the old minute is deleted", async || {
        count(&mut connection, "event_tally where published = 1").await == 1 && count(&mut connection, old).await == 0
    })
    .await;
    running.stop().await;
}

on_each_store! {
    a_destination_is_up_or_down_or_misconfigured_and_back: outage
    a_blocked_key_is_shown_with_what_waits_behind_it: blocked_key
    what_nobody_takes_what_is_delayed_and_dead_letters_are_counted: what_waits
    an_idle_relay_writes_no_tally_and_old_minutes_are_deleted: idle
}

#[tokio::test(flavor = "multi_thread")]
async fn each_relay_is_shown_with_what_it_holds_and_one_that_was_killed_is_gone() {
    let store = Postgres::new().await;
    let mut connection = store.connect().await;
    let (one, gate) = (ScriptedSink::accepting(), Gate::new());
    one.hold_at(&gate);
    let mut setup = Setup::new(&store, vec![("a", one)]);
    setup.outbox.worker = "one:1".to_owned();
    let one = setup.run();
    emit(&mut connection, "held", "").await;
    gate.entered().await;
    let mut setup = Setup::new(&store, vec![("a", ScriptedSink::accepting())]);
    setup.outbox.worker = "two:2".to_owned();
    let mut two = setup.run();
    two.until_ready().await;
    let status = until_status(store.url(), "one holds a batch", |status| {
        status["relays"][0]["batches"] == 1 && status["relays"][1]["batches"] == 0
    })
    .await;
    let relays = &status["relays"];
    assert_eq!((&relays[0]["worker"], &relays[0]["alive"]), (&"one:1".into(), &true.into()));
    assert!(relays[0]["partitions_held"].as_u64() >= Some(1), "{relays}");
    assert_eq!((&relays[1]["worker"], &relays[1]["batches"]), (&"two:2".into(), &0.into()));
    assert_eq!(relays[1]["destinations"][0], "a");
    // The row of a relay that was killed.
    sql(
        &mut connection,
        "insert into event_relay (id, worker, version, schema_version, once, fingerprint, destinations, routes, pid, trouble)
         select nextval('event_relay_changes'), 'dead:3', version, schema_version, once, fingerprint, destinations, routes, 0,
                '{\"a\": {\"state\": \"down\", \"since\": 1, \"reason\": \"long ago\"}}'
         from event_relay where worker = 'two:2'",
    )
    .await;
    let status = until_status(store.url(), "the third is gone", |status| status["relays"][2]["alive"] == false).await;
    assert_eq!(of(&status, "a")["state"], "up", "its report no longer counts");
    gate.open(1);
    one.stop().await;
    two.stop().await;
}
