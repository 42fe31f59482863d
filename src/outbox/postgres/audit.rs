//! Reads what the database knows of its events, for an audit.

use futures_util::TryStreamExt;
use sqlx::postgres::PgConnection;
use sqlx::{Executor, Row};
use uuid::Uuid;

use crate::audit::{Audit, Checksum, EntryId, Fact};
use crate::outbox::OutboxError;
use crate::outbox::postgres::connection::{connect, connect_options, query_failed};
use crate::outbox::postgres::sql::{Schema, Sql};
use crate::secret::Secret;

/// Everything that is recorded of the destination `$1`, as it was at one time.
const KNOWN: &str = "
select 0 as known, event_id, id as sequence, null::text as message,
    pg_catalog.sha256(pg_catalog.convert_to(payload::text, 'UTF8')) as digest
from {schema}.event_outbox where destination in ('', $1)
union all
select 1, event_id, outbox_id, message_id, null
from {schema}.event_processing_log where destination = $1 and status = 'published'
union all
select case when redriven_at is null then 2 else 4 end, event_id, outbox_id, null, pg_catalog.sha256(pg_catalog.convert_to(payload::text, 'UTF8'))
from {schema}.event_dead_letter where destination in ('', $1)
union all
select 3, event_id, outbox_id, null, pg_catalog.sha256(pg_catalog.convert_to(payload::text, 'UTF8'))
from {schema}.event_history where destination = $1";

/// Feeds `audit` with all that the database at `url` knows about `destination`. Returns the time since which the log is
/// complete.
///
/// # Errors
/// The database cannot be reached or read; the error says why.
pub async fn read(url: &Secret, destination: &str, audit: &mut Audit) -> Result<EntryId, OutboxError> {
    let mut connection = connect(&connect_options(url, true)?).await?;
    let read = async {
        // A pooler may send each transaction to another server connection. Rows that row-level security hides would look lost.
        connection.execute("begin; set local row_security = off").await?;
        let since = feed(&mut connection, destination, audit).await?;
        connection.execute("commit").await?;
        Ok(since)
    };
    read.await.map_err(|source| query_failed("read what is recorded", source))
}

async fn feed(connection: &mut PgConnection, destination: &str, audit: &mut Audit) -> Result<EntryId, sqlx::Error> {
    let sql = Sql { schema: Schema::find(connection).await?.unwrap_or_default(), persistent: false };
    // Five minutes for a clock that differs a little from Redis', and for a batch that was published just before the day of its
    // log row began.
    let since: Option<i64> = sql.query_scalar(
        "select (extract(epoch from pg_catalog.min(processed_at) + interval '5 minutes') operator(pg_catalog.*) 1000)::bigint from {schema}.event_processing_log",
    )
    .fetch_one(&mut *connection)
    .await?;
    let whole: bool = sql.query_scalar(
        "select not exists (select from {schema}.event_processing_log where processed_at < pg_catalog.clock_timestamp() - interval '1 day')",
    )
    .fetch_one(&mut *connection)
    .await?;
    let mut rows = sql.query(KNOWN).bind(destination).fetch(connection);
    while let Some(row) = rows.try_next().await? {
        let (event_id, sequence): (Uuid, i64) = (row.try_get("event_id")?, row.try_get("sequence")?);
        let message: Option<&str> = row.try_get("message")?;
        let known = match row.try_get::<i32, _>("known")? {
            0 => Fact::Pending,
            1 => Fact::Published(message.and_then(|message| message.parse().ok())),
            2 => Fact::DeadLetter,
            4 => Fact::Redriven,
            _ => Fact::Kept,
        };
        let checksum = row.try_get::<Option<&[u8]>, _>("digest")?.and_then(Checksum::from_sha256);
        audit.known(event_id, sequence, known, checksum);
    }
    // Nothing was dropped from a log that began today.
    let since = since.and_then(|since| u64::try_from(since).ok()).unwrap_or(0);
    Ok(if whole { EntryId(0, 0) } else { EntryId(since, 0) })
}
