//! Finds events that are owed to destinations which no relay has configured.

use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use sqlx::sqlite::SqliteConnection;

use crate::outbox::quote::literal;
use crate::outbox::sqlite::question::Question;
use crate::outbox::standstill::{MOST_COUNTED, Standstill, Unconfigured};

/// Reads each destination of scheduled rows that is not in `?1`, with its number of rows, at most `?2`, and the age of the
/// first row.
const UNCONFIGURED: &str = "
with recursive owed(destination) as (
    select * from (
        select destination from event_outbox where status = 'scheduled' and destination > '' order by destination limit 1
    )
    union all
    select (select e.destination from event_outbox e
            where e.status = 'scheduled' and e.destination > owed.destination order by e.destination limit 1)
    from owed where owed.destination is not null
)
select owed.destination, (
    select count(*) from (
        select 1 from event_outbox e where e.status = 'scheduled' and e.destination = owed.destination limit ?2
    )
), (
    select (julianday('now') - julianday(min(created_at))) * 86400.0 from (
        select e.created_at from event_outbox e where e.status = 'scheduled' and e.destination = owed.destination
        order by e.available_at, e.id limit ?2
    )
)
from owed
where owed.destination is not null and owed.destination not in (select value from json_each(?1))
order by owed.destination limit 20";

/// Moves events to another destination. `{from}` and `{to}` are literals. An event that is owed to both becomes owed once.
const MOVE: &str = "begin immediate; \
    delete from event_outbox where destination = {from} and exists (select 1 from event_outbox o \
    where o.partition in (event_outbox.partition % 640, event_outbox.partition % 640 + 640) and o.id = event_outbox.id \
    and o.destination = {to}); \
    update event_outbox set destination = {to} where destination = {from}; commit";

const GIVE_UP: &str = "begin immediate; \
    insert into event_dead_letter (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers, \
    correlation_id, causation_id, schema_version, priority, format, created_at, destination, attempts, error_code, error, \
    first_failed_at, failed_at) select id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers, \
    correlation_id, causation_id, schema_version, priority, format, created_at, destination, max(attempts, 1), 'given_up', \
    'given up by hand', coalesce(first_failed_at, strftime('%Y-%m-%d %H:%M:%f', 'now')), \
    strftime('%Y-%m-%d %H:%M:%f', 'now') from event_outbox where destination = {from} order by id; \
    insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, error, duration_ms, \
    worker) select event_id, id, event_type, destination, 'dead_lettered', max(attempts, 1), 'given_up: given up by hand', \
    0, 'sql' from event_outbox where destination = {from}; \
    delete from event_outbox where destination = {from}; commit";

/// Returns one standstill for each such destination.
pub(super) fn find<'a>(
    connection: &'a mut SqliteConnection,
    question: &'a Question<'a>,
) -> BoxFuture<'a, Result<Vec<Standstill>, sqlx::Error>> {
    async {
        let found: Vec<(String, i64, Option<f64>)> = sqlx::query_as(UNCONFIGURED)
            .bind(serde_json::json!(question.destinations).to_string())
            .bind(MOST_COUNTED + 1)
            .fetch_all(connection)
            .await?;
        let told = found.into_iter().map(|(destination, count, seconds)| {
            let to = question.destinations.first().map_or("another", String::as_str);
            let (from, to) = (literal(&destination), literal(to));
            let fill = |statements: &str| statements.replace("{from}", &from).replace("{to}", &to);
            let oldest = seconds.map(|seconds| Duration::from_secs_f64(seconds.max(0.0)));
            Unconfigured { destination, count, oldest, move_them: fill(MOVE), give_them_up: fill(GIVE_UP) }.told()
        });
        Ok(told.collect())
    }
    .boxed()
}
