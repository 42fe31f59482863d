//! Migrates a database to the schema of this binary.

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor};

use crate::outbox::postgres::connection::{connect, connect_options, query_failed};
use crate::outbox::postgres::home::Home;
use crate::outbox::postgres::migrations::MIGRATIONS;
use crate::outbox::postgres::patience::{Patience, WAIT_BRIEFLY};
use crate::outbox::postgres::schema;
use crate::outbox::{Migrated, OutboxError, SchemaVersion};
use crate::secret::Secret;

pub use crate::outbox::postgres::migrations::SCHEMA_VERSION;

/// The text in each file that names the schema in its functions: `relay migrate` runs it again if the schema has another name
/// by now.
const RUN_AGAIN: &str = "-- Run again by `relay migrate`";

/// Brings the database at `url` to [`SCHEMA_VERSION`], and its functions to the schema of its tables. Safe to run twice, twice at
/// once, and beside running relays.
///
/// # Errors
/// [`OutboxError::SchemaTooNew`], or the reason why a migration failed. Each migration is applied whole or not at all.
pub async fn migrate(url: &Secret) -> Result<Migrated, OutboxError> {
    let mut connection = connect(&connect_options(url, true)?).await?;
    let mut from = None;
    let mut applied = Vec::new();
    let mut patience = Patience::default();
    loop {
        // Under the lock the version is read anew: another migrator may just have finished.
        run(
            &mut connection,
            "begin; set local lock_timeout = '10s'; select pg_catalog.pg_advisory_xact_lock(7233173, 1)",
        )
        .await?;
        let home = find_home(&mut connection).await?;
        let version = match &home {
            Some(home) => schema::version(&mut connection, home).await?,
            None => SchemaVersion { found: 0, needs: 0 },
        };
        let from = *from.get_or_insert(version.found);
        let Some((name, sql)) = usize::try_from(version.found).ok().and_then(|found| MIGRATIONS.get(found)) else {
            drop(version.fits(SCHEMA_VERSION)?);
            let mended = match home {
                Some(home) => mend(&mut connection, home, version).await?,
                None => None,
            };
            run(&mut connection, "commit").await?;
            return Ok(Migrated { from, to: version.found, known: SCHEMA_VERSION, applied, mended });
        };
        run(&mut connection, WAIT_BRIEFLY).await?;
        if let Err(error) = run(&mut connection, sql).await {
            patience.after(&mut connection, name, error).await?;
            continue;
        }
        crate::failpoint::failpoint("migrate_step")?;
        run(&mut connection, "commit").await?;
        applied.push(*name);
    }
}

/// Finds the schema that has our tables, with its functions, and puts it first on the search path of this transaction, so that
/// a migration creates its objects there.
async fn find_home(connection: &mut PgConnection) -> Result<Option<Home>, OutboxError> {
    let Some(mut home) = Home::find(connection).await? else { return Ok(None) };
    if home.left_behind().is_some() {
        home.gather(connection).await?;
        home = Home::find(connection).await?.unwrap_or(home);
    }
    home.require_ours()?;
    let path = format!(
        "select pg_catalog.set_config('search_path', pg_catalog.concat('{}', ', ', pg_catalog.current_setting('search_path')), true)",
        home.identifier.replace('\'', "''")
    );
    run_text(connection, path).await?;
    Ok(Some(home))
}

/// Creates the functions anew if they work in another schema than that of the tables, or are missing. Returns the schema if it
/// did.
async fn mend(
    connection: &mut PgConnection,
    home: Home,
    version: SchemaVersion,
) -> Result<Option<String>, OutboxError> {
    home.require_complete()?;
    let Some(reason) = home.outdated() else { return Ok(None) };
    let SchemaVersion { found, needs } = version;
    if found > SCHEMA_VERSION {
        let reason =
            format!("{reason}: run `relay migrate` of a relay that knows version {found}, which makes them anew");
        return Err(OutboxError::SchemaBroken { reason });
    }
    for (_, sql) in MIGRATIONS.iter().filter(|(_, sql)| sql.contains(RUN_AGAIN)) {
        run(connection, sql).await?;
    }
    // Each of these files sets the version of its own place in the list, so the version is set again.
    let versions = [("relay_schema_version", found), ("relay_schema_needs", needs)].map(|(function, number)| {
        let home = &home.identifier;
        format!(
            "create or replace function {home}.{function}() returns integer language sql immutable as 'select {number}'"
        )
    });
    run_text(connection, versions.join(";")).await?;
    Ok(Some(home.name))
}

async fn run(connection: &mut PgConnection, sql: &'static str) -> Result<(), OutboxError> {
    // A migration of a large table may take long, and to stop it half-way helps nobody.
    connection.execute(sql).await.map(drop).map_err(failed)
}

async fn run_text(connection: &mut PgConnection, sql: String) -> Result<(), OutboxError> {
    connection.execute(AssertSqlSafe(sql)).await.map(drop).map_err(failed)
}

fn failed(source: sqlx::Error) -> OutboxError {
    let code = source.as_database_error().and_then(|error| error.code().map(|code| code.into_owned()));
    let advice = match code.as_deref() {
        Some("42501") => {
            "the role that migrates must own the tables of relay, and needs `create` on their schema: migrate as their owner, or grant it"
        }
        Some("3F000") => "create the schema first, or correct search_path in DATABASE_URL",
        _ => return query_failed("migrate", source),
    };
    OutboxError::Query { operation: "migrate", advice: Some(advice), source }
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

    #[test]
    fn what_names_the_schema_is_run_again_after_a_renaming() {
        for (name, sql) in MIGRATIONS {
            assert_eq!(sql.contains("{home}."), sql.contains(RUN_AGAIN), "{name}");
        }
    }
}
