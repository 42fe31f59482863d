//! Migrations: bringing a file to the schema of this binary.

use sqlx::Executor;

use crate::outbox::Migrated;
use crate::outbox::error::OutboxError;
use crate::outbox::sqlite::connection::{open_or_create, run_query};
use crate::outbox::sqlite::migrations::MIGRATIONS;
use crate::outbox::sqlite::schema::version;
use crate::outbox::sqlite::shape;
use crate::secret::Secret;

pub use crate::outbox::sqlite::migrations::SCHEMA_VERSION;

/// Brings the file at `url` to [`SCHEMA_VERSION`]. Safe to run twice, twice at once, and beside running relays.
///
/// # Errors
/// [`OutboxError::SchemaTooNew`], or the reason why it failed. Each migration is applied whole or not at all.
pub async fn migrate(url: &Secret) -> Result<Migrated, OutboxError> {
    let mut connection = open_or_create(url).await?;
    let from = version(&mut connection).await?.found;
    let mut migrated = Migrated { from, to: SCHEMA_VERSION, known: SCHEMA_VERSION, applied: Vec::new(), mended: None };
    loop {
        // The version is read again under the lock, because another migrator may just have finished.
        run_query("migrate", connection.execute("begin immediate")).await?;
        let version = version(&mut connection).await?;
        let Some((name, sql)) = usize::try_from(version.found).ok().and_then(|found| MIGRATIONS.get(found)) else {
            drop(version.fits(SCHEMA_VERSION)?);
            run_query("migrate", connection.execute("rollback")).await?;
            shape::require(&mut connection).await?;
            migrated.to = version.found;
            return Ok(migrated);
        };
        run_query("migrate", connection.execute(*sql)).await?;
        run_query("migrate", connection.execute("commit")).await?;
        migrated.applied.push(name);
    }
}
