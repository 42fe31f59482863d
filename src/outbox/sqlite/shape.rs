//! Checks that relay's tables exist, with the columns that the statements name: somebody may have renamed one.

use std::collections::BTreeSet;

use sqlx::sqlite::SqliteConnection;

use crate::outbox::OutboxError;
use crate::outbox::quote::quoted;
use crate::outbox::shape::{Column, differences};
use crate::outbox::sqlite::connection::run_query;

/// Each table with its columns.
const TABLES: [(&str, &str); 11] = [
    (
        "event_outbox",
        "row_id, copy_of, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers, \
         correlation_id, causation_id, schema_version, priority, available_at, status, destination, attempts, \
         last_error, first_failed_at, created_at, format",
    ),
    (
        "event_processing_log",
        "event_id, outbox_id, event_type, destination, status, attempt, message_id, error, duration_ms, worker, \
         processed_at",
    ),
    (
        "event_dead_letter",
        "id, outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers, \
         correlation_id, causation_id, schema_version, priority, created_at, destination, attempts, error_code, \
         error, first_failed_at, failed_at, redriven_at, format, redriven_by, redriven_to, discarded_at, \
         discarded_by, discard_reason",
    ),
    (
        "event_history",
        "outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers, correlation_id, \
         causation_id, schema_version, priority, created_at, destination, published_at, format",
    ),
    ("event_outbox_epoch", "outbox_id, epoch"),
    (
        "event_relay",
        "id, worker, version, schema_version, once, since, fingerprint, destinations, routes, seen_at, trouble",
    ),
    ("event_pause", "destination, event_type, paused_at, paused_by"),
    ("event_tally", "minute, destination, published, retried, dead_lettered"),
    ("event_relay_run", "run_id, worker, begun_at"),
    ("event_crash_suspect", "event_id, run_id, together, noted_at"),
    ("event_relay_changes", "changes, last_id"),
];

const COLUMNS: &str = "
select lower(m.name), lower(c.name), '' from sqlite_schema m join pragma_table_info(m.name) c where m.type = 'table' order by m.name, c.cid";

/// Fails if a table or a column does not exist.
pub(super) async fn require(connection: &mut SqliteConnection) -> Result<(), OutboxError> {
    let columns: Vec<Column> = run_query("look at the columns", async {
        sqlx::query_as(COLUMNS).persistent(false).fetch_all(connection).await
    })
    .await?;
    let changes = changes(&columns);
    if changes.is_empty() { Ok(()) } else { Err(OutboxError::SchemaBroken { reason: changes.join("; ") }) }
}

fn changes(columns: &[Column]) -> Vec<String> {
    let names: BTreeSet<&str> = columns.iter().map(|(table, ..)| table.as_str()).collect();
    let (there, missing): (Vec<_>, Vec<_>) = TABLES.into_iter().partition(|(table, _)| names.contains(table));
    let mut changes: Vec<String> = missing
        .into_iter()
        .map(|(table, wanted)| {
            let has_all = |name: &&&str| {
                let has = |wanted: &str| columns.iter().any(|(of, column, _)| of == **name && column == wanted);
                !TABLES.iter().any(|(ours, _)| ours == *name) && wanted.split(", ").all(has)
            };
            let cure = match names.iter().find(has_all) {
                Some(other) => format!("{other} has its columns: alter table {} rename to {table}", quoted(other)),
                None => "restore it from a backup".to_owned(),
            };
            format!("there is no table {table}; {cure}")
        })
        .collect();
    changes.extend(differences(&there, columns, false));
    changes
}
