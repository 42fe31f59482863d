//! Migrations: bringing a database to the schema of this binary.

use sqlx::Executor;
use sqlx::postgres::PgConnection;

use crate::outbox::postgres::{connect, connect_options, query_failed, schema};
use crate::outbox::{Migrated, OutboxError};
use crate::secret::Secret;

/// All migrations, the first with version 1. Never edited once released.
const MIGRATIONS: [(&str, &str); 11] = [
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
    ("0011_older_relays", include_str!("../../../migrations/postgres/0011_older_relays.sql")),
];

/// The schema version this binary needs.
pub const SCHEMA_VERSION: i32 = MIGRATIONS.len() as i32;

/// Brings the database at `url` to [`SCHEMA_VERSION`]. Safe to run twice, twice at once, and beside running relays.
///
/// # Errors
/// [`OutboxError::SchemaTooNew`], or why it could not; each migration is applied whole or not at all.
pub async fn migrate(url: &Secret) -> Result<Migrated, OutboxError> {
    let mut connection = connect(&connect_options(url, true)?).await?;
    let from = schema::version(&mut connection).await?.found;
    let mut migrated = Migrated { from, to: SCHEMA_VERSION, known: SCHEMA_VERSION, applied: Vec::new() };
    loop {
        // Under the lock the version is read anew: another migrator may just have finished.
        run(
            &mut connection,
            "begin; set local lock_timeout = '10s'; select pg_catalog.pg_advisory_xact_lock(7233173, 1)",
        )
        .await?;
        let version = schema::version(&mut connection).await?;
        let Some((name, sql)) = usize::try_from(version.found).ok().and_then(|found| MIGRATIONS.get(found)) else {
            drop(version.fits(SCHEMA_VERSION)?);
            run(&mut connection, "commit").await?;
            migrated.to = version.found;
            return Ok(migrated);
        };
        run(&mut connection, sql).await?;
        crate::failpoint::hit("migrate_step")?;
        run(&mut connection, "commit").await?;
        migrated.applied.push(name);
    }
}

async fn run(connection: &mut PgConnection, sql: &'static str) -> Result<(), OutboxError> {
    // A migration of a large table may take long, and a half-way stop helps nobody.
    connection.execute(sql).await.map(drop).map_err(|source| query_failed("migrate", source))
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
