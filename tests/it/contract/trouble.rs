//! What an event is charged when its content, its destination or the answer is bad.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::{LOG, assert_in_order_per_key};
use crate::harness::{Setup, column, count, emit, eventually, sql};
use crate::scripted::{Act, ScriptedSink};
use crate::stores::Store;

pub(super) async fn a_poison_event_is_dead_lettered_after_its_retries_and_its_key_goes_on<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    for (name, key) in [("poison", "k"), ("k2", "k"), ("k3", "k")] {
        emit(&mut connection, name, key).await;
    }
    let sink = ScriptedSink::new(|event| if event.event_type == "poison" { Act::Refuse } else { Act::Accept });
    let running = Setup::new(&store, vec![("a", sink.clone())]).run();
    eventually("the key went on", async || sink.names() == ["k2", "k3"]).await;
    let tally = running.stop().await;
    assert_eq!((tally.published, tally.dead_lettered, tally.retried), (2, 1, 3));
    assert_eq!(
        column(&mut connection, LOG).await,
        [
            "poison a failed 1",
            "poison a failed 2",
            "poison a failed 3",
            "poison a dead_lettered 4",
            "k2 a published 1",
            "k3 a published 1"
        ]
    );
    let dead = "select concat_ws(' ', event_type, aggregate_id, destination, attempts, error_code, error)
                from event_dead_letter where first_failed_at < failed_at and redriven_at is null";
    assert_eq!(column(&mut connection, dead).await, ["poison k a 4 SCRIPTED Refuse"]);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
}

pub(super) async fn f58_an_outage_costs_time_and_never_attempts<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    for index in 0..20 {
        emit(&mut connection, &format!("e{index}"), &format!("k{}", index % 3)).await;
    }
    let sink = ScriptedSink::new(|_| Act::Unreachable);
    let running = Setup::new(&store, vec![("a", sink.clone())]).run();
    // Five failures open the breaker. The sixth call is the probe.
    eventually("the breaker was open and probed", async || sink.calls() >= 7).await;
    assert_eq!(count(&mut connection, "event_outbox where attempts = 0 and status = 'pending'").await, 20);
    assert_eq!(count(&mut connection, "event_processing_log").await, 0);
    sink.then(|_| Act::Accept);
    eventually("everything arrived", async || sink.accepted().len() == 20).await;
    assert_eq!(running.stop().await.published, 20);
    assert_in_order_per_key(&sink.accepted());
    assert_eq!(count(&mut connection, "event_dead_letter").await, 0);
}

pub(super) async fn a_misconfigured_destination_pauses_at_the_first_failure_and_charges_nobody<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    emit(&mut connection, "e", "k").await;
    let sink = ScriptedSink::new(|_| Act::Misconfigured);
    let mut setup = Setup::new(&store, vec![("a", sink.clone())]);
    setup.policy.breaker.recovery = Duration::from_secs(3600);
    assert!(setup.drain().await.undelivered);
    assert_eq!(sink.calls(), 1);
    assert_eq!(count(&mut connection, "event_outbox where attempts = 0 and status = 'pending'").await, 1);
}

pub(super) async fn an_unknown_outcome_leaves_the_event_pending_and_repeats_it<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    emit(&mut connection, "e1", "k").await;
    emit(&mut connection, "e2", "k").await;
    let once = AtomicUsize::new(0);
    let sink = ScriptedSink::new(move |_| match once.fetch_add(1, Ordering::SeqCst) {
        0 => Act::AcceptThenFail,
        _ => Act::Accept,
    });
    let drained = Setup::new(&store, vec![("a", sink.clone())]).drain().await;
    assert!(!drained.undelivered);
    assert_eq!(sink.names(), ["e1", "e1", "e2"]);
    assert_eq!(column(&mut connection, LOG).await, ["e1 a published 1", "e2 a published 1"]);
}

pub(super) async fn a_clock_that_was_set_back_during_retries_stalls_nobody<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    emit(&mut connection, "poison", "").await;
    let sink = ScriptedSink::new(|event| if event.event_type == "poison" { Act::Refuse } else { Act::Accept });
    let setup = || {
        let mut setup = Setup::new(&store, vec![("a", sink.clone() as std::sync::Arc<_>)]);
        (setup.policy.retry.max_retries, setup.policy.retry.base) = (1, Duration::from_secs(3600));
        setup
    };
    assert_eq!(setup().drain().await.tally.retried, 1);
    let (future, now) = (S::in_ms(3_600_000), S::in_ms(0));
    sql(&mut connection, format!("update event_outbox set first_failed_at = {future}, available_at = {now}")).await;
    emit(&mut connection, "healthy", "").await;
    assert_eq!(setup().drain().await.tally.dead_lettered, 1);
    assert_eq!(sink.names(), ["healthy"]);
    assert_eq!(count(&mut connection, "event_dead_letter where first_failed_at <= failed_at").await, 1);
}
