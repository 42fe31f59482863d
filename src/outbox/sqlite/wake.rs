//! Sleeps until the application commits.
//!
//! `PRAGMA data_version` says exactly whether another connection has committed, but it has to be queried. The operating
//! system reports writes to the file by itself, but a little before the commit is visible. So its reports decide when to run
//! the query. On a file system without such reports, as with some network and container mounts, the query is run at
//! intervals.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use notify::event::{EventKind, ModifyKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use sqlx::sqlite::SqliteConnection;
use tokio::sync::Notify;

use crate::failpoint::failpoint;
use crate::outbox::sqlite::connection::{Connected, path, run_query};
use crate::outbox::sqlite::store::SqliteOutbox;
use crate::outbox::{Armed, OutboxError, Wakeup};

/// The shortest and the longest time between two queries. [`UNTOLD`] is the longest time without reports of writes.
const FIRST: Duration = Duration::from_millis(1);
const LONGEST: Duration = Duration::from_millis(250);
const UNTOLD: Duration = Duration::from_millis(10);

/// Notices that the application has committed.
pub struct SqliteWakeup {
    outbox: SqliteOutbox,
    /// The connection with its last answer. Only answers of the same connection can be compared.
    asked: Option<(Connected, i64)>,
    watch: Option<FileWatch>,
    /// The log already says that there are no reports of writes.
    warned: bool,
}

/// The subscription to reports of writes to the database's files.
struct FileWatch {
    watcher: RecommendedWatcher,
    written: Arc<Notify>,
    files: Vec<PathBuf>,
}

impl SqliteWakeup {
    pub(super) fn new(outbox: SqliteOutbox) -> Self {
        Self { outbox, asked: None, watch: None, warned: false }
    }

    /// Subscribes to reports of writes. Without them, the queries are more frequent.
    fn watch_files(&mut self) -> Result<(), OutboxError> {
        let database = path(&self.outbox.config.url)?;
        // The log is beside the file itself, so symbolic links are resolved.
        let database = database.canonicalize().unwrap_or(database);
        if self.watch.is_none() {
            match FileWatch::new() {
                Ok(watch) => self.watch = Some(watch),
                Err(error) => self.warn(&error),
            }
        }
        if let Some(watch) = &mut self.watch
            && let Err(error) = watch.add(&database)
        {
            self.watch = None;
            self.warn(&error);
        }
        Ok(())
    }

    fn warn(&mut self, error: &notify::Error) {
        if !std::mem::replace(&mut self.warned, true) {
            tracing::warn!(%error, "the operating system does not tell of writes to the file; asking every {} ms", UNTOLD.as_millis());
        }
    }
}

impl Wakeup for SqliteWakeup {
    async fn arm(&mut self) -> Result<Armed, OutboxError> {
        failpoint("arm")?;
        self.watch_files()?;
        let connection = self.asked.take().map(|(connection, _)| connection);
        let mut connection = self.outbox.connect_unless(connection).await?;
        let version = data_version(&mut connection).await?;
        self.asked = Some((connection, version));
        Ok(Armed::Yes)
    }

    async fn wait(&mut self, at_most: Duration) -> Result<bool, OutboxError> {
        let begun = Instant::now();
        let mut written_at: Option<Instant> = None;
        loop {
            // A wait that is cancelled during a query loses the connection, and with it the answer to compare with.
            let Some((mut connection, before)) = self.asked.take() else { return Ok(true) };
            if self.outbox.file().ok() != Some(connection.file) {
                return Ok(true); // it was replaced, or is gone
            }
            let version = data_version(&mut connection).await?;
            self.asked = Some((connection, version));
            if version != before {
                return Ok(true);
            }
            let Some(rest) = at_most.checked_sub(begun.elapsed()) else { return Ok(false) };
            // The longer ago the last write was, the less likely its commit is still to come.
            let longest = if self.watch.is_some() { LONGEST } else { UNTOLD };
            let pause = written_at.map_or(longest, |at| (at.elapsed() / 2).clamp(FIRST, longest));
            match &self.watch {
                Some(watch) => tokio::select! {
                    () = watch.written.notified() => written_at = Some(Instant::now()),
                    () = tokio::time::sleep(pause.min(rest)) => {}
                },
                None => tokio::time::sleep(pause.min(rest)).await,
            }
        }
    }

    async fn disarm(&mut self) -> Result<(), OutboxError> {
        // While the relay works, its own writes would cause reports.
        if let Some(watch) = &mut self.watch {
            watch.remove();
        }
        Ok(())
    }
}

impl FileWatch {
    fn new() -> notify::Result<Self> {
        let written = Arc::new(Notify::new());
        let tell = Arc::clone(&written);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // An error may mean that events were lost.
            if event.is_ok_and(|event| !matches!(event.kind, EventKind::Modify(ModifyKind::Data(_)))) {
                return;
            }
            tell.notify_one();
        })?;
        Ok(Self { watcher, written, files: Vec::new() })
    }

    /// Watches the file and its write-ahead log, if there is one.
    fn add(&mut self, database: &Path) -> notify::Result<()> {
        self.remove();
        let mut log = database.as_os_str().to_owned();
        log.push("-wal");
        for file in [database.to_owned(), log.into()] {
            if file.exists() {
                self.watcher.watch(&file, RecursiveMode::NonRecursive)?;
                self.files.push(file);
            }
        }
        Ok(())
    }

    fn remove(&mut self) {
        for file in self.files.drain(..) {
            if let Err(error) = self.watcher.unwatch(&file) {
                tracing::debug!(%error, "a file of the database is gone");
            }
        }
    }
}

async fn data_version(connection: &mut SqliteConnection) -> Result<i64, OutboxError> {
    run_query("ask whether anything was committed", async {
        sqlx::query_scalar("pragma data_version").fetch_one(connection).await
    })
    .await
}
