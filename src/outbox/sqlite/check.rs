//! `relay check` on SQLite: tries the file as a relay would use it.

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use sqlx::sqlite::SqliteConnection;

use crate::outbox::error::OutboxError;
use crate::outbox::proof::ProofRows;
use crate::outbox::sqlite::connection::{open, path, run_query};
use crate::outbox::sqlite::proof;
use crate::outbox::sqlite::question::Question;
use crate::outbox::sqlite::schema::require_fit;
use crate::outbox::sqlite::{owner, pause, register, standstill};
use crate::outbox::standstill::{Memory, Standstill};
use crate::outbox::{Check, CheckRequest};
use crate::secret::Secret;

/// A working relay claims due events within this time.
const MOMENT: Duration = Duration::from_secs(3);

/// Tries the file at `url` as a relay would use it. Stops at the first failure that makes further checks pointless.
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
    push("writing", proof::prove(&mut connection, "", usage).await.map(ProofRows::describe));
    let rows = run_query("read event_relay", register::rows(&mut connection)).await;
    push("configuration", rows.and_then(|rows| configuration.check(&rows)));
    match run_query("read event_pause", pause::read(&mut connection)).await.map(|pauses| pauses.described()) {
        Ok(None) => {}
        other => {
            push("pauses", other.map(Option::unwrap_or_default));
        }
    }
    match standstills(&mut connection, url, request).await {
        Ok(found) => checks.extend(Check::standstills(found)),
        Err(error) => {
            push("standstills", Err(error));
        }
    }
    checks
}

/// Searches for standstills. If a relay works on the file, an event that has long been due and is still there a moment later
/// is not being claimed. If no relay works on it, the next relay claims the event.
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
    let found = run_query(look, standstill::find(connection, &question)).await?;
    if memory.is_empty() || question.owner.is_none() {
        return Ok(found);
    }
    tokio::time::sleep(MOMENT).await;
    run_query(look, standstill::find(connection, &question)).await
}

/// Checks that the file has one name. SQLite keeps its journal beside the name that a program used, and a program that uses
/// another name does not find it.
fn one_name(url: &Secret) -> Result<String, OutboxError> {
    let path = path(url)?;
    match std::fs::metadata(&path).map(|metadata| metadata.nlink()) {
        Ok(names) if names > 1 => Err(OutboxError::Names { file: path.display().to_string(), names }),
        _ => Ok("one".to_owned()),
    }
}

async fn facts(url: &Secret, connection: &mut SqliteConnection) -> Result<String, OutboxError> {
    let (version, mode): (String, String) = run_query("look at the file", async {
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
