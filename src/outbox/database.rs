//! Which kind of database `DATABASE_URL` names, and what the commands ask of it.

use sqlx::Connection;
use uuid::Uuid;

use crate::event::NewEvent;
use crate::outbox::emit::{EmitError, emit};
use crate::outbox::{Check, CheckRequest, Migrated, OutboxError, postgres, sqlite};
use crate::redact::{self, hide};
use crate::secret::Secret;

/// A database that is not connected yet.
#[derive(Debug, Clone)]
pub struct Database {
    kind: Kind,
    url: Secret,
    pooled: bool,
}

/// The kinds of databases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `postgres://...`
    Postgres,
    /// `sqlite:...`
    Sqlite,
}

/// Why an event was not emitted.
#[derive(Debug)]
pub enum Unemitted {
    /// For its content, in words without it.
    Refused(String),
    /// The database could not be reached.
    Outbox(OutboxError),
    /// The insert failed.
    Emit(EmitError),
}

impl Database {
    /// The database at `url`, which is only read; nobody is asked whether it leads anywhere. `pooled`: a
    /// transaction-pooling proxy stands in front.
    ///
    /// # Errors
    /// The URL cannot be read, or cannot be one.
    pub fn new(url: Secret, pooled: bool) -> Result<Self, OutboxError> {
        let text = url.read().map_err(OutboxError::UrlFile)?;
        let kind = if text.starts_with("sqlite:") { Kind::Sqlite } else { Kind::Postgres };
        match kind {
            Kind::Postgres => postgres::validate(&url, pooled)?,
            Kind::Sqlite => sqlite::validate(&url, pooled)?,
        }
        Ok(Self { kind, url, pooled })
    }

    /// Which kind it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where it is.
    pub fn url(&self) -> &Secret {
        &self.url
    }

    /// Where it is, without secrets.
    pub fn shown(&self) -> String {
        match (self.url.read(), self.kind) {
            (Err(error), _) => error.to_string(),
            (Ok(url), Kind::Postgres) => hide(&url),
            (Ok(url), Kind::Sqlite) => redact::setting(url.split('?').next().unwrap_or_default()).into_owned(),
        }
    }

    /// Brings it to the schema of this binary. Safe to run twice, twice at once, and beside running relays.
    ///
    /// # Errors
    /// [`OutboxError::SchemaTooNew`], or why it could not; each migration is applied whole or not at all.
    pub async fn migrate(&self) -> Result<Migrated, OutboxError> {
        match self.kind {
            Kind::Postgres => postgres::migrate::migrate(&self.url).await,
            Kind::Sqlite => sqlite::schema::migrate(&self.url).await,
        }
    }

    /// Tries it as a relay would use it; stops at the first thing that makes the rest pointless. At last it looks for what
    /// stands still.
    pub async fn check(&self, request: CheckRequest<'_>) -> Vec<Check> {
        match self.kind {
            Kind::Postgres => postgres::check::check(&self.url, self.pooled, request).await,
            Kind::Sqlite => sqlite::schema::check(&self.url, request).await,
        }
    }

    /// Inserts one event, in a transaction of its own.
    ///
    /// # Errors
    /// Why not.
    pub async fn emit(&self, event: NewEvent) -> Result<Uuid, Unemitted> {
        let payload = event.payload.clone();
        let (emitted, refusal): (_, fn(&sqlx::Error, &str) -> Option<String>) = match self.kind {
            Kind::Postgres => {
                let mut connection = postgres::open(&self.url, self.pooled).await.map_err(Unemitted::Outbox)?;
                let emitted = postgres::emit::alone(&mut connection, event).await;
                drop(connection.close().await); // it is committed, or an error tells
                (emitted, postgres::emit::refusal)
            }
            Kind::Sqlite => {
                let mut connection = sqlite::open(&self.url).await.map_err(Unemitted::Outbox)?;
                let emitted = emit(&mut connection, event).await;
                drop(connection.close().await);
                (emitted, sqlite::emit::refusal)
            }
        };
        emitted.map_err(|error| match &error {
            EmitError::Event(reason) => Unemitted::Refused(reason.to_string()),
            EmitError::Insert(source) => match refusal(source, &payload) {
                Some(reason) => Unemitted::Refused(reason),
                None => Unemitted::Emit(error),
            },
        })
    }
}
