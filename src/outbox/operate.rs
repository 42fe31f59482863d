//! The operator's part of a store: the work of commands, and a relay's rare work.
//!
//! Nothing here is on the hot path, so every method returns a boxed future, and commands need no type parameter for the kind
//! of store. Each call opens the connections that it needs.

use std::time::Duration;

use futures_util::future::BoxFuture;
use uuid::Uuid;

use crate::audit::{Audit, EntryId};
use crate::emit::{EmitError, NewEvent};
use crate::outbox::config::Usage;
use crate::outbox::error::OutboxError;
use crate::outbox::mend::Mend;
use crate::outbox::past::Past;
use crate::outbox::pause::PauseOutcome;
use crate::outbox::register::Configuration;
use crate::outbox::sample::Sampling;
use crate::outbox::standstill::Standstill;
use crate::outbox::status::{Found, Status, StatusRequest, TallyCount};

/// The result of a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Migrated {
    /// The version before; 0 if there was none.
    pub from: i32,
    /// The version after. It is higher than `known` if a newer relay migrated in a way that this relay can work with.
    pub to: i32,
    /// The newest migration that this binary has.
    pub known: i32,
    /// The names of the migrations that were applied, in order.
    pub applied: Vec<&'static str>,
    /// The schema whose functions were created anew, because it was renamed, or because some of them were moved.
    pub mended: Option<String>,
}

/// One line of `relay check`.
#[derive(Debug)]
pub struct Check {
    /// What was checked.
    pub subject: String,
    /// What was found; or what is wrong, and what to do about it.
    pub result: Result<String, String>,
}

impl Check {
    /// Returns one failed check for each standstill.
    pub(super) fn standstills(found: Vec<Standstill>) -> impl Iterator<Item = Self> {
        found.into_iter().map(|standstill| Self {
            subject: format!("standstill {}", standstill.cause),
            result: Err(standstill.text),
        })
    }
}

/// The context of a check: the configuration of the relay.
#[derive(Debug, Clone, Copy)]
pub struct CheckRequest<'a> {
    /// The names of all configured destinations.
    pub destinations: &'a [String],
    /// How long one publish call may take.
    pub publish_timeout: Duration,
    /// The parts of the schema that are used.
    pub usage: Usage,
    /// How many batches are published at once, each on its own connection.
    pub lanes: usize,
    /// Everything that decides where events go.
    pub configuration: &'a Configuration,
}

/// Why `relay emit` inserted no event.
#[derive(Debug)]
pub enum Unemitted {
    /// The content of the event was refused. The text does not quote it.
    Refused(String),
    /// The database could not be reached.
    Outbox(OutboxError),
    /// The insert failed.
    Emit(EmitError),
}

impl Unemitted {
    /// `refusal` returns why the database refused the event for its content, if it did.
    pub(super) fn new(error: EmitError, refusal: impl FnOnce(&sqlx::Error) -> Option<String>) -> Self {
        match &error {
            EmitError::Event(reason) => Self::Refused(reason.to_string()),
            EmitError::Insert(source) => refusal(source).map_or(Self::Emit(error), Self::Refused),
        }
    }
}

/// A feature that only some kinds of store have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    /// Publishing only commits that a crash of the server cannot undo: `RELAY_GHOST_BARRIER`.
    GhostBarrier,
    /// [`Operate::audit`].
    Audit,
}

/// A store as its operator uses it.
pub trait Operate: Send + Sync {
    /// Checks that the store has this feature.
    ///
    /// # Errors
    /// [`OutboxError::Unsupported`], with what to do about it.
    fn require(&self, feature: Feature) -> Result<(), OutboxError>;

    /// Brings the database to the schema of this binary. Safe to run twice, twice at once, and beside running relays.
    ///
    /// # Errors
    /// [`OutboxError::SchemaTooNew`], or the reason why it failed. Each migration is applied whole or not at all.
    fn migrate(&self) -> BoxFuture<'_, Result<Migrated, OutboxError>>;

    /// Tries the database as a relay would use it, and stops at the first failure that makes further checks pointless. At the
    /// end it searches for standstills.
    fn check<'a>(&'a self, request: CheckRequest<'a>) -> BoxFuture<'a, Vec<Check>>;

