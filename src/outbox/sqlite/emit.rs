//! `relay emit` into a SQLite file.

use sqlx::Connection;
use uuid::Uuid;

use crate::emit::NewEvent;
use crate::outbox::operate::Unemitted;
use crate::outbox::sqlite::connection::open;
use crate::secret::Secret;

/// Inserts one event into the file at `url`, in a transaction of its own.
pub(super) async fn emit(url: &Secret, event: NewEvent) -> Result<Uuid, Unemitted> {
    let payload = event.payload.clone();
    let mut connection = open(url).await.map_err(Unemitted::Outbox)?;
    let emitted = crate::emit(&mut connection, event).await;
    drop(connection.close().await);
    emitted.map_err(|error| Unemitted::new(error, |source| refusal(source, &payload)))
}

/// Returns why the database refused an event for its content, without quoting that content.
fn refusal(error: &sqlx::Error, payload: &str) -> Option<String> {
    let message = error.as_database_error()?.message();
    // SQLite's time functions return NULL for a date outside their range.
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
