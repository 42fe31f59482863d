//! Reads what `relay status` shows. Each part is one statement, walks a bounded number of index entries, and gives up after two
//! seconds, or a moment after it has met a lock. Then it is left out, and the status says so.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{Executor, Row};

use crate::outbox::error::OutboxError;
use crate::outbox::postgres::connection::{STATEMENT_TIMEOUT, query_failed, with_timeout};
use crate::outbox::postgres::question::Question;
use crate::outbox::postgres::sql::Sql;
use crate::outbox::postgres::store::PgOutbox;
use crate::outbox::postgres::{pause, register, schema, standstill};
use crate::outbox::standstill::Memory;
use crate::outbox::status::{
    BlockedKey, Count, MOST_COUNTED, MOST_KEYS, Minute, Obstacle, Status, StatusRequest, Unrouted,
};

const BEGIN: &str = "
begin isolation level read committed read only;
set local lock_timeout = '250ms';
set local statement_timeout = '2s'";

const NOW: &str = "
select pg_catalog.to_char(pg_catalog.clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SSZ'),
       extract(epoch from pg_catalog.clock_timestamp())::float8";

/// Pending events, and those that were delayed: at most `$1` of each are counted. The first event of each partition is its
/// oldest, by the primary key.
const UNROUTED: &str = "
select (
    select pg_catalog.count(*) from (
        select from {schema}.event_outbox o where o.partition < 640::smallint order by o.partition, o.id limit $1
    ) c
) as pending, (
    select extract(epoch from pg_catalog.clock_timestamp() - pg_catalog.min(first.due))::float8
    from pg_catalog.generate_series(0, 639) p(partition)
    cross join lateral (
        select greatest(o.available_at, '0001-01-01Z'::timestamptz) as due from {schema}.event_outbox o
        where o.partition = p.partition::smallint
        order by o.partition, o.id limit 1
    ) first
    where first.due <= pg_catalog.statement_timestamp()
) as oldest, (
    select pg_catalog.count(*) from (
        select from {schema}.event_outbox o where o.status = 'scheduled' and o.destination = ''
        order by o.available_at, o.id limit $1
    ) c
) as delayed, (
    select t.reltuples::float8 from pg_catalog.pg_class t where t.oid = '{schema}.event_outbox'::regclass::oid
) as estimated";

/// The destinations that are owed an event, each by one index entry, and those of `$1`.
const NAMES: &str = "
with recursive owed(destination) as (
    (select e.destination from {schema}.event_outbox e
     where e.status = 'scheduled' and e.destination > '' order by e.destination limit 1)
    union all
    select (select e.destination from {schema}.event_outbox e
            where e.status = 'scheduled' and e.destination > owed.destination order by e.destination limit 1)
    from owed where owed.destination is not null
)
select o.destination from (select w.destination from owed w where w.destination is not null limit 100) o";

/// For each destination `$1`, what is owed to it: at most `$2` events that are due, `$3` that are due later, and `$2` that are
/// parked.
const OWED: &str = "
select n.destination, due.events as due, due.oldest, due.retrying + later.retrying as retrying, later.behind, parked.events as parked
from pg_catalog.unnest($1::text[]) n(destination)
cross join lateral (
    select pg_catalog.count(*) as events, pg_catalog.count(c.last_error) as retrying,
           extract(epoch from pg_catalog.clock_timestamp()
               - pg_catalog.min(greatest(c.created_at, '0001-01-01Z'::timestamptz)))::float8 as oldest
    from (
        select e.created_at, e.last_error from {schema}.event_outbox e
        where e.status = 'scheduled' and e.destination = n.destination
          and e.available_at <= pg_catalog.statement_timestamp()
        order by e.available_at, e.id limit $2
    ) c
) due
cross join lateral (
    select pg_catalog.count(c.last_error) as retrying, pg_catalog.count(*) - pg_catalog.count(c.last_error) as behind
    from (
        select e.last_error from {schema}.event_outbox e
        where e.status = 'scheduled' and e.destination = n.destination
          and e.available_at > pg_catalog.statement_timestamp() and e.available_at < 'infinity'
        order by e.available_at, e.id limit $3
    ) c
) later
cross join lateral (
    select pg_catalog.count(c.last_error) as events
    from (
        select e.last_error from {schema}.event_outbox e
        where e.status = 'scheduled' and e.destination = n.destination and e.available_at = 'infinity'
        order by e.available_at, e.id limit $2
    ) c
) parked";

/// For each destination `$1`, the events that have failed there, among as many as [`OWED`] reads; and how many events wait behind
/// each, at most `$2`. At most `$4` events are returned.
const KEYS: &str = "
select b.*, case when b.aggregate_id is null then 0::bigint else (
    select pg_catalog.count(*) from (
        select from {schema}.event_outbox w
        where w.status = 'scheduled' and w.destination <> '' and w.aggregate_id is not null and w.destination = b.destination
          and pg_catalog.hashtextextended(w.aggregate_id, pg_catalog.hashtextextended(coalesce(w.aggregate_type, ''), 0))
            = pg_catalog.hashtextextended(b.aggregate_id, pg_catalog.hashtextextended(coalesce(b.aggregate_type, ''), 0))
          and w.aggregate_id = b.aggregate_id and coalesce(w.aggregate_type, '') = coalesce(b.aggregate_type, '')
          and w.id > b.id
        limit $2
    ) c
) end as behind
from (
    select s.destination, s.aggregate_type, s.aggregate_id, s.id, s.event_type, s.attempts::bigint as attempts, s.last_error as error,
        extract(epoch from pg_catalog.clock_timestamp() - s.first_failed_at)::float8 as seconds,
        case when s.available_at < 'infinity' then greatest(0.0::float8,
            extract(epoch from s.available_at - pg_catalog.clock_timestamp())::float8) end as next
    from pg_catalog.unnest($1::text[]) n(destination)
    cross join lateral (
        (select e.* from {schema}.event_outbox e
         where e.status = 'scheduled' and e.destination = n.destination
           and e.available_at <= pg_catalog.statement_timestamp()
         order by e.available_at, e.id limit $2)
        union all
        (select e.* from {schema}.event_outbox e
         where e.status = 'scheduled' and e.destination = n.destination
           and e.available_at > pg_catalog.statement_timestamp()
         order by e.available_at, e.id limit $3)
    ) s
    where s.last_error is not null
      and (not pg_catalog.starts_with(s.last_error, 'settle_failed: ')
           or pg_catalog.starts_with(s.last_error, 'settle_failed: retry'))
    order by s.first_failed_at, s.id limit $4
) b
order by b.seconds desc nulls last, b.id";

const TALLIES: &str = "
select t.destination,
    pg_catalog.round((extract(epoch from present.minute - t.minute) / 60)::numeric)::bigint, t.published,
    extract(epoch from pg_catalog.statement_timestamp() - present.minute)::float8
from (
    select pg_catalog.to_timestamp(
        pg_catalog.floor(extract(epoch from pg_catalog.statement_timestamp())::float8 / 60.0::float8) * 60.0::float8
    ) as minute
) present
cross join {schema}.event_tally t
where t.minute > present.minute - interval '15 minutes'";

/// Dead letters of the last day, newest first: at most `$1` of all destinations together.
const DEAD_LETTERS: &str = "
select d.destination, pg_catalog.count(*)
from (
    select l.destination from {schema}.event_dead_letter l
    where l.failed_at > pg_catalog.statement_timestamp() - interval '1 day' and l.redriven_at is null and l.discarded_at is null
    order by l.failed_at desc limit $1
) d
group by d.destination";

/// Sessions that have had a snapshot or a transaction id for more than a minute. Other roles see this only as members of
/// pg_read_all_stats.
const SNAPSHOTS: &str = "
select a.pid, a.application_name, a.usename::text, coalesce(a.state, ''),
    extract(epoch from pg_catalog.clock_timestamp() - a.xact_start)::float8
from pg_catalog.pg_stat_activity a
where a.datname = pg_catalog.current_database() and a.pid <> pg_catalog.pg_backend_pid()
  and (a.backend_xmin is not null or a.backend_xid is not null) and a.backend_type = 'client backend'
  and a.xact_start < pg_catalog.clock_timestamp() - interval '1 minute'
order by a.xact_start limit 5";

/// How many events that are due later are looked through for each destination.
const LATER: i64 = 5000;

/// How many dead letters of the last day are counted.
const DEAD: i64 = 10_000;

/// One more than are counted, which shows that there are more.
const LIMIT: i64 = MOST_COUNTED as i64 + 1;

/// A connection, and what became of the parts so far.
struct Reader<'a> {
    connection: &'a mut PgConnection,
    sql: Sql,
    unread: Vec<String>,
    /// A part has met a lock on event_outbox.
    locked: bool,
}

