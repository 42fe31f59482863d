//! What operators do with the past: follow the processing log, read the history for a replay, and delete what is past its
//! retention.
//!
//! Nothing here is recorded, so none of it appears in the log or in the history. A connection belongs to one command.

use std::time::Duration;

use futures_util::future::BoxFuture;
use serde::Serialize;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::event::Event;
use crate::outbox::error::OutboxError;

/// A table that expires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// `event_processing_log`.
    Log,
    /// `event_history`.
    History,
}

impl Kept {
    /// The name of the table.
    pub fn table(self) -> &'static str {
        match self {
            Self::Log => "event_processing_log",
            Self::History => "event_history",
        }
    }

    /// The column with the time by which its rows expire.
    pub(super) fn column(self) -> &'static str {
        match self {
            Self::Log => "processed_at",
            Self::History => "published_at",
        }
    }
}

/// The part of a table that is past its retention.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Expired {
    /// The tables of days that go as a whole, in PostgreSQL.
    pub days: Vec<String>,
    /// How many rows. PostgreSQL estimates it.
    pub rows: u64,
    /// How many bytes its days take on disk, with their indexes. `None`: SQLite, which keeps the room for later rows.
    pub bytes: Option<u64>,
}

/// An event in the history: its id, or its sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// `event_id`.
    Event(Uuid),
    /// `outbox_id`, which consumers see as `sequence`.
    Sequence(i64),
}

/// Which rows of the history a replay reads. Every field that is set must fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// The destination that the events were published to.
    pub published_to: String,
    /// A glob over the event type: `*` matches any characters, `?` matches any one character.
    pub event_type: Option<String>,
    /// The second half of the key, or both halves with a colon between them, as logs show a key.
    pub key: Option<String>,
    /// If not empty: the events.
    pub ids: Vec<Identity>,
    /// The earliest time of publication.
    pub since: Option<OffsetDateTime>,
    /// The time before which it must have been published.
    pub until: OffsetDateTime,
}

/// The history as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    /// It has no event.
    pub is_empty: bool,
    /// The time before which nothing is kept. `None`: nothing was deleted.
    pub begins: Option<OffsetDateTime>,
}

/// How much a selection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Extent {
    /// How many rows.
    pub count: u64,
    /// The lowest sequence.
    pub first: i64,
    /// The highest sequence.
    pub last: i64,
    /// When the first of them was published.
    pub from: Option<OffsetDateTime>,
    /// When the last of them was published.
    pub to: Option<OffsetDateTime>,
}

/// Which rows of the log are followed. Every field that is set must fit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogFilter {
    /// A glob over the event type.
    pub event_type: Option<String>,
    /// The second half of the key, or both halves with a colon between them.
    pub key: Option<String>,
    /// The name of the destination.
    pub destination: Option<String>,
    /// `published`, `failed`, `dead_lettered`, `duplicate` or `dropped`.
    pub status: Option<String>,
}

/// A row of the processing log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LogLine {
    /// When it was recorded, in UTC as RFC 3339.
    pub processed_at: String,
    /// `published`, `failed`, `dead_lettered`, `duplicate` or `dropped`.
    pub status: String,
    /// The name of the destination; empty: the event was not routed.
    pub destination: String,
    /// What happened.
    pub event_type: String,
    /// The id of the event in the outbox.
    pub sequence: i64,
    /// The identity of the event.
    pub event_id: String,
    /// The number of the attempt, from 1.
    pub attempt: i32,
    /// The id that the destination gave the message.
    pub message_id: Option<String>,
    /// Code and message of the failure.
    pub error: Option<String>,
    /// How long the publish call took, in milliseconds.
    pub duration_ms: i32,
    /// The relay that did it.
    pub worker: String,
}

/// What was read of the log.
#[derive(Debug, Default)]
pub struct LogPage {
    /// Rows that were not returned before, in the order of time.
    pub lines: Vec<LogLine>,
    /// There may be more at once.
    pub full: bool,
}

/// The right to replay, which one process has at a time. It ends when this is dropped.
pub trait ReplayLock: Send {
    /// Makes sure that this process still has it.
    ///
    /// # Errors
    /// It is lost, or may be lost.
    fn require(&mut self) -> BoxFuture<'_, Result<(), OutboxError>>;
}

/// A connection for the commands that are about the past.
pub trait Past: Send {
    /// Returns what is older than `retention`. It takes no lock that others wait for.
    ///
    /// # Errors
    /// The table cannot be read.
    fn expired(&mut self, kept: Kept, retention: Duration) -> BoxFuture<'_, Result<Expired, OutboxError>>;

    /// Deletes what is older than `retention`: in PostgreSQL whole days, in one transaction; in SQLite rows, a few at a time.
    ///
    /// # Errors
    /// The reason, such as a missing right. In PostgreSQL nothing was deleted; in SQLite some rows may be gone.
    fn prune(&mut self, kept: Kept, retention: Duration) -> BoxFuture<'_, Result<(), OutboxError>>;

    /// Takes the right to replay. `None`: another process replays.
    ///
    /// # Errors
    /// It cannot be taken.
    fn lock_replay(&mut self) -> BoxFuture<'_, Result<Option<Box<dyn ReplayLock>>, OutboxError>>;

    /// Returns what the history has.
    ///
    /// # Errors
    /// It cannot be read.
    fn history(&mut self) -> BoxFuture<'_, Result<History, OutboxError>>;

    /// Returns the destinations that have events in the history, in the order of their names. This reads all of it.
    ///
    /// # Errors
    /// It cannot be read.
    fn destinations(&mut self) -> BoxFuture<'_, Result<Vec<String>, OutboxError>>;

    /// Measures the rows of a selection with a sequence above `after`, which reads all of them.
    ///
    /// # Errors
    /// The history cannot be read.
    fn measure<'a>(&'a mut self, selection: &'a Selection, after: i64) -> BoxFuture<'a, Result<Extent, OutboxError>>;

    /// Returns the events of a selection with a sequence above `after` and up to `up_to`, by sequence: at most `limit`.
    ///
    /// # Errors
    /// The history cannot be read, or has events of a format that this relay does not know.
    fn events<'a>(
        &'a mut self,
        selection: &'a Selection,
        after: i64,
        up_to: i64,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<Event>, OutboxError>>;

    /// Returns the time by the database's clock.
    ///
    /// # Errors
    /// It cannot be read.
    fn now(&mut self) -> BoxFuture<'_, Result<OffsetDateTime, OutboxError>>;

    /// Begins to follow the log with the rows since then.
    ///
    /// # Errors
    /// The log cannot be read.
    fn follow(&mut self, since: OffsetDateTime) -> BoxFuture<'_, Result<(), OutboxError>>;

    /// Returns the rows of the log that were committed since the last call and fit.
    ///
    /// # Errors
    /// The log cannot be read.
    fn log<'a>(&'a mut self, filter: &'a LogFilter) -> BoxFuture<'a, Result<LogPage, OutboxError>>;
}

/// The error for an event that a later relay wrote.
pub(super) const UNKNOWN_FORMAT: OutboxError = OutboxError::Unsupported(
    "event_history has events of a format that this relay does not know: replay with a newer relay",
);
