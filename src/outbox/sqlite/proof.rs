//! Proves that the file records what is published, and handles events that it does not record.
//!
//! The tables belong to the application as much as to the relay, so a trigger may suppress or refuse a write, and so may a
//! constraint. If that happens for every event, nothing is published any more. If it happens for single events, these are
//! found by bisection and parked, and the others are settled.

use sqlx::Executor;
use sqlx::sqlite::SqliteConnection;

use crate::outbox::proof::ProofRows;
use crate::outbox::records::SETTLE_FAILED;
use crate::outbox::sqlite::connection::query_failed;
use crate::outbox::sqlite::settle::{SUPPRESSED, SettleScript};
use crate::outbox::{OutboxError, Usage};
use crate::text::shown;

/// The number of the application's rows that a proof tries if it may not insert its own.
const ROWS: i64 = 4;

/// Inserts rows that are delayed for ever, so that they are never taken for work.
const INSERT: &str = "
insert into event_outbox (event_type, status, available_at)
select 'relay.proof', 'scheduled', '9999-12-31 23:59:59' from (values (1), (2), (3), (4)) returning row_id";

/// Reads the triggers that are not the relay's own.
const TRIGGERS: &str = "
select group_concat(name || ' on ' || tbl_name, ', ') from sqlite_schema
where type = 'trigger' and tbl_name in ('event_outbox', 'event_processing_log', 'event_dead_letter', 'event_history')
  and name not like 'event\\_%' escape '\\' and name not like 'relay\\_%' escape '\\'";

/// Writes everything that settles write, and rolls it back.
///
/// # Errors
/// [`OutboxError::Unrecorded`] if that fails or has no effect.
pub(super) async fn prove(
    connection: &mut SqliteConnection,
    worker: &str,
    usage: Usage,
) -> Result<ProofRows, OutboxError> {
    begin(connection).await?;
    let tried = try_all(connection, worker, usage).await;
    rollback(connection).await;
    match tried {
        Err(error) if is_content(&error) => Err(unrecorded(connection, error).await),
        tried => tried.map_err(|error| query_failed("write to the database file", error)),
    }
}

async fn try_all(connection: &mut SqliteConnection, worker: &str, usage: Usage) -> Result<ProofRows, sqlx::Error> {
    let inserted: Result<Vec<i64>, sqlx::Error> =
        sqlx::query_scalar(INSERT).persistent(false).fetch_all(&mut *connection).await;
    let (tried, rows) = match inserted {
        Ok(rows) if rows.len() == 4 => (ProofRows::Own, rows),
        Err(error) if !is_content(&error) => return Err(error),
        refused => {
            let words = refused.err().map_or_else(|| "a trigger swallows it".to_owned(), |error| words(&error));
            // Whatever a refused insert has done until then is rolled back.
            rollback(connection).await;
            connection.execute("begin immediate").await?;
            let query = format!("select row_id from event_outbox order by row_id limit {ROWS}");
            let rows =
                sqlx::query_scalar(sqlx::AssertSqlSafe(query)).persistent(false).fetch_all(&mut *connection).await?;
            (ProofRows::Existing(words), rows)
        }
    };
    SettleScript::proof(&rows, usage).write_within(connection, worker).await?;
    Ok(tried)
}

/// The result of salvaging a settle that failed because of its content.
pub(super) struct Salvaged {
    /// The settles that still could not be recorded.
    pub(super) left: Vec<SettleScript>,
    /// The error that prevented that.
    pub(super) error: Option<sqlx::Error>,
}

/// Settles what can be settled of `settle`, and parks the events that cannot.
///
/// # Errors
/// Errors that are not about content. Then `settle` is to be repeated whole; rows that were recorded by then are skipped.
pub(super) async fn salvage(
    connection: &mut SqliteConnection,
    worker: &str,
    settle: &SettleScript,
) -> Result<Salvaged, sqlx::Error> {
    let mut salvaged = Salvaged { left: Vec::new(), error: None };
    let mut parts = vec![settle.clone()];
    while let Some(part) = parts.pop() {
        let Err(error) = write(connection, worker, &part).await else { continue };
        if !is_content(&error) {
            return Err(error);
        }
        if part.rows() > 1 {
            let [first, second] = part.halves()?;
            parts.extend([second, first]);
            continue;
        }
        let reason = words(&error);
        let [each, whole] = part.parked(&reason)?;
        match write(connection, worker, &each).await {
            Ok(()) => {}
            Err(error) if !is_content(&error) => return Err(error),
            Err(_) => match write(connection, worker, &whole).await {
                Ok(()) => {}
                Err(error) if !is_content(&error) => return Err(error),
                Err(_) => {
                    salvaged.left.push(part);
                    salvaged.error = Some(error);
                    continue;
                }
            },
        }
        tracing::error!(
            error = reason,
            "an event cannot be settled; it is parked with the code {SETTLE_FAILED}, and published again only when somebody \
             says so: see `select row_id, event_id, last_error from event_outbox where last_error like '{SETTLE_FAILED}%'`"
        );
    }
    Ok(salvaged)
}

async fn write(connection: &mut SqliteConnection, worker: &str, settle: &SettleScript) -> Result<(), sqlx::Error> {
    let written = settle.write(connection, worker).await;
    if written.is_err() {
        rollback(connection).await;
    }
    written
}

async fn begin(connection: &mut SqliteConnection) -> Result<(), OutboxError> {
    let begun = connection.execute("begin immediate").await;
    begun.map(drop).map_err(|error| query_failed("write to the database file", error))
}

/// Rolls back. A statement may have ended the transaction already, as `raise(rollback)` does.
async fn rollback(connection: &mut SqliteConnection) {
    drop(connection.execute("rollback").await);
}

/// Returns whether an error is about the written content, and not about the file, its lock or its disk.
pub(super) fn is_content(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code()?.parse::<i32>().ok());
    // ERROR, which triggers cause that cannot run, TOOBIG, CONSTRAINT and MISMATCH: https://www.sqlite.org/rescode.html
    code.is_some_and(|code| matches!(code & 0xff, 1 | 18 | 19 | 20))
}

/// Returns the reason of such an error, in words.
fn words(error: &sqlx::Error) -> String {
    let message = error.as_database_error().map_or_else(|| error.to_string(), |error| error.message().to_owned());
    match message.split_once(SUPPRESSED) {
        Some((_, what)) => {
            let what = what.split(';').next().unwrap_or(what);
            format!("a trigger swallows the {what}")
        }
        // A trigger of the application may have written it.
        None => shown(&message, 500),
    }
}

/// Returns the error of a file that does not record, with the names of the triggers that may be the cause.
pub(super) async fn unrecorded(connection: &mut SqliteConnection, error: sqlx::Error) -> OutboxError {
    let triggers: Option<String> =
        sqlx::query_scalar(TRIGGERS).persistent(false).fetch_one(connection).await.ok().flatten();
    match triggers {
        Some(triggers) => {
            let reason =
                format!("{}; look at the triggers {triggers}, and drop or correct the one that does it", words(&error));
            OutboxError::Unrecorded { reason }
        }
        None if error.to_string().contains(SUPPRESSED) => OutboxError::Unrecorded { reason: words(&error) },
        None => query_failed("settle", error),
    }
}
