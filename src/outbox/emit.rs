//! The insert for applications that use sqlx.

use sqlx::query::Query;
use sqlx::{Database, Executor, IntoArguments};
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

/// A database with an outbox: [`sqlx::Postgres`] and [`sqlx::Sqlite`].
pub trait OutboxDatabase: Database + sealed::Sealed {
    /// The insert of one event.
    #[doc(hidden)]
    fn insert(event: NewEvent) -> Query<'static, Self, Self::Arguments>;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for sqlx::Postgres {}
    impl Sealed for sqlx::Sqlite {}
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
