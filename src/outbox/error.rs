//! Why a store did not do what it was asked, and what to do about it.

use std::error::Error;
use std::time::Duration;

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum OutboxError {
    /// The connection settings cannot be used.
    #[error("DATABASE_URL cannot be used: {reason}")]
    Url {
        /// What is wrong with it, without its password.
        reason: String,
    },
    /// The file that holds the URL cannot be read; it may be about to be replaced.
    #[error("DATABASE_URL cannot be read")]
    UrlFile(#[source] std::io::Error),
    /// No connection.
    #[error("cannot connect to the database")]
    Connect(#[source] sqlx::Error),
    /// A replica, or a database set to read-only.
    #[error(
        "the database is read-only: a replica, or default_transaction_read_only; point DATABASE_URL at the primary"
    )]
    ReadOnly,
    /// The tables are not there, or of an older version.
    #[error("the database has schema version {found}, this relay needs {needed}: run `relay migrate`")]
    SchemaTooOld {
        /// 0: none at all.
        found: i32,
        /// The newest migration this binary has.
        needed: i32,
    },
    /// The tables are there, where this role does not find them.
    #[error(
        "the tables lie in schema {schemas}, which is not on the search path, or this role has no usage on schema {schemas}: \
         set ?options=-csearch_path%3D... in DATABASE_URL, or grant usage as deploy/sql/roles.sql does"
    )]
    SchemaElsewhere {
        /// Where they lie.
        schemas: String,
    },
    /// A newer relay migrated it.
    #[error("the database has schema version {found}, this relay knows up to {known}: install a newer relay")]
    SchemaTooNew {
        /// The database's.
        found: i32,
        /// The newest migration this binary has.
        known: i32,
    },
    /// The relay's role lacks rights.
    #[error("the role lacks: {missing}; deploy/sql/roles.sql has all the relay needs")]
    Privileges {
        /// Which, in words.
        missing: String,
    },
    /// A statement failed.
    #[error("cannot {operation}")]
    Query {
        /// In words, as in "claim events".
        operation: &'static str,
        /// The database's answer.
        #[source]
        source: sqlx::Error,
    },
    /// No answer in time; the connection was dropped.
    #[error("cannot {operation}: no answer from the database within {} s", after.as_secs())]
    TimedOut {
        /// In words, as in "claim events".
        operation: &'static str,
        /// How long it waited.
        after: Duration,
    },
}

impl OutboxError {
    /// Waiting cannot help: a human must change the configuration or the binary.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Url { .. } | Self::SchemaTooNew { .. })
    }

    /// The whole chain of causes, and what to do about it where the error tells. One line, without any row's values.
    pub fn explain(&self) -> String {
        let mut text = self.to_string();
        let mut source = self.source();
        while let Some(cause) = source {
            // Some drivers' errors repeat their cause.
            if text.ends_with(&cause.to_string()) {
                source = cause.source();
                continue;
            }
            text.push_str(": ");
            if let Some(database) = cause.downcast_ref::<sqlx::Error>().and_then(sqlx::Error::as_database_error) {
                // Its own text, without the driver's preamble; never its DETAIL, which may quote a row.
                text.push_str(database.message());
                break;
            }
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        if let Some(advice) = self.advice() {
            text.push_str("; ");
            text.push_str(advice);
        }
        text
    }

    fn advice(&self) -> Option<&'static str> {
        let (Self::Connect(source) | Self::Query { source, .. }) = self else { return None };
        let sqlstate = match source {
            sqlx::Error::Database(error) => error.code()?,
            sqlx::Error::Io(_) => return Some("is the server up, and are host and port in DATABASE_URL right?"),
            sqlx::Error::Tls(_) => return Some("check sslmode and sslrootcert in DATABASE_URL"),
            _ => return None,
        };
        Some(match sqlstate.as_ref() {
            "28P01" | "28000" => "check user and password in DATABASE_URL, and pg_hba.conf",
            "3D000" => "create the database, or correct its name in DATABASE_URL",
            "42501" => "grant what is missing: deploy/sql/roles.sql has all the relay needs",
            "42P01" | "42703" | "42883" => {
                "run `relay migrate`; where the tables lie in another schema, set search_path in DATABASE_URL"
            }
            "25006" => "point DATABASE_URL at the primary",
            "53300" => "raise max_connections, or lower RELAY_LANES",
            "26000" | "42P05" => "a transaction-pooling proxy stands in front: set RELAY_DATABASE_POOLED=true",
            _ => return None,
        })
    }
}
