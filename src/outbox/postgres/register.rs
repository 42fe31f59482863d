//! The register of relays, on the side connection. Its session holds an advisory lock, which shows other relays that this one
//! is at work. Behind a transaction-pooling proxy there is no session.

use std::time::{Duration, Instant};

use sqlx::Row;
use sqlx::postgres::{PgConnection, PgRow};

use crate::outbox::OutboxError;
use crate::outbox::pause::Pauses;
use crate::outbox::postgres::migrations::SCHEMA_VERSION;
use crate::outbox::postgres::pause;
use crate::outbox::postgres::sql::Sql;
use crate::outbox::postgres::store::PgOutbox;
use crate::outbox::register::{Configuration, Member, Register, Registration, Role};

/// The number of changes, in as many bits as a claim can read in one number with the moves, see `batch`.
pub(super) const CHANGES: &str = "
select (last_value + coalesce((select pg_catalog.max(changes) from {schema}.event_pause_changes), 0::bigint)) & 8388607::bigint
from {schema}.event_relay_changes";

const CHANGED: &str = "select pg_catalog.nextval('{schema}.event_relay_changes'::regclass)";

const ROWS: &str = "
select r.id, r.worker, r.version, r.once, r.hung, r.fingerprint, r.destinations::text as destinations,
       r.routes::text as routes,
       case when r.pid is not null then exists (
           select from pg_catalog.pg_locks l
           where l.locktype = 'advisory' and l.granted and l.objsubid = 2 and l.pid = r.pid
             and l.database = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
             and l.classid = '{schema}.event_outbox'::regclass::oid
             and l.objid = (2000000::bigint + r.id % 2000000000::bigint)::oid
       ) end as session,
       extract(epoch from pg_catalog.clock_timestamp() - r.since)::float8 as age,
       extract(epoch from pg_catalog.clock_timestamp() - r.seen_at)::float8 as silent,
       extract(epoch from pg_catalog.clock_timestamp() - r.looked_at)::float8 as idle,
       r.trouble::text as trouble
from {schema}.event_relay r
order by r.id";

/// `$1` id, `$9` whether there is a session to hold the lock. A session may take the lock several times; it ends with the
/// session.
const WRITE: &str = "
insert into {schema}.event_relay (id, worker, version, schema_version, once, fingerprint, destinations, routes, pid)
select $1, $2, $3, $4, $5, $6, $7::jsonb, $8::jsonb,
       case when $9 then case when pg_catalog.pg_try_advisory_lock(
           '{schema}.event_outbox'::regclass::oid::int, (2000000::bigint + $1 % 2000000000::bigint)::int
       ) then pg_catalog.pg_backend_pid() end end
on conflict (id) do update
set hung = false, pid = excluded.pid, seen_at = pg_catalog.clock_timestamp(), looked_at = pg_catalog.clock_timestamp()";

const BEAT: &str = "
update {schema}.event_relay
set seen_at = pg_catalog.clock_timestamp(), looked_at = pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $2)
where id = $1";

/// Takes the lock by which others see to which relay this session belongs. All lanes of a relay share it.
const LANE: &str = "
select pg_catalog.pg_try_advisory_lock_shared(
    '{schema}.event_outbox'::regclass::oid::int, (-2000000::bigint - $1 % 2000000000::bigint)::int
)";

/// The key of that lock for each relay, with how many of its sessions hold partitions, and how many partitions these are.
const LANES: &str = "
with locks as materialized (
    select l.pid, l.objid::bigint as key from pg_catalog.pg_locks l
    where l.locktype = 'advisory' and l.granted and l.objsubid = 2
      and l.database = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
      and l.classid = '{schema}.event_outbox'::regclass::oid
)
select lane.key, pg_catalog.count(distinct held.pid), pg_catalog.count(held.pid)
from locks lane left join locks held on held.pid = lane.pid and held.key < 640::bigint
where lane.key between 2292967296::bigint and 4292967296::bigint
group by lane.key";

/// Marks a relay as hung, but only if an event that is not routed has been due for longer than `$2` seconds.
const DEPOSE: &str = "
update {schema}.event_relay set hung = true
where id = $1 and exists (
    select from {schema}.event_outbox
    where partition < 640::smallint and status = 'pending' and destination = ''
      and available_at < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $2)
)";

impl PgOutbox {
    /// Returns the role of this relay at this number of changes.
    pub(super) async fn role_at(&self, changes: i64) -> Result<Role, OutboxError> {
        match self.membership.role_at(changes) {
            Some(role) => Ok(role),
            None => self.membership.look(self, Instant::now()).await,
        }
    }

    /// Shows others that this session, of a lane, belongs to this relay.
    pub(super) async fn name_lane(&self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        if let Some(member) = self.membership.member().filter(|_| !self.config.pooled) {
            self.sql().query(LANE).persistent(false).bind(member.id).execute(connection).await?;
        }
        Ok(())
    }
}

