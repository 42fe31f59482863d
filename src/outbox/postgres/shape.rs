//! Checks that our tables have the columns that the statements name: somebody may have renamed one, or changed its type.

use sqlx::postgres::PgConnection;

use crate::outbox::postgres::connection::{STATEMENT_TIMEOUT, with_timeout};
use crate::outbox::postgres::sql::Sql;
use crate::outbox::shape::{Column, differences};
use crate::outbox::{OutboxError, Usage};

/// Each table with its columns and their types.
const TABLES: [(&str, &str); 10] = [
    (
        "event_outbox",
        "id bigint, event_id uuid, event_type text, source text, aggregate_type text, aggregate_id text, \
         payload jsonb, headers jsonb, correlation_id text, causation_id text, schema_version integer, \
         priority smallint, available_at timestamp with time zone, status text, destination text, \
         attempts integer, last_error text, first_failed_at timestamp with time zone, \
         created_at timestamp with time zone, partition smallint, format smallint",
    ),
    (
        "event_processing_log",
        "event_id uuid, outbox_id bigint, event_type text, destination text, status text, attempt integer, \
         message_id text, error text, duration_ms integer, worker text, processed_at timestamp with time zone",
    ),
    (
        "event_dead_letter",
        "id bigint, outbox_id bigint, event_id uuid, event_type text, source text, aggregate_type text, \
         aggregate_id text, payload jsonb, headers jsonb, correlation_id text, causation_id text, \
         schema_version integer, priority smallint, created_at timestamp with time zone, destination text, \
         attempts integer, error_code text, error text, first_failed_at timestamp with time zone, \
         failed_at timestamp with time zone, redriven_at timestamp with time zone, format smallint, \
         redriven_by text, redriven_to text, discarded_at timestamp with time zone, discarded_by text, \
         discard_reason text",
    ),
    (
        "event_history",
        "outbox_id bigint, event_id uuid, event_type text, source text, aggregate_type text, aggregate_id text, \
         payload jsonb, headers jsonb, correlation_id text, causation_id text, schema_version integer, \
         priority smallint, created_at timestamp with time zone, destination text, \
         published_at timestamp with time zone, format smallint",
    ),
    (
        "event_relay",
        "id bigint, worker text, version text, schema_version integer, once boolean, \
         since timestamp with time zone, fingerprint text, destinations jsonb, routes jsonb, pid integer, \
         seen_at timestamp with time zone, looked_at timestamp with time zone, hung boolean, trouble jsonb",
    ),
    ("event_pause", "destination text, event_type text, paused_at timestamp with time zone, paused_by text"),
    ("event_pause_changes", "changes bigint"),
    (
        "event_tally",
        "minute timestamp with time zone, destination text, published bigint, retried bigint, dead_lettered bigint",
    ),
    ("event_relay_run", "run_id uuid, worker text, begun_at timestamp with time zone"),
    ("event_crash_suspect", "event_id uuid, run_id uuid, together integer, noted_at timestamp with time zone"),
];

const COLUMNS: &str = "
select c.relname::text, a.attname::text, pg_catalog.format_type(a.atttypid, null)
from pg_catalog.pg_class o
join pg_catalog.pg_class c on c.relnamespace = o.relnamespace and c.relkind in ('r', 'p')
join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0::smallint and not a.attisdropped
where o.oid = '{schema}.event_outbox'::regclass::oid and c.relname = any ($1::text[]::name[])
order by c.relname, a.attnum";

/// Returns what differs from how it was made. `types`: types are compared too, although many others work as well.
pub(super) async fn changes(
    connection: &mut PgConnection,
    sql: Sql,
    usage: Usage,
    types: bool,
) -> Result<Vec<String>, sqlx::Error> {
    let used: Vec<_> = TABLES.into_iter().filter(|(table, _)| usage.history || *table != "event_history").collect();
    let names: Vec<&str> = used.iter().map(|(table, _)| *table).collect();
    let columns: Vec<Column> = sql.query_as(COLUMNS).persistent(false).bind(names).fetch_all(connection).await?;
    Ok(differences(&used, &columns, types))
}

/// Fails if a column is missing.
pub(super) async fn require(connection: &mut PgConnection, sql: Sql, usage: Usage) -> Result<(), OutboxError> {
    let changes =
        with_timeout("look at the columns", STATEMENT_TIMEOUT, changes(connection, sql, usage, false)).await?;
    if changes.is_empty() { Ok(()) } else { Err(OutboxError::SchemaBroken { reason: changes.join("; ") }) }
}
