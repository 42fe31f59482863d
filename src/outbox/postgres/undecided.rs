//! Finds prepared transactions that nobody decides. They outlive their sessions, and the server's restarts.

use sqlx::Row;
use sqlx::postgres::PgConnection;

use crate::outbox::postgres::question::Question;
use crate::outbox::quote::literal;
use crate::outbox::standstill::Standstill;

/// How long they may last: a coordinator that works decides sooner.
const PATIENCE_SECONDS: f64 = 10.0;

/// The prepared transactions that write to the outbox. They hold its lock under the name of the session's transaction, which
/// the lock on their own id has as well.
const UNDECIDED: &str = "
with locks as materialized (
    select l.locktype, l.virtualtransaction, l.transactionid, l.relation, l.mode from pg_catalog.pg_locks l where l.pid is null
)
select p.gid, p.owner::text as owner,
    pg_catalog.to_char(p.prepared at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SSZ') as since,
    extract(epoch from pg_catalog.clock_timestamp() - p.prepared)::float8 as seconds
from pg_catalog.pg_prepared_xacts p
where p.database = pg_catalog.current_database()
  and exists (
      select from locks id join locks l on l.virtualtransaction = id.virtualtransaction
      where id.locktype = 'transactionid' and id.transactionid = p.transaction
        and l.locktype = 'relation' and l.relation = '{schema}.event_outbox'::regclass::oid and l.mode = 'RowExclusiveLock'
  )
order by p.prepared limit 20";

pub(super) async fn find(
    connection: &mut PgConnection,
    question: &Question<'_>,
) -> Result<Vec<Standstill>, sqlx::Error> {
    let mut found = Vec::new();
    for row in &question.sql.query(UNDECIDED).fetch_all(connection).await? {
        let seconds: f64 = row.try_get("seconds")?;
        if seconds < PATIENCE_SECONDS && !question.brief.is_zero() {
            continue;
        }
        let (gid, owner): (&str, &str) = (row.try_get("gid")?, row.try_get("owner")?);
        let since: &str = row.try_get("since")?;
        let gid_literal = literal(gid);
        let text = format!(
            "the prepared transaction {gid:?} of role {owner:?}, which wrote to event_outbox, is undecided since {since} ({seconds:.0} s): \
             its events are not published until it is decided: commit prepared {gid_literal}; or: rollback prepared {gid_literal};"
        );
        found.push(Standstill::new("undecided", text).about(gid));
    }
    Ok(found)
}
