//! Reads what `relay status` shows, and writes what it needs: tallies, and the destinations that are down. No statement walks
//! over a whole table.

use sqlx::Row;
use sqlx::sqlite::{SqliteConnection, SqliteRow};

use crate::outbox::error::OutboxError;
use crate::outbox::register::Registration;
use crate::outbox::sqlite::connection::run_query;
use crate::outbox::sqlite::store::SqliteOutbox;
use crate::outbox::sqlite::{owner, pause, register, schema};
use crate::outbox::status::{
    BlockedKey, Count, Found, MOST_COUNTED, MOST_KEYS, Minute, Status, StatusRequest, TallyCount, Unrouted,
};

const NOW: &str = "
select strftime('%Y-%m-%d %H:%M:%SZ', 'now'), (julianday('now') - 2440587.5) * 86400.0";

/// Pending events, and those that were delayed: at most `?1` of each are counted. Rows are claimed in the order of the index
/// on `partition`, so the first of each priority is about the oldest.
const UNROUTED: &str = "
select (select count(*) from (select 1 from event_outbox where partition < 640 limit ?1)) as pending, (
    select (julianday('now') - julianday(min(available_at))) * 86400.0 from (
        select available_at from event_outbox where partition < 640 order by partition, id, destination limit ?1
    ) where available_at <= strftime('%Y-%m-%d %H:%M:%f', 'now')
) as oldest, (
    select count(*) from (select 1 from event_outbox where status = 'scheduled' and destination = '' limit ?1)
) as delayed";

/// The destinations that are owed an event, each by one index entry.
const NAMES: &str = "
with recursive owed(destination) as (
    select * from (
        select destination from event_outbox where status = 'scheduled' and destination > '' order by destination limit 1
    )
    union all
    select (select e.destination from event_outbox e
            where e.status = 'scheduled' and e.destination > owed.destination order by e.destination limit 1)
    from owed where owed.destination is not null
)
select destination from owed where destination is not null limit 100";

/// What is owed to `?1`: at most `?2` events that are due, `?3` that are due later, and `?2` that are parked.
const OWED: &str = "
select due.events as due, due.oldest, due.retrying + later.retrying as retrying, later.behind, parked.events as parked
from (
    select count(*) as events, count(last_error) as retrying, (julianday('now') - julianday(min(created_at))) * 86400.0 as oldest
    from (
        select created_at, last_error from event_outbox
        where status = 'scheduled' and destination = ?1 and available_at <= strftime('%Y-%m-%d %H:%M:%f', 'now')
        order by available_at, id limit ?2
    )
) due, (
    select count(last_error) as retrying, count(*) - count(last_error) as behind
    from (
        select last_error from event_outbox
        where status = 'scheduled' and destination = ?1 and available_at > strftime('%Y-%m-%d %H:%M:%f', 'now')
          and available_at < '9999-12-31 23:59:59'
        order by available_at, id limit ?3
    )
) later, (
    select count(last_error) as events
    from (
        select last_error from event_outbox
        where status = 'scheduled' and destination = ?1 and available_at = '9999-12-31 23:59:59'
        order by available_at, id limit ?2
    )
) parked";

/// The events that have failed at `?1`, among as many as [`OWED`] reads; and how many events wait behind each, at most `?2`. At
/// most `?4` events are returned.
const KEYS: &str = "
select b.destination, b.aggregate_type, b.aggregate_id, b.id, b.event_type, b.attempts, b.last_error as error,
    (julianday('now') - julianday(b.first_failed_at)) * 86400.0 as seconds,
    case when b.available_at < '9999-12-31 23:59:59'
        then max(0.0, (julianday(b.available_at) - julianday('now')) * 86400.0) end as next,
    case when b.aggregate_id is null then 0 else (
        select count(*) from (
            select 1 from event_outbox w
            where w.status = 'scheduled' and w.destination <> '' and w.aggregate_id is not null
              and w.destination = b.destination and w.aggregate_id = b.aggregate_id
              and coalesce(w.aggregate_type, '') = coalesce(b.aggregate_type, '') and w.id > b.id
            limit ?2
        )
    ) end as behind
