//! Finds what keeps events from moving: one probe for each cause, one statement for each probe.
//!
//! A probe must not wait for whoever blocks the tables, so it reads catalogues, `pg_locks` and `pg_stat_activity`. A probe that
//! reads a table of ours gives up after a second. To add a probe: a text, a function, and a line in [`PROBES`].

use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{Executor, Row};

use crate::outbox::partitions::PENDING;
use crate::outbox::postgres::question::Question;
use crate::outbox::postgres::sql::Sql;
use crate::outbox::postgres::{formats, left_out, parked, unconfigured, undecided};
use crate::outbox::standstill::{NOT_TAKEN, Standstill, TAKEN_AFTER, not_taken as not_taken_text};

type Probe = for<'a> fn(&'a mut PgConnection, &'a Question<'a>) -> BoxFuture<'a, Result<Vec<Standstill>, sqlx::Error>>;

/// Probes that read catalogues come first: where a table is locked, the others wait in vain.
const PROBES: [Probe; 9] = [
    |connection, question| table_locked(connection, question).boxed(),
    |connection, question| partitions_held(connection, question).boxed(),
    |connection, question| undecided::find(connection, question).boxed(),
    |connection, question| unconfigured::find(connection, question),
    |connection, question| parked::parked(connection, question).boxed(),
    |connection, question| parked::blocked(connection, question).boxed(),
    |connection, question| left_out::find(connection, question).boxed(),
    |connection, question| formats::unknown(connection, question).boxed(),
    // This is the last one, because its answer is left out if another probe has found the reason.
    |connection, question| not_taken(connection, question).boxed(),
];

/// The cause of a standstill: a session's lock keeps claims or settles waiting.
pub(super) const TABLE_LOCKED: &str = "table_locked";

/// No probe may wait for long, whatever is locked.
const BEGIN: &str = "
begin isolation level read committed read only;
set local lock_timeout = '1s';
set local statement_timeout = '5s'";

/// A state that lasts shorter than this is no standstill.
pub(super) const BRIEF: Duration = Duration::from_secs(3);

/// Returns what stands still, and whether to look again after [`BRIEF`]: a state that is too brief to count may be over then,
/// or last.
pub(super) async fn find(
    connection: &mut PgConnection,
    question: &Question<'_>,
) -> Result<(Vec<Standstill>, bool), sqlx::Error> {
    let found = ask(connection, question).await?;
    Ok((found, question.memory.forget_unseen()))
}

/// Returns who holds locks that keep events from moving, also if it did not last long yet, and undecided prepared transactions.
/// Reads catalogues only.
pub(super) async fn lock_holders(
    connection: &mut PgConnection,
    question: &Question<'_>,
) -> Result<Vec<Standstill>, sqlx::Error> {
    let mut found = table_locked(connection, question).await?;
    found.extend(partitions_held(connection, question).await?);
    found.extend(undecided::find(connection, question).await?);
    Ok(found)
}

/// Returns the sessions that hold partitions now.
pub(super) async fn holders(connection: &mut PgConnection, sql: Sql) -> Result<Vec<String>, sqlx::Error> {
    let rows = sql.query(PARTITIONS_HELD).fetch_all(connection).await?;
    rows.iter().map(|row| Holder::of(row).map(|session| session.name(Duration::ZERO))).collect()
}

/// Runs all probes. If the database refuses a probe, it is left out. If a table is locked, all later probes are left out.
async fn ask(connection: &mut PgConnection, question: &Question<'_>) -> Result<Vec<Standstill>, sqlx::Error> {
    let mut found: Vec<Standstill> = Vec::new();
    connection.execute(BEGIN).await?;
    for probe in PROBES {
        match probe(connection, question).await {
            Ok(standstills) if standstills.iter().all(|new| new.cause != NOT_TAKEN) || !found.iter().any(holds_all) => {
                found.extend(standstills);
            }
            Ok(_) => {}
            Err(sqlx::Error::Database(error)) => {
                tracing::debug!(error = error.message(), "a search for standstills was refused");
                connection.execute("rollback").await?;
                if error.code().as_deref() == Some("55P03") {
                    return Ok(found);
                }
                connection.execute(BEGIN).await?;
            }
            Err(error) => return Err(error),
        }
    }
    connection.execute("commit").await?;
    Ok(found)
}

