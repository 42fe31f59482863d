//! Dead letters, as operators look at them and change them. Changes go through functions of the schema, which a role needs no
//! right on a table for, and which write down who called them.

use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use sqlx::postgres::{PgArguments, PgConnection};
use sqlx::query::QueryScalar;
use sqlx::{Executor, Postgres};
use time::OffsetDateTime;

use crate::outbox::error::OutboxError;
use crate::outbox::mend::{
    Action, CommandId, DeadLetter, Filter, Group, Mend, State, Waiting, WaitingAction, WaitingBatch, WholeDeadLetter,
};
use crate::outbox::postgres::connection::{self, with_timeout};
use crate::outbox::postgres::sql::{Schema, Sql};
use crate::outbox::postgres::{schema, waiting};
use crate::secret::Secret;

/// How long one transaction may take: a batch may wait for a lock, and a table may be large.
const TRANSACTION_TIMEOUT: Duration = Duration::from_secs(60);

/// The same where a transaction changes all events of a partition: a relay may publish events of the same keys, and there may be
/// very many.
pub(super) const LONG_TRANSACTION_TIMEOUT: Duration = Duration::from_secs(600);

/// The settings of each transaction. If row-level security applies to this role, a statement fails, and hides no rows.
const BEGIN: &str = "begin isolation level read committed; set local row_security = off; set local lock_timeout = '15s'; \
                     set local statement_timeout = '55s'";

/// The settings of such a transaction, after the others. A relay publishes for half a minute at most, unless it is set up
/// otherwise.
const LONG: &str = "set local lock_timeout = '60s'; set local statement_timeout = '595s'";

/// What a dead letter `e` must fulfil: the parameters are those of `Filter`.
const CONDITION: &str = "
    ($1::text is null or e.event_type like $1)
    and ($2::text is null or e.aggregate_id = $2 or e.aggregate_type || ':' || e.aggregate_id = $2)
    and ($3::text is null or e.destination = $3)
    and ($4::text is null or e.error_code = $4)
    and ($5::timestamptz is null or e.failed_at >= $5)
    and ($6::timestamptz is null or e.failed_at < $6)
    and ($7::bigint[] is null or e.id = any ($7))
    and case $8::text
        when 'open' then e.redriven_at is null and e.discarded_at is null
        when 'redriven' then e.redriven_at is not null
        when 'discarded' then e.redriven_at is null and e.discarded_at is not null
        when 'closed' then e.redriven_at is not null or e.discarded_at is not null
        else true
    end";

/// A dead letter `e` as JSON. The times are UTC.
const AS_JSON: &str = "pg_catalog.jsonb_build_object(
    'id', e.id, 'outbox_id', e.outbox_id, 'event_id', e.event_id, 'event_type', e.event_type,
    'aggregate_type', e.aggregate_type, 'aggregate_id', e.aggregate_id, 'destination', e.destination, 'attempts', e.attempts,
    'error_code', e.error_code, 'error', e.error, 'created_at', {e.created_at}, 'first_failed_at', {e.first_failed_at},
    'failed_at', {e.failed_at}, 'redriven_at', {e.redriven_at}, 'redriven_by', e.redriven_by, 'redriven_to', e.redriven_to,
    'discarded_at', {e.discarded_at}, 'discarded_by', e.discarded_by, 'discard_reason', e.discard_reason,
    'redrives', (
        select pg_catalog.count(*) from past p
        where p.event_id = e.event_id and p.outbox_id = e.outbox_id and p.id < e.id and p.destination = e.destination
    ))::text";

/// The redrives of the events of `page`. No index leads to them, so the table is read once for the whole page.
const PAST: &str = "past as materialized (
    select p.id, p.event_id, p.outbox_id, coalesce(p.redriven_to, p.destination) as destination
    from {schema}.event_dead_letter p
    where p.redriven_at is not null and p.event_id in (select event_id from page)
)";

