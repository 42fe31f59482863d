//! `relay emit` into PostgreSQL.

use sqlx::postgres::PgConnection;
use sqlx::{Connection, Executor, Postgres};
use uuid::Uuid;

use crate::emit::{EmitError, NewEvent, OutboxDatabase};
use crate::outbox::operate::Unemitted;
use crate::outbox::postgres::connection::open;
use crate::secret::Secret;

/// Inserts one event into the database at `url`, in a transaction of its own.
pub(super) async fn emit(url: &Secret, pooled: bool, event: NewEvent) -> Result<Uuid, Unemitted> {
    let payload = event.payload.clone();
    let mut connection = open(url, pooled).await.map_err(Unemitted::Outbox)?;
    let emitted = insert(&mut connection, event).await;
    drop(connection.close().await); // it is committed, or the error says why not
    emitted.map_err(|error| Unemitted::new(error, |source| refusal(source, &payload)))
}

/// Emits one event in a transaction of its own. Its statement has no name, because behind a pooler another client may have used
/// that name; and outside of a transaction its parts may reach different connections.
async fn insert(connection: &mut PgConnection, event: NewEvent) -> Result<Uuid, EmitError> {
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

/// Returns why the database refused an event because of its content, without quoting that content.
fn refusal(error: &sqlx::Error, payload: &str) -> Option<String> {
    let error = error.as_database_error()?;
    match error.code()?.as_ref() {
        // A text that is no value of its type, which can only be the payload. Our parser only finds the place.
        "22P02" => Some(match serde_json::from_str::<serde::de::IgnoredAny>(payload) {
            Err(place) => format!("the payload is not JSON: {place}"),
            Ok(_) => "the payload is not JSON as PostgreSQL takes it".to_owned(),
        }),
        code if code.starts_with("22") => Some(format!("the event cannot be stored: {}", error.message())),
        _ => None,
    }
}
