//! The outbox in PostgreSQL 13 and later.
//!
//! - [`lane`]: claim and settle, the hot path.
//! - `take`, `batch`: taking partitions, and reading their rows.
//! - `promote`: making due rows pending.
//! - `bounds`: what lies left of them is dead, and not walked over.
//! - `settle`: what is written of a batch; `salvage`: and where that is refused; `kept`: what cannot even be
//!   parked. `proof`: whether all of it can be written. `refusal`: what a refusal says, and its cure.
//! - [`wake`]: sleeping until a producer commits.
//! - `schema`, `home`, `shape`: whether a database fits; `migrations`: their list; [`migrate`], [`check`]: the commands of that name.
//! - `formats`: events that this relay cannot read.
//! - `triggers`: what must be there of them. `patience`: the locks of a migration.
//! - `register`: the relays at work, by what configurations; `owed`: what is owed to destinations that are gone.
//! - `suspects`: the notes that end a crash loop.
//! - `exclusion`: whether advisory locks are what they should be.
//! - `standstill`: what keeps events from moving; `question`: what its probes go by; `parked`, `undecided`: two of them.
//! - `session`: what connections and transactions are set to.
//! - `emit`: the command of that name.

pub mod audit;
mod batch;
mod bounds;
pub mod check;
pub(super) mod emit;
mod exclusion;
mod formats;
mod home;
mod kept;
pub mod lane;
pub mod migrate;
mod migrations;
mod owed;
mod parked;
mod patience;
mod promote;
mod proof;
mod question;
mod refusal;
mod register;
mod salvage;
mod schema;
mod session;
mod settle;
mod shape;
mod sql;
mod standstill;
mod suspects;
mod take;
mod tid;
mod triggers;
mod undecided;
mod url;
pub mod wake;

use std::future::Future;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor};

use crate::failpoint::failpoint;
use crate::outbox::postgres::bounds::Bounds;
use crate::outbox::postgres::promote::Walks;
use crate::outbox::postgres::question::Question;
use crate::outbox::postgres::salvage::Unrecorded;
use crate::outbox::postgres::sql::{Schema, Sql};
use crate::outbox::postgres::suspects::Aside;
use crate::outbox::register::{Configuration, Membership};
use crate::outbox::standstill::Memory;
use crate::outbox::{Outbox, OutboxConfig, OutboxError, Standstill};
use crate::secret::Secret;

/// How long a statement may go unanswered before its connection is given up. Far above what any of ours takes, and
/// short enough that a host that vanished does not stop a lane for long.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A relay with nothing to do is idle, and must not lose its connections for it. (PostgreSQL 13 has no such setting.)
const NO_IDLE_LIMIT: &str = "select pg_catalog.set_config('idle_session_timeout', '0', false)
                             where pg_catalog.current_setting('idle_session_timeout', true) is not null";

/// The outbox of one database.
#[derive(Debug, Clone)]
pub struct PgOutbox {
    config: OutboxConfig,
    id: Arc<OnceLock<Arc<str>>>,
    aside: Aside,
    bounds: Bounds,
    walks: Arc<Walks>,
    membership: Membership,
    /// Where the last connection found our tables.
    schema: Arc<Mutex<Schema>>,
    unrecorded: Unrecorded,
    memory: Memory,
    /// Events wait behind one of a format that this relay does not know, or did.
    aside_by_format: Arc<AtomicBool>,
    /// Advisory locks were proven to exclude.
    exclusion: Arc<OnceLock<()>>,
}

impl PgOutbox {
    /// Nothing is connected yet.
    pub fn new(config: OutboxConfig) -> Self {
        let bounds = Bounds::new(config.pooled);
        let (id, aside, schema, memory) = (Arc::default(), Aside::default(), Arc::default(), Memory::default());
        let (unrecorded, exclusion, membership, aside_by_format, walks) = Default::default();
        Self { config, id, aside, bounds, walks, membership, schema, unrecorded, memory, aside_by_format, exclusion }
    }

