//! The errors of a store, with advice on what to do about them.

use std::error::Error;
use std::time::Duration;

use crate::failpoint::FailpointError;
use crate::text::shown;

/// The longest text of one cause, in characters.
const MAX_CAUSE_CHARS: usize = 1000;

/// The connections of a relay besides those of its lanes: one for rare work, one for notifications, one for the search for
/// standstills.
pub(super) const CONNECTIONS_BESIDE: usize = 3;

/// Why the store could not do something.
#[derive(Debug, thiserror::Error)]
pub enum OutboxError {
    /// The connection settings cannot be used.
    #[error("DATABASE_URL cannot be used: {reason}")]
    Url {
        /// What is wrong with the URL, without its password.
        reason: String,
    },
    /// The file that holds the URL cannot be read. It may be about to be replaced.
    #[error("DATABASE_URL cannot be read")]
    UrlFile(#[source] std::io::Error),
    /// This kind of database does not have this feature.
    #[error("{0}")]
    Unsupported(&'static str),
    /// The connection failed.
    #[error("cannot connect to the database")]
    Connect {
        /// The driver's error.
        #[source]
        source: sqlx::Error,
        /// What to do about it, if the error shows that.
        advice: Option<&'static str>,
    },
    /// The database cannot be written to.
    #[error("the database is read-only: {reason}")]
    ReadOnly {
        /// The reason, and what to do about it.
        reason: String,
    },
    /// The database file does not exist.
    #[error("there is no database file {file}: correct DATABASE_URL, or let the application create it first")]
    NoFile {
        /// Its path.
        file: String,
    },
    /// The file has several names.
    #[error(
        "{file} has {names} names (hard links), and SQLite keeps its journal beside the name that a program uses: a program \
         that uses another name does not find it and damages the file; delete the other names, `find / -samefile {file}` lists them"
    )]
    Names {
        /// The name that the relay uses.
        file: String,
        /// The number of names.
        names: u64,
    },
    /// Relays at work have other destinations or routes.
    #[error(
        "{differences}; one configuration routes new events: give all relays the same destinations and routes, or stop those \
         that have others (`relay --once` publishes nothing new while such a relay is at work)"
    )]
    Configuration {
        /// The relays, and the differences.
        differences: String,
    },
    /// A file beside the database cannot be used.
    #[error("cannot {operation}; the relay must be allowed to write to the database's folder")]
    File {
        /// The operation, in words, as in "lock the file".
        operation: &'static str,
        /// The operating system's error.
        #[source]
        source: std::io::Error,
    },
    /// The tables do not exist, or have an older version.
    #[error("the database has schema version {found}, this relay needs {needed}: run `relay migrate`")]
    SchemaTooOld {
        /// The version found; 0 if there are no tables.
        found: i32,
        /// The newest migration that this binary has.
        needed: i32,
    },
    /// The tables exist, but this role does not find them.
    #[error(
        "the tables lie in schema {schemas}, which is not on the search path, or this role has no usage on schema {schemas}: \
         set ?options=-csearch_path%3D... in DATABASE_URL, or grant usage as deploy/sql/roles.sql does"
    )]
    SchemaElsewhere {
        /// The schemas that have the tables.
        schemas: String,
    },
    /// Tables and functions do not belong together, or are not relay's.
    #[error("the schema cannot be used: {reason}")]
    SchemaBroken {
        /// What is wrong, and what to do about it.
        reason: String,
    },
    /// A newer relay migrated the database in a way that this relay cannot work with.
    #[error(
        "the database has schema version {found}, which needs a relay that knows version {needs}; this relay knows up to {known}: \
         install a newer relay"
    )]
    SchemaTooNew {
        /// The version of the database's schema.
        found: i32,
        /// The version that a relay must know to work with it.
        needs: i32,
        /// The newest migration that this binary has.
        known: i32,
    },
    /// The database would not record what is published.
    #[error("the database does not record what is published, so nothing is published: {reason}")]
    Unrecorded {
        /// Which writes are suppressed or refused, by what, and what to do about it.
        reason: String,
    },
    /// Triggers that the relay needs do not exist, or other triggers are in their way.
    #[error("event_outbox cannot be used as it is: {reason}")]
    Triggers {
        /// The triggers, and the statement that repairs them.
        reason: String,
    },
    /// The sequence of the ids is behind the rows.
    #[error(
        "event_outbox has ids up to {highest}, and its sequence gave {last} last: new events would get ids that are taken, or \
         come before those that wait; {cure}"
    )]
    Ids {
        /// The highest id of a row.
        highest: i64,
        /// The last id that the sequence gave.
        last: i64,
        /// The statement that repairs the sequence.
        cure: String,
    },
    /// The relay's role lacks rights.
    #[error("the role lacks: {missing}; {advice}")]
    Privileges {
        /// The missing rights, in words.
        missing: String,
        /// What grants the rights.
        advice: String,
    },
    /// Fewer connections are allowed than the relay opens.
    #[error(
        "a relay with {lanes} lanes opens up to {} connections, and fewer are allowed: {limit}; or lower RELAY_LANES",
        lanes + CONNECTIONS_BESIDE
    )]
    Connections {
        /// The number of lanes.
        lanes: usize,
        /// What limits the connections, and the statement that raises the limit.
        limit: String,
    },
    /// Row-level security applies to the relay's role.
    #[error("row-level security hides rows of {tables} from this role: {advice}")]
    RowSecurity {
        /// The tables.
        tables: String,
        /// What to do about it.
        advice: &'static str,
    },
    /// One session's advisory lock does not keep another from taking it.
    #[error(
        "this server accepts advisory locks and does not enforce them, so two relays would publish the same events: use a \
         PostgreSQL, or a compatible server, whose pg_try_advisory_xact_lock excludes other sessions"
    )]
    LocksDoNotExclude,
    /// A statement failed.
    #[error("cannot {operation}")]
    Query {
        /// The operation, in words, as in "claim events".
        operation: &'static str,
        /// The database's error.
        #[source]
        source: sqlx::Error,
        /// What to do about it, if the error shows that.
        advice: Option<&'static str>,
    },
    /// No answer came in time, and the connection was dropped.
    #[error("cannot {operation}: no answer from the database within {} s", after.as_secs())]
    TimedOut {
        /// The operation, in words, as in "claim events".
        operation: &'static str,
        /// How long the relay waited.
        after: Duration,
    },
    /// The relay was stopped, and something in flight did not end in time.
    #[error("given up {} s after the signal: {what}; RELAY_SHUTDOWN_TIMEOUT says how long is waited", after.as_secs())]
    GivenUp {
        /// How long the relay waited.
        after: Duration,
        /// What was in flight, and what becomes of it.
        what: String,
    },
}

