//! Whether a database has the schema that this binary needs.
//!
//! The schema itself tells its version, by the function `relay_schema_version()` that every migration replaces. So the
//! files can be applied by any tool, and a database that has other tables, or another migrator's, is no trouble.

use sqlx::postgres::PgConnection;

use crate::outbox::OutboxError;
use crate::outbox::postgres::migrate::SCHEMA_VERSION;
use crate::outbox::postgres::{STATEMENT_TIMEOUT, answered};

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

/// The schema's version, 0 where there is none.
pub(super) async fn version(connection: &mut PgConnection) -> Result<i32, OutboxError> {
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
