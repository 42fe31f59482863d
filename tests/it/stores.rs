//! The stores that the contract runs on, and the SQL in which they differ.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use outbox_relay::outbox::postgres::PgOutbox;
use outbox_relay::outbox::sqlite::{self, SqliteOutbox};
use outbox_relay::outbox::{Outbox, OutboxConfig};
use outbox_relay::secret::Secret;
use outbox_relay::{EmitError, NewEvent};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, Connection, PgConnection, SqliteConnection};
use tempfile::TempDir;

use crate::harness::{count, eventually};
pub(crate) use crate::servers::Database as Postgres;
use crate::servers::database;

/// SQLite with the write-ahead log, as recommended to applications.
pub(crate) type Sqlite = SqliteFile<true>;

/// SQLite with its default journal.
pub(crate) type SqliteRollbackJournal = SqliteFile<false>;

/// A throwaway store with every migration applied.
pub(crate) trait Store: Sized {
    type Outbox: Outbox;
    type Connection: Client;

    async fn new() -> Self;

    /// The URL for relay.
    fn url(&self) -> &str;

    /// Opens a connection in the same way as an application.
    async fn connect(&self) -> Self::Connection;

    fn outbox(config: OutboxConfig) -> Self::Outbox;

    /// Waits until a relay in this process sleeps and relies on being woken.
    async fn until_asleep(&self);

    /// SQL: the time that is so many milliseconds from now.
    fn in_ms(ms: i64) -> String;

    /// SQL: a table with one column `i`, from 1 to `last`.
    fn numbers(last: i64) -> String;

    /// SQL: a text as a payload.
    fn json(text: &str) -> String;

    /// SQL: redrives the dead letters for which `condition` holds.
    fn redrive(condition: &str) -> String;

    /// SQL: makes every `delete on event_outbox`, or whatever `what` names, fail.
    fn refuse(what: &str) -> String;

    /// SQL: ends a [`Self::refuse`] on `table`.
    fn allow(table: &str) -> String;

    /// SQL: the history keeps only what is published later.
    fn forget_history() -> String;

    /// SQL: three rows of the log that are ten days old.
    fn old_log() -> String;

    /// Runs statements while the triggers that check rules are off, to insert rows like those of old versions.
    async fn unruled(connection: &mut Self::Connection, statements: &str);
}

/// A test's connection.
pub(crate) trait Client {
    /// Runs statements. Returns how many rows they changed.
    async fn execute(&mut self, statements: &str) -> Result<u64, sqlx::Error>;

    /// Returns the one number of a query.
    async fn number(&mut self, query: &str) -> i64;

    /// Returns the first column of every row.
    async fn texts(&mut self, query: &str) -> Vec<String>;

    /// Emits in the same way as an application that uses the library.
    async fn emit(&mut self, event: NewEvent) -> Result<uuid::Uuid, EmitError>;
}

macro_rules! client {
    ($connection:ty) => {
        impl Client for $connection {
            async fn execute(&mut self, statements: &str) -> Result<u64, sqlx::Error> {
                Ok(sqlx::raw_sql(AssertSqlSafe(statements)).execute(self).await?.rows_affected())
            }

            async fn number(&mut self, query: &str) -> i64 {
                sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(self).await.unwrap()
            }

            async fn texts(&mut self, query: &str) -> Vec<String> {
                sqlx::query_scalar(AssertSqlSafe(query)).fetch_all(self).await.unwrap()
            }

            async fn emit(&mut self, event: NewEvent) -> Result<uuid::Uuid, EmitError> {
                outbox_relay::emit(self, event).await
            }
        }
    };
}

client!(PgConnection);
client!(SqliteConnection);

impl Store for Postgres {
    type Outbox = PgOutbox;
    type Connection = PgConnection;

    async fn new() -> Self {
        database().await
    }

    fn url(&self) -> &str {
        self.url()
    }

    async fn connect(&self) -> PgConnection {
        self.connect().await
    }

    fn outbox(config: OutboxConfig) -> PgOutbox {
        PgOutbox::new(config)
    }

    async fn until_asleep(&self) {
        let mut connection = self.connect().await;
        let asleep = "pg_locks where locktype = 'advisory' and mode = 'ExclusiveLock' and objid = 4294967295
                      and database = (select oid from pg_database where datname = current_database())";
        eventually("one relay sleeps and can be woken", async || count(&mut connection, asleep).await == 1).await;
    }

    fn in_ms(ms: i64) -> String {
        // Not `interval '... milliseconds'`: PostgreSQL 13 reads its number into 32 bits.
        format!("clock_timestamp() + {ms} * interval '1 millisecond'")
    }

    fn numbers(last: i64) -> String {
        format!("generate_series(1, {last}) as numbers (i)")
    }

    fn json(text: &str) -> String {
        format!("cast({text} as jsonb)")
    }

    fn redrive(condition: &str) -> String {
        format!("select redrive_dead_letter(id) from event_dead_letter where {condition}")
    }

    fn refuse(what: &str) -> String {
        format!(
            "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'refused'; end $$;
             create trigger refuse before {what} for each row execute function refuse()"
        )
    }

    fn allow(table: &str) -> String {
        format!("drop trigger refuse on {table}")
    }

    fn forget_history() -> String {
        // Days of before are never made, so there is nothing to delete.
        String::from("select 1")
    }

