//! Which events are charged when a destination accepts some events and fails others.

use std::sync::Arc;
use std::time::Duration;

use crate::contract::assert_in_order_per_key;
use crate::harness::{Setup, column, count, emit, eventually, sql};
use crate::scripted::{Act, Gate, ScriptedSink};
use crate::stores::Store;

/// A relay whose destination stays paused longer than any test lasts, once it is paused.
fn setup<S: Store>(store: &S, sink: &Arc<ScriptedSink>) -> Setup<S> {
    let mut setup = Setup::new(store, vec![("a", sink.clone() as Arc<_>)]);
    setup.policy.breaker.recovery = Duration::from_secs(3600);
    setup
}

/// Fails events named `bad` in this way, and accepts the others.
fn failing(act: Act) -> Arc<ScriptedSink> {
    ScriptedSink::new(move |event| if event.event_type == "bad" { act } else { Act::Accept })
}

/// Selects what the outbox shows of events that wait.
const WAITING: &str = "select concat_ws(' ', event_type, status, destination, attempts, last_error) from event_outbox
                       order by id, destination";

const BLOCKED: &str = "event_outbox where status = 'scheduled' and last_error is not null";

async fn fails_one_key<S: Store>(act: Act) {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let sink = failing(act);
    for index in 0..20 {
        emit(&mut connection, "ok", &format!("k{}", index % 5)).await;
    }
    emit(&mut connection, "bad", "blocked").await;
    emit(&mut connection, "behind", "blocked").await;
    emit(&mut connection, "bad", "").await;
    let running = setup(&store, &sink).run();
    eventually("both are blocked", async || {
        // A temporary error counts against an event only if other events succeed between its failures.
        emit(&mut connection, "ok", "").await;
        count(&mut connection, BLOCKED).await == 2
    })
    .await;
    // While they are blocked, other events are published: in the same batches, later, and between the retries.
    for index in 0..100 {
        emit(&mut connection, "ok", &format!("k{}", index % 5)).await;
        emit(&mut connection, "ok", "").await;
        let rest = "event_outbox where event_type = 'ok'";
        eventually("others arrive", async || count(&mut connection, rest).await == 0).await;
        if index >= 20 && sink.calls() > 150 {
            break;
        }
    }
    let error = format!("SCRIPTED: {act:?}");
    let waiting = column(&mut connection, WAITING).await;
    assert!(waiting.len() == 3 && waiting[1].starts_with("behind"), "{waiting:?}");
    for blocked in [&waiting[0], &waiting[2]] {
        // It may be claimed just now.
        let shown = ["scheduled", "pending"].map(|status| format!("bad {status} a 0 {error}"));
        assert!(shown.contains(blocked), "{waiting:?}");
    }
    assert_eq!(count(&mut connection, "event_dead_letter").await, 0);
    sink.then(|_| Act::Accept);
    eventually("all arrived", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
    let mut accepted = sink.accepted();
    if act == Act::AcceptThenFail {
        let mut seen = std::collections::HashSet::new();
        accepted.retain(|event| seen.insert(event.event_id));
    }
    assert_in_order_per_key(&accepted);
    let attempts = "select distinct concat_ws(' ', status, attempt) from event_processing_log";
    assert_eq!(column(&mut connection, attempts).await, ["published 1"]);
}

pub(super) async fn f64_a_key_that_a_destination_refuses_waits_uncharged_and_the_destination_is_not_paused<S: Store>() {
    fails_one_key::<S>(Act::Misconfigured).await;
}

pub(super) async fn f64_a_key_with_an_error_that_nobody_knows_waits_uncharged_and_the_destination_is_not_paused<
    S: Store,
>() {
    fails_one_key::<S>(Act::Unreachable).await;
}

pub(super) async fn f64_a_key_whose_answers_are_lost_waits_uncharged_and_the_destination_is_not_paused<S: Store>() {
    fails_one_key::<S>(Act::AcceptThenFail).await;
}

pub(super) async fn f64_an_event_that_is_refused_alone_shortly_after_others_were_taken_pauses_nobody<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let sink = failing(Act::Misconfigured);
    let mut setup = setup(&store, &sink);
    setup.relay.lanes = 1;
    let running = setup.run();
    for _ in 0..5 {
        emit(&mut connection, "ok", "").await;
        eventually("it arrived", async || {
            count(&mut connection, "event_outbox").await == count(&mut connection, BLOCKED).await
        })
        .await;
        let blocked = count(&mut connection, BLOCKED).await;
        emit(&mut connection, "bad", "").await;
        eventually("it is blocked", async || count(&mut connection, BLOCKED).await == blocked + 1).await;
    }
    running.stop().await;
    assert_eq!(sink.names().iter().filter(|name| *name == "ok").count(), 5);
}

