//! Helpers that tests of several modules use.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_eventbridge::config::{Credentials, SharedCredentialsProvider};
use outbox_relay::event::{Event, Fault, Outcome, PublishError, RowKey};
use outbox_relay::outbox::postgres::PgOutbox;
use outbox_relay::relay::{Relay, RelayConfig};
use outbox_relay::route::Router;
use outbox_relay::sink::eventbridge::{DEFAULT_MAX_ENTRY_BYTES, EventBridgeConfig};
use outbox_relay::sink::{Batch, Format, Sink};

use crate::harness::Setup;
pub(crate) use crate::harness::relay_config;
use crate::servers::Database;

/// A small event without a key.
pub(crate) fn event(id: i64) -> Event {
    Event {
        row: RowKey { locator: 0, partition: 576, id, destination: String::new() },
        event_id: uuid::Uuid::from_u128(id.unsigned_abs().into()),
        event_type: "order.created".into(),
        source: "shop".into(),
        aggregate_type: None,
        aggregate_id: None,
        payload: format!(r#"{{"n": {id}}}"#).into_bytes(),
        headers: vec![],
        correlation_id: None,
        causation_id: None,
        schema_version: 1,
        created_at: time::OffsetDateTime::from_unix_timestamp(1_767_225_600).expect("2026-01-01"),
        attempts: 0,
    }
}

/// A small event with the key `order:<key>`.
pub(crate) fn keyed(id: i64, key: &str) -> Event {
    Event { aggregate_type: Some("order".into()), aggregate_id: Some(key.into()), ..event(id) }
}

/// A name that no other test of this process uses, for a stream, a channel or a bus.
pub(crate) fn unique(name: &str) -> String {
    static LAST: AtomicU64 = AtomicU64::new(0);
    format!("{name}-{}", LAST.fetch_add(1, Ordering::Relaxed) + 1)
}

/// Credentials and a region, which every AWS client needs.
pub(crate) fn sdk() -> SdkConfig {
    SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("eu-west-1"))
        .credentials_provider(SharedCredentialsProvider::new(Credentials::new("id", "secret", None, None, "test")))
        .build()
}

/// The bus `orders` at the address of a stub or of moto.
pub(crate) fn eventbridge_config(url: &str) -> EventBridgeConfig {
    EventBridgeConfig {
        bus: "orders".into(),
        source: "outbox".into(),
        format: Format::CloudEvents,
        region: None,
        endpoint_url: Some(url.into()),
        max_entry_bytes: DEFAULT_MAX_ENTRY_BYTES,
        requests_in_flight: 16,
        timeout: Duration::from_secs(30),
    }
}

/// Publishes with a deadline that is never reached.
pub(crate) async fn publish(sink: &dyn Sink, events: &[Event]) -> Vec<Outcome> {
    publish_until(sink, events, Instant::now() + Duration::from_secs(60)).await
}

pub(crate) async fn publish_until(sink: &dyn Sink, events: &[Event], deadline: Instant) -> Vec<Outcome> {
    let refs: Vec<&Event> = events.iter().collect();
    let outcomes = sink.publish(&Batch::new(&refs, deadline)).await.outcomes;
    assert_eq!(outcomes.len(), events.len());
    outcomes
}

/// Publishes again what was not delivered, until everything is delivered or a minute has passed.
pub(crate) async fn publish_until_delivered(sink: &dyn Sink, events: &[Event]) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut left = events.to_vec();
    loop {
        let outcomes = publish(sink, &left).await;
        let last = outcomes.iter().find(|outcome| !is_delivered(outcome)).cloned();
        let mut outcomes = outcomes.into_iter();
        left.retain(|_| outcomes.next().is_none_or(|outcome| !is_delivered(&outcome)));
        let Some(last) = last else { return };
        assert!(Instant::now() < deadline, "{} events left, the first with {last:?}", left.len());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn is_delivered(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Delivered { .. })
}

/// No event is charged an attempt: the destination failed, or the event was not sent.
pub(crate) fn is_uncharged(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Delivered { .. } => false,
        Outcome::Failed(error) => !error.fault.charges_event(),
        Outcome::Held => true,
    }
}

#[track_caller]
pub(crate) fn assert_all_delivered(outcomes: &[Outcome]) {
    if let Some(at) = outcomes.iter().position(|outcome| !is_delivered(outcome)) {
        panic!("event {at} of {} was not delivered: {:?}", outcomes.len(), outcomes[at]);
    }
}

#[track_caller]
pub(crate) fn error(outcome: &Outcome) -> &PublishError {
    match outcome {
        Outcome::Failed(error) => error,
        other => panic!("not a failure: {other:?}"),
    }
}

#[track_caller]
pub(crate) fn assert_all_failed(outcomes: &[Outcome], fault: Fault, code: &str) {
    for outcome in outcomes {
        let error = error(outcome);
        assert_eq!((error.fault, error.code.as_str()), (fault, code), "{error}");
    }
}

/// A relay from `database` to all of `destinations`; each destination gets every event.
pub(crate) fn relay_to(database: &Database, destinations: &[(&str, Arc<dyn Sink>)]) -> Arc<Relay<PgOutbox>> {
    relay_with(database, destinations, Router::new(vec![], destinations.len()), relay_config())
}

pub(crate) fn relay_with(
    database: &Database,
    destinations: &[(&str, Arc<dyn Sink>)],
    router: Router,
    config: RelayConfig,
) -> Arc<Relay<PgOutbox>> {
    let destinations = destinations.iter().map(|(name, sink)| (*name, Arc::clone(sink))).collect();
    let mut setup = Setup::new(database, destinations);
    (setup.router, setup.relay) = (router, config);
    setup.relay()
}
