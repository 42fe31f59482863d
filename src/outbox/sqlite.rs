//! The outbox in one SQLite file, shared with the application that owns it.
//!
//! - `owner`: of several relays on one file, one works; `identity`: which file it is, whatever its name.
//! - `proof`: whether the file records, and events that it does not take.
//! - [`lane`]: claim and settle, the hot path; `traffic`: staying out of the application's way.
//! - [`wake`]: sleeping until the application commits.
//! - [`schema`], `shape`: migrations, and whether a file fits.
//! - `register`: the relays that use the file, by what configurations.
//! - `retention`: forgetting what is old, a little at a time.
//! - `standstill`: what keeps events from moving.
//!
//! The file is the application's. Nothing here changes its journal mode or any other setting that outlives a connection;
//! the write lock is taken to settle and given back at once, never held while anything is published.

pub(super) mod emit;
mod formats;
mod identity;
pub mod lane;
mod owed;
mod owner;
mod parked;
mod proof;
mod question;
mod register;
mod retention;
mod row;
pub mod schema;
mod settle;
mod shape;
mod standstill;
mod suspects;
mod traffic;
pub mod wake;

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Connection, Executor};
use tokio::sync::Mutex;

use crate::outbox::register::{Configuration, Membership};
use crate::outbox::standstill::{Memory, TAKEN_AFTER};
use crate::outbox::{Outbox, OutboxConfig, OutboxError, Standstill};
use crate::secret::Secret;
use identity::FileId;
use lane::Turn;
use owner::Owner;
use question::Question;

/// How long a write waits for another program's transaction to end before it fails, to be tried again later. What is
/// told to stop waits no longer than this either.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The outbox of one file.
#[derive(Debug, Clone)]
pub struct SqliteOutbox {
    config: Arc<OutboxConfig>,
    owner: Arc<Owner>,
    membership: Membership,
    /// Where the URL led at the last connection.
    path: Arc<StdMutex<Option<Arc<Path>>>>,
    /// Held by the lane that has a claim. One at a time is enough: all writes to a file are one after the other anyhow, and
    /// the rows of a claim lie side by side, so that deleting them empties whole pages.
    turn: Arc<Mutex<Turn>>,
    memory: Memory,
}

impl SqliteOutbox {
    /// Nothing is opened yet.
    pub fn new(config: OutboxConfig) -> Self {
        let (config, memory) = (Arc::new(config), Memory::default());
        let (owner, membership, path, turn) = Default::default();
        Self { config, owner, membership, path, turn, memory }
    }

    /// A connection for a relay's own work.
    async fn connect(&self) -> Result<Connected, OutboxError> {
        *self.known_path() = Some(path(&self.config.url)?.into());
        // A file that is replaced meanwhile may be either.
        loop {
            let file = self.file()?;
            let connection = open(&self.config.url).await?;
            if self.file()? == file {
                return Ok(Connected { connection, file });
            }
        }
    }

    /// The connection there is, or a new one where there is none, or where it leads to a file that was replaced.
    async fn connect_unless(&self, connection: Option<Connected>) -> Result<Connected, OutboxError> {
        let file = self.file()?;
        match connection {
            Some(connection) if connection.file == file => Ok(connection),
            _ => self.connect().await,
        }
    }

    /// Which file is at the path now.
    fn file(&self) -> Result<FileId, OutboxError> {
        owner::file_id(&self.path()?)
    }

    /// Where the file is.
    fn path(&self) -> Result<Arc<Path>, OutboxError> {
        let mut known = self.known_path();
        match &*known {
            Some(known) => Ok(Arc::clone(known)),
            None => Ok(Arc::clone(known.insert(path(&self.config.url)?.into()))),
        }
    }

    fn known_path(&self) -> MutexGuard<'_, Option<Arc<Path>>> {
        self.path.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this relay is the one that works on the file; becomes it where no other is.
    fn owns(&self) -> Result<bool, OutboxError> {
        self.owner.owns(&self.config.worker, &self.path()?)
    }
}

/// A connection, and which file it leads to: a file that was moved or deleted is written to all the same.
#[derive(Debug)]
struct Connected {
    connection: SqliteConnection,
    file: FileId,
}

impl Deref for Connected {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        &self.connection
    }
}

impl DerefMut for Connected {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.connection
    }
}

impl Outbox for SqliteOutbox {
    type Lane = lane::SqliteLane;
    type Wakeup = wake::SqliteWakeup;

    fn lane(&self) -> lane::SqliteLane {
        lane::SqliteLane::new(self.clone())
    }

    fn wakeup(&self) -> Option<wake::SqliteWakeup> {
        Some(wake::SqliteWakeup::new(self.clone()))
    }

    async fn prepare(&self) -> Result<(), OutboxError> {
        let mut connection = self.connect().await?;
        drop(schema::require_fit(&mut connection).await?);
        if let Ok(mut turn) = self.turn.try_lock() {
            turn.fits(connection.file);
        }
        proof::prove(&mut connection, &self.config.worker, self.config.usage).await.map(drop)
    }

    async fn register(&self, configuration: &Arc<Configuration>, once: bool) -> Result<(), OutboxError> {
        self.membership.join(self, configuration, once, Instant::now()).await
    }

    async fn attend(&self, idle: Duration) -> Result<Duration, OutboxError> {
        self.membership.attend(self, idle, Duration::MAX, Instant::now()).await
    }

    fn differences(&self, lasting: Duration) -> Vec<String> {
        self.membership.differences(lasting)
    }

    async fn deregister(&self) -> Result<(), OutboxError> {
        self.membership.leave(self).await
    }

