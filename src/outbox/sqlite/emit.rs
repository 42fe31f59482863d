//! The insert of one event.

use sqlx::Sqlite;
use sqlx::query::Query;
use sqlx::sqlite::SqliteArguments;

use crate::event::NewEvent;
use crate::outbox::emit::OutboxDatabase;

impl OutboxDatabase for Sqlite {
    fn insert(event: NewEvent) -> Query<'static, Self, SqliteArguments> {
        sqlx::query(
            "insert into event_outbox (event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                                       correlation_id, causation_id, schema_version, priority, available_at, status)
             values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, strftime('%Y-%m-%d %H:%M:%f', 'now', ?12 || ' seconds'),
                     case when ?12 > 0 then 'scheduled' else 'pending' end)",
        )
        .bind(event.event_id.to_string())
        .bind(event.event_type)
        .bind(event.source)
        .bind(event.aggregate_type)
        .bind(event.aggregate_id)
        .bind(event.payload)
        .bind(serde_json::to_string(&event.headers).expect("a map of strings is JSON"))
        .bind(event.correlation_id)
        .bind(event.causation_id)
        .bind(event.schema_version)
        .bind(event.priority)
        .bind(event.delay.as_secs_f64())
    }
}

/// Why the database refused an event for its content, told without that content.
pub(in crate::outbox) fn refusal(error: &sqlx::Error, payload: &str) -> Option<String> {
    let message = error.as_database_error()?.message();
    // What SQLite's time functions make of a date that they cannot tell.
    if message == "NOT NULL constraint failed: event_outbox.available_at" {
        return Some("the delay goes beyond the year 9999".to_owned());
    }
    let rule = message.strip_prefix("CHECK constraint failed: ")?;
    Some(match (rule, serde_json::from_str::<serde::de::IgnoredAny>(payload)) {
        ("payload_is_json", Err(place)) => format!("the payload is not JSON: {place}"),
        ("payload_is_json", Ok(_)) => "the payload is not JSON as SQLite takes it".to_owned(),
        (rule, _) => format!("the event cannot be stored: {}", rule.replace('_', " ")),
    })
}
