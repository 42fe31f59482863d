//! The insert of one event.

use sqlx::postgres::{PgArguments, PgConnection};
use sqlx::query::Query;
use sqlx::{Executor, Postgres};
use uuid::Uuid;

use crate::event::NewEvent;
use crate::outbox::emit::{EmitError, OutboxDatabase};

impl OutboxDatabase for Postgres {
    fn insert(event: NewEvent) -> Query<'static, Self, PgArguments> {
        sqlx::query(
            "insert into event_outbox (event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                                       correlation_id, causation_id, schema_version, priority, available_at, status)
             values ($1, $2, $3, $4, $5, $6::text::jsonb, $7::text::jsonb, $8, $9, $10, $11,
                     pg_catalog.now() + pg_catalog.make_interval(secs => $12), case when $12 > 0 then 'scheduled' else 'pending' end)",
        )
        .bind(event.event_id)
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

/// Emits one event in a transaction of its own. Its statement has no name and travels in that transaction: behind a pooler
/// another client may have used the name, and outside of one its parts may reach different connections.
pub(in crate::outbox) async fn alone(connection: &mut PgConnection, event: NewEvent) -> Result<Uuid, EmitError> {
    event.validate()?;
    let event_id = event.event_id;
    let emitted = async {
        connection.execute("begin").await?;
        Postgres::insert(event).persistent(false).execute(&mut *connection).await?;
        connection.execute("commit").await
    };
    emitted.await.map_err(EmitError::Insert)?;
    Ok(event_id)
}

/// Why the database refused an event for its content, told without that content.
pub(in crate::outbox) fn refusal(error: &sqlx::Error, payload: &str) -> Option<String> {
    let error = error.as_database_error()?;
    match error.code()?.as_ref() {
        // A text that is no value of its type, which can only be the payload. Our parser merely knows where.
        "22P02" => Some(match serde_json::from_str::<serde::de::IgnoredAny>(payload) {
            Err(place) => format!("the payload is not JSON: {place}"),
            Ok(_) => "the payload is not JSON as PostgreSQL takes it".to_owned(),
        }),
        code if code.starts_with("22") => Some(format!("the event cannot be stored: {}", error.message())),
        _ => None,
    }
}
