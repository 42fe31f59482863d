//! What the tests share.

use outbox_relay::event::{Event, RowKey};

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

/// The same with the key `order:<key>`.
pub(crate) fn keyed(id: i64, key: &str) -> Event {
    Event { aggregate_type: Some("order".into()), aggregate_id: Some(key.into()), ..event(id) }
}
