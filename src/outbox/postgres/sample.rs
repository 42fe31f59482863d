//! The figures for the metrics. Two statements, every 15 s, by one relay: it holds an advisory lock of its side connection.

use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::{PgConnection, PgRow};

use crate::outbox::deliveries::NO_DESTINATION;
use crate::outbox::error::OutboxError;
use crate::outbox::partitions::PENDING;
use crate::outbox::postgres::sql::Sql;
use crate::outbox::postgres::store::PgOutbox;
use crate::outbox::sample::{DatabaseSample, DestinationSample, MOST_PENDING, MOST_SAMPLED, Sample, Sampling};

/// Takes the lock of the relay that samples, or sees that this session holds it, and then asks catalogues and statistics. It
/// locks no table. `$1`: there is no session, so that each relay samples for itself.
///
/// It also limits how long the next statement may wait, and says what the limits were. One more statement for each of these
/// would double the number of statements.
///
/// A role sees the snapshots of other roles only with the rights of `pg_read_all_stats`. Autovacuum's own snapshots hold up
/// no other vacuum.
const DATABASE: &str = "
with me as materialized (
    select case
        when $1 then true
        when exists (
            select from pg_catalog.pg_locks l
            where l.locktype = 'advisory' and l.granted and l.objsubid = 2 and l.pid = pg_catalog.pg_backend_pid()
              and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())
              and l.classid = '{schema}.event_outbox'::regclass::oid and l.objid = '1000001'::oid
        ) then true
        else pg_catalog.pg_try_advisory_lock('{schema}.event_outbox'::regclass::oid::int, 1000001)
    end as samples,
    pg_catalog.current_setting('lock_timeout') as lock_timeout,
    pg_catalog.current_setting('statement_timeout') as statement_timeout
)
select me.samples, me.lock_timeout, me.statement_timeout, found.*,
    case when me.samples then pg_catalog.set_config('lock_timeout', '1s', $1) end,
    case when me.samples then pg_catalog.set_config('statement_timeout', '2s', $1) end
from me
left join lateral (
    select
        pg_catalog.pg_stat_get_live_tuples('{schema}.event_outbox'::regclass::oid) as rows,
        pg_catalog.pg_stat_get_dead_tuples('{schema}.event_outbox'::regclass::oid) as dead_rows,
        pg_catalog.pg_stat_get_live_tuples('{schema}.event_dead_letter'::regclass::oid) as dead_letters,
        pg_catalog.date_part('epoch', pg_catalog.pg_stat_get_last_autovacuum_time('{schema}.event_outbox'::regclass::oid))
            as last_autovacuum,
        (
            select pg_catalog.max(pg_catalog.to_date(pg_catalog.\"right\"(c.relname::text, 8), 'YYYYMMDD'))
                - (pg_catalog.clock_timestamp() at time zone 'UTC')::date
            from pg_catalog.pg_inherits i join pg_catalog.pg_class c on c.oid = i.inhrelid
            where i.inhparent = '{schema}.event_processing_log'::regclass::oid and c.relname::text ~ '_[0-9]{8}$'
        ) as days_ahead,
        snapshot.seconds, snapshot.holder
    from (select me.samples) it
    left join lateral (
        select holders.seconds, holders.holder
        from (
            select pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() - a.xact_start) as seconds,
                   a.application_name as holder
            from pg_catalog.pg_stat_activity a
            where a.backend_xmin is not null and a.xact_start is not null and a.pid <> pg_catalog.pg_backend_pid()
              and a.backend_type <> 'autovacuum worker'
              and (a.datname is null or a.datname = pg_catalog.current_database())
            union all
            select pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() - p.prepared), 'a prepared transaction'
            from pg_catalog.pg_prepared_xacts p where p.database = pg_catalog.current_database()
        ) holders
        order by holders.seconds desc limit 1
    ) snapshot on true
    where it.samples
) found on true";

/// `$1` destinations, among them the empty name of events that are not routed yet; of each at most `$2` events are counted for
/// each figure. `$3` partitions, with the ids above which they may have pending events in `$4`; of each at most `$5` events
/// are counted. `$6` and `$7` are the limits to restore, `$8`: until the transaction ends.
///
/// An event that waits for a destination has a new `available_at` whenever that was probed. So it is due since it was created.
const DESTINATIONS: &str = "
select found.*, restored.lock_timeout, restored.statement_timeout
from (
    select pg_catalog.set_config('lock_timeout', $6, $8) as lock_timeout,
           pg_catalog.set_config('statement_timeout', $7, $8) as statement_timeout
) restored
left join lateral (
    select d.destination, due.events as pending, due.seconds, later.retrying, later.waiting_behind, later.blocked_keys,
           parked.events as parked
    from pg_catalog.unnest($1::text[]) d(destination)
    cross join lateral (
        select pg_catalog.count(*) as events,
               pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() - pg_catalog.min(e.since)) as seconds
        from (
            select greatest('2000-01-01Z'::timestamptz,
                            case d.destination when '' then o.available_at else least(o.available_at, o.created_at) end)
                as since
            from {schema}.event_outbox o
            where o.status = 'scheduled' and o.destination = d.destination
              and o.available_at <= pg_catalog.statement_timestamp()
            order by o.available_at, o.id limit $2
        ) e
    ) due
    cross join lateral (
        select pg_catalog.count(*) filter (where e.failed) as retrying,
               pg_catalog.count(*) filter (where not e.failed) as waiting_behind,
               pg_catalog.count(distinct e.key) filter (where e.failed) as blocked_keys
        from (
            select o.last_error is not null as failed, pg_catalog.hashtextextended(
                o.aggregate_id, pg_catalog.hashtextextended(coalesce(o.aggregate_type, ''), 0)) as key
            from {schema}.event_outbox o
            where o.status = 'scheduled' and o.destination = d.destination
              and o.available_at > pg_catalog.statement_timestamp() and o.available_at < 'infinity'
            order by o.available_at, o.id limit $2
        ) e
    ) later
    cross join lateral (
        select pg_catalog.count(*) as events
        from (
            select from {schema}.event_outbox o
            where o.status = 'scheduled' and o.destination = d.destination and o.available_at = 'infinity'
            order by o.available_at, o.id limit $2
        ) e
    ) parked
    union all
    select first.destination, pg_catalog.count(*),
           pg_catalog.date_part('epoch', pg_catalog.clock_timestamp()
               - pg_catalog.min(greatest('2000-01-01Z'::timestamptz, first.available_at))),
           0::bigint, 0::bigint, 0::bigint, 0::bigint
    from unnest($3::smallint[], $4::bigint[]) b(partition, bound)
    cross join lateral (
        select o.destination, o.available_at from {schema}.event_outbox o
        where o.partition = b.partition and o.id > b.bound
        order by o.partition, o.id limit $5
    ) first
    group by first.destination
) found on true";

