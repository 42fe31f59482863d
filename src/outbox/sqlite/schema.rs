//! Checks that a file has a schema that this binary can work with.
//!
//! The version is stored in the view `relay_schema_version`, which every migration replaces, because `user_version` belongs
//! to the application.

use sqlx::sqlite::SqliteConnection;

use crate::outbox::SchemaVersion;
use crate::outbox::error::OutboxError;
use crate::outbox::sqlite::connection::run_query;
use crate::outbox::sqlite::migrations::SCHEMA_VERSION;
use crate::outbox::sqlite::shape;

/// Returns a description if this binary can work with the file's schema, and an error otherwise.
pub(super) async fn require_fit(connection: &mut SqliteConnection) -> Result<String, OutboxError> {
    let fit = version(connection).await?.fits(SCHEMA_VERSION)?;
    shape::require(connection).await.map(|()| fit)
}

/// Returns the schema's version, which is 0 if there is none.
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
        // The statement is not cached, because a migration by another program replaces the views.
        let (found, needs) = sqlx::query_as(query).persistent(false).fetch_one(connection).await?;
        Ok(SchemaVersion { found, needs })
    })
    .await
}
