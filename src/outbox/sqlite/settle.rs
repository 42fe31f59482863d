//! What a settle writes, as the JSON that SQLite's statements unfold.
//!
//! One parameter a table, however many rows: the write lock is held for the statements alone. A record takes effect only
//! where its row is still there, so that a settle may be repeated until it succeeds.

use serde_json::{Value, json};
use sqlx::Executor;
use sqlx::sqlite::SqliteConnection;

use crate::outbox::records::Records;

/// Everything one settle writes, ready to be sent.
pub(super) struct Settle {
    rows: Vec<Value>,
    /// Each statement that has something to write, with its parameter.
    writes: Vec<(&'static str, String)>,
}

const LOG: &str = "
insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, message_id, error,
    duration_ms, worker, processed_at)
select o.event_id, o.id, o.event_type, e.value ->> 1, e.value ->> 2, o.attempts + 1, e.value ->> 3, e.value ->> 4,
    e.value ->> 5, ?2, (select strftime('%Y-%m-%d %H:%M:%f', 'now'))
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
        let mut writes = Vec::new();
        let mut add = |statement, rows: Vec<Value>| {
            if !rows.is_empty() {
                writes.push((statement, Value::from(rows).to_string()));
            }
        };
        let dead = records.dead_letters.iter();
        add(
            DEAD_LETTERS,
            dead.map(|d| json!([d.row.locator, d.destination, d.attempts, d.error.code, d.error.message])).collect(),
        );
        add(HISTORY, records.history.iter().map(|kept| json!([kept.row.locator, kept.destination])).collect());
        let owed = records.owed.iter();
        add(OWED, owed.map(|o| json!([o.row.locator, o.destination, o.attempts, o.delay_seconds, o.error])).collect());
        let log = records.log.iter();
        add(
            LOG,
            log.map(|e| json!([e.row.locator, e.destination, e.status, e.message_id, e.error, e.duration_ms]))
                .collect(),
        );
        Self { rows: records.rows.iter().map(|row| row.locator.into()).collect(), writes }
    }

    /// There is nothing to write.
    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Writes all of it in one transaction.
    pub(super) async fn write(&self, connection: &mut SqliteConnection, worker: &str) -> Result<(), sqlx::Error> {
        // At once for writing: a transaction that begins by reading cannot wait for another to end.
        connection.execute("begin immediate").await?;
        for (statement, rows) in &self.writes {
            sqlx::query(*statement).bind(rows).bind(worker).execute(&mut *connection).await?;
        }
        let rows = Value::from(self.rows.clone()).to_string();
        let gone = sqlx::query(DELETE).bind(rows).execute(&mut *connection).await?.rows_affected();
        connection.execute("commit").await?;
        let expected = self.rows.len();
        if gone != expected as u64 {
            tracing::warn!(expected, gone, "someone else deleted rows of event_outbox while they were being published");
        }
        Ok(())
    }
}
