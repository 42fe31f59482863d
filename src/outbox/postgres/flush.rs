//! Whether what is committed is on disk: a commit that the server loses in a crash must not have been published.

use sqlx::Executor;
use sqlx::postgres::PgConnection;

use crate::outbox::error::OutboxError;
use crate::outbox::postgres::store::PgOutbox;

/// Whether every commit that a statement before this one saw is on disk. Commits of others come in between all the time, so
/// this is the usual answer only where little goes on, or all of it waits for the disk.
pub(super) async fn flushed(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("select pg_catalog.pg_current_wal_insert_lsn() <= pg_catalog.pg_current_wal_flush_lsn()")
        .persistent(false)
        .fetch_one(connection)
        .await
}

/// A commit of its own waits until the log is on disk up to itself, and so the commits before it.
const FLUSH: &str = "
begin;
set local synchronous_commit = on;
select pg_catalog.pg_logical_emit_message(true, 'relay', '');
commit";

impl PgOutbox {
    /// Waits until all that is committed now is on disk.
    pub(super) async fn flush(&self) -> Result<(), OutboxError> {
        let mut slot = self.side_connection.lock().await;
        let flush = async |connection: &mut PgConnection| connection.execute(FLUSH).await.map(drop);
        self.ask_on(&mut slot, "have commits flushed to disk", flush).await
    }
}
