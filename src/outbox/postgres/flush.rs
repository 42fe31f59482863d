//! Waits until what is committed is on disk: a commit that the server loses in a crash must not have been published.

use sqlx::Executor;
use sqlx::postgres::PgConnection;

use crate::outbox::error::OutboxError;
use crate::outbox::postgres::store::PgOutbox;

/// Returns whether every commit that an earlier statement saw is on disk. Others commit all the time, so the answer is usually
/// yes only where little goes on, or where all commits wait for the disk.
pub(super) async fn flushed(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("select pg_catalog.pg_current_wal_insert_lsn() <= pg_catalog.pg_current_wal_flush_lsn()")
        .persistent(false)
        .fetch_one(connection)
        .await
}

/// A commit of its own waits until the log is on disk up to that commit, and so up to all earlier ones.
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
