//! The register of relays on a file. One relay works at a time, so the register only shows how their configurations differ.

use std::time::Duration;

use sqlx::Row;
use sqlx::sqlite::{SqliteConnection, SqliteRow};

use crate::outbox::OutboxError;
use crate::outbox::pause::Pauses;
use crate::outbox::register::{Configuration, Member, Register, Registration};
use crate::outbox::sqlite::connection::run_query;
use crate::outbox::sqlite::migrations::SCHEMA_VERSION;
use crate::outbox::sqlite::pause;
use crate::outbox::sqlite::store::SqliteOutbox;

const ROWS: &str = "
select id, worker, version, once, fingerprint, destinations, routes,
    (julianday('now') - julianday(since)) * 86400.0 as age, (julianday('now') - julianday(seen_at)) * 86400.0 as silent,
    trouble
from event_relay
order by id";

const WRITE: &str = "
insert into event_relay (id, worker, version, schema_version, once, fingerprint, destinations, routes)
values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
on conflict (id) do update set seen_at = strftime('%Y-%m-%d %H:%M:%f', 'now')";

fn registration(row: &SqliteRow) -> Result<Registration, sqlx::Error> {
    let json = |error: serde_json::Error| sqlx::Error::Decode(error.into());
    let duration = |column: &str| row.try_get(column).map(|seconds: f64| Duration::from_secs_f64(seconds.max(0.0)));
    Ok(Registration {
        id: row.try_get("id")?,
        worker: row.try_get("worker")?,
        version: row.try_get("version")?,
        once: row.try_get("once")?,
        hung: false,
        configuration: Configuration {
            fingerprint: row.try_get("fingerprint")?,
            destinations: serde_json::from_str(row.try_get("destinations")?).map_err(json)?,
            routes: serde_json::from_str(row.try_get("routes")?).map_err(json)?,
        },
        session: None,
        age: duration("age")?,
        silent: duration("silent")?,
        idle: Duration::ZERO,
        trouble: serde_json::from_str(row.try_get("trouble")?).map_err(json)?,
    })
}

/// Reads all rows.
pub(super) async fn rows(connection: &mut SqliteConnection) -> Result<Vec<Registration>, sqlx::Error> {
    sqlx::query(ROWS).fetch_all(connection).await?.iter().map(registration).collect()
}

impl Register for SqliteOutbox {
    const ONE_WORKS: bool = true;

    async fn changes(&self) -> Result<i64, OutboxError> {
        let mut connection = self.connect().await?;
        let query = sqlx::query_scalar("select changes from event_relay_changes");
        run_query("read the number of changes of event_relay", query.fetch_one(&mut *connection)).await
    }

    async fn changed(&self) -> Result<(), OutboxError> {
        let mut connection = self.connect().await?;
        let query = sqlx::query("update event_relay_changes set changes = changes + 1");
        run_query("raise the number of changes of event_relay", query.execute(&mut *connection)).await.map(drop)
    }

    async fn rows(&self) -> Result<Vec<Registration>, OutboxError> {
        let mut connection = self.connect().await?;
        run_query("read event_relay", rows(&mut connection)).await
    }

    async fn pauses(&self) -> Result<Pauses, OutboxError> {
        let mut connection = self.connect().await?;
        run_query("read event_pause", pause::read(&mut connection)).await
    }

    async fn next_id(&self) -> Result<i64, OutboxError> {
        let mut connection = self.connect().await?;
        let query = sqlx::query_scalar("update event_relay_changes set last_id = last_id + 1 returning last_id");
        run_query("number this relay", query.fetch_one(&mut *connection)).await
    }

    async fn write(&self, member: &Member) -> Result<(), OutboxError> {
        let mut connection = self.connect().await?;
        let configuration = &member.configuration;
        let query = sqlx::query(WRITE)
            .bind(member.id)
            .bind(&self.config.worker)
            .bind(env!("CARGO_PKG_VERSION"))
            .bind(SCHEMA_VERSION)
            .bind(member.once)
            .bind(&configuration.fingerprint)
            .bind(serde_json::json!(configuration.destinations).to_string())
            .bind(serde_json::json!(configuration.routes).to_string());
        run_query("register this relay", query.execute(&mut *connection)).await.map(drop)
    }

    async fn beat(&self, id: i64, _: Duration) -> Result<(), OutboxError> {
        let mut connection = self.connect().await?;
        let query = "update event_relay set seen_at = strftime('%Y-%m-%d %H:%M:%f', 'now') where id = ?1";
        run_query("note that this relay is at work", sqlx::query(query).bind(id).execute(&mut *connection))
            .await
            .map(drop)
    }

    async fn remove(&self, ids: &[i64]) -> Result<(), OutboxError> {
        if ids.is_empty() {
            return Ok(());
        }
        let mut connection = self.connect().await?;
        let query = "delete from event_relay where id in (select value from json_each(?1))";
        let query = sqlx::query(query).bind(serde_json::json!(ids).to_string());
        run_query("remove relays from event_relay", query.execute(&mut *connection)).await.map(drop)
    }

    async fn depose(&self, _: i64, _: Duration) -> Result<bool, OutboxError> {
        Ok(false) // the lock decides
    }
}