impl From<FailpointError> for OutboxError {
    fn from(error: FailpointError) -> Self {
        Self::Query { operation: "pass a failpoint", source: sqlx::Error::Decode(Box::new(error)), advice: None }
    }
}

impl OutboxError {
    /// Returns whether a statement was given up, by the relay or by the server.
    pub(super) fn is_timeout(&self) -> bool {
        match self {
            Self::TimedOut { .. } => true,
            Self::Query { source, .. } => {
                source.as_database_error().is_some_and(|error| error.code().as_deref() == Some("57014"))
            }
            _ => false,
        }
    }

    /// Returns whether waiting cannot help: a person must change the configuration or the binary.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Url { .. } | Self::LocksDoNotExclude | Self::SchemaTooNew { .. })
    }

    /// Returns the whole chain of causes, and what to do if the error shows that. It is one line, without any row's values.
    pub fn explain(&self) -> String {
        let mut text = self.to_string();
        let mut source = self.source();
        while let Some(cause) = source {
            if matches!(cause.downcast_ref(), Some(sqlx::Error::WorkerCrashed)) {
                text.push_str(": the connection to the file has broken down; it is opened anew");
                break;
            }
            // Some drivers' errors repeat their cause.
            if text.ends_with(&cause.to_string()) {
                source = cause.source();
                continue;
            }
            text.push_str(": ");
            if let Some(database) = cause.downcast_ref::<sqlx::Error>().and_then(sqlx::Error::as_database_error) {
                // The server's message only. Its DETAIL is left out, because it may quote a row.
                text.push_str(&shown(database.message(), MAX_CAUSE_CHARS));
                break;
            }
            text.push_str(&shown(&cause.to_string(), MAX_CAUSE_CHARS));
            source = cause.source();
        }
        if let Some(advice) = self.advice() {
            text.push_str("; ");
            text.push_str(advice);
        }
        text
    }

    fn advice(&self) -> Option<&'static str> {
        match self {
            Self::Connect { advice, .. } | Self::Query { advice, .. } => *advice,
            _ => None,
        }
    }
}
