//! Deletes rows that are past their retention, a few at a time, so that no writer waits long.

use std::time::Duration;

use sqlx::AssertSqlSafe;
use sqlx::sqlite::SqliteConnection;

use crate::outbox::OutboxError;
use crate::outbox::sqlite::connection::run_query;

/// The number of rows deleted in one transaction, which takes the write lock for about a millisecond.
const ROWS: u32 = 200;

/// The pause between two such transactions, in which others get the lock.
const PAUSE: Duration = Duration::from_millis(10);

/// Deletes the rows of `table` whose `column` is older than `retention`. They are the first rows of the table, because rows
/// are written in the order of time.
pub(super) async fn forget(
    connection: &mut SqliteConnection,
    table: &'static str,
    column: &'static str,
    retention: Duration,
) -> Result<(), OutboxError> {
    // The statement reads first: if no row is old, no write lock is taken.
    let delete = format!(
        "delete from {table} where rowid in (
             select rowid from (select rowid, {column} from {table} order by rowid limit {ROWS})
             where {column} < strftime('%Y-%m-%d %H:%M:%f', 'now', ?1)
         )"
    );
    let any = format!(
        "select exists (
             select 1 from (select {column} from {table} order by rowid limit 1)
             where {column} < strftime('%Y-%m-%d %H:%M:%f', 'now', ?1)
         )"
    );
    let age = format!("-{} seconds", retention.as_secs());
    loop {
        let old: bool = run_query("look for what is past its retention", async {
            sqlx::query_scalar(AssertSqlSafe(any.clone())).bind(&age).fetch_one(&mut *connection).await
        })
        .await?;
        if !old {
            return Ok(());
        }
        run_query("delete what is past its retention", async {
            sqlx::query(AssertSqlSafe(delete.clone())).bind(&age).execute(&mut *connection).await
        })
        .await?;
        tokio::time::sleep(PAUSE).await;
    }
}
