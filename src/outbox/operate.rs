//! The operator's door to a store: what a command does, and what a relay does once in a while.
//!
//! Nothing here is on the hot path, so every method is a boxed future, and a command needs no type of its own for each kind of
//! store. Each call opens the connections that it needs.

use std::time::Duration;

use futures_util::future::BoxFuture;
use uuid::Uuid;

use crate::audit::{Audit, EntryId};
use crate::emit::{EmitError, NewEvent};
use crate::outbox::config::Usage;
use crate::outbox::error::OutboxError;
use crate::outbox::register::Configuration;
use crate::outbox::standstill::Standstill;

/// What a migration did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Migrated {
    /// The version before; 0: nothing was there.
    pub from: i32,
    /// The version after; higher than `known` where a newer relay migrated, in a way that this one can work with.
    pub to: i32,
    /// The newest migration that this binary has.
    pub known: i32,
    /// The names of the migrations that were applied, in order.
    pub applied: Vec<&'static str>,
    /// The schema whose functions were made anew, because it was renamed, or because some were moved.
    pub mended: Option<String>,
}

/// One line of `relay check`.
#[derive(Debug)]
pub struct Check {
    /// What was looked at.
    pub subject: String,
    /// What was found, or what is wrong and what to do about it.
    pub result: Result<String, String>,
}

impl Check {
    /// What stands still, one failed line each.
    pub(super) fn standstills(found: Vec<Standstill>) -> impl Iterator<Item = Self> {
        found.into_iter().map(|standstill| Self {
            subject: format!("standstill {}", standstill.cause),
            result: Err(standstill.text),
        })
    }
}

/// What a check looks for besides the store itself.
#[derive(Debug, Clone, Copy)]
pub struct CheckRequest<'a> {
    /// The names of all configured destinations.
    pub destinations: &'a [String],
    /// How long one publish call may take.
    pub publish_timeout: Duration,
    /// What of the tables is used.
    pub usage: Usage,
    /// How many batches are published at once, each on a connection of its own.
    pub lanes: usize,
    /// What decides where events go.
    pub configuration: &'a Configuration,
}

/// Why `relay emit` inserted no event.
#[derive(Debug)]
pub enum Unemitted {
    /// The event's content, in words that do not quote it.
    Refused(String),
    /// The database could not be reached.
    Outbox(OutboxError),
    /// The insert failed.
    Emit(EmitError),
}

impl Unemitted {
    /// `refusal` says why the database refused the event for its content, if it did.
    pub(super) fn new(error: EmitError, refusal: impl FnOnce(&sqlx::Error) -> Option<String>) -> Self {
        match &error {
            EmitError::Event(reason) => Self::Refused(reason.to_string()),
            EmitError::Insert(source) => refusal(source).map_or(Self::Emit(error), Self::Refused),
        }
    }
}

/// What only some kinds of store have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    /// Publishing only what a crash of the server cannot take back: `RELAY_GHOST_BARRIER`.
    GhostBarrier,
    /// [`Operate::audit`].
    Audit,
}

/// A store as its operator uses it.
pub trait Operate: Send + Sync {
    /// Whether the store has this.
    ///
    /// # Errors
    /// [`OutboxError::Unsupported`], which says what to do about it.
    fn require(&self, feature: Feature) -> Result<(), OutboxError>;

    /// Brings the database to the schema of this binary. Safe to run twice, twice at once, and beside running relays.
    ///
    /// # Errors
    /// [`OutboxError::SchemaTooNew`], or why it could not; each migration is applied whole or not at all.
    fn migrate(&self) -> BoxFuture<'_, Result<Migrated, OutboxError>>;

    /// Tries the database as a relay would use it, and stops at the first thing that makes the rest pointless. At last it looks
    /// for what stands still.
    fn check<'a>(&'a self, request: CheckRequest<'a>) -> BoxFuture<'a, Vec<Check>>;

    /// Inserts one event, in a transaction of its own.
    ///
    /// # Errors
    /// Why it was not inserted.
    fn emit(&self, event: NewEvent) -> BoxFuture<'_, Result<Uuid, Unemitted>>;

    /// Tells `audit` all that the database knows about `destination`, in one snapshot. Returns the first stream entry from which
    /// on the processing log has everything. The rows are streamed: memory is what the audit itself keeps.
    ///
    /// # Errors
    /// Why it could not be read.
    fn audit<'a>(&'a self, destination: &'a str, audit: &'a mut Audit) -> BoxFuture<'a, Result<EntryId, OutboxError>>;

    /// Makes room for the days ahead, and deletes from the processing log and the history what is past its retention.
    ///
    /// # Errors
    /// What stands in the way; it is enough to try again within a few days.
    fn maintain(&self) -> BoxFuture<'_, Result<(), OutboxError>>;

    /// Who holds pending events now, this relay's own lanes included: one text for people each.
    ///
    /// # Errors
    /// It is not known who does.
    fn holders(&self) -> BoxFuture<'_, Result<Vec<String>, OutboxError>>;

    /// What keeps events from moving, as far as the store can tell. `destinations`: the names of all configured ones. Never
    /// waits for a lock on a table.
    ///
    /// # Errors
    /// It is not known what does.
    fn standstills<'a>(&'a self, destinations: &'a [String]) -> BoxFuture<'a, Result<Vec<Standstill>, OutboxError>>;
}