/// What the lanes of a relay hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    /// The key of the lock of its lanes, see [`lanes_key`].
    pub(super) key: i64,
    pub(super) batches: i64,
    pub(super) partitions: i64,
}

/// Returns the key of the lock that the lanes of this relay hold, as `pg_locks` shows it.
pub(super) fn lanes_key(id: i64) -> i64 {
    (1 << 32) - 2_000_000 - id % 2_000_000_000
}

/// Reads what the lanes of each relay hold.
pub(super) async fn lanes(sql: Sql, connection: &mut PgConnection) -> Result<Vec<Held>, sqlx::Error> {
    let rows: Vec<(i64, i64, i64)> = sql.query_as(LANES).persistent(false).fetch_all(connection).await?;
    Ok(rows.into_iter().map(|(key, batches, partitions)| Held { key, batches, partitions }).collect())
}

fn registration(row: &PgRow) -> Result<Registration, sqlx::Error> {
    let json = |error: serde_json::Error| sqlx::Error::Decode(error.into());
    let duration = |column: &str| row.try_get(column).map(|seconds: f64| Duration::from_secs_f64(seconds.max(0.0)));
    Ok(Registration {
        id: row.try_get("id")?,
        worker: row.try_get("worker")?,
        version: row.try_get("version")?,
        once: row.try_get("once")?,
        hung: row.try_get("hung")?,
        configuration: Configuration {
            fingerprint: row.try_get("fingerprint")?,
            destinations: serde_json::from_str(row.try_get("destinations")?).map_err(json)?,
            routes: serde_json::from_str(row.try_get("routes")?).map_err(json)?,
        },
        session: row.try_get("session")?,
        age: duration("age")?,
        silent: duration("silent")?,
        idle: duration("idle")?,
        trouble: serde_json::from_str(row.try_get("trouble")?).map_err(json)?,
    })
}

/// Reads all registrations.
pub(super) async fn rows(sql: Sql, connection: &mut PgConnection) -> Result<Vec<Registration>, sqlx::Error> {
    let rows = sql.query(ROWS).persistent(false).fetch_all(connection).await?;
    rows.iter().map(registration).collect()
}

impl Register for PgOutbox {
    const ONE_WORKS: bool = false;

    async fn changes(&self) -> Result<i64, OutboxError> {
        self.on_side_connection("read the number of changes of event_relay", async |connection| {
            self.sql().query_scalar(CHANGES).persistent(false).fetch_one(connection).await
        })
        .await
    }

    async fn changed(&self) -> Result<(), OutboxError> {
        self.next_id().await.map(drop)
    }

    async fn rows(&self) -> Result<Vec<Registration>, OutboxError> {
        self.on_side_connection("read event_relay", async |connection| rows(self.sql(), connection).await).await
    }

    async fn pauses(&self) -> Result<Pauses, OutboxError> {
        self.on_side_connection("read event_pause", async |connection| pause::read(self.sql(), connection).await).await
    }

    async fn next_id(&self) -> Result<i64, OutboxError> {
        self.on_side_connection("raise the number of changes of event_relay", async |connection| {
            self.sql().query_scalar(CHANGED).persistent(false).fetch_one(connection).await
        })
        .await
    }

    async fn write(&self, member: &Member) -> Result<(), OutboxError> {
        let configuration = &member.configuration;
        let json = |value: serde_json::Value| value.to_string();
        self.on_side_connection("register this relay", async |connection| {
            self.sql()
                .query(WRITE)
                .persistent(false)
                .bind(member.id)
                .bind(&self.config.worker)
                .bind(env!("CARGO_PKG_VERSION"))
                .bind(SCHEMA_VERSION)
                .bind(member.once)
                .bind(&configuration.fingerprint)
                .bind(json(serde_json::json!(configuration.destinations)))
                .bind(json(serde_json::json!(configuration.routes)))
                .bind(!self.config.pooled)
                .execute(connection)
                .await
                .map(drop)
        })
        .await
    }

    async fn beat(&self, id: i64, idle: Duration) -> Result<(), OutboxError> {
        self.on_side_connection("note that this relay is at work", async |connection| {
            let query = self.sql().query(BEAT).persistent(false).bind(id).bind(idle.as_secs_f64());
            query.execute(connection).await.map(drop)
        })
        .await
    }

    async fn remove(&self, ids: &[i64]) -> Result<(), OutboxError> {
        if ids.is_empty() {
            return Ok(());
        }
        self.on_side_connection("remove relays from event_relay", async |connection| {
            let query = "delete from {schema}.event_relay where id = any($1)";
            self.sql().query(query).persistent(false).bind(ids).execute(connection).await.map(drop)
        })
        .await
    }

    async fn depose(&self, id: i64, patience: Duration) -> Result<bool, OutboxError> {
        self.on_side_connection("take over from a relay that hangs", async |connection| {
            let query = self.sql().query(DEPOSE).persistent(false).bind(id).bind(patience.as_secs_f64());
            query.execute(connection).await.map(|done| done.rows_affected() > 0)
        })
        .await
    }
}