    /// One connection to a database that can be written to.
    async fn connect(&self) -> Result<PgConnection, OutboxError> {
        failpoint("connect")?;
        let mut options = connect_options(&self.config.url, self.config.pooled)?;
        if !self.config.pooled {
            options = options.options(session::settings(&self.config));
        }
        let mut connection = connect(&options).await?;
        answered("begin", STATEMENT_TIMEOUT, self.begin_pooled(&mut connection)).await?;
        // A database without an encoding would fail a whole batch over one byte that is not UTF-8, so it is to send what
        // it has. (PgBouncer carries this setting from server to server.)
        let look = "
            select pg_catalog.pg_is_in_recovery() or pg_catalog.current_setting('transaction_read_only')::boolean,
                   case pg_catalog.current_setting('server_encoding')
                       when 'SQL_ASCII' then pg_catalog.set_config('client_encoding', 'SQL_ASCII', false)
                   end";
        let (read_only, _): (bool, Option<String>) =
            answered("look whether the database is read-only", STATEMENT_TIMEOUT, async {
                sqlx::query_as(look).persistent(false).fetch_one(&mut connection).await
            })
            .await?;
        if read_only {
            return Err(check::read_only());
        }
        if !self.config.pooled {
            answered("switch off idle_session_timeout", STATEMENT_TIMEOUT, connection.execute(NO_IDLE_LIMIT)).await?;
        }
        let found = answered("look for event_outbox", STATEMENT_TIMEOUT, Schema::find(&mut connection)).await?;
        if let Some(found) = found {
            *self.schema.lock().unwrap_or_else(PoisonError::into_inner) = found;
        }
        answered("commit", STATEMENT_TIMEOUT, self.commit_pooled(&mut connection)).await?;
        Ok(connection)
    }

    /// Begins a transaction where a pooler may send each one to another server connection. There a statement with parameters
    /// needs one even if it is the only one: its parts travel apart.
    async fn begin_pooled(&self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        if self.config.pooled {
            connection.execute(AssertSqlSafe(session::begin(&self.config))).await?;
        }
        Ok(())
    }

    /// Ends what [`Self::begin_pooled`] has begun.
    async fn commit_pooled(&self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        if self.config.pooled {
            connection.execute("commit").await?;
        }
        Ok(())
    }

    /// How statements are sent on this outbox' connections.
    fn sql(&self) -> Sql {
        Sql { schema: *self.schema.lock().unwrap_or_else(PoisonError::into_inner), persistent: !self.config.pooled }
    }

    /// What tells this outbox from others; asked for once.
    async fn id(&self, connection: &mut PgConnection) -> Result<Arc<str>, sqlx::Error> {
        if let Some(id) = self.id.get() {
            return Ok(Arc::clone(id));
        }
        let id: String = self
            .sql()
            .query_scalar("select {schema}.relay_outbox_id()")
            .persistent(false)
            .fetch_one(connection)
            .await?;
        Ok(Arc::clone(self.id.get_or_init(|| id.into())))
    }

    /// Fails where this relay cannot work with what is there.
    async fn look_at(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        answered("begin", STATEMENT_TIMEOUT, self.begin_pooled(connection)).await?;
        drop(schema::require_fit(connection).await?);
        shape::require(connection, Sql { persistent: false, ..self.sql() }, self.config.usage).await?;
        check::require_all_rows(connection, Sql { persistent: false, ..self.sql() }).await?;
        triggers::require(connection, Sql { persistent: false, ..self.sql() }).await?;
        answered("commit", STATEMENT_TIMEOUT, self.commit_pooled(connection)).await?;
        formats::give_back(connection, self.sql().schema).await
    }

    async fn find_standstills(
        &self,
        connection: &mut PgConnection,
        destinations: &[String],
    ) -> Result<(Vec<Standstill>, bool), sqlx::Error> {
        let (sql, publish_timeout) = (Sql { persistent: false, ..self.sql() }, self.config.publish_timeout);
        let bounds = self.bounds.known().0.bounds_of(&(0..take::PARTITIONS).collect::<Vec<_>>());
        let (memory, history, aside) = (&self.memory, self.config.usage.history, &*self.aside_by_format);
        let question = Question { sql, destinations, publish_timeout, history, memory, bounds, aside };
        let (mut found, brief) = standstill::find(connection, &question).await?;
        found.extend(self.unrecorded.kept.told());
        Ok((found, brief))
    }

    async fn look_for_standstills(&self, destinations: &[String]) -> Result<(Vec<Standstill>, bool), OutboxError> {
        let operation = "look for what stands still";
        // The connection aside may itself be waiting for what is to be found, and so may one that is to take its place.
        if let Some(Ok(answer)) = self
            .aside_unless_busy(operation, async |connection| self.find_standstills(connection, destinations).await)
            .await
        {
            return Ok(answer);
        }
        let mut connection = self.connect().await?;
        answered(operation, STATEMENT_TIMEOUT, self.find_standstills(&mut connection, destinations)).await
    }

