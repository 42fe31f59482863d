//! The outbox in PostgreSQL 13 and later.
//!
//! - [`lane`]: claim and settle, the hot path.
//! - [`wake`]: sleeping until a producer commits.
//! - [`schema`]: migrations, and whether a database fits.
//! - [`emit`](mod@emit): the insert for applications.

pub mod emit;
pub mod lane;
mod records;
pub mod schema;
mod tid;
pub mod wake;

use std::future::Future;
use std::str::FromStr;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection};

use crate::outbox::{Outbox, OutboxError};
use crate::secret::Secret;

/// How long a statement may go unanswered before its connection is given up. Far above what any of ours takes, and
/// short enough that a host that vanished does not stop a lane for long.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How a relay uses its database.
#[derive(Debug, Clone)]
pub struct PgConfig {
    /// `postgres://...`; read again at every connection.
    pub url: Secret,
    /// A transaction-pooling proxy such as PgBouncer stands in front: no named statements, no LISTEN.
    pub pooled: bool,
    /// How long one publish call may take, which bounds how long a claim's transaction stays idle.
    pub publish_timeout: Duration,
    /// How long days of the processing log are kept.
    pub log_retention: Duration,
    /// How long days of the history are kept.
    pub history_retention: Duration,
    /// Whether published events are copied to `event_history`.
    pub history: bool,
    /// Who writes the processing log: host name and process id.
    pub worker: String,
}

/// The outbox of one database.
#[derive(Debug, Clone)]
pub struct PgOutbox {
    config: PgConfig,
}

impl PgOutbox {
    /// Nothing is connected yet.
    pub fn new(config: PgConfig) -> Self {
        Self { config }
    }

    /// One connection to a database that can be written to.
    async fn connect(&self) -> Result<PgConnection, OutboxError> {
        let options = connect_options(&self.config.url, self.config.pooled)?;
        let mut connection = connect(&options).await?;
        let read_only: bool = answered("look whether the database is read-only", STATEMENT_TIMEOUT, async {
            sqlx::query_scalar("select pg_is_in_recovery() or current_setting('transaction_read_only')::boolean")
                .persistent(false)
                .fetch_one(&mut connection)
                .await
        })
        .await?;
        if read_only { Err(OutboxError::ReadOnly) } else { Ok(connection) }
    }

    async fn add_days(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        // A week ahead: that long the relay may be without the right or the luck to add more.
        let mut parents = vec!["event_processing_log"];
        parents.extend(self.config.history.then_some("event_history"));
        for parent in parents {
            answered("add the day partitions ahead", STATEMENT_TIMEOUT, async {
                sqlx::query("select relay_add_days($1, 7)")
                    .persistent(false)
                    .bind(parent)
                    .execute(&mut *connection)
                    .await
            })
            .await?;
        }
        Ok(())
    }
}

impl Outbox for PgOutbox {
    type Lane = lane::PgLane;
    type Wakeup = wake::PgWakeup;

    fn lane(&self) -> lane::PgLane {
        lane::PgLane::new(self.clone())
    }

    fn wakeup(&self) -> Option<wake::PgWakeup> {
        (!self.config.pooled).then(|| wake::PgWakeup::new(self.clone()))
    }

    async fn prepare(&self) -> Result<(), OutboxError> {
        let mut connection = self.connect().await?;
        schema::require_fit(&mut connection).await?;
        self.add_days(&mut connection).await
    }

    async fn maintain(&self) -> Result<(), OutboxError> {
        let mut connection = self.connect().await?;
        self.add_days(&mut connection).await?;
        for (parent, retention) in
            [("event_processing_log", self.config.log_retention), ("event_history", self.config.history_retention)]
        {
            answered("drop the days past their retention", STATEMENT_TIMEOUT, async {
                sqlx::query("select relay_drop_days($1, make_interval(secs => $2))")
                    .persistent(false)
                    .bind(parent)
                    .bind(retention.as_secs_f64())
                    .execute(&mut connection)
                    .await
            })
            .await?;
        }
        Ok(())
    }
}

/// Whether the URL can be read and used; nobody is asked whether it leads anywhere.
///
/// # Errors
/// Why not.
pub fn validate(url: &Secret) -> Result<(), OutboxError> {
    connect_options(url, false).map(drop)
}

/// A plain connection to the database at `url`, for commands that do one thing.
///
/// # Errors
/// The URL cannot be used, or nobody answers there.
pub async fn open(url: &Secret, pooled: bool) -> Result<PgConnection, OutboxError> {
    connect(&connect_options(url, pooled)?).await
}

/// The connection options of `url`, with what the relay adds to them.
fn connect_options(url: &Secret, pooled: bool) -> Result<PgConnectOptions, OutboxError> {
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
    if !pooled {
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

async fn connect(options: &PgConnectOptions) -> Result<PgConnection, OutboxError> {
    match tokio::time::timeout(CONNECT_TIMEOUT, PgConnection::connect_with(options)).await {
        Ok(connection) => connection.map_err(OutboxError::Connect),
        Err(_) => Err(OutboxError::TimedOut { operation: "connect to the database", after: CONNECT_TIMEOUT }),
    }
}

/// Bounds the wait for an answer. After an error the caller must drop the connection, whose state is unknown.
async fn answered<T>(
    operation: &'static str,
    after: Duration,
    query: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, OutboxError> {
    match tokio::time::timeout(after, query).await {
        Ok(answer) => answer.map_err(|source| OutboxError::Query { operation, source }),
        Err(_) => Err(OutboxError::TimedOut { operation, after }),
    }
}
