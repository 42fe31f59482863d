//! Connecting to a server, and waiting for its answers.

use std::future::Future;
use std::str::FromStr;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection};

use crate::outbox::error::OutboxError;
use crate::outbox::postgres::url;
use crate::secret::Secret;

/// How long a statement may go unanswered before its connection is given up. This is far above what any of our statements
/// takes, and short enough that a host that vanished does not stop a lane for long.
pub(super) const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long connecting may take.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A relay with nothing to do is idle, and must not lose its connections for it. (PostgreSQL 13 has no such setting.)
pub(super) const NO_IDLE_LIMIT: &str = "select pg_catalog.set_config('idle_session_timeout', '0', false)
                             where pg_catalog.current_setting('idle_session_timeout', true) is not null";

/// Checks that the URL can be read and used, without connecting to the server.
///
/// # Errors
/// The URL cannot be read or used; the error says why.
pub fn validate(url: &Secret, pooled: bool) -> Result<(), OutboxError> {
    let text = url.read().map_err(OutboxError::UrlFile)?;
    url::require_all_taken(&text, pooled).map_err(|reason| OutboxError::Url { reason })?;
    connect_options(url, false).map(drop)
}

/// Opens a plain connection to the database at `url`, for commands that do one thing.
///
/// # Errors
/// The URL cannot be used, or no server answers there.
pub async fn open(url: &Secret, pooled: bool) -> Result<PgConnection, OutboxError> {
    connect(&connect_options(url, pooled)?).await
}

/// Returns the connection options of `url`, with what the relay adds to them.
pub(super) fn connect_options(url: &Secret, pooled: bool) -> Result<PgConnectOptions, OutboxError> {
    let text = url.read().map_err(OutboxError::UrlFile)?;
    if !["postgres://", "postgresql://"].iter().any(|scheme| text.starts_with(scheme)) {
        return Err(OutboxError::Url { reason: "it must begin with postgres:// or postgresql://".into() });
    }
    let mut options = PgConnectOptions::from_str(&text)
        .map_err(|error| OutboxError::Url { reason: error.to_string() })?
        .disable_statement_logging();
    if options.get_application_name().is_none() {
        options = options.application_name("relay");
    }
    if pooled {
        // A pooler refuses settings that it does not know, and no float of ours needs this one.
        options = options.extra_float_digits(None);
    } else {
        // The server notices within about 15 s that a relay's host has vanished, and frees its claims. A pooler refuses
        // start-up options, and they would concern the wrong connection.
        options = options.options([
            ("tcp_keepalives_idle", "5"),
            ("tcp_keepalives_interval", "3"),
            ("tcp_keepalives_count", "3"),
            ("tcp_user_timeout", "15000"),
        ]);
    }
    Ok(options)
}

pub(super) async fn connect(options: &PgConnectOptions) -> Result<PgConnection, OutboxError> {
    match tokio::time::timeout(CONNECT_TIMEOUT, PgConnection::connect_with(options)).await {
        Ok(connection) => connection.map_err(|source| OutboxError::Connect { advice: advice(&source), source }),
        Err(_) => Err(OutboxError::TimedOut { operation: "connect to the database", after: CONNECT_TIMEOUT }),
    }
}

/// Bounds the wait for an answer. After an error the caller must drop the connection, whose state is unknown.
pub(super) async fn with_timeout<T>(
    operation: &'static str,
    after: Duration,
    query: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, OutboxError> {
    match tokio::time::timeout(after, query).await {
        Ok(answer) => answer.map_err(|source| query_failed(operation, source)),
        Err(_) => Err(OutboxError::TimedOut { operation, after }),
    }
}

pub(super) fn query_failed(operation: &'static str, source: sqlx::Error) -> OutboxError {
    OutboxError::Query { operation, advice: advice(&source), source }
}

/// Returns what to do about an error, if its SQLSTATE shows that.
fn advice(error: &sqlx::Error) -> Option<&'static str> {
    if let Some(advice) = error.as_database_error().and_then(|error| advice_by_words(error.message())) {
        return Some(advice);
    }
    let sqlstate = match error {
        sqlx::Error::Database(error) => error.code()?,
        sqlx::Error::Io(error) if error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) => {
            return Some(
                "is the server's certificate signed by the authority in sslrootcert, and issued for the host in DATABASE_URL?",
            );
        }
        sqlx::Error::Io(_) => {
            return Some("is the server up, and are host and port in DATABASE_URL right?");
        }
        sqlx::Error::Tls(_) => return Some("check sslmode and sslrootcert in DATABASE_URL"),
        _ => return None,
    };
    Some(match sqlstate.as_ref() {
        "28P01" | "28000" => "check user and password in DATABASE_URL, and pg_hba.conf",
        "3D000" => "create the database, or correct its name in DATABASE_URL",
        "42501" => "grant what is missing: `relay check` names it, and deploy/sql/roles.sql has all the relay needs",
        "42P01" | "42703" | "42883" => {
            "run `relay migrate`; where the tables lie in another schema, set search_path in DATABASE_URL"
        }
        "25006" => "point DATABASE_URL at the primary",
        "55P03" => "another session holds a lock on one of the relay's tables or sequences: `relay check` names it",
        "57014" => "the server is slow or another session is in the way: `relay check` names who holds locks",
        "53300" => {
            "raise max_connections, or lower RELAY_LANES: a relay opens up to three connections more than it has lanes; a role and a \
             database may have a lower limit (alter role ... connection limit, alter database ... connection limit)"
        }
        "26000" | "42P05" => "a transaction-pooling proxy stands in front: set RELAY_DATABASE_POOLED=true",
        _ => return None,
    })
}

/// The same for errors that only their words tell apart: PgBouncer gives all its errors one SQLSTATE, and PostgreSQL gives
/// row-level security that of missing rights.
fn advice_by_words(message: &str) -> Option<&'static str> {
    let says = |words: &str| message.contains(words);
    if says("row-level security") {
        Some(ROW_SECURITY_ADVICE)
    } else if says("unsupported startup parameter") {
        Some(
            "a pooler stands in front: set RELAY_DATABASE_POOLED=true, and take `options` out of DATABASE_URL (the search path can \
             be set for the role: alter role ... set search_path = ...), or let the pooler ignore it: ignore_startup_parameters",
        )
    } else if says("transaction blocks not allowed in statement pooling mode") || says("long transactions not allowed")
    {
        Some("the pooler is in statement mode: the relay needs pool_mode = transaction or session for its database")
    } else {
        None
    }
}

/// What to do where row-level security applies to the relay's role.
pub(super) const ROW_SECURITY_ADVICE: &str = "the relay must see every row: `alter role ... bypassrls` for its role, or let it connect as \
     the tables' owner (where FORCE ROW LEVEL SECURITY is set, `alter table ... no force row level security`)";

/// The error of a database that takes no writes.
pub(super) fn read_only() -> OutboxError {
    let reason = "a replica, or default_transaction_read_only; point DATABASE_URL at the primary".to_owned();
    OutboxError::ReadOnly { reason }
}
