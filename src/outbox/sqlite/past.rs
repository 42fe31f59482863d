//! What operators do with the past, in SQLite: see [`Past`].
//!
//! The log and the history need no index on time: their rows are written in the order of time, so the first row of a time is
//! found by halving the range of row ids.

use std::fs::{File, OpenOptions, TryLockError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, ready};
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use sqlx::{AssertSqlSafe, Row};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::event::{Event, RowKey};
use crate::outbox::decode;
use crate::outbox::error::OutboxError;
use crate::outbox::past::{
    Expired, Extent, History, Identity, Kept, LogFilter, LogLine, LogPage, Past, ReplayLock, Selection, UNKNOWN_FORMAT,
};
use crate::outbox::sqlite::connection::{open, path, query_failed, run_query};
use crate::outbox::sqlite::{retention, row, schema};
use crate::secret::Secret;

/// The most rows of the log that one question returns.
const LOG_ROWS: i64 = 5000;

/// The rows of a selection: `?1` to `?6`. `?1` is a row id, before which everything is older.
macro_rules! selected {
    () => {
        "from event_history h
where h.rowid >= ?1 and h.destination = ?2 and h.published_at < ?3
  and (?4 is null or h.event_type glob ?4)
  and (?5 is null or h.aggregate_id = ?5 or h.aggregate_type || ':' || h.aggregate_id = ?5)
  and (?6 is null or h.event_id in (select value from json_each(?6)) or h.outbox_id in (select value from json_each(?6)))"
    };
}

const MEASURE: &str = concat!(
    "select count(*) as count, min(h.outbox_id) as first, max(h.outbox_id) as last, min(h.published_at) as since,
    max(h.published_at) as upto ",
    selected!(),
    " and h.outbox_id > ?7"
);

const EVENTS: &str = concat!(
    "select h.outbox_id, h.event_id, h.event_type, h.source, h.aggregate_type, h.aggregate_id, cast(h.payload as blob) as payload,
    h.headers, h.correlation_id, h.causation_id, h.schema_version, h.created_at, h.format ",
    selected!(),
    " and h.outbox_id > ?7 and h.outbox_id <= ?8 order by h.outbox_id, h.rowid limit ?9"
);

/// New rows of the log. The history and the dead letters have the keys of events, and the outbox has those that still wait.
const LOG: &str = "
select l.rowid as row_id, l.* from event_processing_log l
where l.rowid > ?1 and l.rowid <= ?2
  and (?3 is null or l.event_type glob ?3)
  and (?4 is null or l.destination = ?4)
  and (?5 is null or l.status = ?5)
  and (?6 is null
      or exists (
          select 1 from event_history h where h.outbox_id = l.outbox_id and h.event_id = l.event_id
            and (h.aggregate_id = ?6 or h.aggregate_type || ':' || h.aggregate_id = ?6)
      )
      or l.status = 'dead_lettered' and exists (
          select 1 from event_dead_letter d
          where d.failed_at >= strftime('%Y-%m-%d %H:%M:%f', l.processed_at, '-1 minute') and d.event_id = l.event_id
            and (d.aggregate_id = ?6 or d.aggregate_type || ':' || d.aggregate_id = ?6)
      )
      or l.status = 'failed' and exists (
          select 1 from event_outbox o
          where o.status = 'scheduled' and o.destination = l.destination and o.destination <> ''
            and o.aggregate_id in (?6, substr(?6, instr(?6, ':') + 1)) and o.id = l.outbox_id and o.event_id = l.event_id
            and (o.aggregate_id = ?6 or o.aggregate_type || ':' || o.aggregate_id = ?6)
      ))
order by l.rowid
limit ?7";

/// A connection to a SQLite outbox.
pub(super) struct SqlitePast {
    url: Secret,
    connection: SqliteConnection,
    /// The row of the log up to which everything was returned.
    returned: Option<i64>,
}