/// Returns whether this standstill is the reason that events are not taken.
fn holds_all(standstill: &Standstill) -> bool {
    [TABLE_LOCKED, "partitions_held"].contains(&standstill.cause)
}

/// A session that stands in the way.
struct Holder {
    /// `None` for a prepared transaction.
    pid: Option<i32>,
    /// Its present transaction, as `pg_locks` names it. Outside of a transaction the name ends in `/0`.
    transaction: String,
    application: Option<String>,
    role: Option<String>,
    /// The state of the session, which is hidden from other roles, as are the times.
    state: Option<String>,
    since: Option<String>,
    seconds: Option<f64>,
}

impl Holder {
    fn of(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            pid: row.try_get("pid")?,
            transaction: row.try_get("transaction")?,
            application: row.try_get("application")?,
            role: row.try_get("role")?,
            state: row.try_get("state")?,
            since: row.try_get("since")?,
            seconds: row.try_get("seconds")?,
        })
    }

    /// Names the session for people: who it is, and since when.
    fn name(&self, seen: Duration) -> String {
        let Some(pid) = self.pid else {
            return format!("a prepared transaction ({})", self.transaction);
        };
        let mut name = format!("the session with pid {pid}");
        let known = |part: &Option<String>| part.clone().filter(|part| !part.is_empty());
        if let Some(application) = known(&self.application) {
            name.push_str(&format!(", application {application:?}"));
        }
        if let Some(role) = known(&self.role) {
            name.push_str(&format!(", role {role}"));
        }
        if let Some(state) = known(&self.state) {
            name.push_str(&format!(", {state}"));
        }
        match &self.since {
            Some(since) => name.push_str(&format!(", since {since}")),
            None if seen.is_zero() => {}
            None => name.push_str(&format!(", seen for {} s", seen.as_secs())),
        }
        name
    }

    /// A name that stays the same as long as the session lasts.
    fn key(&self) -> String {
        match self.pid {
            Some(pid) => format!("pid {pid}"),
            None => self.transaction.clone(),
        }
    }

    fn cure(&self) -> String {
        match self.pid {
            Some(pid) => format!("let it end, or end it: select pg_catalog.pg_terminate_backend({pid})"),
            None => "end it with COMMIT PREPARED or ROLLBACK PREPARED; pg_prepared_xacts lists it".to_owned(),
        }
    }

    fn held(&self, seen: Duration) -> Duration {
        self.seconds.map_or(seen, |seconds| Duration::from_secs_f64(seconds.max(0.0)))
    }
}

