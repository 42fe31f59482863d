//! Which kind of database `DATABASE_URL` names, and what the commands ask of it.

use uuid::Uuid;

use crate::emit::{EmitError, NewEvent};
#[cfg(feature = "postgres")]
use crate::outbox::postgres;
#[cfg(feature = "sqlite")]
use crate::outbox::sqlite;
use crate::outbox::{Check, CheckRequest, Migrated, OutboxError};
use crate::secret::Secret;

/// A database that is not connected yet.
#[derive(Debug, Clone)]
pub struct Database {
    kind: Kind,
    url: Secret,
    pooled: bool,
}

/// The kinds of databases that this library is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `postgres://...`
    #[cfg(feature = "postgres")]
    Postgres,
    /// `sqlite:...`
    #[cfg(feature = "sqlite")]
    Sqlite,
}

/// Tells why a database refused an event with this payload for its content, if that is why.
type Refusal = fn(&sqlx::Error, &str) -> Option<String>;

impl Kind {
    /// The kind that a URL names.
    ///
    /// # Errors
    /// The feature that this library was built without.
    fn of(url: &str) -> Result<Self, &'static str> {
        if url.starts_with("sqlite:") {
            #[cfg(feature = "sqlite")]
            return Ok(Self::Sqlite);
            #[cfg(not(feature = "sqlite"))]
            return Err("sqlite");
        }
        #[cfg(feature = "postgres")]
        return Ok(Self::Postgres);
        #[cfg(not(feature = "postgres"))]
        return Err("postgres");
    }

    /// Whether it is a file of SQLite.
    pub fn is_sqlite(self) -> bool {
        match self {
            #[cfg(feature = "postgres")]
            Self::Postgres => false,
            #[cfg(feature = "sqlite")]
            Self::Sqlite => true,
        }
    }
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
    /// The URL cannot be read, cannot be one, or names a kind of database that this library was built without.
    pub fn new(url: Secret, pooled: bool) -> Result<Self, OutboxError> {
        let text = url.read().map_err(OutboxError::UrlFile)?;
        let kind = Kind::of(&text).map_err(|feature| OutboxError::Url {
            reason: format!("this relay was built without the feature `{feature}`; use one that was built with it"),
        })?;
        match kind {
            #[cfg(feature = "postgres")]
            Kind::Postgres => postgres::validate(&url, pooled)?,
            #[cfg(feature = "sqlite")]
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
            #[cfg(feature = "postgres")]
            (Ok(url), Kind::Postgres) => crate::redact::hide(&url),
            #[cfg(feature = "sqlite")]
            (Ok(url), Kind::Sqlite) => crate::redact::setting(url.split('?').next().unwrap_or_default()).into_owned(),
        }
    }

    /// Brings it to the schema of this binary. Safe to run twice, twice at once, and beside running relays.
    ///
    /// # Errors
    /// [`OutboxError::SchemaTooNew`], or why it could not; each migration is applied whole or not at all.
    pub async fn migrate(&self) -> Result<Migrated, OutboxError> {
        match self.kind {
            #[cfg(feature = "postgres")]
            Kind::Postgres => postgres::migrate::migrate(&self.url).await,
            #[cfg(feature = "sqlite")]
            Kind::Sqlite => sqlite::schema::migrate(&self.url).await,
        }
    }

    /// Tries it as a relay would use it; stops at the first thing that makes the rest pointless. At last it looks for what
    /// stands still.
    pub async fn check(&self, request: CheckRequest<'_>) -> Vec<Check> {
        match self.kind {
            #[cfg(feature = "postgres")]
            Kind::Postgres => postgres::check::check(&self.url, self.pooled, request).await,
            #[cfg(feature = "sqlite")]
            Kind::Sqlite => sqlite::schema::check(&self.url, request).await,
        }
    }

    /// Inserts one event, in a transaction of its own.
    ///
    /// # Errors
    /// Why not.
    pub async fn emit(&self, event: NewEvent) -> Result<Uuid, Unemitted> {
        let payload = event.payload.clone();
        let (emitted, refusal): (Result<Uuid, EmitError>, Refusal) = match self.kind {
            #[cfg(feature = "postgres")]
            Kind::Postgres => {
                let mut connection = postgres::open(&self.url, self.pooled).await.map_err(Unemitted::Outbox)?;
                let emitted = postgres::emit::alone(&mut connection, event).await;
                drop(sqlx::Connection::close(connection).await); // it is committed, or an error tells
                (emitted, postgres::emit::refusal)
            }
            #[cfg(feature = "sqlite")]
            Kind::Sqlite => {
                let mut connection = sqlite::open(&self.url).await.map_err(Unemitted::Outbox)?;
                let emitted = crate::emit(&mut connection, event).await;
                drop(sqlx::Connection::close(connection).await);
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

#[cfg(all(test, not(any(feature = "postgres", feature = "sqlite"))))]
mod tests {
    use super::*;

    #[test]
    fn a_database_that_the_relay_was_built_without_is_refused_with_the_feature_to_build_with() {
        for (url, feature) in [("postgres://localhost/shop", "`postgres`"), ("sqlite:shop.db", "`sqlite`")] {
            let refused = Database::new(Secret::inline(url), false).expect_err("there is no store");
            assert!(refused.explain().contains(feature), "{url}");
        }
    }
}