from (
    select * from (
        select * from event_outbox
        where status = 'scheduled' and destination = ?1 and available_at <= strftime('%Y-%m-%d %H:%M:%f', 'now')
        order by available_at, id limit ?2
    )
    union all
    select * from (
        select * from event_outbox
        where status = 'scheduled' and destination = ?1 and available_at > strftime('%Y-%m-%d %H:%M:%f', 'now')
        order by available_at, id limit ?3
    )
) b
where b.last_error is not null
  and (b.last_error not like 'settle_failed: %' or b.last_error like 'settle_failed: retry%')
order by b.first_failed_at, b.id limit ?4";

const TALLIES: &str = "
select destination,
    cast(round((julianday(strftime('%Y-%m-%d %H:%M:00', 'now')) - julianday(minute)) * 1440.0) as integer), published,
    cast(strftime('%f', 'now') as real)
from event_tally
where minute > strftime('%Y-%m-%d %H:%M:00', 'now', '-15 minutes')";

/// Dead letters of the last day: at most `?1` of all destinations together.
const DEAD_LETTERS: &str = "
select destination, count(*) from (
    select destination from event_dead_letter
    where failed_at > strftime('%Y-%m-%d %H:%M:%f', 'now', '-1 day') and redriven_at is null and discarded_at is null
    order by failed_at desc limit ?1
)
group by destination";

const ADD: &str = "
insert into event_tally (minute, destination, published, retried, dead_lettered)
select strftime('%Y-%m-%d %H:%M:00', 'now'), value ->> 0, value ->> 1, value ->> 2, value ->> 3 from json_each(?1) where true
on conflict (minute, destination) do update
set published = published + excluded.published, retried = retried + excluded.retried,
    dead_lettered = dead_lettered + excluded.dead_lettered";

const FORGET: &str = "delete from event_tally where minute < strftime('%Y-%m-%d %H:%M:00', 'now', '-16 minutes')";

const TROUBLE: &str = "
update event_relay set trouble = (
    select json_group_object(value ->> 0, json_object(
        'state', value ->> 1, 'since', (julianday('now') - 2440587.5) * 86400.0 - (value ->> 2), 'reason', value ->> 3))
    from json_each(?2)
)
where id = ?1";

/// How many events that are due later are looked through for each destination.
const LATER: i64 = 5000;

/// How many dead letters of the last day are counted.
const DEAD: i64 = 10_000;

/// One more than are counted, which shows that there are more.
const LIMIT: i64 = MOST_COUNTED as i64 + 1;

impl SqliteOutbox {
    pub(super) async fn read_status(&self, request: StatusRequest) -> Result<Status, OutboxError> {
        let mut connection = self.connect().await?;
        drop(schema::require_fit(&mut connection).await?);
        let works = owner::holder(&self.path()?)?;
        run_query("read the status", read(&mut connection, works.as_deref(), request)).await
    }

    /// Adds to the tallies.
    pub(super) async fn write_tally(&self, counts: &[TallyCount]) -> Result<(), OutboxError> {
        let mut connection = self.connect().await?;
        let counts = counts
            .iter()
            .map(|count| serde_json::json!([count.destination, count.published, count.retried, count.dead_lettered]));
        let counts = serde_json::Value::from_iter(counts).to_string();
        run_query("add to event_tally", async {
            sqlx::query(ADD).bind(counts).execute(&mut *connection).await?;
            let old = "select exists (select 1 from event_tally where minute < strftime('%Y-%m-%d %H:%M:00', 'now', '-16 minutes'))";
            if sqlx::query_scalar(old).fetch_one(&mut *connection).await? {
                sqlx::query(FORGET).execute(&mut *connection).await?;
            }
            Ok(())
        })
        .await
    }

    /// Writes the destinations that this relay finds down.
    pub(super) async fn write_trouble(&self, found: &[Found]) -> Result<(), OutboxError> {
        let Some(member) = self.membership.member() else { return Ok(()) };
        let mut connection = self.connect().await?;
        let found = found
            .iter()
            .map(|found| serde_json::json!([found.destination, found.state, found.seconds(), found.reason]));
        let query = sqlx::query(TROUBLE).bind(member.id).bind(serde_json::Value::from_iter(found).to_string());
        run_query("write which destinations are down", query.execute(&mut *connection)).await.map(drop)
    }
}

