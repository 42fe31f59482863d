//! Finds events that wait until a person acts, and keys that stay blocked though their destination works.

use std::time::Duration;

use sqlx::sqlite::SqliteConnection;

use crate::outbox::sqlite::question::Question;
use crate::outbox::standstill::{self, First, MOST_COUNTED, Standstill};

/// The time of rows that do not become due by themselves.
const FOREVER: &str = "9999-12-31 23:59:59";

/// Counts parked events. `?1` are the destinations; at most `?2` events of each are counted. Events that wait behind them are
/// counted for the first twenty that block their key: an event that was delivered does not.
const PARKED: &str = "
with parked as materialized (
    select o.id, o.destination, o.aggregate_type, o.aggregate_id, o.last_error from event_outbox o
    where o.status = 'scheduled' and o.destination in (select value from json_each(?1) union all select '')
      and o.available_at = '9999-12-31 23:59:59' and o.last_error is not null and o.last_error not glob 'format_unknown: *'
    order by o.id limit ?2
), holding as (
    select * from parked
    where destination <> '' and aggregate_id is not null
      and (last_error not like 'settle_failed: %' or last_error like 'settle_failed: retry%')
    order by id limit 20
)
select id, destination, last_error, (select count(*) from parked), (
    select count(*) from (
        select 1 from holding h join event_outbox w
            on w.status = 'scheduled' and w.destination <> '' and w.aggregate_id is not null and w.destination = h.destination
            and w.aggregate_id = h.aggregate_id and coalesce(w.aggregate_type, '') = coalesce(h.aggregate_type, '')
            and w.id > h.id
        limit ?2
    )
)
from parked order by id, destination limit 1";

pub(super) async fn parked(
    connection: &mut SqliteConnection,
    question: &Question<'_>,
) -> Result<Vec<Standstill>, sqlx::Error> {
    let found: Option<(i64, String, String, i64, i64)> = sqlx::query_as(PARKED)
        .bind(serde_json::json!(question.destinations).to_string())
        .bind(MOST_COUNTED + 1)
        .fetch_optional(connection)
        .await?;
    let told = |(id, destination, error, count, behind)| {
        standstill::parked(count, behind, &First { id, destination, error }, "datetime('now')", FOREVER)
    };
    Ok(found.map(told).into_iter().collect())
}

/// Reads blocked keys. `?1` are the destinations. The events are without attempts: they are not charged, so only a person or
/// their destination ends their waiting. Rows that are retried are found by the time of the next attempt, so few rows are
/// read.
const BLOCKED: &str = "
select d.value, min(b.id), b.last_error, count(*), max(0.0, (julianday('now') - julianday(b.first_failed_at)) * 86400.0)
from json_each(?1) d join event_outbox b
    on b.status = 'scheduled' and b.destination = d.value and b.last_error is not null
    and b.available_at > strftime('%Y-%m-%d %H:%M:%f', 'now', '-10 seconds') and b.available_at < '9999-12-31 23:59:59'
    and (b.attempts = 0 and b.first_failed_at is not null
         or b.first_failed_at < strftime('%Y-%m-%d %H:%M:%f', 'now', '-10 minutes'))
group by d.value order by d.value";

pub(super) async fn blocked(
    connection: &mut SqliteConnection,
    question: &Question<'_>,
) -> Result<Vec<Standstill>, sqlx::Error> {
    let found: Vec<(String, i64, String, i64, f64)> = sqlx::query_as(BLOCKED)
        .bind(serde_json::json!(question.destinations).to_string())
        .fetch_all(connection)
        .await?;
    let told = |(destination, id, error, count, seconds)| {
        let failing = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        standstill::blocked(count, &First { id, destination, error }, failing, FOREVER)
    };
    Ok(found.into_iter().map(told).collect())
}
