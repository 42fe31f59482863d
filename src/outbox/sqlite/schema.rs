//! Migrations, and whether a file fits this binary.
//!
//! The schema itself tells its version, by the view `relay_schema_version` that every migration replaces: `user_version`
//! is the application's.

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use sqlx::Executor;
use sqlx::sqlite::SqliteConnection;

use crate::outbox::sqlite::proof::{self, Tried};
use crate::outbox::sqlite::question::Question;
use crate::outbox::sqlite::standstill;
use crate::outbox::sqlite::{answered, open, open_or_create, owner, path, register, shape};
use crate::outbox::standstill::Memory;
use crate::outbox::{Check, CheckRequest, Migrated, OutboxError, SchemaVersion, Standstill};
use crate::secret::Secret;

/// All migrations, the first with version 1. Never edited once released.
const MIGRATIONS: [(&str, &str); 13] = [
    ("0001_event_outbox", include_str!("../../../migrations/sqlite/0001_event_outbox.sql")),
    ("0002_event_processing_log", include_str!("../../../migrations/sqlite/0002_event_processing_log.sql")),
    ("0003_event_dead_letter", include_str!("../../../migrations/sqlite/0003_event_dead_letter.sql")),
    ("0004_event_history", include_str!("../../../migrations/sqlite/0004_event_history.sql")),
    ("0005_operator_views", include_str!("../../../migrations/sqlite/0005_operator_views.sql")),
    ("0006_claim_epoch", include_str!("../../../migrations/sqlite/0006_claim_epoch.sql")),
    ("0007_crash_loops", include_str!("../../../migrations/sqlite/0007_crash_loops.sql")),
    ("0008_older_relays", include_str!("../../../migrations/sqlite/0008_older_relays.sql")),
    ("0009_blocked_keys", include_str!("../../../migrations/sqlite/0009_blocked_keys.sql")),
    ("0010_bounds", include_str!("../../../migrations/sqlite/0010_bounds.sql")),
    ("0011_format", include_str!("../../../migrations/sqlite/0011_format.sql")),
    ("0012_several_configurations", include_str!("../../../migrations/sqlite/0012_several_configurations.sql")),
    ("0013_redriven_formats", include_str!("../../../migrations/sqlite/0013_redriven_formats.sql")),
];

/// The schema version this binary needs.
pub const SCHEMA_VERSION: i32 = MIGRATIONS.len() as i32;

/// Brings the file at `url` to [`SCHEMA_VERSION`]. Safe to run twice, twice at once, and beside running relays.
///
/// # Errors
/// [`OutboxError::SchemaTooNew`], or why it could not; each migration is applied whole or not at all.
pub async fn migrate(url: &Secret) -> Result<Migrated, OutboxError> {
    let mut connection = open_or_create(url).await?;
    let from = version(&mut connection).await?.found;
    let mut migrated = Migrated { from, to: SCHEMA_VERSION, known: SCHEMA_VERSION, applied: Vec::new(), mended: None };
    loop {
        // Under the lock the version is read anew: another migrator may just have finished.
        answered("migrate", connection.execute("begin immediate")).await?;
        let version = version(&mut connection).await?;
        let Some((name, sql)) = usize::try_from(version.found).ok().and_then(|found| MIGRATIONS.get(found)) else {
            drop(version.fits(SCHEMA_VERSION)?);
            answered("migrate", connection.execute("rollback")).await?;
            shape::require(&mut connection).await?;
            migrated.to = version.found;
            return Ok(migrated);
        };
        answered("migrate", connection.execute(*sql)).await?;
        answered("migrate", connection.execute("commit")).await?;
        migrated.applied.push(name);
    }
}

/// Fails unless the file has a schema that this binary can work with; else says which.
pub(super) async fn require_fit(connection: &mut SqliteConnection) -> Result<String, OutboxError> {
    let fit = version(connection).await?.fits(SCHEMA_VERSION)?;
    shape::require(connection).await.map(|()| fit)
}