impl PgOutbox {
    /// Returns the figures of this moment, if this relay samples and its side connection is free.
    pub(super) async fn take_sample(&self, destinations: &[String]) -> Result<Sampling, OutboxError> {
        let asked = self
            .on_side_connection_unless_busy("sample the figures of the outbox", async |connection| {
                self.begin_pooled(connection).await?;
                let sample = self.ask_for_sample(connection, destinations).await?;
                self.commit_pooled(connection).await?;
                Ok(sample)
            })
            .await;
        asked.unwrap_or(Ok(Sampling::NotNow))
    }

    async fn ask_for_sample(
        &self,
        connection: &mut PgConnection,
        destinations: &[String],
    ) -> Result<Sampling, sqlx::Error> {
        // Planned anew each time: the plan must not outlive the tables' growth, nor a pooler's server.
        let (sql, pooled) = (Sql { persistent: false, ..self.sql() }, self.config.pooled);
        let row = sql.query(DATABASE).bind(pooled).fetch_one(&mut *connection).await?;
        if !row.try_get::<bool, _>("samples")? {
            return Ok(Sampling::ByAnother);
        }
        let database = database(&row)?;
        let names: Vec<&str> = std::iter::once(NO_DESTINATION).chain(destinations.iter().map(String::as_str)).collect();
        let partitions: Vec<i16> = (0..PENDING).collect();
        let bounds = self.bounds.known().0.bounds_of(&partitions);
        let rows = sql
            .query(DESTINATIONS)
            .bind(&names)
            .bind(MOST_SAMPLED)
            .bind(partitions)
            .bind(bounds)
            .bind(MOST_PENDING)
            .bind(row.try_get::<&str, _>("lock_timeout")?)
            .bind(row.try_get::<&str, _>("statement_timeout")?)
            .bind(pooled)
            .fetch_all(connection)
            .await?;
        let named = |name: &&str| DestinationSample { name: (*name).to_owned(), ..DestinationSample::default() };
        let mut sample = Sample { destinations: names.iter().map(named).collect(), database };
        for row in &rows {
            add(&mut sample.destinations, row)?;
        }
        Ok(Sampling::Taken(sample))
    }
}

fn database(row: &PgRow) -> Result<DatabaseSample, sqlx::Error> {
    let number = |column: &str| row.try_get::<Option<i64>, _>(column).map(Option::unwrap_or_default);
    Ok(DatabaseSample {
        rows: number("rows")?,
        dead_rows: number("dead_rows")?,
        dead_letters: number("dead_letters")?,
        oldest_snapshot: seconds(row)?,
        snapshot_holder: row.try_get("holder")?,
        last_autovacuum: row.try_get::<Option<f64>, _>("last_autovacuum")?.unwrap_or_default(),
        days_ahead: row.try_get::<Option<i32>, _>("days_ahead")?.unwrap_or_default().into(),
    })
}

/// Adds a row to the destination that it names. Other destinations are reported as a standstill.
fn add(destinations: &mut [DestinationSample], row: &PgRow) -> Result<(), sqlx::Error> {
    let name: &str = row.try_get("destination")?;
    let Some(there) = destinations.iter_mut().find(|there| there.name == name) else { return Ok(()) };
    there.oldest_due = there.oldest_due.max(seconds(row)?);
    there.pending += row.try_get::<i64, _>("pending")?;
    there.retrying += row.try_get::<i64, _>("retrying")?;
    there.waiting_behind += row.try_get::<i64, _>("waiting_behind")?;
    there.blocked_keys += row.try_get::<i64, _>("blocked_keys")?;
    there.parked += row.try_get::<i64, _>("parked")?;
    Ok(())
}

fn seconds(row: &PgRow) -> Result<Duration, sqlx::Error> {
    let seconds: Option<f64> = row.try_get("seconds")?;
    Ok(Duration::try_from_secs_f64(seconds.unwrap_or_default().max(0.0)).unwrap_or_default())
}
