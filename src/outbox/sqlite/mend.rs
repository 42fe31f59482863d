//! Dead letters, as operators look at them and change them.

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde_json::json;
use sqlx::query::{Query, QueryAs, QueryScalar};
use sqlx::sqlite::{SqliteArguments, SqliteConnection};
use sqlx::{AssertSqlSafe, Executor, Sqlite};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::outbox::error::OutboxError;
use crate::outbox::mend::{
    Action, CommandId, Content, DeadLetter, Filter, Group, Mend, State, Waiting, WaitingAction, WaitingBatch,
    WholeDeadLetter,
};
use crate::outbox::sqlite::connection::{open, query_failed, run_query};
use crate::outbox::sqlite::{schema, waiting};
use crate::secret::Secret;

/// What a dead letter `e` must fulfil: the parameters are those of `Filter`.
const CONDITION: &str = "
    (?1 is null or e.event_type glob ?1)
    and (?2 is null or e.aggregate_id = ?2 or e.aggregate_type || ':' || e.aggregate_id = ?2)
    and (?3 is null or e.destination = ?3)
    and (?4 is null or e.error_code = ?4)
    and (?5 is null or e.failed_at >= ?5)
    and (?6 is null or e.failed_at < ?6)
    and (?7 is null or e.id in (select value from json_each(?7)))
    and case ?8
        when 'open' then e.redriven_at is null and e.discarded_at is null
        when 'redriven' then e.redriven_at is not null
        when 'discarded' then e.redriven_at is null and e.discarded_at is not null
        when 'closed' then e.redriven_at is not null or e.discarded_at is not null
        else 1
    end";

/// A dead letter `e` as JSON. The times are UTC.
const AS_JSON: &str = "json_object(
    'id', e.id, 'outbox_id', e.outbox_id, 'event_id', e.event_id, 'event_type', e.event_type,
    'aggregate_type', e.aggregate_type, 'aggregate_id', e.aggregate_id, 'destination', e.destination, 'attempts', e.attempts,
    'error_code', e.error_code, 'error', e.error, 'created_at', {e.created_at}, 'first_failed_at', {e.first_failed_at},
    'failed_at', {e.failed_at}, 'redriven_at', {e.redriven_at}, 'redriven_by', e.redriven_by, 'redriven_to', e.redriven_to,
    'discarded_at', {e.discarded_at}, 'discarded_by', e.discarded_by, 'discard_reason', e.discard_reason,
    'redrives', (
        select count(*) from past p
        where p.event_id = e.event_id and p.outbox_id = e.outbox_id and p.id < e.id and p.destination = e.destination
    ))";

/// The redrives of the events of `page`. No index leads to them, so the table is read once for the whole page. (`limit` keeps
/// SQLite from reading it for each row.)
const PAST: &str = "past as (
    select p.id, p.event_id, p.outbox_id, coalesce(p.redriven_to, p.destination) as destination
    from event_dead_letter p
    where p.redriven_at is not null and p.event_id in (select event_id from page) limit -1
)";

const LIST: &str = "
with page as (
    select * from event_dead_letter e where {condition} order by e.failed_at desc, e.id desc limit ?9
), {past}
select {json} from page e order by e.failed_at desc, e.id desc";

const GROUPS: &str = "
select json_object(
    'destination', e.destination, 'error_code', e.error_code, 'count', count(*), 'types', count(distinct e.event_type),
    'first_failed_at', {min(e.failed_at)}, 'last_failed_at', {max(e.failed_at)}, 'error', max(e.error))
from event_dead_letter e
where {condition} and ?9 is null
group by e.destination, e.error_code
order by count(*) desc, e.destination, e.error_code";

const CHOOSE: &str = "
select e.id from event_dead_letter e where {condition} order by e.outbox_id, e.id limit ?9";