/// Finds locks on our tables, their day partitions and our sequences. Such a lock conflicts with a claim
/// (`AccessExclusiveLock`) or with a settle (the others). One that is itself waited for blocks all that come after it. The
/// sequence of the ids may be the table's own or the application's.
const TABLE_LOCKS: &str = "
with outbox as (
    select o.oid, o.relnamespace, a.attnum from pg_catalog.pg_class o
    left join pg_catalog.pg_attribute a on a.attrelid = o.oid and a.attname = 'id'::name
    where o.oid = '{schema}.event_outbox'::regclass::oid
), ours as (
    select t.oid, t.relname, t.relname::text as part from outbox o
    join pg_catalog.pg_class t on t.relnamespace = o.relnamespace and t.relkind in ('r', 'p', 'S')
     and t.relname in ('event_outbox', 'event_processing_log', 'event_dead_letter', 'event_history', 'event_relay',
                       'event_relay_run', 'event_crash_suspect', 'event_outbox_epoch', 'event_outbox_moves',
                       'event_relay_changes', 'event_pause', 'event_pause_changes')
    union all
    select s.oid, s.relname, 'ids' from pg_catalog.pg_class s where s.relkind = 'S' and s.oid in (
        select d.objid from outbox o join pg_catalog.pg_depend d on d.refobjid = o.oid and d.refobjsubid = o.attnum::int
        where d.classid = 'pg_catalog.pg_class'::regclass::oid and d.refclassid = 'pg_catalog.pg_class'::regclass::oid
        union all
        select d.refobjid from outbox o join pg_catalog.pg_attrdef f on f.adrelid = o.oid and f.adnum = o.attnum
        join pg_catalog.pg_depend d on d.objid = f.oid
        where d.classid = 'pg_catalog.pg_attrdef'::regclass::oid and d.refclassid = 'pg_catalog.pg_class'::regclass::oid
    )
), tables as (
    select oid, relname, part from ours
    union all
    select i.inhrelid, o.relname, o.part from ours o join pg_catalog.pg_inherits i on i.inhparent = o.oid
)
select distinct on (l.pid, l.virtualtransaction, t.relname)
    l.pid, l.virtualtransaction as transaction, a.application_name as application, a.usename::text as role, a.state,
    pg_catalog.to_char(a.xact_start at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SSZ') as since,
    extract(epoch from pg_catalog.clock_timestamp() - a.xact_start)::float8 as seconds,
    t.relname::text as relation, t.part, l.mode, l.granted,
    case when l.granted then '{}' else pg_catalog.pg_blocking_pids(l.pid) end as behind
from pg_catalog.pg_locks l
join tables t on t.oid = l.relation
left join pg_catalog.pg_stat_activity a on a.pid = l.pid
where l.locktype = 'relation'
  and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())
  and l.mode in ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
  and l.pid is distinct from pg_catalog.pg_backend_pid()
  and ($1 or t.part <> 'event_history')
order by l.pid, l.virtualtransaction, t.relname, l.granted desc, l.mode";

/// Says what waits while this table or sequence is locked.
fn waits(part: &str) -> &'static str {
    match part {
        "event_dead_letter" => {
            "what is to be dead-lettered waits until it ends, with all that is settled with it, and no relay starts"
        }
        "event_relay" => "no relay starts until it ends, and relays at work do not learn of others",
        "event_pause" => "no relay starts until it ends, and nobody can pause or resume a destination",
        "event_relay_changes" | "event_relay_run" => "no relay starts until it ends",
        "event_crash_suspect" => "no relay starts until it ends, and events that are tried after a crash wait",
        "event_outbox_moves" => "what is delayed, tried again or redriven waits until it ends, and no relay starts",
        "ids" => "nobody can insert an event until it ends",
        _ => "events wait until it ends",
    }
}

async fn table_locked(connection: &mut PgConnection, question: &Question<'_>) -> Result<Vec<Standstill>, sqlx::Error> {
    let rows = question.sql.query(TABLE_LOCKS).bind(question.history).fetch_all(connection).await?;
    let mut found = Vec::new();
    for row in &rows {
        let session = Holder::of(row)?;
        let (relation, mode): (&str, &str) = (row.try_get("relation")?, row.try_get("mode")?);
        let waiting = waits(row.try_get("part")?);
        let behind: Vec<i32> = row.try_get("behind")?;
        let who = format!("{relation} {}", session.key());
        let seen = question.memory.seen(&(who.clone() + &session.transaction));
        if session.held(seen) < question.brief {
            question.memory.is_brief(&(who + &session.transaction));
            continue;
        }
        let name = session.name(seen);
        let text = if row.try_get("granted")? {
            format!("{relation} is locked ({mode}) by {name}: {waiting}; {}", session.cure())
        } else {
            let behind: Vec<_> = behind.iter().map(ToString::to_string).collect();
            format!(
                "{name} waits for a lock on {relation} ({mode}) behind pid {}, and all others wait behind it: {waiting}; {}",
                behind.join(", "),
                session.cure()
            )
        };
        found.push(Standstill::new(TABLE_LOCKED, text).about(who));
    }
    Ok(found)
}