    async fn maintain(&self) -> Result<(), OutboxError> {
        if !self.owns()? {
            return Ok(()); // the relay that works does it
        }
        let mut connection = self.connect().await?;
        retention::forget(&mut connection, "event_processing_log", "processed_at", self.config.log_retention).await?;
        retention::forget(&mut connection, "event_history", "published_at", self.config.history_retention).await
    }

    async fn holders(&self) -> Result<Vec<String>, OutboxError> {
        Ok(owner::holder(&self.path()?)?.into_iter().collect())
    }

    async fn standstills(&self, destinations: &[String]) -> Result<Vec<Standstill>, OutboxError> {
        let mut connection = self.connect().await?;
        let owner = if self.owns()? { None } else { self.holders().await?.pop() };
        let (publish_timeout, memory) = (self.config.publish_timeout, &self.memory);
        let seen_for = publish_timeout + TAKEN_AFTER;
        let question = Question { destinations, publish_timeout, memory, owner, seen_for };
        answered("look for what stands still", standstill::find(&mut connection, &question)).await
    }
}

/// Whether the URL can be used; nobody looks whether the file is there.
///
/// # Errors
/// Why not.
pub(in crate::outbox) fn validate(url: &Secret, pooled: bool) -> Result<(), OutboxError> {
    if pooled {
        let reason =
            "it names a SQLite file, and RELAY_DATABASE_POOLED is for a pooler before PostgreSQL: take that away";
        return Err(OutboxError::Url { reason: reason.into() });
    }
    connect_options(url).map(drop)
}

/// A connection to the file at `url`.
///
/// # Errors
/// There is no such file, or it cannot be used.
pub async fn open(url: &Secret) -> Result<SqliteConnection, OutboxError> {
    let options = connect_options(url)?;
    if matches!(options.get_filename().try_exists(), Ok(false)) {
        return Err(OutboxError::NoFile { file: options.get_filename().display().to_string() });
    }
    connect(&options.create_if_missing(false)).await
}

/// The same; creates the file where it is missing and the URL says `mode=rwc`.
async fn open_or_create(url: &Secret) -> Result<SqliteConnection, OutboxError> {
    let creates = url.read().map_err(OutboxError::UrlFile)?.contains("mode=rwc");
    if creates { connect(&connect_options(url)?).await } else { open(url).await }
}

async fn connect(options: &SqliteConnectOptions) -> Result<SqliteConnection, OutboxError> {
    let mut connection = SqliteConnection::connect_with(options)
        .await
        .map_err(|source| OutboxError::Connect { advice: advice(&source), source })?;
    // SQLite reads nothing before it must; what the file is shows now.
    answered("read the database file", connection.execute("select count(*) from sqlite_schema")).await?;
    Ok(connection)
}

fn path(url: &Secret) -> Result<PathBuf, OutboxError> {
    Ok(connect_options(url)?.get_filename().to_owned())
}

/// The options of `url`, with what the relay adds to them.
fn connect_options(url: &Secret) -> Result<SqliteConnectOptions, OutboxError> {
    let text = url.read().map_err(OutboxError::UrlFile)?;
    let refused = |reason: &str| OutboxError::Url { reason: reason.to_owned() };
    let parameters = text.split_once('?').map_or("", |(_, parameters)| parameters);
    if text.contains(":memory:") || parameters.contains("mode=memory") {
        return Err(refused("an in-memory database is one program's own: name the application's file"));
    }
    if parameters.contains("mode=ro") || parameters.contains("immutable=") {
        return Err(refused("it opens the file for reading only, and the relay deletes what it has published"));
    }
    let path = text.strip_prefix("sqlite:").map(|rest| rest.strip_prefix("//").unwrap_or(rest));
    if path.is_none_or(|path| path.is_empty() || path.starts_with('?')) {
        return Err(refused(
            "it must be sqlite: and the path of the application's file, as in sqlite:/srv/shop/app.db",
        ));
    }
    let options =
        SqliteConnectOptions::from_str(&text).map_err(|error| OutboxError::Url { reason: error.to_string() })?;
    Ok(options.busy_timeout(BUSY_TIMEOUT).disable_statement_logging())
}

async fn answered<T>(
    operation: &'static str,
    query: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, OutboxError> {
    // No timeout of our own: the file is here, and the busy timeout bounds every wait for others.
    query.await.map_err(|source| query_failed(operation, source))
}

fn query_failed(operation: &'static str, source: sqlx::Error) -> OutboxError {
    OutboxError::Query { operation, advice: advice(&source), source }
}

/// What to do about an error, where its result code tells.
fn advice(error: &sqlx::Error) -> Option<&'static str> {
    let code: i32 = error.as_database_error()?.code()?.parse().ok()?;
    // The lower byte is the primary code: https://www.sqlite.org/rescode.html
    Some(match code & 0xff {
        1 if error.to_string().contains("no such table") => "run `relay migrate`",
        5 | 6 => {
            "another program holds the file's write lock: its transactions must be short; `fuser -v` on the file shows who has it open"
        }
        8 => {
            "the file, its folder or its file system is read-only for this user: the relay must write to both file and folder"
        }
        10 => "look at the disk and its kernel messages",
        11 => "the file is damaged: stop its users, and restore it from a backup",
        13 => "make room on its file system; what is published already is recorded as soon as there is some",
        14 => "is its path right, and may this user write to the file and to its folder?",
        26 => "the file is no SQLite database, or an encrypted one: correct DATABASE_URL",
        _ => return None,
    })
}
