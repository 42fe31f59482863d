//! What a settle writes, as the JSON that SQLite's statements unfold.
//!
//! One parameter a table, however many rows: the write lock is held for the statements alone. A record takes effect only
//! where its row is still there, so that a settle may be repeated until it succeeds.

use serde_json::{Value, json};
use sqlx::Executor;
use sqlx::sqlite::SqliteConnection;

use crate::outbox::records::{LogEntry, Records};

/// Everything one settle writes, ready to be sent.
pub(super) struct Settle {
    /// The rows that go.
    rows: Vec<i64>,
    /// What they leave behind: statements that have something to write, with their parameters.
    writes: Vec<Write>,
}

struct Write {
    statement: &'static str,
    rows: String,
    /// What all rows of a [`DELIVERED`] have in common.
    delivered: Option<Delivered>,
}

#[derive(PartialEq)]
struct Delivered {
    destination: String,
    status: &'static str,
    duration_ms: i32,
}

/// Deliveries without an error, nearly all there are: `?1` the message of each row, as an object, which unfolds in a third
/// of the time that a list of lists takes.
const DELIVERED: &str = "
insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, message_id, duration_ms,
    worker, processed_at)
select o.event_id, o.id, o.event_type, ?3, ?4, o.attempts + 1, e.value, ?5, ?2,
    (select strftime('%Y-%m-%d %H:%M:%f', 'now'))
from json_each(?1) e cross join event_outbox o on o.row_id = cast(e.key as integer)";

const LOG: &str = "
insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, error, duration_ms,
    worker, processed_at)
select o.event_id, o.id, o.event_type, e.value ->> 1, e.value ->> 2, o.attempts + 1, e.value ->> 3, e.value ->> 4, ?2,
    (select strftime('%Y-%m-%d %H:%M:%f', 'now'))
from json_each(?1) e cross join event_outbox o on o.row_id = e.value ->> 0";

const DEAD_LETTERS: &str = "
insert into event_dead_letter (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
    correlation_id, causation_id, schema_version, priority, created_at, destination, attempts, error_code, error,
    first_failed_at, failed_at)
select o.id, o.event_id, o.event_type, o.source, o.aggregate_type, o.aggregate_id, o.payload, o.headers,
    o.correlation_id, o.causation_id, o.schema_version, o.priority, o.created_at, e.value ->> 1, e.value ->> 2,
    e.value ->> 3, e.value ->> 4, coalesce(o.first_failed_at, strftime('%Y-%m-%d %H:%M:%f', 'now')),
    strftime('%Y-%m-%d %H:%M:%f', 'now')
from json_each(?1) e cross join event_outbox o on o.row_id = e.value ->> 0";

const HISTORY: &str = "
insert into event_history (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
    correlation_id, causation_id, schema_version, priority, created_at, destination)
select o.id, o.event_id, o.event_type, o.source, o.aggregate_type, o.aggregate_id, o.payload, o.headers,
    o.correlation_id, o.causation_id, o.schema_version, o.priority, o.created_at, e.value ->> 1
from json_each(?1) e cross join event_outbox o on o.row_id = e.value ->> 0";

/// What is still owed becomes one scheduled row per destination. An event parked uncharged is due at once, or behind the
/// head of its key; a delayed one keeps its own time.
const OWED: &str = "
insert into event_outbox (copy_of, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
    correlation_id, causation_id, schema_version, priority, created_at, status, destination, attempts, last_error,
    available_at, first_failed_at)
select o.id, o.event_id, o.event_type, o.source, o.aggregate_type, o.aggregate_id, o.payload, o.headers,
    o.correlation_id, o.causation_id, o.schema_version, o.priority, o.created_at, 'scheduled', e.value ->> 1,
    e.value ->> 2, coalesce(e.value ->> 4, o.last_error),
    max(o.available_at, strftime('%Y-%m-%d %H:%M:%f', 'now', (e.value ->> 3) || ' seconds')),
    case when e.value ->> 4 is null then o.first_failed_at
         else coalesce(o.first_failed_at, strftime('%Y-%m-%d %H:%M:%f', 'now')) end
from json_each(?1) e cross join event_outbox o on o.row_id = e.value ->> 0
order by o.id";

const DELETE: &str = "delete from event_outbox where row_id in (select value from json_each(?1))";

impl Settle {
    pub(super) fn new(records: &Records<'_>) -> Self {
        let mut settle = Self { rows: records.rows.iter().map(|row| row.locator).collect(), writes: Vec::new() };
        settle.add(DEAD_LETTERS, &records.dead_letters, |dead| {
            let error = dead.error;
            json!([dead.row.locator, dead.destination, dead.attempts, error.code, error.message])
        });
        settle.add(HISTORY, &records.history, |kept| json!([kept.row.locator, kept.destination]));
        settle.add(OWED, &records.owed, |owed| {
            json!([owed.row.locator, owed.destination, owed.attempts, owed.delay_seconds, owed.error])
        });
        let (failed, delivered): (Vec<_>, Vec<_>) = records.log.iter().partition(|entry| entry.error.is_some());
        settle.add(LOG, &failed, |entry| {
            json!([entry.row.locator, entry.destination, entry.status, entry.error, entry.duration_ms])
        });
        settle.add_delivered(&delivered);
        settle
    }

    fn add<T>(&mut self, statement: &'static str, records: &[T], row: impl Fn(&T) -> Value) {
        if !records.is_empty() {
            let rows = Value::from_iter(records.iter().map(row)).to_string();
            self.writes.push(Write { statement, rows, delivered: None });
        }
    }

    fn add_delivered(&mut self, entries: &[&LogEntry<'_>]) {
        let mut groups: Vec<(Delivered, Vec<String>)> = Vec::new();
        for entry in entries {
            let (destination, status) = (entry.destination, entry.status);
            let group = Delivered { destination: destination.to_owned(), status, duration_ms: entry.duration_ms };
            let message = format!("\"{}\":{}", entry.row.locator, json!(entry.message_id));
            match groups.iter_mut().find(|(known, _)| *known == group) {
                Some((_, messages)) => messages.push(message),
                None => groups.push((group, vec![message])),
            }
        }
        self.writes.extend(groups.into_iter().map(|(group, messages)| Write {
            statement: DELIVERED,
            rows: format!("{{{}}}", messages.join(",")),
            delivered: Some(group),
        }));
    }

    /// There is nothing to write.
    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Writes all of it in one transaction.
    pub(super) async fn write(&self, connection: &mut SqliteConnection, worker: &str) -> Result<(), sqlx::Error> {
        // At once for writing: a transaction that begins by reading cannot wait for another to end.
        connection.execute("begin immediate").await?;
        for write in &self.writes {
            let mut query = sqlx::query(write.statement).bind(&write.rows).bind(worker);
            if let Some(group) = &write.delivered {
                query = query.bind(&group.destination).bind(group.status).bind(group.duration_ms);
            }
            query.execute(&mut *connection).await?;
        }
        let rows = json!(self.rows).to_string();
        let gone = sqlx::query(DELETE).bind(rows).execute(&mut *connection).await?.rows_affected();
        connection.execute("commit").await?;
        let expected = self.rows.len();
        if gone != expected as u64 {
            tracing::warn!(expected, gone, "someone else deleted rows of event_outbox while they were being published");
        }
        Ok(())
    }
}
