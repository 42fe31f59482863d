//! Whether a file has the schema that this binary needs.
//!
//! The schema itself tells its version, by the view `relay_schema_version` that every migration replaces: `user_version`
//! is the application's.

use sqlx::sqlite::SqliteConnection;

use crate::outbox::SchemaVersion;
use crate::outbox::error::OutboxError;
use crate::outbox::sqlite::connection::run_query;
use crate::outbox::sqlite::migrations::SCHEMA_VERSION;
use crate::outbox::sqlite::shape;

/// Fails unless the file has a schema that this binary can work with; else says which.
pub(super) async fn require_fit(connection: &mut SqliteConnection) -> Result<String, OutboxError> {
    let fit = version(connection).await?.fits(SCHEMA_VERSION)?;
    shape::require(connection).await.map(|()| fit)
}

/// The schema's version, 0 where there is none.
pub(super) async fn version(connection: &mut SqliteConnection) -> Result<SchemaVersion, OutboxError> {
    run_query("read the schema version", async {
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