const OTHERS: &str = "
with page as (
    select * from event_dead_letter e
    where e.event_id = ?1 and e.outbox_id = ?2 and e.id <> ?3 order by e.id limit 100
), {past}
select {json} from page e order by e.id";

const CONTENT: &str = "
select json_object('source', e.source, 'payload', e.payload, 'headers', e.headers, 'correlation_id', e.correlation_id,
    'causation_id', e.causation_id, 'schema_version', e.schema_version, 'priority', e.priority)
from event_dead_letter e where e.id = ?1";

/// The dead letters to change: those of `?9` that still fit.
const CHOSEN: &str = "select e.id from event_dead_letter e
    where e.id in (select value from json_each(?9)) and {condition}";

/// The trigger `event_dead_letter_redrive` inserts the events.
const REDRIVE: &str = "
update event_dead_letter set redriven_by = ?10, redriven_to = ?11, redriven_at = strftime('%Y-%m-%d %H:%M:%f', 'now')
where redriven_at is null and (discarded_at is null or ?7 is not null) and id in ({chosen})";

const CORRECT: &str = "
update event_outbox set payload = ?2
where row_id in (
    select o.row_id from event_dead_letter d join event_outbox o
    on o.partition in ((9 - d.priority) * 64, (9 - d.priority) * 64 + 640) and o.id = d.outbox_id
       and o.destination = coalesce(d.redriven_to, d.destination) and o.event_id = d.event_id
    where d.id = ?1
)";

const DISCARD: &str = "
update event_dead_letter
set discarded_at = strftime('%Y-%m-%d %H:%M:%f', 'now'), discarded_by = ?10, discard_reason = ?11
where redriven_at is null and discarded_at is null and id in ({chosen})";

const PURGE: &str = "delete from event_dead_letter where id in ({chosen}) and ?10 is not null and ?11 is null";

/// Writes down what was done, or adds to what the same command did before.
pub(super) const NOTE: &str = "
insert into event_operator_action (command, action, filter, details, event_count, done_by) values (?1, ?2, ?3, ?4, ?5, ?6)
on conflict (command) do update
set event_count = event_count + excluded.event_count, done_at = strftime('%Y-%m-%d %H:%M:%f', 'now')";

/// A connection of an operator's command.
pub(super) struct SqliteMend {
    connection: SqliteConnection,
}

impl SqliteMend {
    /// Opens the file, and checks that its schema is one that this binary knows.
    pub(super) async fn open(url: &Secret) -> Result<Self, OutboxError> {
        let mut connection = open(url).await?;
        drop(schema::require_fit(&mut connection).await?);
        Ok(Self { connection })
    }

    /// Runs `work` in a transaction that writes.
    pub(super) async fn transaction<T>(
        &mut self,
        operation: &'static str,
        work: impl AsyncFnOnce(&mut SqliteConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, OutboxError> {
        let connection = &mut self.connection;
        run_query(operation, async {
            // A transaction that begins as a reader cannot wait for another one to end.
            connection.execute("begin immediate").await?;
            let done = async {
                let done = work(connection).await?;
                connection.execute("commit").await?;
                Ok(done)
            };
            let done = done.await;
            if done.is_err() {
                // A statement may have ended the transaction already.
                drop(connection.execute("rollback").await);
            }
            done
        })
        .await
    }

    async fn read(&mut self, text: &str, filter: &Filter, limit: Option<i64>) -> Result<Vec<String>, OutboxError> {
        let query = sqlx::query_scalar(AssertSqlSafe(statement(text))).persistent(false);
        let rows = bind(query, filter).bind(limit).fetch_all(&mut self.connection);
        run_query("read the dead letters", rows).await
    }
}

/// Fills in the condition and the columns, with times as RFC 3339.
fn statement(text: &str) -> String {
    let text = text.replace("{chosen}", CHOSEN).replace("{json}", AS_JSON).replace("{past}", PAST);
    let mut text = text.replace("{condition}", CONDITION);
    for time in [
        "e.created_at",
        "e.first_failed_at",
        "e.failed_at",
        "e.redriven_at",
        "e.discarded_at",
        "min(e.failed_at)",
        "max(e.failed_at)",
    ] {
        text = text.replace(&format!("{{{time}}}"), &format!("strftime('%Y-%m-%dT%H:%M:%fZ', {time})"));
    }
    text
}

/// A query that takes parameters one after the other.
pub(super) trait Bind<'q>: Sized {
    fn text(self, text: Option<String>) -> Self;
}

impl<'q, T> Bind<'q> for QueryScalar<'q, Sqlite, T, SqliteArguments> {
    fn text(self, text: Option<String>) -> Self {
        self.bind(text)
    }
}