impl SqlitePast {
    pub(super) async fn open(url: &Secret) -> Result<Self, OutboxError> {
        let mut connection = open(url).await?;
        schema::require_fit(&mut connection).await?;
        Ok(Self { url: url.clone(), connection, returned: None })
    }

    /// Returns the time so long ago, as rows have it.
    async fn ago(&mut self, age: Duration) -> Result<String, OutboxError> {
        run_query("read the clock", async {
            sqlx::query_scalar("select coalesce(strftime('%Y-%m-%d %H:%M:%f', 'now', ?1), '')")
                .bind(format!("-{:.3} seconds", age.as_secs_f64()))
                .fetch_one(&mut self.connection)
                .await
        })
        .await
    }

    /// Returns the lowest and the highest row id of a table. Both are 0 if it is empty.
    async fn ends(&mut self, kept: Kept) -> Result<(i64, i64), OutboxError> {
        let table = kept.table();
        let ends = format!(
            "select coalesce((select min(rowid) from {table}), 0), coalesce((select max(rowid) from {table}), 0)"
        );
        run_query("look at the ends of a table", async {
            sqlx::query_as(AssertSqlSafe(ends)).fetch_one(&mut self.connection).await
        })
        .await
    }

    /// Returns the id of the first row that is not older than `at`, or one above the last row.
    async fn first_since(&mut self, kept: Kept, at: &str) -> Result<i64, OutboxError> {
        let next =
            format!("select rowid, {} from {} where rowid >= ?1 order by rowid limit 1", kept.column(), kept.table());
        let (mut low, mut high) = self.ends(kept).await?;
        while low <= high {
            let middle = low + (high - low) / 2;
            let found: Option<(i64, String)> = run_query("look for the rows of a time", async {
                sqlx::query_as(AssertSqlSafe(next.clone())).bind(middle).fetch_optional(&mut self.connection).await
            })
            .await?;
            match found {
                Some((row, time)) if time.as_str() < at => low = row + 1,
                _ => high = middle - 1,
            }
        }
        Ok(low)
    }

    async fn expired(&mut self, kept: Kept, age: Duration) -> Result<Expired, OutboxError> {
        let before = self.ago(age).await?;
        let first = self.first_since(kept, &before).await?;
        let count = format!("select count(*) from {} where rowid < ?1", kept.table());
        let rows: i64 = run_query("count the rows past their retention", async {
            sqlx::query_scalar(AssertSqlSafe(count)).bind(first).fetch_one(&mut self.connection).await
        })
        .await?;
        Ok(Expired { rows: rows.unsigned_abs(), ..Expired::default() })
    }

