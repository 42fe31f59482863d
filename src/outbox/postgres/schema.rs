//! Checks that a database has the schema that this binary needs.
//!
//! The schema itself has its version, in the function `relay_schema_version()` that every migration replaces. So the files can
//! be applied by any tool, and a database may have other tables, or those of another migrator.

use sqlx::AssertSqlSafe;
use sqlx::postgres::PgConnection;

use crate::outbox::postgres::connection::{STATEMENT_TIMEOUT, with_timeout};
use crate::outbox::postgres::home::Home;
use crate::outbox::postgres::migrations::SCHEMA_VERSION;
use crate::outbox::{OutboxError, SchemaVersion};

/// Fails unless the database has a schema that this binary can work with. Returns which schema it is.
pub(super) async fn require_fit(connection: &mut PgConnection) -> Result<String, OutboxError> {
    let Some(home) = Home::find(connection).await? else {
        let schemas = schemas(connection).await?;
        // The functions are here, and the table is not.
        if let Some((name, _)) = schemas.iter().find(|(_, on_path)| *on_path) {
            let reason = format!(
                "schema {name} has relay's functions and no table event_outbox: `alter table ... rename to event_outbox` where \
                 somebody renamed it, `alter table ... set schema` where it was moved, or restore it from a backup"
            );
            return Err(OutboxError::SchemaBroken { reason });
        }
        let names: Vec<String> = schemas.into_iter().map(|(name, _)| name).collect();
        return Err(if names.is_empty() {
            OutboxError::SchemaTooOld { found: 0, needed: SCHEMA_VERSION }
        } else {
            OutboxError::SchemaElsewhere { schemas: names.join(", ") }
        });
    };
    home.require_ours()?;
    let fit = version(connection, &home).await?.fits(SCHEMA_VERSION)?;
    home.require_whole()?;
    Ok(fit)
}

/// Returns the schema's version; 0 if that is not known there.
pub(super) async fn version(connection: &mut PgConnection, home: &Home) -> Result<SchemaVersion, OutboxError> {
    if !home.has_function("relay_schema_version()") {
        return Ok(SchemaVersion { found: 0, needs: 0 });
    }
    let needs = if home.has_function("relay_schema_needs()") { "relay_schema_needs" } else { "relay_schema_version" };
    let query = format!("select {0}.relay_schema_version(), {0}.{needs}()", home.identifier);
    let (found, needs) = with_timeout("read the schema version", STATEMENT_TIMEOUT, async {
        sqlx::query_as(AssertSqlSafe(query)).persistent(false).fetch_one(connection).await
    })
    .await?;
    Ok(SchemaVersion { found, needs })
}

/// Returns the schemas that have our functions, and whether each is on the search path and open to this role.
async fn schemas(connection: &mut PgConnection) -> Result<Vec<(String, bool)>, OutboxError> {
    with_timeout("look for the schema", STATEMENT_TIMEOUT, async {
        sqlx::query_as(
            "select n.nspname::text, n.nspname = any (pg_catalog.current_schemas(true))
             from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
             where p.proname = 'relay_schema_version'::name order by 1",
        )
        .persistent(false)
        .fetch_all(connection)
        .await
    })
    .await
}