const LIST: &str = "
with page as materialized (
    select * from {schema}.event_dead_letter e where {condition} order by e.failed_at desc, e.id desc limit $9
), {past}
select {json} from page e order by e.failed_at desc, e.id desc";

const GROUPS: &str = "
select pg_catalog.jsonb_build_object(
    'destination', e.destination, 'error_code', e.error_code, 'count', pg_catalog.count(*),
    'types', pg_catalog.count(distinct e.event_type), 'first_failed_at', {pg_catalog.min(e.failed_at)},
    'last_failed_at', {pg_catalog.max(e.failed_at)}, 'error', pg_catalog.max(e.error))::text
from {schema}.event_dead_letter e
where {condition} and $9::bigint is null
group by e.destination, e.error_code
order by pg_catalog.count(*) desc, e.destination, e.error_code";

const CHOOSE: &str = "
select e.id from {schema}.event_dead_letter e where {condition} order by e.outbox_id, e.id limit $9";

const OTHERS: &str = "
with page as materialized (
    select * from {schema}.event_dead_letter e
    where e.event_id = $1::text::uuid and e.outbox_id = $2 and e.id <> $3 order by e.id limit 100
), {past}
select {json} from page e order by e.id";

const CONTENT: &str = "
select pg_catalog.jsonb_build_object(
    'source', e.source, 'payload', e.payload::text, 'headers', e.headers::text, 'correlation_id', e.correlation_id,
    'causation_id', e.causation_id, 'schema_version', e.schema_version, 'priority', e.priority)::text
from {schema}.event_dead_letter e where e.id = $1";

const REDRIVE: &str = "select {schema}.redrive_dead_letters($1::text::jsonb, $4::text, $5::text::jsonb, null, $2::text::uuid, $3::bigint[])";

const DISCARD: &str =
    "select {schema}.discard_dead_letters($1::text::jsonb, $4::text, null, $2::text::uuid, $3::bigint[])";

const PURGE: &str = "select {schema}.purge_dead_letters($1::text::jsonb, null, $2::text::uuid, $3::bigint[])";

const DESTINATIONS: &str = "select distinct d.name from {schema}.event_relay r cross join lateral pg_catalog.jsonb_object_keys(r.destinations) d(name) order by 1";

/// A connection of an operator's command.
pub(super) struct PgMend {
    connection: PgConnection,
    sql: Sql,
}

impl PgMend {
    /// Connects, and checks that the schema is one that this binary knows.
    pub(super) async fn open(url: &Secret, pooled: bool) -> Result<Self, OutboxError> {
        let mut connection = connection::open(url, pooled).await?;
        drop(schema::require_fit(&mut connection).await?);
        let schema = with_timeout("look for event_outbox", TRANSACTION_TIMEOUT, Schema::find(&mut connection)).await?;
        Ok(Self { connection, sql: Sql { schema: schema.unwrap_or_default(), persistent: false } })
    }

    /// Runs `work` in a transaction of its own.
    pub(super) async fn transaction<T>(
        &mut self,
        operation: &'static str,
        work: impl AsyncFnOnce(&mut PgConnection, Sql) -> Result<T, sqlx::Error>,
    ) -> Result<T, OutboxError> {
        self.timed_transaction(operation, TRANSACTION_TIMEOUT, work).await
    }

    /// The same with another timeout.
    pub(super) async fn timed_transaction<T>(
        &mut self,
        operation: &'static str,
        timeout: Duration,
        work: impl AsyncFnOnce(&mut PgConnection, Sql) -> Result<T, sqlx::Error>,
    ) -> Result<T, OutboxError> {
        let Self { connection, sql } = self;
        let done = with_timeout(operation, timeout, async {
            connection.execute(BEGIN).await?;
            if timeout > TRANSACTION_TIMEOUT {
                connection.execute(LONG).await?;
            }
            let done = work(connection, *sql).await;
            // If the connection is lost, the rollback has happened already, and the error of the work is told.
            let ended = connection.execute(if done.is_ok() { "commit" } else { "rollback" }).await;
            let done = done?;
            ended.map(|_| done)
        });
        done.await.map_err(with_role)
    }