    /// Inserts one event, in a transaction of its own.
    ///
    /// # Errors
    /// The reason why it was not inserted.
    fn emit(&self, event: NewEvent) -> BoxFuture<'_, Result<Uuid, Unemitted>>;

    /// Connects for a command that changes dead letters or events that wait.
    ///
    /// # Errors
    /// The database cannot be reached, or has another schema.
    fn mend(&self) -> BoxFuture<'_, Result<Box<dyn Mend>, OutboxError>>;

    /// Passes everything that the database knows about `destination` to `audit`, in one snapshot. Returns the first stream
    /// entry from which on the processing log is complete. The rows are streamed: only the audit itself keeps anything in
    /// memory.
    ///
    /// # Errors
    /// The reason why it could not be read.
    fn audit<'a>(&'a self, destination: &'a str, audit: &'a mut Audit) -> BoxFuture<'a, Result<EntryId, OutboxError>>;

    /// Adds the days ahead, and deletes rows of the processing log and the history that are past their retention.
    ///
    /// # Errors
    /// The obstacle. It is enough to retry within a few days.
    fn maintain(&self) -> BoxFuture<'_, Result<(), OutboxError>>;

    /// Connects for a command about the log or the history.
    ///
    /// # Errors
    /// The database cannot be reached, or has another schema.
    fn past(&self) -> BoxFuture<'_, Result<Box<dyn Past>, OutboxError>>;

    /// Returns who holds pending events now, including this relay's own lanes: one text for people each.
    ///
    /// # Errors
    /// The holders cannot be read.
    fn holders(&self) -> BoxFuture<'_, Result<Vec<String>, OutboxError>>;

    /// Returns the figures for the metrics. Of all relays of a store only one gets them. `destinations` are the names of all configured destinations.
    ///
    /// # Errors
    /// The store cannot be asked.
    fn sample<'a>(&'a self, destinations: &'a [String]) -> BoxFuture<'a, Result<Sampling, OutboxError>>;

    /// Returns the causes that keep events from moving, as far as the store can find them. `destinations` are the names of
    /// all configured destinations. It never waits for a lock on a table.
    ///
    /// # Errors
    /// The store cannot be searched.
    fn standstills<'a>(&'a self, destinations: &'a [String]) -> BoxFuture<'a, Result<Vec<Standstill>, OutboxError>>;

    /// Returns the state of the outbox, its destinations and its relays. A part that cannot be read is left out and named. It
    /// never waits for a lock for long, and reads no whole table.
    ///
    /// # Errors
    /// The database cannot be used, or its schema does not fit.
    fn status(&self, request: StatusRequest) -> BoxFuture<'_, Result<Status, OutboxError>>;

    /// Adds to the tallies of the present minute, and deletes those that are older than the minutes that are kept.
    ///
    /// # Errors
    /// The counts may be added or not.
    fn add_tally<'a>(&'a self, counts: &'a [TallyCount]) -> BoxFuture<'a, Result<(), OutboxError>>;

    /// Writes into the register which destinations this relay finds down, in place of what it wrote before. Does nothing if
    /// this relay is not registered.
    ///
    /// # Errors
    /// It may be written or not.
    fn note_trouble<'a>(&'a self, found: &'a [Found]) -> BoxFuture<'a, Result<(), OutboxError>>;

    /// Pauses a destination: it is given no events, or none of the types of the glob `event_type`, from the next claim of each
    /// relay on.
    ///
    /// # Errors
    /// The database cannot be used, or the role may not do it.
    fn pause<'a>(
        &'a self,
        destination: &'a str,
        event_type: Option<&'a str>,
    ) -> BoxFuture<'a, Result<PauseOutcome, OutboxError>>;

    /// Ends all pauses of a destination, or the one of the glob `event_type`.
    ///
    /// # Errors
    /// The database cannot be used, or the role may not do it.
    fn resume<'a>(
        &'a self,
        destination: &'a str,
        event_type: Option<&'a str>,
    ) -> BoxFuture<'a, Result<PauseOutcome, OutboxError>>;

    /// Waits until the claims have ended that are held now, `at_most` at the longest. Returns whether they have, as far as the
    /// store can see it.
    ///
    /// # Errors
    /// The claims cannot be read.
    fn claims_ended(&self, at_most: Duration) -> BoxFuture<'_, Result<bool, OutboxError>>;
}
