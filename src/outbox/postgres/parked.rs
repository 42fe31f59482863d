//! Finds events that wait until somebody acts, and keys that go on waiting though their destination works.

use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::{PgConnection, PgRow};

use crate::outbox::deliveries::NO_DESTINATION;
use crate::outbox::postgres::question::Question;
use crate::outbox::standstill::{self, First, MOST_COUNTED, Standstill};

/// `$1` destinations; of each at most `$2` events are counted. The events behind them are counted for the first twenty that
/// hold back their key. An event that was delivered does not hold it back.
const PARKED: &str = "
with parked as materialized (
    select e.*
    from pg_catalog.unnest($1::text[]) d(destination)
    cross join lateral (
        select o.id, o.destination, o.aggregate_type, o.aggregate_id, o.last_error from {schema}.event_outbox o
        where o.status = 'scheduled' and o.destination = d.destination and o.available_at = 'infinity'
          and o.last_error is not null
        order by o.available_at, o.id limit $2
    ) e
), holding as (
    select p.* from parked p
    where p.destination <> '' and p.aggregate_id is not null
      and (not pg_catalog.starts_with(p.last_error, 'settle_failed: ')
           or pg_catalog.starts_with(p.last_error, 'settle_failed: retry'))
    order by p.id limit 20
)
select p.id, p.destination, p.last_error as error, (select pg_catalog.count(*) from parked) as count, (
    select pg_catalog.count(*)
    from holding h
    cross join lateral (
        select from {schema}.event_outbox w
        where w.status = 'scheduled' and w.destination <> '' and w.aggregate_id is not null and w.destination = h.destination
          and pg_catalog.hashtextextended(w.aggregate_id, pg_catalog.hashtextextended(coalesce(w.aggregate_type, ''), 0))
            = pg_catalog.hashtextextended(h.aggregate_id, pg_catalog.hashtextextended(coalesce(h.aggregate_type, ''), 0))
          and w.aggregate_id = h.aggregate_id and coalesce(w.aggregate_type, '') = coalesce(h.aggregate_type, '')
          and w.id > h.id
        limit $2
    ) behind
) as behind
from parked p order by p.id, p.destination limit 1";

pub(super) async fn parked(
    connection: &mut PgConnection,
    question: &Question<'_>,
) -> Result<Vec<Standstill>, sqlx::Error> {
    // A row that stands for all its destinations is owed to none of them.
    let destinations: Vec<&str> =
        std::iter::once(NO_DESTINATION).chain(question.destinations.iter().map(String::as_str)).collect();
    let found = question.sql.query(PARKED).bind(destinations).bind(MOST_COUNTED + 1).fetch_optional(connection).await?;
    let Some(row) = found else { return Ok(Vec::new()) };
    let (count, behind) = (row.try_get("count")?, row.try_get("behind")?);
    Ok(vec![standstill::parked(count, behind, &first(&row)?, "pg_catalog.now()", "infinity")])
}

/// `$1` destinations; of each at most `$2` events are counted. These have no attempts: nobody charges the event, so only a
/// person or its destination ends its waiting. Events that are tried again are due at times to come, so few rows are read.
const BLOCKED: &str = "
select blocked.count, first.id, d.destination, first.last_error as error,
    extract(epoch from pg_catalog.statement_timestamp() - first.first_failed_at)::float8 as seconds
from pg_catalog.unnest($1::text[]) d(destination)
cross join lateral (
    select pg_catalog.count(*) as count, pg_catalog.min(b.id) as id
    from (
        select o.id from {schema}.event_outbox o
        where o.status = 'scheduled' and o.destination = d.destination and o.last_error is not null
          and o.available_at > pg_catalog.statement_timestamp() - interval '10 seconds' and o.available_at < 'infinity'
          and (o.attempts = 0 and o.first_failed_at is not null
               or o.first_failed_at < pg_catalog.statement_timestamp() - interval '10 minutes')
        order by o.available_at, o.id limit $2
    ) b
) blocked
cross join lateral (
    select o.id, o.last_error, o.first_failed_at from {schema}.event_outbox o
    where o.id = blocked.id and o.status = 'scheduled' and o.destination = d.destination
      and o.available_at > pg_catalog.statement_timestamp() - interval '10 seconds' and o.available_at < 'infinity'
    limit 1
) first
order by d.destination";

pub(super) async fn blocked(
    connection: &mut PgConnection,
    question: &Question<'_>,
) -> Result<Vec<Standstill>, sqlx::Error> {
    let rows =
        question.sql.query(BLOCKED).bind(question.destinations).bind(MOST_COUNTED + 1).fetch_all(connection).await?;
    let told = rows.iter().map(|row| {
        let failing = Duration::try_from_secs_f64(row.try_get("seconds")?).unwrap_or_default();
        Ok(standstill::blocked(row.try_get("count")?, &first(row)?, failing, "infinity"))
    });
    told.collect()
}

fn first(row: &PgRow) -> Result<First, sqlx::Error> {
    Ok(First { id: row.try_get("id")?, destination: row.try_get("destination")?, error: row.try_get("error")? })
}