impl Reader<'_> {
    /// Reads one part. If the database refuses it, returns the default and says so.
    async fn part<T: Default>(
        &mut self,
        what: &str,
        read: impl AsyncFnOnce(Sql, &mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, OutboxError> {
        let operation = "read the status";
        match with_timeout_of(operation, read(self.sql, self.connection)).await? {
            Ok(part) => Ok(part),
            Err(sqlx::Error::Database(error)) => {
                let code = error.code().unwrap_or_default().into_owned();
                self.locked |= code == "55P03";
                let why = match code.as_str() {
                    "55P03" => "it is locked".to_owned(),
                    "57014" => "it took longer than 2 s".to_owned(),
                    _ => error.message().to_owned(),
                };
                self.unread.push(format!("{what}: {why}"));
                with_timeout(operation, STATEMENT_TIMEOUT, async {
                    self.connection.execute("rollback").await?;
                    self.connection.execute(BEGIN).await
                })
                .await?;
                Ok(T::default())
            }
            Err(error) => Err(query_failed(operation, error)),
        }
    }
}

async fn with_timeout_of<T>(
    operation: &'static str,
    read: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<Result<T, sqlx::Error>, OutboxError> {
    tokio::time::timeout(STATEMENT_TIMEOUT, read)
        .await
        .map_err(|_| OutboxError::TimedOut { operation, after: STATEMENT_TIMEOUT })
}

/// Reads the status.
pub(super) async fn read(
    connection: &mut PgConnection,
    outbox: &PgOutbox,
    request: StatusRequest,
) -> Result<Status, OutboxError> {
    with_timeout("begin", STATEMENT_TIMEOUT, connection.execute(BEGIN)).await?;
    drop(schema::require_fit(connection).await?);
    let sql = Sql { persistent: false, ..outbox.sql() };
    let mut reader = Reader { connection, sql, unread: Vec::new(), locked: false };
    let mut status = Status::default();
    let (at, now): (String, f64) = reader.part("time", async |sql, c| sql.query_as(NOW).fetch_one(c).await).await?;
    status.at = at;
    let publish_timeout = outbox.config.publish_timeout;
    status.obstacles = reader.part("locks", async |sql, c| obstacles(c, sql, publish_timeout).await).await?;
    status.obstacles.extend(reader.part("snapshots", async |sql, c| snapshots(c, sql).await).await?);
    let relays = reader.part("relays", async |sql, c| register::rows(sql, c).await).await?;
    let lanes = reader.part("lanes", async |sql, c| register::lanes(sql, c).await).await?;
    let holds = |row: &crate::outbox::register::Registration| {
        let held = lanes.iter().find(|held| held.key == register::lanes_key(row.id))?;
        Some((unsigned(held.partitions), unsigned(held.batches)))
    };
    let lives = |row: &crate::outbox::register::Registration| row.session.or(row.lives().then_some(true));
    let tallies: Vec<(String, i64, i64, f64)> =
        reader.part("tallies", async |sql, c| sql.query_as(TALLIES).fetch_all(c).await).await?;
    let into_minute = tallies.first().map_or(60.0, |(.., into)| *into);
    let minutes = tallies.into_iter().map(|(destination, ago, published, _)| Minute { destination, ago, published });
    status.add_minutes(minutes.collect(), into_minute);
    let dead: Vec<(String, i64)> =
        reader.part("dead letters", async |sql, c| sql.query_as(DEAD_LETTERS).bind(DEAD).fetch_all(c).await).await?;
    let many = dead.iter().map(|(_, count)| count).sum::<i64>() >= DEAD;
    for (name, count) in dead.into_iter().filter(|(name, _)| !name.is_empty()) {
        status.destination(&name).dead_letters = Count { count: unsigned(count), more: many };
    }
    status.unrouted = reader.part("unrouted events", async |sql, c| unrouted(c, sql).await).await?;
    if !reader.locked {
        let names: Vec<String> =
            reader.part("destinations", async |sql, c| sql.query_scalar(NAMES).fetch_all(c).await).await?;
        for name in names {
            status.destination(&name);
        }
    }
    status.add_relays(relays, now, lives, holds);
    status.add_pauses(&reader.part("pauses", async |sql, c| pause::read(sql, c).await).await?);
    let names: Vec<String> = status.destinations.iter().map(|destination| destination.name.clone()).collect();
    if !reader.locked {
        let rows = reader.part("events owed", async |sql, c| owed(c, sql, &names).await).await?;
        for row in rows {
            let destination = status.destination(&row.destination);
            destination.pending = row.due;
            destination.oldest_due_seconds = row.oldest;
            (destination.retrying, destination.waiting_behind) = (row.retrying, row.behind);
            destination.parked = row.parked;
        }
    }
    if request.keys && !reader.locked {
        status.blocked_keys = reader.part("blocked keys", async |sql, c| keys(c, sql, &names).await).await?;
    }
    status.unread = reader.unread;
    with_timeout("end the reading of the status", STATEMENT_TIMEOUT, connection.execute("commit")).await?;
    Ok(status)
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}

async fn unrouted(connection: &mut PgConnection, sql: Sql) -> Result<Unrouted, sqlx::Error> {
    let row = sql.query(UNROUTED).bind(LIMIT).fetch_one(connection).await?;
    let estimated: f64 = row.try_get("estimated")?;
    Ok(Unrouted {
        pending: Count::capped(row.try_get("pending")?),
        oldest_due_seconds: row.try_get("oldest")?,
        delayed: Count::capped(row.try_get("delayed")?),
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an estimate")]
        estimated_rows: (estimated >= 0.0).then_some(estimated as u64),
    })
}

/// What is owed to one destination.
struct OwedRow {
    destination: String,
    due: Count,
    oldest: Option<f64>,
    retrying: Count,
    behind: Count,
    parked: Count,
}

async fn owed(connection: &mut PgConnection, sql: Sql, names: &[String]) -> Result<Vec<OwedRow>, sqlx::Error> {
    let rows = sql.query(OWED).bind(names).bind(LIMIT).bind(LATER).fetch_all(connection).await?;
    let count = |row: &PgRow, column: &str| row.try_get(column).map(Count::capped);
    rows.iter()
        .map(|row| {
            Ok(OwedRow {
                destination: row.try_get("destination")?,
                due: count(row, "due")?,
                oldest: row.try_get("oldest")?,
                retrying: count(row, "retrying")?,
                behind: count(row, "behind")?,
                parked: count(row, "parked")?,
            })
        })
        .collect()
}

async fn keys(connection: &mut PgConnection, sql: Sql, names: &[String]) -> Result<Vec<BlockedKey>, sqlx::Error> {
    let most = i64::try_from(MOST_KEYS).unwrap_or(i64::MAX);
    let rows = sql.query(KEYS).bind(names).bind(LIMIT).bind(LATER).bind(most).fetch_all(connection).await?;
    rows.iter()
        .map(|row| {
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
        })
        .collect()
}

async fn obstacles(
    connection: &mut PgConnection,
    sql: Sql,
    publish_timeout: Duration,
) -> Result<Vec<Obstacle>, sqlx::Error> {
    let question = Question {
        sql,
        destinations: &[],
        publish_timeout,
        history: true,
        brief: Duration::ZERO,
        memory: &Memory::default(),
        bounds: Vec::new(),
        behind_unknown_format: &AtomicBool::new(false),
    };
    let found = standstill::lock_holders(connection, &question).await?;
    Ok(found.into_iter().map(|found| Obstacle { cause: found.cause.to_owned(), text: found.text }).collect())
}

async fn snapshots(connection: &mut PgConnection, sql: Sql) -> Result<Vec<Obstacle>, sqlx::Error> {
    let rows: Vec<(i32, String, Option<String>, String, f64)> = sql.query_as(SNAPSHOTS).fetch_all(connection).await?;
    let told = rows.into_iter().map(|(pid, application, role, state, seconds)| {
        let lasts = humantime::format_duration(Duration::from_secs_f64(seconds.max(0.0).trunc()));
        let role = role.unwrap_or_default();
        let text = format!(
            "the session with pid {pid}, application {application:?}, role {role}, {state}, has held a snapshot for {lasts}: no dead \
             row can be removed, and the relay becomes slower; let it end, or end it: select pg_catalog.pg_terminate_backend({pid})"
        );
        Obstacle { cause: "snapshot_held".to_owned(), text }
    });
    Ok(told.collect())
}
