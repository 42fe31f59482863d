//! Migrations, and whether a database fits this binary.
//!
//! The schema itself tells its version, by the function `relay_schema_version()` that every migration replaces. So the
//! files can be applied by any tool, and a database that has other tables, or another migrator's, is no trouble.

use sqlx::postgres::PgConnection;
use sqlx::{Executor, Row};

use crate::outbox::postgres::{STATEMENT_TIMEOUT, answered, connect, connect_options, query_failed};
use crate::outbox::{Check, Migrated, OutboxError};
use crate::secret::Secret;

/// All migrations, the first with version 1. Never edited once released.
const MIGRATIONS: [(&str, &str); 10] = [
    ("0001_event_outbox", include_str!("../../../migrations/postgres/0001_event_outbox.sql")),
    ("0002_event_processing_log", include_str!("../../../migrations/postgres/0002_event_processing_log.sql")),
    ("0003_event_dead_letter", include_str!("../../../migrations/postgres/0003_event_dead_letter.sql")),
    ("0004_event_history", include_str!("../../../migrations/postgres/0004_event_history.sql")),
    ("0005_wake_up", include_str!("../../../migrations/postgres/0005_wake_up.sql")),
    ("0006_operator_views", include_str!("../../../migrations/postgres/0006_operator_views.sql")),
    ("0007_claim_epoch", include_str!("../../../migrations/postgres/0007_claim_epoch.sql")),
    ("0008_crash_loops", include_str!("../../../migrations/postgres/0008_crash_loops.sql")),
    ("0009_moved_events", include_str!("../../../migrations/postgres/0009_moved_events.sql")),
    ("0010_cheaper_inserts", include_str!("../../../migrations/postgres/0010_cheaper_inserts.sql")),
];

/// The schema version this binary needs.
pub const SCHEMA_VERSION: i32 = MIGRATIONS.len() as i32;

/// Brings the database at `url` to [`SCHEMA_VERSION`]. Safe to run twice, twice at once, and beside running relays.
///
/// # Errors
/// [`OutboxError::SchemaTooNew`], or why it could not; each migration is applied whole or not at all.
pub async fn migrate(url: &Secret) -> Result<Migrated, OutboxError> {
    let mut connection = connect(&connect_options(url, true)?).await?;
    let from = version(&mut connection).await?;
    let mut migrated = Migrated { from, to: SCHEMA_VERSION, applied: Vec::new() };
    loop {
        // Under the lock the version is read anew: another migrator may just have finished.
        run(&mut connection, "begin; set local lock_timeout = '10s'; select pg_advisory_xact_lock(7233173, 1)").await?;
        let found = version(&mut connection).await?;
        if found > SCHEMA_VERSION {
            return Err(OutboxError::SchemaTooNew { found, known: SCHEMA_VERSION });
        }
        let Some((name, sql)) = usize::try_from(found).ok().and_then(|found| MIGRATIONS.get(found)) else {
            run(&mut connection, "commit").await?;
            return Ok(migrated);
        };
        run(&mut connection, sql).await?;
        crate::failpoint::hit("migrate_step")?;
        run(&mut connection, "commit").await?;
        migrated.applied.push(name);
    }
}

/// Fails unless the database has exactly the schema this binary needs.
pub(super) async fn require_fit(connection: &mut PgConnection) -> Result<(), OutboxError> {
    match version(connection).await? {
        0 => match schemas(connection).await? {
            schemas if schemas.is_empty() => Err(OutboxError::SchemaTooOld { found: 0, needed: SCHEMA_VERSION }),
            schemas => Err(OutboxError::SchemaElsewhere { schemas: schemas.join(", ") }),
        },
        found if found < SCHEMA_VERSION => Err(OutboxError::SchemaTooOld { found, needed: SCHEMA_VERSION }),
        found if found > SCHEMA_VERSION => Err(OutboxError::SchemaTooNew { found, known: SCHEMA_VERSION }),
        _ => Ok(()),
    }
}

async fn run(connection: &mut PgConnection, sql: &'static str) -> Result<(), OutboxError> {
    // A migration of a large table may take long, and a half-way stop helps nobody.
    connection.execute(sql).await.map(drop).map_err(|source| query_failed("migrate", source))
}

/// The schema's version, 0 where there is none.
async fn version(connection: &mut PgConnection) -> Result<i32, OutboxError> {
    // A query that names a table, even a catalogue, takes note of what others have just committed; one that names only
    // functions may be answered from what this session has cached, and so from before it waited for its lock.
    let exists: bool = answered("read the schema version", STATEMENT_TIMEOUT, async {
        sqlx::query_scalar("select exists (select from pg_proc where oid = to_regprocedure('relay_schema_version()'))")
            .persistent(false)
            .fetch_one(&mut *connection)
            .await
    })
    .await?;
    if !exists {
        return Ok(0);
    }
    answered("read the schema version", STATEMENT_TIMEOUT, async {
        sqlx::query_scalar("select relay_schema_version()").persistent(false).fetch_one(&mut *connection).await
    })
    .await
}

/// The schemas that have our tables, on the search path and open to this role or not.
async fn schemas(connection: &mut PgConnection) -> Result<Vec<String>, OutboxError> {
    answered("look for the schema", STATEMENT_TIMEOUT, async {
        sqlx::query_scalar(
            "select pronamespace::regnamespace::text from pg_proc where proname = 'relay_schema_version' order by 1",
        )
        .persistent(false)
        .fetch_all(connection)
        .await
    })
    .await
}