/// The schema's version, 0 where there is none.
async fn version(connection: &mut SqliteConnection) -> Result<SchemaVersion, OutboxError> {
    answered("read the schema version", async {
        let (exists, tells_needs): (bool, bool) = sqlx::query_as(
            "select exists (select 1 from sqlite_schema where name = 'relay_schema_version'),
                    exists (select 1 from sqlite_schema where name = 'relay_schema_needs')",
        )
        .fetch_one(&mut *connection)
        .await?;
        if !exists {
            return Ok(SchemaVersion { found: 0, needs: 0 });
        }
        let query = if tells_needs {
            "select (select version from relay_schema_version), (select version from relay_schema_needs)"
        } else {
            "select version, version from relay_schema_version"
        };
        // Not remembered: a migration by another program replaces the views.
        let (found, needs) = sqlx::query_as(query).persistent(false).fetch_one(connection).await?;
        Ok(SchemaVersion { found, needs })
    })
    .await
}

/// In this time a relay that works takes what is due.
const MOMENT: Duration = Duration::from_secs(3);

/// Tries the file at `url` as a relay would use it; stops at the first thing that makes the rest pointless.
pub async fn check(url: &Secret, request: CheckRequest<'_>) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut push = |subject: &str, result: Result<String, OutboxError>| {
        let failed = result.is_err();
        checks.push(Check { subject: subject.to_owned(), result: result.map_err(|error| error.explain()) });
        failed
    };
    let mut connection = match open(url).await {
        Ok(connection) => connection,
        Err(error) => {
            push("database", Err(error));
            return checks;
        }
    };
    let fit = require_fit(&mut connection).await;
    if push("database", facts(url, &mut connection).await) | push("schema", fit) {
        return checks;
    }
    push("names", one_name(url));
    let CheckRequest { usage, configuration, .. } = request;
    push("writing", proof::prove(&mut connection, "", usage).await.map(Tried::told));
    let rows = answered("read event_relay", register::rows(&mut connection)).await;
    push("configuration", rows.and_then(|rows| configuration.check(&rows)));
    match standstills(&mut connection, url, request).await {
        Ok(found) => checks.extend(Check::standstills(found)),
        Err(error) => {
            push("standstills", Err(error));
        }
    }
    checks
}

/// What stands still. Where a relay works on the file, an event that is due for long and is still there a moment later is not
/// taken; without one the next relay that comes takes it.
async fn standstills(
    connection: &mut SqliteConnection,
    url: &Secret,
    CheckRequest { destinations, publish_timeout, .. }: CheckRequest<'_>,
) -> Result<Vec<Standstill>, OutboxError> {
    let memory = Memory::default();
    let owner = owner::holder(&path(url)?)?;
    let seen_for = if owner.is_some() { MOMENT } else { Duration::MAX };
    let question = Question { destinations, publish_timeout, memory: &memory, owner, seen_for };
    let look = "look for what stands still";
    let found = answered(look, standstill::find(connection, &question)).await?;
    if memory.is_empty() || question.owner.is_none() {
        return Ok(found);
    }
    tokio::time::sleep(MOMENT).await;
    answered(look, standstill::find(connection, &question)).await
}

/// SQLite keeps its journal beside the name that a program used: whoever uses another name does not find it.
fn one_name(url: &Secret) -> Result<String, OutboxError> {
    let path = path(url)?;
    match std::fs::metadata(&path).map(|metadata| metadata.nlink()) {
        Ok(names) if names > 1 => Err(OutboxError::Names { file: path.display().to_string(), names }),
        _ => Ok("one".to_owned()),
    }
}

async fn facts(url: &Secret, connection: &mut SqliteConnection) -> Result<String, OutboxError> {
    let (version, mode): (String, String) = answered("look at the file", async {
        let version = sqlx::query_scalar("select sqlite_version()").fetch_one(&mut *connection).await?;
        Ok((version, sqlx::query_scalar("pragma journal_mode").fetch_one(connection).await?))
    })
    .await?;
    let advice = if mode == "wal" {
        ""
    } else {
        "; its readers and writers wait for each other: `pragma journal_mode = wal` would end that, and is the application's decision"
    };
    Ok(format!("{} with SQLite {version}, journal mode {mode}{advice}", path(url)?.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_migration_sets_the_version_of_its_place() {
        for (index, (name, sql)) in MIGRATIONS.iter().enumerate() {
            let version = format!("create view relay_schema_version as select {} as version", index + 1);
            assert!(sql.contains(&version), "{name} does not set version {}", index + 1);
            assert!(name.starts_with(&format!("{:04}_", index + 1)), "{name} stands at {}", index + 1);
        }
    }
}
