//! Events of a format that this relay does not know.
//!
//! The schema keeps them in partitions of their own, which no claim reads: see `migrations/postgres/0017_format.sql`. This
//! module keeps the later events of their keys behind them, so that claims do not read these again and again.

use std::sync::atomic::Ordering;

use sqlx::Executor;
use sqlx::postgres::PgConnection;

use crate::outbox::postgres::connection::{STATEMENT_TIMEOUT, with_timeout};
use crate::outbox::postgres::question::Question;
use crate::outbox::postgres::sql::{Schema, Sql};
use crate::outbox::postgres::tid;
use crate::outbox::{Claimed, OutboxError, Standstill, standstill};

/// In a claim, the name under which an event waits behind one of another format.
pub(super) const APART: &str = "*";

/// Puts rows behind the event of another format that they wait for. `$1` places, `$2` ids.
const SET_ASIDE: &str = "
update {schema}.event_outbox o set format = -1
from unnest($1::text[]::tid[], $2::bigint[]) c(tid, id)
where o.ctid = c.tid and o.id = c.id and o.format = 0";

/// Gives rows back that wait behind no event any more, because somebody deleted it or changed its format. An earlier statement
/// locks the partitions, so that no claim has read a later event of such a key.
const GIVE_BACK: &str = "
update {schema}.event_outbox o set format = 0
where o.partition >= 1280 and o.format = -1 and (o.partition % 640) = any($1::int[])
  and not exists (
      select from {schema}.event_outbox h
      where h.partition in (o.partition % 640 + 1280, o.partition % 640 + 1920) and h.format not in (0, -1) and h.id < o.id
        and h.aggregate_id = o.aggregate_id and coalesce(h.aggregate_type, '') = coalesce(o.aggregate_type, '')
  )";

const LOCK: &str = "
select array(
    select p.partition
    from (select distinct o.partition % 640 as partition from {schema}.event_outbox o
          where o.partition >= 1280 and o.format = -1) p
    where pg_catalog.pg_try_advisory_xact_lock('{schema}.event_outbox'::regclass::oid::int, p.partition)
)";

/// Counts these events: how many, of which formats, how many wait behind them, and since when.
const COUNT: &str = "
select pg_catalog.count(*) filter (where o.format <> -1::smallint),
       pg_catalog.string_agg(distinct o.format::text, ', ') filter (where o.format <> -1::smallint),
       pg_catalog.count(*) filter (where o.format = -1::smallint),
       pg_catalog.to_char(pg_catalog.min(o.created_at) at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SSZ')
from {schema}.event_outbox o where o.partition >= 1280::smallint";

const ANY_ASIDE: &str = "select exists (select from {schema}.event_outbox o where o.partition >= 1280::smallint and o.format = -1::smallint)";

/// Sets aside the events that wait behind one of another format. If there are any, the claim must begin anew.
pub(super) async fn set_aside(
    connection: &mut PgConnection,
    sql: Sql,
    claimed: &[Claimed],
) -> Result<bool, sqlx::Error> {
    let waits = |claimed: &&Claimed| claimed.blocked_by.iter().any(|earlier| earlier.destination == APART);
    let (tids, ids): (Vec<String>, Vec<i64>) = claimed
        .iter()
        .filter(waits)
        .map(|claimed| (tid::from_locator(claimed.event.row.locator), claimed.event.row.id))
        .unzip();
    if ids.is_empty() {
        return Ok(false);
    }
    let count = ids.len();
    let set_aside = sql.query(SET_ASIDE).bind(tids).bind(ids).execute(connection).await?.rows_affected();
    if set_aside == 0 {
        // Otherwise the next claim would find the same events again, at once.
        let message = format!("none of {count} events that wait behind one of an unknown format can be set aside");
        return Err(sqlx::Error::Protocol(message));
    }
    Ok(true)
}

/// Gives back the events that wait behind no other any more.
pub(super) async fn give_back(connection: &mut PgConnection, schema: Schema) -> Result<(), OutboxError> {
    let sql = Sql { schema, persistent: false };
    with_timeout("give back events that wait behind no other format any more", STATEMENT_TIMEOUT, async {
        connection.execute("begin").await?;
        if sql.query_scalar(ANY_ASIDE).fetch_one(&mut *connection).await? {
            let locked: Vec<i32> = sql.query_scalar(LOCK).fetch_one(&mut *connection).await?;
            sql.query(GIVE_BACK).bind(locked).execute(&mut *connection).await?;
        }
        connection.execute("commit").await.map(drop)
    })
    .await
}

/// Finds events of unknown formats. Records whether events wait, or have waited, behind them.
pub(super) async fn unknown(
    connection: &mut PgConnection,
    question: &Question<'_>,
) -> Result<Vec<Standstill>, sqlx::Error> {
    let (events, formats, behind, since): (i64, Option<String>, i64, Option<String>) =
        question.sql.query_as(COUNT).fetch_one(connection).await?;
    question.behind_unknown_format.store(behind > 0, Ordering::Relaxed);
    let told = || {
        let (formats, since) = (formats.unwrap_or_default(), since.unwrap_or_default());
        standstill::unknown_formats(events, &formats, behind, &since)
    };
    Ok((events > 0).then(told).into_iter().collect())
}