/// `works` names the relay that works on the file.
async fn read(
    connection: &mut SqliteConnection,
    works: Option<&str>,
    request: StatusRequest,
) -> Result<Status, sqlx::Error> {
    let mut status = Status::default();
    let (at, now): (String, f64) = sqlx::query_as(NOW).fetch_one(&mut *connection).await?;
    status.at = at;
    let tallies: Vec<(String, i64, i64, f64)> = sqlx::query_as(TALLIES).fetch_all(&mut *connection).await?;
    let into_minute = tallies.first().map_or(60.0, |(.., into)| *into);
    let minutes = tallies.into_iter().map(|(destination, ago, published, _)| Minute { destination, ago, published });
    status.add_minutes(minutes.collect(), into_minute);
    let dead: Vec<(String, i64)> = sqlx::query_as(DEAD_LETTERS).bind(DEAD).fetch_all(&mut *connection).await?;
    let many = dead.iter().map(|(_, count)| count).sum::<i64>() >= DEAD;
    for (name, count) in dead.into_iter().filter(|(name, _)| !name.is_empty()) {
        let count = u64::try_from(count).unwrap_or_default();
        status.destination(&name).dead_letters = Count { count, more: many };
    }
    let row = sqlx::query(UNROUTED).bind(LIMIT).fetch_one(&mut *connection).await?;
    status.unrouted = Unrouted {
        pending: Count::capped(row.try_get("pending")?),
        oldest_due_seconds: row.try_get("oldest")?,
        delayed: Count::capped(row.try_get("delayed")?),
        estimated_rows: None,
    };
    let names: Vec<String> = sqlx::query_scalar(NAMES).fetch_all(&mut *connection).await?;
    for name in names {
        status.destination(&name);
    }
    let rows = register::rows(connection).await?;
    // One relay works at a time. The others stand by, and whether they live cannot be seen.
    let lives = |row: &Registration| match works {
        None => Some(false),
        Some(works) if works.contains(&format!("({},", row.worker)) => Some(true),
        Some(_) => None,
    };
    status.add_relays(rows, now, lives, |_| None);
    status.add_pauses(&pause::read(connection).await?);
    for destination in &mut status.destinations {
        let row = sqlx::query(OWED).bind(&destination.name).bind(LIMIT).bind(LATER).fetch_one(&mut *connection).await?;
        let count = |column: &str| row.try_get(column).map(Count::capped);
        (destination.pending, destination.retrying) = (count("due")?, count("retrying")?);
        (destination.waiting_behind, destination.parked) = (count("behind")?, count("parked")?);
        destination.oldest_due_seconds = row.try_get("oldest")?;
        if request.keys {
            let most = i64::try_from(MOST_KEYS).unwrap_or(i64::MAX);
            let query = sqlx::query(KEYS).bind(&destination.name).bind(LIMIT).bind(LATER).bind(most);
            for row in query.fetch_all(&mut *connection).await? {
                status.blocked_keys.push(key(&row)?);
            }
        }
    }
    let seconds = |key: &BlockedKey| key.blocked_seconds.unwrap_or_default();
    status.blocked_keys.sort_by(|a, b| seconds(b).total_cmp(&seconds(a)));
    status.blocked_keys.truncate(MOST_KEYS);
    Ok(status)
}

fn key(row: &SqliteRow) -> Result<BlockedKey, sqlx::Error> {
    Ok(BlockedKey {
        destination: row.try_get("destination")?,
        aggregate_type: row.try_get("aggregate_type")?,
        aggregate_id: row.try_get("aggregate_id")?,
        outbox_id: row.try_get("id")?,
        event_type: row.try_get("event_type")?,
        attempts: row.try_get("attempts")?,
        blocked_seconds: row.try_get("seconds")?,
        next_attempt_seconds: row.try_get("next")?,
        error: row.try_get("error")?,
        behind: Count::capped(row.try_get("behind")?),
    })
}
