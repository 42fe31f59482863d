//! Finds out which kind of database `DATABASE_URL` names. No other module matches on the kind.

use std::future::Future;

use crate::outbox::operate::Operate;
#[cfg(feature = "postgres")]
use crate::outbox::postgres;
#[cfg(feature = "sqlite")]
use crate::outbox::sqlite;
use crate::outbox::{Outbox, OutboxConfig, OutboxError};
use crate::secret::Secret;

/// A database that is not connected yet.
#[derive(Debug, Clone)]
pub struct Database {
    kind: Store,
    url: Secret,
    pooled: bool,
}

/// The kinds of databases that this library is built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Store {
    /// `postgres://...`
    #[cfg(feature = "postgres")]
    Postgres,
    /// `sqlite:...`
    #[cfg(feature = "sqlite")]
    Sqlite,
}

impl Store {
    /// Returns the kind that a URL names.
    ///
    /// # Errors
    /// The name of the feature that this library was built without.
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
}

impl Database {
    /// Creates the database at `url`. The URL is only parsed; nothing is connected. `pooled` says that a transaction-pooling
    /// proxy is between relay and database.
    ///
    /// # Errors
    /// The URL cannot be read or parsed, or names a kind of database that this library was built without.
    pub fn new(url: Secret, pooled: bool) -> Result<Self, OutboxError> {
        let text = url.read().map_err(OutboxError::UrlFile)?;
        if !["postgres://", "postgresql://", "sqlite:"].iter().any(|scheme| text.starts_with(scheme)) {
            return Err(OutboxError::Url { reason: "it must begin with postgres://, postgresql:// or sqlite:".into() });
        }
        let kind = Store::of(&text).map_err(|feature| OutboxError::Url {
            reason: format!("this relay was built without the feature `{feature}`; use one that was built with it"),
        })?;
        match kind {
            #[cfg(feature = "postgres")]
            Store::Postgres => postgres::validate(&url, pooled)?,
            #[cfg(feature = "sqlite")]
            Store::Sqlite => sqlite::validate(&url, pooled)?,
        }
        Ok(Self { kind, url, pooled })
    }

    /// The address of the database, without secrets.
    pub fn shown(&self) -> String {
        match (self.url.read(), self.kind) {
            (Err(error), _) => error.to_string(),
            #[cfg(feature = "postgres")]
            (Ok(url), Store::Postgres) => crate::redact::hide(&url),
            #[cfg(feature = "sqlite")]
            (Ok(url), Store::Sqlite) => crate::redact::setting(url.split('?').next().unwrap_or_default()).into_owned(),
        }
    }

    /// The configuration of a relay's access to the database, with default settings.
    pub fn config(&self) -> OutboxConfig {
        OutboxConfig { pooled: self.pooled, ..OutboxConfig::new(self.url.clone()) }
    }

    /// Returns the store for commands. Nothing is connected yet.
    pub fn operate(&self) -> Box<dyn Operate> {
        match self.kind {
            #[cfg(feature = "postgres")]
            Store::Postgres => Box::new(postgres::PgOutbox::new(self.config())),
            #[cfg(feature = "sqlite")]
            Store::Sqlite => Box::new(sqlite::SqliteOutbox::new(self.config())),
        }
    }

    /// Runs `work` with an outbox of this database that is configured by `config`.
    pub async fn with_outbox<W: WithOutbox>(&self, config: OutboxConfig, work: W) -> W::Output {
        match self.kind {
            #[cfg(feature = "postgres")]
            Store::Postgres => work.run(postgres::PgOutbox::new(config)).await,
            #[cfg(feature = "sqlite")]
            Store::Sqlite => work.run(sqlite::SqliteOutbox::new(config)).await,
        }
    }
}

/// Work that is done with an outbox of any kind.
pub trait WithOutbox {
    /// The result of the work.
    type Output;

    /// Runs the work with `outbox`.
    fn run(self, outbox: impl Outbox) -> impl Future<Output = Self::Output>;
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