    fn old_log() -> String {
        "do $$ declare
             day date := (now() at time zone 'UTC')::date - 10;
             name text := 'event_processing_log' || to_char(day, '_YYYYMMDD');
         begin
             execute format('create table %I partition of event_processing_log for values from (%L) to (%L)',
                            name, day::text || ' 00:00:00+00', (day + 1)::text || ' 00:00:00+00');
             insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, duration_ms,
                                               worker, processed_at)
             select gen_random_uuid(), i, 'old', 'a', 'published', 1, 1, 'w', (day::text || ' 12:00+00')::timestamptz
             from generate_series(1, 3) i;
         end $$"
            .to_owned()
    }

    async fn unruled(connection: &mut PgConnection, statements: &str) {
        let unruled = format!("set session_replication_role = replica; {statements}; reset session_replication_role");
        connection.execute(&unruled).await.unwrap();
    }
}

/// Waits until something in this process watches for writes to the file.
pub(crate) async fn until_watched(file: &Path) {
    let watched = format!(" ino:{:x} ", std::fs::metadata(file).unwrap().ino());
    // The list changes while it is read, because other tests open and close files.
    let watches = || std::fs::read_dir("/proc/self/fdinfo").unwrap().flatten().map(|entry| entry.path());
    let told = || watches().any(|fd| std::fs::read_to_string(fd).is_ok_and(|info| info.contains(&watched)));
    eventually(&format!("{} is watched", file.display()), async || told()).await;
}

/// A database file in a folder of its own. Dropping this value removes the folder.
#[derive(Debug)]
pub(crate) struct SqliteFile<const WAL: bool> {
    folder: TempDir,
    url: String,
}

impl<const WAL: bool> SqliteFile<WAL> {
    /// A file of an application, without relay's tables.
    pub(crate) async fn unmigrated() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}", folder.path().join("app.db").display());
        let file = Self { folder, url };
        let options = SqliteConnectOptions::new().filename(file.path()).create_if_missing(true);
        let mut application = SqliteConnection::connect_with(&options).await.unwrap();
        let mode = if WAL { "wal" } else { "delete" };
        application.execute(&format!("pragma journal_mode = {mode}; create table app_order (id)")).await.unwrap();
        application.close().await.unwrap();
        file
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("app.db")
    }

    /// Opens a connection that waits so long for the write lock.
    pub(crate) async fn connect_patiently(&self, busy_timeout: Duration) -> SqliteConnection {
        let options = SqliteConnectOptions::new().filename(self.path()).busy_timeout(busy_timeout);
        // Tests need not survive a loss of power.
        SqliteConnection::connect_with(&options.synchronous(sqlx::sqlite::SqliteSynchronous::Off)).await.unwrap()
    }
}

impl<const WAL: bool> Store for SqliteFile<WAL> {
    type Outbox = SqliteOutbox;
    type Connection = SqliteConnection;

    async fn new() -> Self {
        let file = Self::unmigrated().await;
        sqlite::migrate::migrate(&Secret::inline(&file.url)).await.unwrap();
        file
    }

    fn url(&self) -> &str {
        &self.url
    }

    async fn connect(&self) -> SqliteConnection {
        self.connect_patiently(Duration::from_secs(60)).await
    }

    fn outbox(config: OutboxConfig) -> SqliteOutbox {
        SqliteOutbox::new(config)
    }

    async fn until_asleep(&self) {
        until_watched(&self.path()).await;
    }

    fn in_ms(ms: i64) -> String {
        format!("strftime('%Y-%m-%d %H:%M:%f', 'now', '{} seconds')", ms as f64 / 1000.0)
    }

    fn numbers(last: i64) -> String {
        format!(
            "(with recursive numbers (i) as (select 1 union all select i + 1 from numbers where i < {last})
              select i from numbers)"
        )
    }

    fn json(text: &str) -> String {
        text.to_owned()
    }

    fn redrive(condition: &str) -> String {
        format!("update event_dead_letter set redriven_at = datetime('now') where {condition}")
    }

    fn refuse(what: &str) -> String {
        format!("create trigger refuse before {what} begin select raise(abort, 'refused'); end")
    }

    fn allow(_: &str) -> String {
        "drop trigger refuse".to_owned()
    }

    fn forget_history() -> String {
        "delete from event_history where rowid < (select max(rowid) from event_history)".to_owned()
    }

    fn old_log() -> String {
        // They are the first rows, as they would be.
        "update event_processing_log set rowid = rowid + 1000;
         insert into event_processing_log (rowid, event_id, outbox_id, event_type, destination, status, attempt, duration_ms,
                                           worker, processed_at)
         select i, 'old' || i, i, 'old', 'a', 'published', 1, 1, 'w', strftime('%Y-%m-%d %H:%M:%f', 'now', '-10 days')
         from (select 1 as i union all select 2 union all select 3)"
            .to_owned()
    }

    async fn unruled(connection: &mut SqliteConnection, statements: &str) {
        let triggers = "from sqlite_schema where type = 'trigger' and tbl_name = 'event_outbox'";
        let names = connection.texts(&format!("select name {triggers}")).await;
        let made = connection.texts(&format!("select sql {triggers}")).await;
        let drop = names.iter().map(|name| format!("drop trigger {name};"));
        let make = made.iter().map(|sql| format!("{sql};"));
        let all: String = drop.chain([format!("{statements};")]).chain(make).collect();
        connection.execute(&all).await.unwrap();
    }
}
