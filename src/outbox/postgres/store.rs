//! The store of one database: what its lanes share, and how each connects.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor};

use crate::failpoint::failpoint;
use crate::outbox::OutboxConfig;
use crate::outbox::error::OutboxError;
use crate::outbox::postgres::bounds::Bounds;
use crate::outbox::postgres::connection::{
    self, NO_IDLE_LIMIT, STATEMENT_TIMEOUT, connect, connect_options, with_timeout,
};
use crate::outbox::postgres::promote::Walks;
use crate::outbox::postgres::refused_writes::RefusedWrites;
use crate::outbox::postgres::session;
use crate::outbox::postgres::sql::{Schema, Sql};
use crate::outbox::register::Membership;
use crate::outbox::standstill::Memory;

/// A connection beside those of the lanes, opened when it is first needed; see `side_connection`.
pub(super) type SideConnection = Arc<tokio::sync::Mutex<Option<PgConnection>>>;

/// The outbox of one database.
#[derive(Debug, Clone)]
pub struct PgOutbox {
    pub(super) config: OutboxConfig,
    pub(super) id: Arc<OnceLock<Arc<str>>>,
    pub(super) side_connection: SideConnection,
    pub(super) bounds: Bounds,
    pub(super) walks: Arc<Walks>,
    pub(super) membership: Membership,
    /// Where the last connection found our tables.
    pub(super) schema: Arc<Mutex<Schema>>,
    pub(super) refused_writes: RefusedWrites,
    pub(super) memory: Memory,
    /// Whether events wait, or have waited, behind an event of a format that this relay does not know.
    pub(super) behind_unknown_format: Arc<AtomicBool>,
    /// Set once advisory locks were proven to exclude each other.
    pub(super) exclusion: Arc<OnceLock<()>>,
}

impl PgOutbox {
    /// Creates the store of one database, without connecting to it.
    pub fn new(config: OutboxConfig) -> Self {
        let bounds = Bounds::new(config.pooled);
        let (id, side_connection, schema, memory) =
            (Arc::default(), SideConnection::default(), Arc::default(), Memory::default());
        let (refused_writes, exclusion, membership, behind_unknown_format, walks) = Default::default();
        Self {
            config,
            id,
            side_connection,
            bounds,
            walks,
            membership,
            schema,
            refused_writes,
            memory,
            behind_unknown_format,
            exclusion,
        }
    }

    /// Opens a connection to a database that can be written to.
    pub(super) async fn connect(&self) -> Result<PgConnection, OutboxError> {
        failpoint("connect")?;
        let mut options = connect_options(&self.config.url, self.config.pooled)?;
        if !self.config.pooled {
            options = options.options(session::settings(&self.config));
        }
        let mut connection = connect(&options).await?;
        with_timeout("begin", STATEMENT_TIMEOUT, self.begin_pooled(&mut connection)).await?;
        // In a database without an encoding, one byte that is not UTF-8 would fail a whole batch, so the server is to send the
        // bytes as they are. (PgBouncer carries this setting from server to server.)
        let look = "
            select pg_catalog.pg_is_in_recovery() or pg_catalog.current_setting('transaction_read_only')::boolean,
                   case pg_catalog.current_setting('server_encoding')
                       when 'SQL_ASCII' then pg_catalog.set_config('client_encoding', 'SQL_ASCII', false)
                   end";
        let (read_only, _): (bool, Option<String>) =
            with_timeout("ask whether the database is read-only", STATEMENT_TIMEOUT, async {
                sqlx::query_as(look).persistent(false).fetch_one(&mut connection).await
            })
            .await?;
        if read_only {
            return Err(connection::read_only());
        }
        if !self.config.pooled {
            with_timeout("switch off idle_session_timeout", STATEMENT_TIMEOUT, connection.execute(NO_IDLE_LIMIT))
                .await?;
        }
        let found = with_timeout("look for event_outbox", STATEMENT_TIMEOUT, Schema::find(&mut connection)).await?;
        if let Some(found) = found {
            *self.schema.lock().unwrap_or_else(PoisonError::into_inner) = found;
        }
        with_timeout("commit", STATEMENT_TIMEOUT, self.commit_pooled(&mut connection)).await?;
        Ok(connection)
    }

    /// Begins a transaction if a pooler may send each one to another server connection. There even a single statement with
    /// parameters needs a transaction, because its parts travel apart.
    pub(super) async fn begin_pooled(&self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        if self.config.pooled {
            connection.execute(AssertSqlSafe(session::begin(&self.config))).await?;
        }
        Ok(())
    }

    /// Ends what [`Self::begin_pooled`] has begun.
    pub(super) async fn commit_pooled(&self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        if self.config.pooled {
            connection.execute("commit").await?;
        }
        Ok(())
    }

    /// Returns how statements are sent on this outbox' connections.
    pub(super) fn sql(&self) -> Sql {
        Sql { schema: *self.schema.lock().unwrap_or_else(PoisonError::into_inner), persistent: !self.config.pooled }
    }

    /// Returns the identity of this outbox, which is read once.
    pub(super) async fn id(&self, connection: &mut PgConnection) -> Result<Arc<str>, sqlx::Error> {
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
}