    async fn add_days(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        // A week ahead: that long the relay may be without the right or the luck to add more.
        let mut parents = vec!["event_processing_log"];
        parents.extend(self.config.usage.history.then_some("event_history"));
        for parent in parents {
            answered("add the day partitions ahead", STATEMENT_TIMEOUT, async {
                self.begin_pooled(connection).await?;
                self.sql()
                    .query("select {schema}.relay_add_days($1, 7)")
                    .persistent(false)
                    .bind(parent)
                    .execute(&mut *connection)
                    .await?;
                self.commit_pooled(connection).await
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
        self.look_at(&mut connection).await?;
        if self.exclusion.get().is_none() {
            exclusion::prove(&mut connection, &mut self.connect().await?).await?;
            self.exclusion.get_or_init(|| ());
        }
        self.add_days(&mut connection).await?;
        self.look_at_additions(&mut connection).await?;
        self.prove(&mut connection, &session::begin(&self.config)).await
    }

    async fn register(&self, configuration: &Arc<Configuration>, once: bool) -> Result<(), OutboxError> {
        self.membership.join(self, configuration, once, Instant::now()).await
    }

    async fn attend(&self, idle: Duration) -> Result<Duration, OutboxError> {
        // As long as a claim may last.
        let patience = self.config.publish_timeout + Duration::from_secs(15);
        self.membership.attend(self, idle, patience, Instant::now()).await
    }

    fn differences(&self, lasting: Duration) -> Vec<String> {
        self.membership.differences(lasting)
    }

    async fn deregister(&self) -> Result<(), OutboxError> {
        self.membership.leave(self).await
    }

    async fn maintain(&self) -> Result<(), OutboxError> {
        let mut connection = self.connect().await?;
        self.add_days(&mut connection).await?;
        self.look_at_additions(&mut connection).await?;
        for (parent, retention) in
            [("event_processing_log", self.config.log_retention), ("event_history", self.config.history_retention)]
        {
            answered("drop the days past their retention", STATEMENT_TIMEOUT, async {
                self.begin_pooled(&mut connection).await?;
                self.sql()
                    .query("select {schema}.relay_drop_days($1, pg_catalog.make_interval(secs => $2))")
                    .persistent(false)
                    .bind(parent)
                    .bind(retention.as_secs_f64())
                    .execute(&mut connection)
                    .await?;
                self.commit_pooled(&mut connection).await
            })
            .await?;
        }
        Ok(())
    }

    async fn standstills(&self, destinations: &[String]) -> Result<Vec<Standstill>, OutboxError> {
        let (found, brief) = self.look_for_standstills(destinations).await?;
        if self.aside_by_format.load(Ordering::Relaxed) {
            let schema = self.sql().schema;
            formats::give_back(&mut self.connect().await?, schema).await?;
        }
        if !brief {
            return Ok(found);
        }
        tokio::time::sleep(standstill::BRIEF).await;
        self.look_for_standstills(destinations).await.map(|(found, _)| found)
    }

    async fn holders(&self) -> Result<Vec<String>, OutboxError> {
        self.aside("look who holds events", async |connection| {
            standstill::holders(connection, Sql { persistent: false, ..self.sql() }).await
        })
        .await
    }
}

/// Whether the URL can be read and used; nobody is asked whether it leads anywhere.
///
/// # Errors
/// Why not.
pub fn validate(url: &Secret, pooled: bool) -> Result<(), OutboxError> {
    let text = url.read().map_err(OutboxError::UrlFile)?;
    url::require_all_taken(&text, pooled).map_err(|reason| OutboxError::Url { reason })?;
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
    if pooled {
        // A pooler refuses what it does not know, and no float of ours needs it.
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

async fn connect(options: &PgConnectOptions) -> Result<PgConnection, OutboxError> {
    match tokio::time::timeout(CONNECT_TIMEOUT, PgConnection::connect_with(options)).await {
        Ok(connection) => connection.map_err(|source| OutboxError::Connect { advice: advice(&source), source }),
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
        Ok(answer) => answer.map_err(|source| query_failed(operation, source)),
        Err(_) => Err(OutboxError::TimedOut { operation, after }),
    }
}

fn query_failed(operation: &'static str, source: sqlx::Error) -> OutboxError {
    OutboxError::Query { operation, advice: advice(&source), source }
}

/// What to do about an error, where its SQLSTATE tells.
fn advice(error: &sqlx::Error) -> Option<&'static str> {
    if let Some(advice) = error.as_database_error().and_then(|error| advice_by_words(error.message())) {
        return Some(advice);
    }
    let sqlstate = match error {
        sqlx::Error::Database(error) => error.code()?,
        sqlx::Error::Io(error) if error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) => {
            return Some(
                "is its certificate signed by whom sslrootcert in DATABASE_URL names, and for the host there?",
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

/// The same where only the words tell: PgBouncer gives all its errors one SQLSTATE, and PostgreSQL gives row-level security that
/// of missing rights.
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
const ROW_SECURITY_ADVICE: &str = "the relay must see every row: `alter role ... bypassrls` for its role, or let it connect as \
     the tables' owner (where FORCE ROW LEVEL SECURITY is set, `alter table ... no force row level security`)";
