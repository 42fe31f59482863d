//! A relay's metrics and its health.

use std::time::SystemTime;

use outbox_relay::relay::health::State;
use tokio_util::sync::CancellationToken;

use crate::harness::{Setup, emit, eventually};
use crate::scripted::{Act, ScriptedSink};
use crate::stores::Store;

/// The value of one series of the metrics.
fn figure(text: &str, series: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.and_then(|figure| figure.parse().ok()).unwrap_or_else(|| panic!("{series} is missing in\n{text}"))
}

pub(super) async fn metrics_count_events_by_destination_verdict_and_code<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    for (name, key) in [("poison", "a"), ("good", "b"), ("good", "c")] {
        emit(&mut connection, name, key).await;
    }
    let sink = ScriptedSink::new(|event| if event.event_type == "poison" { Act::Refuse } else { Act::Accept });
    let relay = Setup::new(&store, vec![("a", sink.clone())]).relay();
    let idle = relay.metrics().encode();
    assert!(figure(&idle, r#"outbox_relay_events_total{destination="a",verdict="published",code=""}"#) < 0.5);
    let stop = CancellationToken::new();
    let task = tokio::spawn({
        let (relay, stop) = (relay.clone(), stop.clone());
        async move { relay.run(stop).await }
    });
    let events = |verdict: &str, code: &str| {
        let series = format!(r#"outbox_relay_events_total{{destination="a",verdict="{verdict}",code="{code}"}}"#);
        figure(&relay.metrics().encode(), &series) as u64
    };
    eventually("the poison event was given up", async || {
        relay.metrics().encode().contains(r#"verdict="dead_lettered",code="SCRIPTED"} 1"#)
    })
    .await;
    stop.cancel();
    task.await.unwrap().unwrap();
    assert_eq!(
        (events("published", ""), events("retried", "SCRIPTED"), events("dead_lettered", "SCRIPTED")),
        (2, 3, 1)
    );
    let text = relay.metrics().encode();
    let settles = figure(&text, "outbox_relay_settle_duration_seconds_count");
    assert!(settles >= 4.0, "fewer settles than attempts: {settles}");
    assert!(figure(&text, "outbox_relay_claim_duration_seconds_count") >= settles);
    assert!(figure(&text, "outbox_relay_batch_events_sum") >= 6.0);
    assert!(figure(&text, "outbox_relay_polls_total") >= settles);
    assert!(figure(&text, r#"outbox_relay_publish_duration_seconds_count{destination="a"}"#) >= 4.0);
    assert!(figure(&text, r#"outbox_relay_last_success_timestamp_seconds{destination="a"}"#) > 1e9);
    assert!(figure(&text, "outbox_relay_ready") > 0.5);
    assert!(text.ends_with("# EOF\n"));
}

pub(super) async fn health_and_metrics_tell_of_a_destination_that_goes_down_and_comes_back<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let begun = SystemTime::now();
    emit(&mut connection, "e", "k").await;
    let sink = ScriptedSink::new(|_| Act::Unreachable);
    let relay = Setup::new(&store, vec![("a", sink.clone())]).relay();
    let mut health = relay.health();
    assert_eq!(health.borrow_and_update().destinations[0].status.state, State::Unknown);
    let stop = CancellationToken::new();
    let task = tokio::spawn({
        let (relay, stop) = (relay.clone(), stop.clone());
        async move { relay.run(stop).await }
    });
    let down = health.wait_for(|now| now.destinations[0].status.state == State::Down).await.unwrap().clone();
    assert_eq!((down.store.state, down.destinations[0].name.as_str()), (State::Up, "a"));
    assert!(down.destinations[0].status.since >= begun);
    assert!(down.destinations[0].status.reason.as_ref().is_some_and(|reason| reason.starts_with("SCRIPTED: ")));
    let state = r#"outbox_relay_breaker_state{destination="a"}"#;
    assert!(figure(&relay.metrics().encode(), state) > 0.5, "the breaker is probing or open");
    sink.then(|_| Act::Accept);
    let up = health.wait_for(|now| now.destinations[0].status.state == State::Up).await.unwrap().clone();
    assert_eq!(up.destinations[0].status.reason, None);
    stop.cancel();
    task.await.unwrap().unwrap();
    let text = relay.metrics().encode();
    assert!(figure(&text, state) < 0.5);
    assert!(figure(&text, r#"outbox_relay_breaker_opened_total{destination="a"}"#) >= 1.0);
    assert!((figure(&text, r#"outbox_relay_breaker_closed_total{destination="a"}"#) - 1.0).abs() < 0.1);
    assert!(figure(&text, r#"outbox_relay_destination_failures_total{destination="a",code="SCRIPTED"}"#) >= 5.0);
}