pub(super) async fn f64_a_blocked_event_waits_longer_each_time_and_a_restart_does_not_begin_anew<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let sink = failing(Act::Misconfigured);
    emit(&mut connection, "ok", "").await;
    emit(&mut connection, "bad", "k").await;
    setup(&store, &sink).drain().await;
    assert_eq!(count(&mut connection, BLOCKED).await, 1);
    // Its first failure was a while ago, and it is due now.
    let ago = S::in_ms(-100_000);
    sql(&mut connection, format!("update event_outbox set first_failed_at = {ago}, available_at = {ago}")).await;
    let sooner = |ms| format!("{BLOCKED} and available_at < {}", S::in_ms(ms));
    // No call of this run delivers anything. The destination is nevertheless not at fault, because the event failed before.
    let mut again = setup(&store, &sink);
    again.relay.lanes = 1;
    let drained = again.drain().await;
    assert!(drained.undelivered);
    assert_eq!(
        count(&mut connection, &sooner(45_000)).await,
        0,
        "it waits at least half of the time since the first failure"
    );
    assert_eq!(
        count(&mut connection, &sooner(160_000)).await,
        1,
        "it waits at most one and a half times the time since the first failure"
    );
    let longest = S::in_ms(-100_000_000);
    sql(&mut connection, format!("update event_outbox set first_failed_at = {longest}, available_at = {ago}")).await;
    setup(&store, &sink).drain().await;
    assert_eq!(count(&mut connection, &sooner(140_000)).await, 0);
    assert_eq!(count(&mut connection, &sooner(460_000)).await, 1, "it waits at most one and a half times five minutes");
}

pub(super) async fn f64_a_destination_that_refuses_everything_is_paused_although_a_key_was_blocked_before<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let sink = failing(Act::Misconfigured);
    emit(&mut connection, "ok", "").await;
    emit(&mut connection, "bad", "k").await;
    let running = setup(&store, &sink).run();
    eventually("it is blocked", async || count(&mut connection, BLOCKED).await == 1).await;
    sink.then(|_| Act::Misconfigured);
    for _ in 0..10 {
        emit(&mut connection, "late", "").await;
    }
    // One refused call may count against its events, but not a second one.
    eventually("it is paused", async || {
        let calls = sink.calls();
        tokio::time::sleep(Duration::from_secs(2)).await;
        sink.calls() == calls
    })
    .await;
    running.stop().await;
    assert_eq!(count(&mut connection, "event_outbox where attempts = 0").await, 11);
}

pub(super) async fn f65_a_call_from_before_a_pause_does_not_end_it<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let sink = failing(Act::Misconfigured);
    let gate = Gate::new();
    sink.hold_at(&gate);
    let running = setup(&store, &sink).run();
    emit(&mut connection, "bad", "a").await;
    gate.entered().await;
    // A store that can have two batches in flight lets the relay make both calls at once; else the second follows the first.
    emit(&mut connection, "ok", "b").await;
    let both = tokio::time::timeout(Duration::from_secs(1), gate.entered()).await.is_ok();
    gate.open(1); // the first call is refused
    if both {
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    gate.open(1000);
    if both {
        eventually("the other is settled", async || {
            count(&mut connection, "event_outbox where event_type = 'ok'").await == 0
        })
        .await;
    }
    let calls = sink.calls();
    emit(&mut connection, "late", "c").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(sink.calls(), calls, "the pause continues");
    running.stop().await;
}
