//! Opens the file and runs queries.

use std::future::Future;
use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Connection, Executor};

use crate::outbox::error::OutboxError;
use crate::outbox::sqlite::identity::FileId;
use crate::secret::Secret;

/// How long a write waits for another program's transaction to end before it fails, to be retried later. A relay that is
/// stopped does not wait longer than this either.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection, and the file that it writes to. A connection keeps writing to a file that was moved or deleted.
#[derive(Debug)]
pub(super) struct Connected {
    pub(super) connection: SqliteConnection,
    pub(super) file: FileId,
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

/// Checks that the URL can be used, without checking that the file exists.
///
/// # Errors
/// The reason why it cannot be used.
pub(in crate::outbox) fn validate(url: &Secret, pooled: bool) -> Result<(), OutboxError> {
    if pooled {
        let reason = "it names a SQLite file, and RELAY_DATABASE_POOLED is for a pooler before PostgreSQL: unset it";
        return Err(OutboxError::Url { reason: reason.into() });
    }
    connect_options(url).map(drop)
}

/// Connects to the file at `url`.
///
/// # Errors
/// The file does not exist, or cannot be used.
pub async fn open(url: &Secret) -> Result<SqliteConnection, OutboxError> {
    let options = connect_options(url)?;
    if matches!(options.get_filename().try_exists(), Ok(false)) {
        return Err(OutboxError::NoFile { file: options.get_filename().display().to_string() });
    }
    connect(&options.create_if_missing(false)).await
}

/// Like [`open`], but creates the file if it does not exist and the URL says `mode=rwc`.
pub(super) async fn open_or_create(url: &Secret) -> Result<SqliteConnection, OutboxError> {
    let creates = url.read().map_err(OutboxError::UrlFile)?.contains("mode=rwc");
    if creates { connect(&connect_options(url)?).await } else { open(url).await }
}

async fn connect(options: &SqliteConnectOptions) -> Result<SqliteConnection, OutboxError> {
    let mut connection = SqliteConnection::connect_with(options)
        .await
        .map_err(|source| OutboxError::Connect { advice: advice(&source), source })?;
    // SQLite reads nothing before it must. This query shows now whether the file is a database.
    run_query("read the database file", connection.execute("select count(*) from sqlite_schema")).await?;
    Ok(connection)
}

pub(super) fn path(url: &Secret) -> Result<PathBuf, OutboxError> {
    Ok(connect_options(url)?.get_filename().to_owned())
}

/// Returns the options of `url`, and the relay's own.
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

pub(super) async fn run_query<T>(
    operation: &'static str,
    query: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, OutboxError> {
    // The relay needs no timeout here: the file is local, and the busy timeout bounds every wait for others.
    query.await.map_err(|source| query_failed(operation, source))
}

pub(super) fn query_failed(operation: &'static str, source: sqlx::Error) -> OutboxError {
    OutboxError::Query { operation, advice: advice(&source), source }
}

/// Returns what to do about an error, if its result code shows that.
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