impl<'q> Bind<'q> for Query<'q, Sqlite, SqliteArguments> {
    fn text(self, text: Option<String>) -> Self {
        self.bind(text)
    }
}

impl<'q, T> Bind<'q> for QueryAs<'q, Sqlite, T, SqliteArguments> {
    fn text(self, text: Option<String>) -> Self {
        self.bind(text)
    }
}

/// Binds the parameters of [`CONDITION`].
pub(super) fn bind<'q, Q: Bind<'q>>(query: Q, filter: &Filter) -> Q {
    let list = |ids: &[i64]| (!ids.is_empty()).then(|| json!(ids).to_string());
    query
        // In a glob of SQLite `[` is special too.
        .text(filter.event_type.as_ref().map(|glob| glob.replace('[', "[[]")))
        .text(filter.key.clone())
        .text(filter.destination.clone())
        .text(filter.error.clone())
        .text(filter.since.map(time_text))
        .text(filter.until.map(time_text))
        .text(list(&filter.ids))
        .text(filter.state.map(|state| State::name(state).to_owned()))
}

/// A time as the tables have it.
pub(super) fn time_text(time: OffsetDateTime) -> String {
    let time = time.to_offset(time::UtcOffset::UTC);
    let (date, clock) = (time.date(), time.time());
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}.{:03}",
        date.year(),
        u8::from(date.month()),
        date.day(),
        clock.hour(),
        clock.minute(),
        clock.second(),
        clock.millisecond()
    )
}

/// Who runs this command: nobody logs in to a file.
pub(super) fn operator() -> String {
    let user = ["USER", "LOGNAME"].iter().find_map(|name| std::env::var(name).ok().filter(|user| !user.is_empty()));
    let user = user.unwrap_or_else(|| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let ids = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
        format!("uid {}", ids.split_whitespace().next().unwrap_or("unknown"))
    });
    format!("{user}@{}", gethostname::gethostname().to_string_lossy())
}

/// Reads rows that the database wrote as JSON.
fn parsed<T: for<'d> serde::Deserialize<'d>>(rows: &[String]) -> Result<Vec<T>, OutboxError> {
    let rows = rows.iter().map(|row| serde_json::from_str(row)).collect::<Result<_, _>>();
    rows.map_err(|error| query_failed("read the dead letters", sqlx::Error::Decode(Box::new(error))))
}

/// Leaves out what was not given.
pub(super) fn without_nulls(details: serde_json::Value) -> serde_json::Value {
    match details {
        serde_json::Value::Object(fields) => fields.into_iter().filter(|(_, value)| !value.is_null()).collect(),
        other => other,
    }
}

/// Writes down what was done, within its transaction.
pub(super) async fn note(
    connection: &mut SqliteConnection,
    command: &CommandId,
    action: &str,
    details: serde_json::Value,
    count: u64,
) -> Result<(), sqlx::Error> {
    if count == 0 {
        return Ok(());
    }
    let query = sqlx::query(NOTE).bind(command.id.to_string()).bind(action);
    let query = query.bind(command.filter.to_json().to_string()).bind(details.to_string());
    query.bind(i64::try_from(count).unwrap_or(i64::MAX)).bind(operator()).execute(connection).await.map(drop)
}