    async fn read(&mut self, text: &str, filter: &Filter, limit: Option<i64>) -> Result<Vec<String>, OutboxError> {
        self.transaction("read the dead letters", async |connection, sql| {
            let query = sqlx::query_scalar(sql.schema.fill_once(&statement(text))).persistent(false);
            bind(query, filter).bind(limit).fetch_all(connection).await
        })
        .await
    }
}

/// Fills in the condition and the columns, with times as RFC 3339.
fn statement(text: &str) -> String {
    let mut text = text.replace("{json}", AS_JSON).replace("{past}", PAST).replace("{condition}", CONDITION);
    for time in [
        "e.created_at",
        "e.first_failed_at",
        "e.failed_at",
        "e.redriven_at",
        "e.discarded_at",
        "pg_catalog.min(e.failed_at)",
        "pg_catalog.max(e.failed_at)",
    ] {
        let shown =
            format!("pg_catalog.to_char(pg_catalog.timezone('UTC', {time}), 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"')");
        text = text.replace(&format!("{{{time}}}"), &shown);
    }
    text
}

type Query<'q, T> = QueryScalar<'q, Postgres, T, PgArguments>;

/// Binds the parameters of [`CONDITION`].
fn bind<'q, T>(query: Query<'q, T>, filter: &Filter) -> Query<'q, T>
where
    (T,): for<'r> sqlx::FromRow<'r, sqlx::postgres::PgRow>,
{
    query
        .bind(filter.event_type.as_deref().map(like))
        .bind(filter.key.clone())
        .bind(filter.destination.clone())
        .bind(filter.error.clone())
        .bind(filter.since)
        .bind(filter.until)
        .bind(if filter.ids.is_empty() { None } else { Some(filter.ids.clone()) })
        .bind(filter.state.map(State::name))
}

/// A glob as a pattern of `like`.
fn like(glob: &str) -> String {
    let escaped = glob.replace('\\', "\\\\").replace('%', "\\%").replace('_', "\\_");
    escaped.replace('*', "%").replace('?', "_")
}

/// Says which role may do what was refused.
fn with_role(error: OutboxError) -> OutboxError {
    match error {
        OutboxError::Query { operation, source, .. }
            if source.as_database_error().is_some_and(|error| error.code().as_deref() == Some("42501")) =>
        {
            let advice = Some(
                "the role relay_operator may: deploy/sql/roles.sql makes it, `grant relay_operator to ...` gives it",
            );
            OutboxError::Query { operation, source, advice }
        }
        error => error,
    }
}

/// Reads rows that the database wrote as JSON.
fn parsed<T: for<'d> serde::Deserialize<'d>>(rows: &[String]) -> Result<Vec<T>, OutboxError> {
    let rows = rows.iter().map(|row| serde_json::from_str(row)).collect::<Result<_, _>>();
    rows.map_err(|error| connection::query_failed("read the dead letters", sqlx::Error::Decode(Box::new(error))))
}

