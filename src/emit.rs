//! The part of this library that applications need: an event, and its insert by sqlx.

mod new_event;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "sqlite")]
mod sqlite;

use sqlx::query::Query;
use sqlx::{Database, Executor, IntoArguments};
use uuid::Uuid;

#[cfg(feature = "relay")]
pub(crate) use new_event::HeaderName;
pub use new_event::{
    MAX_EVENT_TYPE_CHARS, MAX_HEADERS_BYTES, MAX_TEXT_BYTES, NewEvent, NewEventError, RESERVED_HEADERS,
};

/// Why an event was not emitted.
#[derive(Debug, thiserror::Error)]
pub enum EmitError {
    /// The schema does not allow the event. Nothing was sent, and the transaction can go on.
    #[error("the event cannot be emitted")]
    Event(#[from] NewEventError),
    /// The insert failed, and the transaction can only be rolled back.
    #[error("the event could not be inserted into event_outbox")]
    Insert(#[source] sqlx::Error),
}

/// A database with an outbox: `sqlx::Postgres` with the feature `postgres`, `sqlx::Sqlite` with the feature `sqlite`.
pub trait OutboxDatabase: Database + sealed::Sealed {
    /// Returns the insert of one event.
    #[doc(hidden)]
    fn insert(event: NewEvent) -> Query<'static, Self, Self::Arguments>;
}

mod sealed {
    pub trait Sealed {}
    #[cfg(feature = "postgres")]
    impl Sealed for sqlx::Postgres {}
    #[cfg(feature = "sqlite")]
    impl Sealed for sqlx::Sqlite {}
}

/// Emits `event` as part of the caller's transaction. Returns the event id that consumers will see.
///
/// It is published once that transaction has committed, and never if it rolls back.
///
#[cfg_attr(feature = "postgres", doc = "```no_run")]
#[cfg_attr(not(feature = "postgres"), doc = "```ignore")]
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
pub async fn emit<'c, D, E>(executor: E, event: NewEvent) -> Result<Uuid, EmitError>
where
    D: OutboxDatabase,
    D::Arguments: IntoArguments<D>,
    E: Executor<'c, Database = D>,
{
    event.validate()?;
    let event_id = event.event_id;
    D::insert(event).execute(executor).await.map_err(EmitError::Insert)?;
    Ok(event_id)
}