/// What the relay needs to be allowed, as SQL conditions, with the words for what is missing.
const PRIVILEGES: [(&str, &str); 14] = [
    (
        "select, insert, update and delete on event_outbox",
        "has_table_privilege('event_outbox', 'select') and has_table_privilege('event_outbox', 'insert') and has_table_privilege('event_outbox', 'update') and has_table_privilege('event_outbox', 'delete')",
    ),
    ("insert on event_processing_log", "has_table_privilege('event_processing_log', 'insert')"),
    ("insert on event_dead_letter", "has_table_privilege('event_dead_letter', 'insert')"),
    ("insert on event_history", "has_table_privilege('event_history', 'insert')"),
    ("execute on relay_add_days", "has_function_privilege('relay_add_days(text, integer)', 'execute')"),
    ("execute on relay_drop_days", "has_function_privilege('relay_drop_days(text, interval)', 'execute')"),
    (
        "select and update on event_outbox_epoch",
        "has_sequence_privilege('event_outbox_epoch', 'select') and has_sequence_privilege('event_outbox_epoch', 'update')",
    ),
    (
        "select on event_outbox_moves and event_outbox_id_seq",
        "has_sequence_privilege('event_outbox_moves', 'select') and has_sequence_privilege('event_outbox_id_seq', 'select')",
    ),
    (
        "select, insert, update and delete on event_relay_run",
        "has_table_privilege('event_relay_run', 'select') and has_table_privilege('event_relay_run', 'insert') and has_table_privilege('event_relay_run', 'update') and has_table_privilege('event_relay_run', 'delete')",
    ),
    (
        "select, insert, update and delete on event_crash_suspect",
        "has_table_privilege('event_crash_suspect', 'select') and has_table_privilege('event_crash_suspect', 'insert') and has_table_privilege('event_crash_suspect', 'update') and has_table_privilege('event_crash_suspect', 'delete')",
    ),
    ("execute on relay_outbox_id", "has_function_privilege('relay_outbox_id()', 'execute')"),
    ("execute on relay_epoch_above", "has_function_privilege('relay_epoch_above(bigint)', 'execute')"),
    (
        "execute on event_partition and event_is_valid",
        "has_function_privilege('event_partition(text, smallint, text, text, uuid)', 'execute') and has_function_privilege('event_is_valid(text, jsonb, jsonb, integer, smallint, text, integer)', 'execute')",
    ),
    ("execute on relay_schema_version", "has_function_privilege('relay_schema_version()', 'execute')"),
];

/// Tries the database at `url` as a relay would use it; stops at the first thing that makes the rest pointless.
pub async fn check(url: &Secret, pooled: bool) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut push = |subject: &str, result: Result<String, OutboxError>| {
        let failed = result.is_err();
        checks.push(Check { subject: subject.to_owned(), result: result.map_err(|error| error.explain()) });
        failed
    };
    let mut connection = match async { connect(&connect_options(url, pooled)?).await }.await {
        Ok(connection) => connection,
        Err(error) => {
            push("database", Err(error));
            return checks;
        }
    };
    let server = facts(&mut connection).await;
    if push("database", server) | push("schema", schema_fit(&mut connection).await) {
        return checks;
    }
    push("privileges", privileges(&mut connection).await);
    checks
}

async fn facts(connection: &mut PgConnection) -> Result<String, OutboxError> {
    let row = answered("look at the server", STATEMENT_TIMEOUT, async {
        sqlx::query(
            "select current_database(), current_setting('server_version'), current_user::text,
                    pg_is_in_recovery() or current_setting('transaction_read_only')::boolean",
        )
        .persistent(false)
        .fetch_one(connection)
        .await
    })
    .await?;
    if row.get::<bool, _>(3) {
        return Err(read_only());
    }
    let (database, version, user): (String, String, String) = (row.get(0), row.get(1), row.get(2));
    Ok(format!("{database} on PostgreSQL {version} as {user}"))
}

/// The error of a database that takes no writes.
pub(super) fn read_only() -> OutboxError {
    let reason = "a replica, or default_transaction_read_only; point DATABASE_URL at the primary".to_owned();
    OutboxError::ReadOnly { reason }
}

async fn schema_fit(connection: &mut PgConnection) -> Result<String, OutboxError> {
    require_fit(connection).await.map(|()| format!("version {SCHEMA_VERSION}"))
}

async fn privileges(connection: &mut PgConnection) -> Result<String, OutboxError> {
    let mut missing = Vec::new();
    for (privilege, condition) in PRIVILEGES {
        let granted: bool = answered("look at the privileges", STATEMENT_TIMEOUT, async {
            sqlx::query_scalar(sqlx::AssertSqlSafe(format!("select {condition}")))
                .persistent(false)
                .fetch_one(&mut *connection)
                .await
        })
        .await?;
        if !granted {
            missing.push(privilege);
        }
    }
    if missing.is_empty() {
        Ok("all granted".to_owned())
    } else {
        Err(OutboxError::Privileges { missing: missing.join("; ") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_migration_sets_the_version_of_its_place() {
        for (index, (name, sql)) in MIGRATIONS.iter().enumerate() {
            let version = format!(
                "function relay_schema_version() returns integer language sql immutable as 'select {}'",
                index + 1
            );
            assert!(sql.contains(&version), "{name} does not set version {}", index + 1);
            assert!(name.starts_with(&format!("{:04}_", index + 1)), "{name} stands at {}", index + 1);
        }
    }
}