/// Finds the sessions that hold partitions. A relay holds them within a transaction, for as long as it publishes and settles. A
/// stranger holds them outside of a transaction, or its last statement, where this role may see that, is none of a claim.
const PARTITIONS_HELD: &str = "
select l.pid, l.virtualtransaction as transaction, a.application_name as application, a.usename::text as role, a.state,
    pg_catalog.to_char(coalesce(a.xact_start, a.state_change) at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SSZ') as since,
    extract(epoch from pg_catalog.clock_timestamp() - coalesce(a.xact_start, a.state_change))::float8 as seconds,
    pg_catalog.count(*) as partitions,
    l.virtualtransaction like '%/0' or coalesce(a.state, '') = 'idle'
        or a.application_name is distinct from pg_catalog.current_setting('application_name') and a.state is not null
           and a.query !~ '(ctid|relay_epoch_above|pg_current_wal|event_processing_log|event_outbox_epoch|event_outbox_moves)'
        as stranger
from pg_catalog.pg_locks l
left join pg_catalog.pg_stat_activity a on a.pid = l.pid
where l.locktype = 'advisory' and l.granted and l.objsubid = 2
  and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())
  and l.classid = '{schema}.event_outbox'::regclass::oid
  and l.objid::bigint < 640
  and l.pid is distinct from pg_catalog.pg_backend_pid()
group by l.pid, l.virtualtransaction, a.application_name, a.usename, a.state, a.xact_start, a.state_change, a.query";

async fn partitions_held(
    connection: &mut PgConnection,
    question: &Question<'_>,
) -> Result<Vec<Standstill>, sqlx::Error> {
    let rows = question.sql.query(PARTITIONS_HELD).fetch_all(connection).await?;
    let mut found = Vec::new();
    for row in &rows {
        let (session, partitions) = (Holder::of(row)?, row.try_get::<i64, _>("partitions")?);
        let who = format!("partitions {}", session.key());
        let seen = question.memory.seen(&(who.clone() + &session.transaction));
        let stranger: bool = row.try_get("stranger")?;
        // A claim lasts no longer than it takes to publish and then to settle, and a settle may wait for others.
        let patience = if stranger { question.brief } else { question.publish_timeout + Duration::from_secs(75) };
        if session.held(seen) < patience {
            if stranger {
                question.memory.is_brief(&(who + &session.transaction));
            }
            continue;
        }
        let what = if stranger { "advisory locks of the relay" } else { "a claim that does not end" };
        let text = format!(
            "{partitions} of {PENDING} partitions of event_outbox are held by {} ({what}): their events wait; {}",
            session.name(seen),
            session.cure()
        );
        found.push(Standstill::new("partitions_held", text).about(who));
    }
    Ok(found)
}

/// The first event of each partition, if it has been due for more than `$3` seconds.
const FIRST_EVENTS: &str = "
select first.id, first.event_id::text as event_id, first.event_type,
    extract(epoch from pg_catalog.clock_timestamp() - first.available_at)::float8 as seconds
from unnest($1::smallint[], $2::bigint[]) b(partition, bound)
cross join lateral (
    select o.id, o.event_id, o.event_type, o.available_at
    from {schema}.event_outbox o where o.partition = b.partition and o.id > b.bound
    order by o.partition, o.id limit 1
) first
where first.available_at < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $3)
order by first.id";

async fn not_taken(connection: &mut PgConnection, question: &Question<'_>) -> Result<Vec<Standstill>, sqlx::Error> {
    let patience = question.publish_timeout + TAKEN_AFTER;
    let rows = question
        .sql
        .query(FIRST_EVENTS)
        .bind((0..PENDING).collect::<Vec<_>>())
        .bind(&question.bounds)
        .bind(patience.as_secs_f64())
        .fetch_all(connection)
        .await?;
    let mut waiting = Vec::new();
    for row in &rows {
        let id: i64 = row.try_get("id")?;
        if question.memory.seen(&format!("event {id}")) >= patience {
            waiting.push(row);
        }
    }
    let Some(first) = waiting.first() else {
        return Ok(Vec::new());
    };
    let (id, event_type): (i64, &str) = (first.try_get("id")?, first.try_get("event_type")?);
    Ok(vec![not_taken_text(waiting.len(), id, event_type, Duration::from_secs_f64(first.try_get("seconds")?), "")])
}
