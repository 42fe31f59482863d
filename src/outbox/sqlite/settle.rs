//! What a settle writes, as the JSON that SQLite's statements unfold.
//!
//! One script with one parameter a table, however many rows: the write lock is held for the statements and nothing else,
//! no way from thread to thread between them. A record takes effect only where its row is still there, so that a settle
//! may be repeated until it succeeds.

use serde_json::{Value, json};
use sqlx::Row;
use sqlx::sqlite::SqliteConnection;

use crate::outbox::records::{LogEntry, Records};

/// Everything one settle writes, ready to be sent.
#[derive(Debug)]
pub(super) struct Settle {
    /// How many rows go.
    count: i64,
    dead_letters: String,
    history: String,
    owed: String,
    log: String,
    published: String,
    rows: String,
    destination: String,
    duration_ms: i32,
}

/// - At once for writing: a transaction that begins by reading cannot wait for another to end.
/// - What is still owed becomes one scheduled row per destination. An event parked uncharged is due at once, or behind the
///   head of its key; a delayed one keeps its own time.
/// - What the first destination took, which is nearly all there is, comes as an object of row and message, which unfolds in
///   a third of the time that a list of lists takes.
const SETTLE: &str = "
begin immediate;

insert into event_dead_letter (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
    correlation_id, causation_id, schema_version, priority, created_at, destination, attempts, error_code, error,
    first_failed_at, failed_at)
select o.id, o.event_id, o.event_type, o.source, o.aggregate_type, o.aggregate_id, o.payload, o.headers,
    o.correlation_id, o.causation_id, o.schema_version, o.priority, o.created_at, e.value ->> 1, e.value ->> 2,
    e.value ->> 3, e.value ->> 4,
    min(coalesce(o.first_failed_at, '9999'), strftime('%Y-%m-%d %H:%M:%f', 'now')), strftime('%Y-%m-%d %H:%M:%f', 'now')
from json_each($1) e cross join event_outbox o on o.row_id = e.value ->> 0;

insert into event_history (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
    correlation_id, causation_id, schema_version, priority, created_at, destination)
select o.id, o.event_id, o.event_type, o.source, o.aggregate_type, o.aggregate_id, o.payload, o.headers,
    o.correlation_id, o.causation_id, o.schema_version, o.priority, o.created_at, e.value ->> 1
from json_each($2) e cross join event_outbox o on o.row_id = e.value ->> 0;

insert into event_outbox (copy_of, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
    correlation_id, causation_id, schema_version, priority, created_at, status, destination, attempts, last_error,
    available_at, first_failed_at)
select o.id, o.event_id, o.event_type, o.source, o.aggregate_type, o.aggregate_id, o.payload, o.headers,
    o.correlation_id, o.causation_id, o.schema_version, o.priority, o.created_at, 'scheduled', e.value ->> 1,
    e.value ->> 2, coalesce(e.value ->> 4, o.last_error),
    max(o.available_at, strftime('%Y-%m-%d %H:%M:%f', 'now', (e.value ->> 3) || ' seconds')),
    case when e.value ->> 4 is null then o.first_failed_at
         else coalesce(o.first_failed_at, strftime('%Y-%m-%d %H:%M:%f', 'now')) end
from json_each($3) e cross join event_outbox o on o.row_id = e.value ->> 0
order by o.id;

insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, message_id, error,
    duration_ms, worker, processed_at)
select o.event_id, o.id, o.event_type, e.value ->> 1, e.value ->> 2, o.attempts + 1, e.value ->> 3, e.value ->> 4,
    e.value ->> 5, $7, (select strftime('%Y-%m-%d %H:%M:%f', 'now'))
from json_each($4) e cross join event_outbox o on o.row_id = e.value ->> 0;

insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, message_id, duration_ms,
    worker, processed_at)
select o.event_id, o.id, o.event_type, $8, 'published', o.attempts + 1, e.value, $9, $7,
    (select strftime('%Y-%m-%d %H:%M:%f', 'now'))
from json_each($5) e cross join event_outbox o on o.row_id = cast(e.key as integer);

update event_outbox_epoch set epoch = epoch + 1;

delete from event_outbox where row_id in (select value from json_each($6));

select changes();

commit";

impl Settle {
    pub(super) fn new(records: &Records<'_>) -> Self {
        // One call carried all that a destination took, so this is what its entries have in common.
        let first = records.log.iter().find(|entry| entry.status == "published");
        let common = first.map_or(("", 0), |first| (first.destination, first.duration_ms));
        let (published, log): (Vec<_>, Vec<_>) = records
            .log
            .iter()
            .partition(|entry| entry.status == "published" && (entry.destination, entry.duration_ms) == common);
        Self {
            count: i64::try_from(records.rows.len()).unwrap_or(i64::MAX),
            dead_letters: list(&records.dead_letters, |dead| {
                json!([dead.row.locator, dead.destination, dead.attempts, dead.error.code, dead.error.message])
            }),
            history: list(&records.history, |kept| json!([kept.row.locator, kept.destination])),
            owed: list(&records.owed, |owed| {
                json!([owed.row.locator, owed.destination, owed.attempts, owed.delay_seconds, owed.error])
            }),
            log: list(&log, |e| {
                json!([e.event.row.locator, e.destination, e.status, e.message_id, e.error, e.duration_ms])
            }),
            published: object(&published),
            rows: list(&records.rows, |row| row.locator.into()),
            destination: common.0.to_owned(),
            duration_ms: common.1,
        }
    }

    /// How many events it records.
    pub(super) fn count(&self) -> i64 {
        self.count
    }

    /// There is nothing to write.
    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Writes all of it in one transaction. After an error the connection must be dropped, and the transaction with it.
    pub(super) async fn write(&self, connection: &mut SqliteConnection, worker: &str) -> Result<(), sqlx::Error> {
        let answers = sqlx::query(SETTLE)
            .bind(&self.dead_letters)
            .bind(&self.history)
            .bind(&self.owed)
            .bind(&self.log)
            .bind(&self.published)
            .bind(&self.rows)
            .bind(worker)
            .bind(&self.destination)
            .bind(self.duration_ms)
            .fetch_all(connection) // to the end: fetching one answer would leave the commit out
            .await?;
        let gone: i64 = answers.first().ok_or(sqlx::Error::RowNotFound)?.try_get(0)?;
        if gone != self.count {
            let expected = self.count;
            tracing::warn!(expected, gone, "someone else deleted rows of event_outbox while they were being published");
        }
        Ok(())
    }
}

fn list<T>(records: &[T], row: impl Fn(&T) -> Value) -> String {
    Value::from_iter(records.iter().map(row)).to_string()
}

/// The message of each row.
fn object(entries: &[&LogEntry<'_>]) -> String {
    let message = |entry: &&LogEntry<'_>| (entry.event.row.locator.to_string(), json!(entry.message_id));
    Value::from_iter(entries.iter().map(message)).to_string()
}
