//! The insert for applications that use sqlx.

use sqlx::PgExecutor;
use uuid::Uuid;

use crate::event::{NewEvent, NewEventError};

/// Why an event was not emitted.
#[derive(Debug, thiserror::Error)]
pub enum EmitError {
    /// The event is not one the schema takes. Nothing was sent; the transaction goes on.
    #[error("the event cannot be emitted")]
    Event(#[from] NewEventError),
    /// The insert failed; the transaction can only be rolled back.
    #[error("the event could not be inserted into event_outbox")]
    Insert(#[source] sqlx::Error),
}

/// Emits `event` as part of the caller's transaction and returns the identity consumers will see.
///
/// It is published once that transaction has committed, and never if it rolls back.
///
/// ```no_run
/// # async fn create_order(database: &sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
/// use outbox_relay::{NewEvent, emit};
///
/// let mut tx = database.begin().await?;
/// sqlx::query("insert into orders (id, total) values (42, 12.50)").execute(&mut *tx).await?;
/// emit(&mut *tx, NewEvent::new("order.created", &serde_json::json!({ "total": "12.50" }))?.key("order", "42")).await?;
/// tx.commit().await?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// See [`EmitError`].
pub async fn emit<'c>(executor: impl PgExecutor<'c>, event: NewEvent) -> Result<Uuid, EmitError> {
    event.validate()?;
    sqlx::query(
        "insert into event_outbox (event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                                   correlation_id, causation_id, schema_version, priority, available_at, status)
         values ($1, $2, $3, $4, $5, $6::text::jsonb, $7::text::jsonb, $8, $9, $10, $11,
                 now() + make_interval(secs => $12), case when $12 > 0 then 'scheduled' else 'pending' end)",
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
    .execute(executor)
    .await
    .map_err(EmitError::Insert)?;
    Ok(event.event_id)
}
