//! Waits for the locks of a migration without making others wait.
//!
//! A session that inserts queues behind a lock that is waited for. So a migration waits for a second at most, lets all others
//! through, and is tried again as a whole.

use std::time::{Duration, Instant};

use sqlx::Executor;
use sqlx::postgres::PgConnection;

use crate::outbox::OutboxError;
use crate::outbox::postgres::connection::{STATEMENT_TIMEOUT, with_timeout};

/// The setting with which a migration begins.
pub(super) const WAIT_BRIEFLY: &str = "set local lock_timeout = '1s'";

/// The pause after the first attempt; each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// How long a migration is tried before it is given up: somebody must find out why.
const ENOUGH: Duration = Duration::from_secs(600);

/// The sessions with the oldest transactions among those that have a lock on one of the tables.
const HOLDERS: &str = "
select coalesce(pg_catalog.string_agg(held.by, '; '), 'whoever it was, is gone')
from (
    select case when l.pid is null then 'a prepared transaction, see pg_prepared_xacts'
                else pg_catalog.concat('pid ', l.pid, ', application \"', a.application_name, '\", role ', a.usename,
                         ', its transaction since ', pg_catalog.date_trunc('second', a.xact_start)) end as by
    from (
        select distinct k.pid from pg_catalog.pg_locks k join pg_catalog.pg_class c on c.oid = k.relation
        where k.locktype = 'relation' and k.granted and k.pid is distinct from pg_catalog.pg_backend_pid()
          and k.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())
          and c.relname in ('event_outbox', 'event_processing_log', 'event_dead_letter', 'event_history')
    ) l
    left join pg_catalog.pg_stat_activity a on a.pid = l.pid
    order by a.xact_start nulls first
    limit 3
) held";

/// The attempts of one run of `relay migrate`.
#[derive(Debug, Default)]
pub(super) struct Patience {
    begun: Option<Instant>,
    pause: Duration,
}

impl Patience {
    /// Rolls the failed attempt back, names who has the lock, and pauses.
    ///
    /// # Errors
    /// `error`, if it is not about a lock, or has lasted for too long.
    pub(super) async fn after(
        &mut self,
        connection: &mut PgConnection,
        migration: &str,
        error: OutboxError,
    ) -> Result<(), OutboxError> {
        let begun = *self.begun.get_or_insert_with(Instant::now);
        if !is_lock(&error) {
            return Err(error);
        }
        let held_by: String = with_timeout("look who has a lock", STATEMENT_TIMEOUT, async {
            connection.execute("rollback").await?;
            sqlx::query_scalar(HOLDERS).persistent(false).fetch_one(connection).await
        })
        .await?;
        tracing::warn!(
            migration,
            held_by,
            "a table is locked; the migration waits for a second, so that inserts wait no longer, and is tried again"
        );
        if begun.elapsed() > ENOUGH {
            return Err(error);
        }
        self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        tokio::time::sleep(self.pause).await;
        Ok(())
    }
}

/// Returns whether a lock was not given in time, or two sessions waited for each other.
fn is_lock(error: &OutboxError) -> bool {
    let OutboxError::Query { source, .. } = error else { return false };
    let code = source.as_database_error().and_then(sqlx::error::DatabaseError::code);
    matches!(code.as_deref(), Some("55P03" | "40P01"))
}
