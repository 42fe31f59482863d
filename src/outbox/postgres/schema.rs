//! Whether a database has the schema that this binary needs.
//!
//! The schema itself tells its version, by the function `relay_schema_version()` that every migration replaces. So the
//! files can be applied by any tool, and a database that has other tables, or another migrator's, is no trouble.

use sqlx::postgres::PgConnection;

use crate::outbox::postgres::migrate::SCHEMA_VERSION;
use crate::outbox::postgres::sql::{Schema, Sql};
use crate::outbox::postgres::{STATEMENT_TIMEOUT, answered};
use crate::outbox::{OutboxError, SchemaVersion};

/// Fails unless the database has a schema that this binary can work with; else says which.
pub(super) async fn require_fit(connection: &mut PgConnection) -> Result<String, OutboxError> {
    let version = version(connection).await?;
    if version.found == 0 {
        let schemas = schemas(connection).await?;
        if !schemas.is_empty() {
            return Err(OutboxError::SchemaElsewhere { schemas: schemas.join(", ") });
        }
    }
    version.fits(SCHEMA_VERSION)
}

/// The schema's version, 0 where there is none.
pub(super) async fn version(connection: &mut PgConnection) -> Result<SchemaVersion, OutboxError> {
    // A query that names a table, even a catalogue, takes note of what others have just committed; one that names only
    // functions may be answered from what this session has cached, and so from before it waited for its lock.
    let (found, needs) = answered("read the schema version", STATEMENT_TIMEOUT, async {
        let Some(schema) = Schema::find(connection).await? else { return Ok((0, 0)) };
        let sql = Sql { schema, persistent: false };
        let (exists, tells_needs): (bool, bool) = sql
            .query_as(
                "select exists (
                     select from pg_catalog.pg_proc
                     where oid = pg_catalog.to_regprocedure('{schema}.relay_schema_version()')::oid
                 ), exists (
                     select from pg_catalog.pg_proc
                     where oid = pg_catalog.to_regprocedure('{schema}.relay_schema_needs()')::oid
                 )",
            )
            .fetch_one(&mut *connection)
            .await?;
        if !exists {
            return Ok((0, 0));
        }
        let query = if tells_needs {
            "select {schema}.relay_schema_version(), {schema}.relay_schema_needs()"
        } else {
            "select {schema}.relay_schema_version(), {schema}.relay_schema_version()"
        };
        sql.query_as(query).fetch_one(connection).await
    })
    .await?;
    Ok(SchemaVersion { found, needs })
}

/// The schemas that have our tables, on the search path and open to this role or not.
async fn schemas(connection: &mut PgConnection) -> Result<Vec<String>, OutboxError> {
    answered("look for the schema", STATEMENT_TIMEOUT, async {
        sqlx::query_scalar(
            "select pronamespace::regnamespace::text from pg_catalog.pg_proc where proname = 'relay_schema_version' order by 1",
        )
        .persistent(false)
        .fetch_all(connection)
        .await
    })
    .await
}
