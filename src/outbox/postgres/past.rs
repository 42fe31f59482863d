//! What operators do with the past, in PostgreSQL: see [`Past`].

use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, ready};
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{Connection, Executor, Row};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::event::{Event, RowKey};
use crate::outbox::decode;
use crate::outbox::error::OutboxError;
use crate::outbox::past::{
    Expired, Extent, History, Identity, Kept, LogFilter, LogPage, Past, ReplayLock, Selection, UNKNOWN_FORMAT,
};
use crate::outbox::postgres::connection::{STATEMENT_TIMEOUT, open, query_failed, with_timeout};
use crate::outbox::postgres::follow::{Following, like};
use crate::outbox::postgres::schema;
use crate::outbox::postgres::sql::{Schema, Sql};
use crate::secret::Secret;

/// The days that `relay_drop_days` would drop.
const EXPIRED: &str = "
select c.relname::text as day, greatest(c.reltuples, 0::real)::bigint as rows,
    pg_catalog.pg_total_relation_size(c.oid::regclass) as bytes
from pg_catalog.pg_inherits i join pg_catalog.pg_class c on c.oid = i.inhrelid
where i.inhparent = pg_catalog.to_regclass('{schema}.' || $1::text)::oid
  and c.relname::text ~ ('^' || $1::text || '_\\d{8}$')
  and (pg_catalog.to_date(pg_catalog.\"right\"(c.relname::text, 8), 'YYYYMMDD') + 1)::timestamp at time zone 'UTC'
      < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $2)
order by c.relname";

const DROP_DAYS: &str = "select {schema}.relay_drop_days($1, pg_catalog.make_interval(secs => $2))";

/// Whether the history is empty, and its first midnight if it has no partitions but days.
const HISTORY: &str = "
select not exists (select from {schema}.event_history),
    case when pg_catalog.bool_and(c.relname::text ~ '^event_history_\\d{8}$') then
        pg_catalog.min(case when c.relname::text ~ '^event_history_\\d{8}$' then
            pg_catalog.to_date(pg_catalog.\"right\"(c.relname::text, 8), 'YYYYMMDD')::timestamp at time zone 'UTC' end)
    end
from pg_catalog.pg_inherits i join pg_catalog.pg_class c on c.oid = i.inhrelid
where i.inhparent = '{schema}.event_history'::regclass::oid";

const DESTINATIONS: &str = "select distinct h.destination from {schema}.event_history h order by 1";

/// The rows of a selection: `$1` to `$7`.
macro_rules! selected {
    () => {
        "from {schema}.event_history h
where h.destination = $1::text and h.published_at < $2::timestamptz
  and ($3::timestamptz is null or h.published_at >= $3::timestamptz)
  and ($4::text is null or h.event_type like $4::text)
  and ($5::text is null or h.aggregate_id = $5::text or h.aggregate_type || ':' || h.aggregate_id = $5::text)
  and ($6::uuid[] is null or h.event_id = any ($6::uuid[]) or h.outbox_id = any ($7::bigint[]))"
    };
}

const MEASURE: &str = concat!(
    "select pg_catalog.count(*) as count, pg_catalog.min(h.outbox_id) as first, pg_catalog.max(h.outbox_id) as last,
    pg_catalog.min(h.published_at) as since, pg_catalog.max(h.published_at) as upto ",
    selected!(),
    " and h.outbox_id > $8::bigint"
);

const EVENTS: &str = concat!(
    "select h.outbox_id, h.event_id, h.event_type, h.source, h.aggregate_type, h.aggregate_id, h.payload::text as payload,
    h.headers::text as headers, h.correlation_id, h.causation_id, h.schema_version, h.created_at, h.format ",
    selected!(),
    " and h.outbox_id > $8::bigint and h.outbox_id <= $9::bigint order by h.outbox_id, h.published_at limit $10::bigint"
);

/// Held for as long as a replay lasts, in a transaction, because a pooler gives each transaction another session.
const LOCK: &str =
    "select pg_catalog.pg_try_advisory_xact_lock('{schema}.event_outbox'::regclass::oid::integer, '-3'::integer)";

/// So that nothing ends the transaction that holds the lock, which has no snapshot while it waits.
const HOLD: &str = "
begin isolation level read committed;
select pg_catalog.set_config('idle_in_transaction_session_timeout', '0', true)";

/// A server goes on with the question of a client that has gone, unless it is told to look. (PostgreSQL 13 cannot.)
const NOTICE_END: &str = "select pg_catalog.set_config('client_connection_check_interval', '2s', false)
                          where pg_catalog.current_setting('client_connection_check_interval', true) is not null";

/// What to do where the role may not drop days.
const PRUNE_ADVICE: &str = "only the relay's own role may delete, which is relay_worker after deploy/sql/roles.sql: run it as that, \
                            with the relay's own settings; --dry-run needs no right";

/// What to do where the role may not read.
const READ_ADVICE: &str =
    "this role may not read it; run the command as one that may, such as relay_operator of deploy/sql/roles.sql";

/// A connection to a PostgreSQL outbox.
pub(super) struct PgPast {
    url: Secret,
    pooled: bool,
    connection: PgConnection,
    sql: Sql,
    following: Option<Following>,
}

impl PgPast {
    pub(super) async fn open(url: &Secret, pooled: bool) -> Result<Self, OutboxError> {
        let mut connection = open(url, pooled).await?;
        schema::require_fit(&mut connection).await?;
        if !pooled {
            with_timeout("set up the connection", STATEMENT_TIMEOUT, connection.execute(NOTICE_END)).await?;
        }
        let found = with_timeout("look for event_outbox", STATEMENT_TIMEOUT, Schema::find(&mut connection)).await?;
        let sql = Sql { schema: found.unwrap_or_default(), persistent: false };
        Ok(Self { url: url.clone(), pooled, connection, sql, following: None })
    }

    /// Runs `query`, in a transaction that changes nothing. A statement with parameters takes several messages, and a pooler
    /// may send each of them to another session otherwise. It has no limit of time, because somebody waits for it, and can
    /// stop it.
    async fn read<T>(
        &mut self,
        operation: &'static str,
        query: impl AsyncFnOnce(&mut PgConnection, Sql) -> Result<T, sqlx::Error>,
    ) -> Result<T, OutboxError> {
        let sql = self.sql;
        let read = async {
            // Rows that row-level security hides would look as if they were not there.
            self.connection
                .execute("begin isolation level read committed read only; set local row_security = off")
                .await?;
            let answer = query(&mut self.connection, sql).await?;
            self.connection.execute("commit").await?;
            Ok(answer)
        };
        read.await.map_err(|source| match is_refused(&source) {
            true => OutboxError::Query { operation, source, advice: Some(READ_ADVICE) },
            false => query_failed(operation, source),
        })
    }

    async fn expired(&mut self, kept: Kept, retention: Duration) -> Result<Expired, OutboxError> {
        self.read("look for days past their retention", async |connection, sql| {
            let mut expired = Expired { bytes: Some(0), ..Expired::default() };
            for row in sql.query(EXPIRED).bind(kept.table()).bind(retention.as_secs_f64()).fetch_all(connection).await?
            {
                expired.days.push(row.try_get("day")?);
                expired.rows += row.try_get::<i64, _>("rows")?.unsigned_abs();
                let bytes = row.try_get::<Option<i64>, _>("bytes")?.unwrap_or_default().unsigned_abs();
                expired.bytes = expired.bytes.map(|sum| sum + bytes);
            }
            Ok(expired)
        })
        .await
    }

    async fn prune(&mut self, kept: Kept, retention: Duration) -> Result<(), OutboxError> {
        let Self { connection, sql, .. } = self;
        with_timeout("drop the days past their retention", STATEMENT_TIMEOUT, async {
            connection.execute("begin").await?;
            sql.query(DROP_DAYS).bind(kept.table()).bind(retention.as_secs_f64()).execute(&mut *connection).await?;
            connection.execute("commit").await.map(drop)
        })
        .await
        .map_err(|error| match error {
            OutboxError::Query { operation, source, .. } if is_refused(&source) => {
                OutboxError::Query { operation, source, advice: Some(PRUNE_ADVICE) }
            }
            error => error,
        })
    }

    async fn lock_replay(&mut self) -> Result<Option<Box<dyn ReplayLock>>, OutboxError> {
        let mut connection = open(&self.url, self.pooled).await?;
        let sql = self.sql;
        let locked: bool = with_timeout("lock the replay", STATEMENT_TIMEOUT, async {
            connection.execute(HOLD).await?;
            sql.query_scalar(LOCK).fetch_one(&mut connection).await
        })
        .await?;
        Ok(locked.then(|| Box::new(PgReplayLock(connection)) as Box<dyn ReplayLock>))
    }

    async fn history(&mut self) -> Result<History, OutboxError> {
        self.read("look at event_history", async |connection, sql| {
            let (is_empty, begins) = sql.query_as(HISTORY).fetch_one(connection).await?;
            Ok(History { is_empty, begins })
        })
        .await
    }

    async fn destinations(&mut self) -> Result<Vec<String>, OutboxError> {
        self.read("look at event_history", async |connection, sql| {
            sql.query_scalar(DESTINATIONS).fetch_all(connection).await
        })
        .await
    }

    async fn measure(&mut self, selection: &Selection, after: i64) -> Result<Extent, OutboxError> {
        self.read("count what is to be replayed", async |connection, sql| {
            let (ids, sequences) = identities(selection);
            let row = sql
                .query(MEASURE)
                .bind(&selection.published_to)
                .bind(selection.until)
                .bind(selection.since)
                .bind(selection.event_type.as_deref().map(like))
                .bind(&selection.key)
                .bind(ids)
                .bind(sequences)
                .bind(after)
                .fetch_one(connection)
                .await?;
            Ok(Extent {
                count: row.try_get::<i64, _>("count")?.unsigned_abs(),
                first: row.try_get::<Option<i64>, _>("first")?.unwrap_or_default(),
                last: row.try_get::<Option<i64>, _>("last")?.unwrap_or_default(),
                from: row.try_get("since")?,
                to: row.try_get("upto")?,
            })
        })
        .await
    }

    async fn events(
        &mut self,
        selection: &Selection,
        after: i64,
        up_to: i64,
        limit: usize,
    ) -> Result<Vec<Event>, OutboxError> {
        let rows = self
            .read("read event_history", async |connection, sql| {
                let (ids, sequences) = identities(selection);
                sql.query(EVENTS)
                    .bind(&selection.published_to)
                    .bind(selection.until)
                    .bind(selection.since)
                    .bind(selection.event_type.as_deref().map(like))
                    .bind(&selection.key)
                    .bind(ids)
                    .bind(sequences)
                    .bind(after)
                    .bind(up_to)
                    .bind(i64::try_from(limit).unwrap_or(i64::MAX))
                    .fetch_all(connection)
                    .await
            })
            .await?;
        let unreadable = |source| query_failed("read event_history", source);
        rows.iter()
            .map(|row| {
                if row.try_get::<i16, _>("format").map_err(unreadable)? != 0 {
                    return Err(UNKNOWN_FORMAT);
                }
                event(row).map_err(unreadable)
            })
            .collect()
    }

    async fn now(&mut self) -> Result<OffsetDateTime, OutboxError> {
        self.read("read the clock", async |connection, sql| {
            sql.query_scalar("select pg_catalog.clock_timestamp()").fetch_one(connection).await
        })
        .await
    }

    async fn log(&mut self, filter: &LogFilter) -> Result<LogPage, OutboxError> {
        let mut following = match self.following.take() {
            Some(following) => following,
            None => Following::new(self.now().await?),
        };
        let read = self
            .read("read event_processing_log", async |connection, sql| following.read(connection, sql, filter).await)
            .await;
        let page = read.and_then(|rows| {
            following.take_in(&rows).map_err(|source| query_failed("read event_processing_log", source))
        });
        self.following = Some(following);
        page
    }
}

struct PgReplayLock(PgConnection);

impl ReplayLock for PgReplayLock {
    fn require(&mut self) -> BoxFuture<'_, Result<(), OutboxError>> {
        with_timeout("keep the lock of the replay", STATEMENT_TIMEOUT, self.0.ping()).boxed()
    }
}

/// Whether the role lacks a right.
fn is_refused(error: &sqlx::Error) -> bool {
    // Row-level security has the same code.
    let refused = |error: &dyn sqlx::error::DatabaseError| {
        error.code().is_some_and(|code| code == "42501") && !error.message().contains("row-level security")
    };
    error.as_database_error().is_some_and(refused)
}

/// Returns the ids of a selection, both `None` if it has none.
fn identities(selection: &Selection) -> (Option<Vec<Uuid>>, Option<Vec<i64>>) {
    if selection.ids.is_empty() {
        return (None, None);
    }
    let (mut ids, mut sequences) = (Vec::new(), Vec::new());
    for id in &selection.ids {
        match id {
            Identity::Event(id) => ids.push(*id),
            Identity::Sequence(sequence) => sequences.push(*sequence),
        }
    }
    (Some(ids), Some(sequences))
}

fn event(row: &PgRow) -> Result<Event, sqlx::Error> {
    let headers: &str = row.try_get("headers")?;
    let headers = decode::headers(Some(headers.as_bytes()))
        .map_err(|error| sqlx::Error::Decode(format!("a row of event_history: {error}").into()))?;
    Ok(Event {
        row: RowKey { locator: 0, partition: 0, id: row.try_get("outbox_id")?, destination: String::new() },
        event_id: row.try_get("event_id")?,
        event_type: row.try_get("event_type")?,
        source: row.try_get("source")?,
        aggregate_type: row.try_get("aggregate_type")?,
        aggregate_id: row.try_get("aggregate_id")?,
        payload: row.try_get::<String, _>("payload")?.into_bytes(),
        headers,
        correlation_id: row.try_get("correlation_id")?,
        causation_id: row.try_get("causation_id")?,
        schema_version: row.try_get("schema_version")?,
        created_at: row.try_get("created_at")?,
        attempts: 0,
    })
}

impl Past for PgPast {
    fn expired(&mut self, kept: Kept, retention: Duration) -> BoxFuture<'_, Result<Expired, OutboxError>> {
        self.expired(kept, retention).boxed()
    }

    fn prune(&mut self, kept: Kept, retention: Duration) -> BoxFuture<'_, Result<(), OutboxError>> {
        self.prune(kept, retention).boxed()
    }

    fn lock_replay(&mut self) -> BoxFuture<'_, Result<Option<Box<dyn ReplayLock>>, OutboxError>> {
        self.lock_replay().boxed()
    }

    fn history(&mut self) -> BoxFuture<'_, Result<History, OutboxError>> {
        self.history().boxed()
    }

    fn destinations(&mut self) -> BoxFuture<'_, Result<Vec<String>, OutboxError>> {
        self.destinations().boxed()
    }

    fn measure<'a>(&'a mut self, selection: &'a Selection, after: i64) -> BoxFuture<'a, Result<Extent, OutboxError>> {
        self.measure(selection, after).boxed()
    }

    fn events<'a>(
        &'a mut self,
        selection: &'a Selection,
        after: i64,
        up_to: i64,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Event>, OutboxError>> {
        self.events(selection, after, up_to, limit).boxed()
    }

    fn now(&mut self) -> BoxFuture<'_, Result<OffsetDateTime, OutboxError>> {
        self.now().boxed()
    }

    fn follow(&mut self, since: OffsetDateTime) -> BoxFuture<'_, Result<(), OutboxError>> {
        self.following = Some(Following::new(since));
        ready(Ok(())).boxed()
    }

    fn log<'a>(&'a mut self, filter: &'a LogFilter) -> BoxFuture<'a, Result<LogPage, OutboxError>> {
        self.log(filter).boxed()
    }
}
