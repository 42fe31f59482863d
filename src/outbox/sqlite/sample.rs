//! The figures for the metrics. The relay that works on the file asks for them.

use std::time::Duration;

use sqlx::sqlite::SqliteConnection;

use crate::outbox::deliveries::NO_DESTINATION;
use crate::outbox::sample::{DatabaseSample, DestinationSample, MOST_SAMPLED, Sample};

/// `?1` destinations, among them the empty name of events that are not routed yet; `?2` the most events that are counted. Each
/// part of it reads an index from its beginning.
///
/// An event that waits for a destination has a new `available_at` whenever that was probed. So it is due since it was created.
const DESTINATIONS: &str = "
with moment as materialized (select strftime('%Y-%m-%d %H:%M:%f', 'now') as now)
select d.value as name,
    (select count(*) from (
        select 1 from event_outbox o
        where o.status = 'scheduled' and o.destination = d.value and o.available_at <= moment.now
        order by o.available_at, o.id limit ?2
    )) + case d.value when '' then (
        select count(*) from (select 1 from event_outbox o where o.partition < 640 limit ?2)
    ) else 0 end as pending,
    86400.0 * (julianday(moment.now) - julianday(min(
        coalesce((
            select min(since) from (
                select case d.value when '' then o.available_at else min(o.available_at, o.created_at) end as since
                from event_outbox o
                where o.status = 'scheduled' and o.destination = d.value and o.available_at <= moment.now
                order by o.available_at, o.id limit ?2
            )
        ), moment.now),
        case d.value when '' then coalesce((
            select min(available_at) from (
                select o.available_at from event_outbox o where o.partition < 640
                order by o.partition, o.id, o.destination limit ?2
            )
        ), moment.now) else moment.now end
    ))) as seconds,
    later.retrying, later.waiting_behind, later.blocked_keys,
    (select count(*) from (
        select 1 from event_outbox o
        where o.status = 'scheduled' and o.destination = d.value and o.available_at = '9999-12-31 23:59:59' limit ?2
    )) as parked
from moment
cross join json_each(?1) d
left join (
    select ranked.destination,
           count(*) filter (where ranked.last_error is not null) as retrying,
           count(*) filter (where ranked.last_error is null) as waiting_behind,
           count(distinct case when ranked.last_error is not null
               then coalesce(ranked.aggregate_type, '') || char(0) || ranked.aggregate_id end) as blocked_keys
    from (
        select o.destination, o.last_error, o.aggregate_type, o.aggregate_id
        from event_outbox o, moment
        where o.status = 'scheduled' and o.destination in (select value from json_each(?1))
          and o.available_at > moment.now and o.available_at < '9999-12-31 23:59:59'
        limit ?2
    ) ranked
    group by ranked.destination
) later on later.destination = d.value";

/// A file has no statistics, so the dead letters are counted as far as that takes no time.
const DEAD_LETTERS: &str = "select count(*) from (select 1 from event_dead_letter limit ?1)";

/// A row of [`DESTINATIONS`].
type Found = (String, i64, Option<f64>, Option<i64>, Option<i64>, Option<i64>, i64);

/// Returns the figures of this moment.
pub(super) async fn take(connection: &mut SqliteConnection, destinations: &[String]) -> Result<Sample, sqlx::Error> {
    let names: Vec<&str> = std::iter::once(NO_DESTINATION).chain(destinations.iter().map(String::as_str)).collect();
    let found: Vec<Found> = sqlx::query_as(DESTINATIONS)
        .bind(serde_json::json!(names).to_string())
        .bind(MOST_SAMPLED)
        .fetch_all(&mut *connection)
        .await?;
    let dead_letters = sqlx::query_scalar(DEAD_LETTERS).bind(MOST_SAMPLED).fetch_one(connection).await?;
    let rows = found.iter().map(|(_, pending, .., parked)| pending + parked).sum();
    let destination =
        |(name, pending, seconds, retrying, waiting_behind, blocked_keys, parked): Found| DestinationSample {
            name,
            oldest_due: Duration::try_from_secs_f64(seconds.unwrap_or_default().max(0.0)).unwrap_or_default(),
            pending,
            retrying: retrying.unwrap_or_default(),
            waiting_behind: waiting_behind.unwrap_or_default(),
            parked,
            blocked_keys: blocked_keys.unwrap_or_default(),
        };
    let destinations = found.into_iter().map(destination).collect();
    let database = DatabaseSample { rows, dead_letters, ..DatabaseSample::default() };
    Ok(Sample { destinations, database })
}