impl Mend for SqliteMend {
    fn now(&mut self) -> BoxFuture<'_, Result<OffsetDateTime, OutboxError>> {
        async {
            let query = sqlx::query_scalar("select strftime('%Y-%m-%dT%H:%M:%fZ', 'now')");
            let now: String = run_query("read the clock", query.fetch_one(&mut self.connection)).await?;
            let now = OffsetDateTime::parse(&now, &Rfc3339);
            now.map_err(|error| query_failed("read the clock", sqlx::Error::Decode(Box::new(error))))
        }
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
            let content = sqlx::query_scalar(CONTENT).bind(id).fetch_all(&mut self.connection);
            let content: Vec<String> = run_query("read the dead letter", content).await?;
            let others = sqlx::query_scalar(AssertSqlSafe(statement(OTHERS))).persistent(false);
            let others = others.bind(&letter.event_id).bind(letter.outbox_id).bind(id);
            let others: Vec<String> = run_query("read the dead letter", others.fetch_all(&mut self.connection)).await?;
            let (content, others): (Vec<Content>, _) = (parsed(&content)?, parsed(&others)?);
            Ok(content.into_iter().next().map(|content| WholeDeadLetter { letter, content, others }))
        }
        .boxed()
    }

    fn choose<'a>(&'a mut self, filter: &'a Filter, limit: i64) -> BoxFuture<'a, Result<Vec<i64>, OutboxError>> {
        async move {
            let query = sqlx::query_scalar(AssertSqlSafe(statement(CHOOSE))).persistent(false);
            let ids = bind(query, filter).bind(limit).fetch_all(&mut self.connection);
            run_query("choose the dead letters", ids).await
        }
        .boxed()
    }

    fn apply<'a>(
        &'a mut self,
        action: &'a Action,
        command: &'a CommandId,
        ids: &'a [i64],
    ) -> BoxFuture<'a, Result<u64, OutboxError>> {
        let (name, text, argument, details) = match action {
            Action::Redrive { to, payload } => {
                let corrected = payload.as_ref().map(|_| "corrected");
                ("redrive", REDRIVE, to.clone(), json!({"to": to, "payload": corrected}))
            }
            Action::Discard { reason } => ("discard", DISCARD, Some(reason.clone()), json!({"reason": reason})),
            Action::Purge => ("purge", PURGE, None, json!({})),
        };
        self.transaction(name, async move |connection| {
            let mut filter = command.filter.clone();
            if filter.ids.is_empty() && filter.state.is_none() {
                filter.state = Some(action.usual_state());
            }
            let query = bind(sqlx::query(AssertSqlSafe(statement(text))).persistent(false), &filter);
            let query = query.bind(json!(ids).to_string()).bind(operator()).bind(argument);
            let count = query.execute(&mut *connection).await?.rows_affected();
            if let (Action::Redrive { payload: Some(payload), .. }, [id]) = (action, ids) {
                sqlx::query(CORRECT).bind(id).bind(payload).execute(&mut *connection).await?;
            }
            note(connection, command, name, without_nulls(details), count).await?;
            Ok(count)
        })
        .boxed()
    }

    fn waiting<'a>(
        &'a mut self,
        action: &'a WaitingAction,
        filter: &'a Filter,
    ) -> BoxFuture<'a, Result<Waiting, OutboxError>> {
        waiting::waiting(&mut self.connection, action, filter).boxed()
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
        let names = sqlx::query_scalar(
            "select distinct cast(d.key as text) from event_relay r cross join json_each(r.destinations) d order by 1",
        );
        run_query("read the configurations of the relays", names.fetch_all(&mut self.connection)).boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_written_as_the_tables_have_it() {
        let time = OffsetDateTime::parse("2026-11-29T13:05:09.0451+02:00", &Rfc3339).expect("a time");
        assert_eq!(time_text(time), "2026-11-29 11:05:09.045");
    }
}