impl Mend for PgMend {
    fn now(&mut self) -> BoxFuture<'_, Result<OffsetDateTime, OutboxError>> {
        self.transaction("read the clock", async |connection, _| {
            sqlx::query_scalar("select pg_catalog.clock_timestamp()").persistent(false).fetch_one(connection).await
        })
        .boxed()
    }

    fn dead_letters<'a>(
        &'a mut self,
        filter: &'a Filter,
        limit: i64,
    ) -> BoxFuture<'a, Result<Vec<DeadLetter>, OutboxError>> {
        async move { parsed(&self.read(LIST, filter, Some(limit)).await?) }.boxed()
    }

    fn groups<'a>(&'a mut self, filter: &'a Filter) -> BoxFuture<'a, Result<Vec<Group>, OutboxError>> {
        async { parsed(&self.read(GROUPS, filter, None).await?) }.boxed()
    }

    fn dead_letter(&mut self, id: i64) -> BoxFuture<'_, Result<Option<WholeDeadLetter>, OutboxError>> {
        async move {
            let filter = Filter { ids: vec![id], ..Filter::default() };
            let Some(letter) = self.dead_letters(&filter, 1).await?.pop() else { return Ok(None) };
            let (event_id, outbox_id) = (letter.event_id.clone(), letter.outbox_id);
            let (content, others) = self
                .transaction("read the dead letter", async |connection, sql| {
                    let content: Vec<String> = sql.query_scalar(CONTENT).bind(id).fetch_all(&mut *connection).await?;
                    let others = sqlx::query_scalar(sql.schema.fill_once(&statement(OTHERS))).persistent(false);
                    let others: Vec<String> =
                        others.bind(event_id).bind(outbox_id).bind(id).fetch_all(connection).await?;
                    Ok((content, others))
                })
                .await?;
            let others = parsed(&others)?;
            Ok(parsed(&content)?.pop().map(|content| WholeDeadLetter { letter, content, others }))
        }
        .boxed()
    }

    fn choose<'a>(&'a mut self, filter: &'a Filter, limit: i64) -> BoxFuture<'a, Result<Vec<i64>, OutboxError>> {
        self.transaction("choose the dead letters", async move |connection, sql| {
            let query = sqlx::query_scalar(sql.schema.fill_once(&statement(CHOOSE))).persistent(false);
            bind(query, filter).bind(limit).fetch_all(connection).await
        })
        .boxed()
    }

    fn apply<'a>(
        &'a mut self,
        action: &'a Action,
        command: &'a CommandId,
        ids: &'a [i64],
    ) -> BoxFuture<'a, Result<u64, OutboxError>> {
        let (operation, text) = match action {
            Action::Redrive { .. } => ("redrive", REDRIVE),
            Action::Discard { .. } => ("discard", DISCARD),
            Action::Purge => ("purge", PURGE),
        };
        self.transaction(operation, async move |connection, sql| {
            let query = sql.query_scalar(text).bind(command.filter.to_json().to_string());
            let query = query.bind(command.id.to_string()).bind(ids);
            let query = match action {
                Action::Redrive { to, payload } => query.bind(to.clone()).bind(payload.clone()),
                Action::Discard { reason } => query.bind(reason.clone()),
                Action::Purge => query,
            };
            let done: i64 = query.fetch_one(connection).await?;
            Ok(u64::try_from(done).unwrap_or_default())
        })
        .boxed()
    }

    fn waiting<'a>(
        &'a mut self,
        action: &'a WaitingAction,
        filter: &'a Filter,
    ) -> BoxFuture<'a, Result<Waiting, OutboxError>> {
        waiting::waiting(self, action, filter).boxed()
    }

    fn apply_waiting<'a>(
        &'a mut self,
        action: &'a WaitingAction,
        command: &'a CommandId,
        batch: &'a WaitingBatch,
        most: Option<u64>,
    ) -> BoxFuture<'a, Result<u64, OutboxError>> {
        waiting::apply(self, action, command, batch, most).boxed()
    }

    fn destinations(&mut self) -> BoxFuture<'_, Result<Vec<String>, OutboxError>> {
        self.transaction("read the configurations of the relays", async |connection, sql| {
            sql.query_scalar(DESTINATIONS).fetch_all(connection).await
        })
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_glob_becomes_a_pattern_in_which_nothing_else_is_special() {
        assert_eq!(like(r"order.*_?%\x"), r"order.%\__\%\\x");
    }

    #[test]
    fn every_place_of_a_statement_is_filled_in() {
        for text in [LIST, GROUPS, CHOOSE, OTHERS] {
            let filled = statement(text).replace("{schema}", "");
            assert!(!filled.contains('{'), "{filled}");
        }
    }
}