    fn lock_replay(&self) -> Result<Option<Box<dyn ReplayLock>>, OutboxError> {
        let failed = |source| OutboxError::File { operation: "lock the replay's file beside the database", source };
        let mut beside = path(&self.url)?.canonicalize().map_err(failed)?.into_os_string();
        beside.push("-relay-replay");
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(beside).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Box::new(SqliteReplayLock(file)))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(failed(source)),
        }
    }

    async fn history(&mut self) -> Result<History, OutboxError> {
        let (first, last) = self.ends(Kept::History).await?;
        // The first row of a table has the id 1.
        let begins = if first > 1 {
            let begins: String = run_query("look at event_history", async {
                let at = "select published_at from event_history where rowid = ?1";
                sqlx::query_scalar(at).bind(first).fetch_one(&mut self.connection).await
            })
            .await?;
            row::time(&begins).map(time::PrimitiveDateTime::assume_utc)
        } else {
            None
        };
        Ok(History { is_empty: last == 0, begins })
    }

    async fn destinations(&mut self) -> Result<Vec<String>, OutboxError> {
        run_query("look at event_history", async {
            let destinations = "select distinct destination from event_history order by 1";
            sqlx::query_scalar(destinations).fetch_all(&mut self.connection).await
        })
        .await
    }

    /// Returns the first row of a selection's time.
    async fn begin(&mut self, selection: &Selection) -> Result<i64, OutboxError> {
        match selection.since {
            Some(since) => self.first_since(Kept::History, &text(since)).await,
            None => Ok(0),
        }
    }

    async fn measure(&mut self, selection: &Selection, after: i64) -> Result<Extent, OutboxError> {
        let begin = self.begin(selection).await?;
        run_query("count what is to be replayed", async {
            let row = sqlx::query(MEASURE)
                .bind(begin)
                .bind(&selection.published_to)
                .bind(text(selection.until))
                .bind(selection.event_type.as_deref().map(glob))
                .bind(&selection.key)
                .bind(identities(selection))
                .bind(after)
                .fetch_one(&mut self.connection)
                .await?;
            let time = |name: &str| {
                let text: Option<String> = row.try_get(name)?;
                Ok::<_, sqlx::Error>(text.and_then(|text| row::time(&text)).map(time::PrimitiveDateTime::assume_utc))
            };
            Ok(Extent {
                count: row.try_get::<i64, _>("count")?.unsigned_abs(),
                first: row.try_get::<Option<i64>, _>("first")?.unwrap_or_default(),
                last: row.try_get::<Option<i64>, _>("last")?.unwrap_or_default(),
                from: time("since")?,
                to: time("upto")?,
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
        let begin = self.begin(selection).await?;
        let rows = run_query("read event_history", async {
            sqlx::query(EVENTS)
                .bind(begin)
                .bind(&selection.published_to)
                .bind(text(selection.until))
                .bind(selection.event_type.as_deref().map(glob))
                .bind(&selection.key)
                .bind(identities(selection))
                .bind(after)
                .bind(up_to)
                .bind(i64::try_from(limit).unwrap_or(i64::MAX))
                .fetch_all(&mut self.connection)
                .await
        })
        .await?;
        let unreadable = |source| query_failed("read event_history", source);
        rows.iter()
            .map(|row| {
                if row.try_get::<i64, _>("format").map_err(unreadable)? != 0 {
                    return Err(UNKNOWN_FORMAT);
                }
                event(row).map_err(unreadable)
            })
            .collect()
    }

    async fn follow(&mut self, since: OffsetDateTime) -> Result<(), OutboxError> {
        self.returned = Some(self.first_since(Kept::Log, &text(since)).await? - 1);
        Ok(())
    }

    async fn log(&mut self, filter: &LogFilter) -> Result<LogPage, OutboxError> {
        let (_, last) = self.ends(Kept::Log).await?;
        // Ids begin anew after the last row was deleted.
        let after = self.returned.map_or(last, |returned| if returned > last { 0 } else { returned });
        let rows = run_query("read event_processing_log", async {
            sqlx::query(LOG)
                .bind(after)
                .bind(last)
                .bind(filter.event_type.as_deref().map(glob))
                .bind(&filter.destination)
                .bind(&filter.status)
                .bind(&filter.key)
                .bind(LOG_ROWS)
                .fetch_all(&mut self.connection)
                .await
        })
        .await?;
        let full = rows.len() >= usize::try_from(LOG_ROWS).unwrap_or(usize::MAX);
        let unreadable = |source| query_failed("read event_processing_log", source);
        self.returned = match rows.last() {
            Some(row) if full => Some(row.try_get("row_id").map_err(unreadable)?),
            _ => Some(last),
        };
        let lines = rows.iter().map(line).collect::<Result<_, _>>().map_err(unreadable)?;
        Ok(LogPage { lines, full })
    }
}

struct SqliteReplayLock(File);

impl ReplayLock for SqliteReplayLock {
    fn require(&mut self) -> BoxFuture<'_, Result<(), OutboxError>> {
        ready(Ok(())).boxed() // the operating system takes it from nobody
    }
}

impl Drop for SqliteReplayLock {
    fn drop(&mut self) {
        // Closing would suffice, except that a program which this process is starting also has the file open.
        drop(self.0.unlock());
    }
}

/// Returns a time as rows have it.
fn text(at: OffsetDateTime) -> String {
    let at = at.to_offset(time::UtcOffset::UTC);
    let (hour, minute, second, milli) = at.to_hms_milli();
    format!("{} {hour:02}:{minute:02}:{second:02}.{milli:03}", at.date())
}

/// Returns a glob of ours as a pattern of `glob`, in which a bracket begins a class of characters.
fn glob(glob: &str) -> String {
    glob.replace('[', "[[]")
}

/// Returns the ids of a selection as JSON.
fn identities(selection: &Selection) -> Option<String> {
    let ids: Vec<serde_json::Value> = selection
        .ids
        .iter()
        .map(|id| match id {
            Identity::Event(id) => id.to_string().into(),
            Identity::Sequence(sequence) => (*sequence).into(),
        })
        .collect();
    (!ids.is_empty()).then(|| serde_json::Value::from(ids).to_string())
}

fn event(row: &SqliteRow) -> Result<Event, sqlx::Error> {
    let unreadable = |what: &str| sqlx::Error::Decode(format!("a row of event_history: {what}").into());
    let headers: &str = row.try_get("headers")?;
    let headers = decode::headers(Some(headers.as_bytes())).map_err(|error| unreadable(&error.to_string()))?;
    let created_at: &str = row.try_get("created_at")?;
    let created_at = row::time(created_at).ok_or_else(|| unreadable("created_at is no time"))?;
    let event_id: &str = row.try_get("event_id")?;
    Ok(Event {
        row: RowKey { locator: 0, partition: 0, id: row.try_get("outbox_id")?, destination: String::new() },
        event_id: event_id.parse::<Uuid>().map_err(|_| unreadable("event_id is no UUID"))?,
        event_type: row.try_get("event_type")?,
        source: row.try_get("source")?,
        aggregate_type: row.try_get("aggregate_type")?,
        aggregate_id: row.try_get("aggregate_id")?,
        payload: row.try_get("payload")?,
        headers,
        correlation_id: row.try_get("correlation_id")?,
        causation_id: row.try_get("causation_id")?,
        schema_version: row.try_get("schema_version")?,
        created_at: created_at.assume_utc(),
        attempts: 0,
    })
}

fn line(row: &SqliteRow) -> Result<LogLine, sqlx::Error> {
    Ok(LogLine {
        processed_at: row.try_get::<String, _>("processed_at")?.replace(' ', "T") + "Z",
        status: row.try_get("status")?,
        destination: row.try_get("destination")?,
        event_type: row.try_get("event_type")?,
        sequence: row.try_get("outbox_id")?,
        event_id: row.try_get("event_id")?,
        attempt: row.try_get("attempt")?,
        message_id: row.try_get("message_id")?,
        error: row.try_get("error")?,
        duration_ms: row.try_get("duration_ms")?,
        worker: row.try_get("worker")?,
    })
}

impl Past for SqlitePast {
    fn expired(&mut self, kept: Kept, retention: Duration) -> BoxFuture<'_, Result<Expired, OutboxError>> {
        self.expired(kept, retention).boxed()
    }

    fn prune(&mut self, kept: Kept, retention: Duration) -> BoxFuture<'_, Result<(), OutboxError>> {
        retention::forget(&mut self.connection, kept.table(), kept.column(), retention).boxed()
    }

    fn lock_replay(&mut self) -> BoxFuture<'_, Result<Option<Box<dyn ReplayLock>>, OutboxError>> {
        ready((*self).lock_replay()).boxed()
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
        ready(Ok(OffsetDateTime::now_utc())).boxed() // the file is on this machine
    }

    fn follow(&mut self, since: OffsetDateTime) -> BoxFuture<'_, Result<(), OutboxError>> {
        self.follow(since).boxed()
    }

    fn log<'a>(&'a mut self, filter: &'a LogFilter) -> BoxFuture<'a, Result<LogPage, OutboxError>> {
        self.log(filter).boxed()
    }
}
