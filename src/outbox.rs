//! The contract of a store. It has two doors:
//!
//! - [`Outbox`], for the engine: claim events, settle what became of them, and sleep until there are more. This is the hot path, so
//!   the engine is compiled once for each kind of store.
//! - [`Operate`], for commands and for what is done rarely. It is used through `dyn`.
//!
//! [`postgres`] and [`sqlite`] implement both, and have all SQL. [`database`] knows which of them a URL names, and is the only
//! place that matches on it. [`error`] says what to do about what goes wrong, [`standstill`] what keeps events from moving,
//! [`register`] which of several configurations routes. [`deliveries`] are what became of a batch, and `records` turns
//! them into rows.

mod config;
pub mod database;
mod decode;
pub mod deliveries;
pub mod error;
mod number;
pub mod operate;
mod partitions;
#[cfg(feature = "postgres")]
pub mod postgres;
mod proof;
mod quote;
mod records;
pub mod register;
mod shape;
#[cfg(feature = "sqlite")]
pub mod sqlite;
pub mod standstill;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::event::{ClaimId, Event, PublishError, RenewedClaim, SentBefore};
pub use config::{OutboxConfig, Usage};
pub use deliveries::{Deliveries, Delivery, NO_DESTINATION};
pub use error::OutboxError;
pub use operate::{Check, CheckRequest, Migrated, Operate};
use register::Configuration;
pub use standstill::Standstill;

/// The schema that a store has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SchemaVersion {
    /// The last migration that was applied; 0: none.
    pub found: i32,
    /// The migration that a relay must know to work with it. Each migration may raise it.
    pub needs: i32,
}

impl SchemaVersion {
    /// Fails unless a relay whose newest migration is `known` can work with it; else says what it is.
    pub(crate) fn fits(self, known: i32) -> Result<String, OutboxError> {
        let Self { found, needs } = self;
        if found < known {
            return Err(OutboxError::SchemaTooOld { found, needed: known });
        }
        if needs > known {
            return Err(OutboxError::SchemaTooNew { found, needs, known });
        }
        Ok(if found == known {
            format!("version {found}")
        } else {
            format!("version {found}; this relay knows up to {known}, and can work with it")
        })
    }
}

/// What a lane asks for.
#[derive(Debug, Clone, Copy)]
pub struct ClaimRequest<'a> {
    /// At most this many events.
    pub max_events: usize,
    /// About this many bytes of events; one event is always given, however large.
    pub max_bytes: usize,
    /// Payloads over this many bytes are not read, nor what is over a bound of the schema; their events come with a defect.
    pub max_payload: usize,
    /// The names of all configured destinations.
    pub destinations: &'a [String],
}

/// The answer to a claim.
#[derive(Debug)]
pub enum Claim {
    /// These are the lane's until it settles.
    Batch {
        /// In the order of `id` for each key; never empty.
        claimed: Vec<Claimed>,
        /// There are more to claim at once.
        full: bool,
        /// What tells this claim from every other one.
        claim_id: ClaimId,
    },
    /// There are pending events, and other lanes or relays hold all of them.
    Busy,
    /// Another relay's configuration routes, and nothing is due that this relay must deliver.
    Superseded,
    /// Nothing is pending.
    Empty,
}

/// One claimed event with what the store knows of it.
#[derive(Debug)]
pub struct Claimed {
    /// The event.
    pub event: Event,
    /// Its `available_at` is now or past.
    pub due: bool,
    /// Why it can go nowhere, such as a payload over the limit; or, where no event is charged for that, why it must wait.
    pub defect: Option<PublishError>,
    /// It failed before, was not charged an attempt for that, and waited.
    pub blocked_before: bool,
    /// The destinations at which an earlier event of its key still waits.
    pub blocked_by: Vec<BlockedBy>,
}

/// An earlier event of the same key waits at this destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockedBy {
    /// Where.
    pub destination: String,
    /// How long until that event is due.
    pub remaining: Duration,
}

/// What is known of an event that was being published when a relay crashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suspicion {
    /// How many events were published together the last time.
    pub together: usize,
    /// How many relays crashed as soon as they began to publish this event alone.
    pub crashes_alone: usize,
    /// How many crashed some time after that.
    pub deaths_alone: usize,
}

/// What a promotion found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Promoted {
    /// How many scheduled events became pending.
    pub count: usize,
    /// How long until the next one is due, where there is one.
    pub next_due: Option<Duration>,
}

/// What a relay finds that sleeps and looks whether there is work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peek {
    /// Some event is pending, whoever may hold it.
    pub pending: bool,
    /// How long until a scheduled event is due, where there is one.
    pub next_due: Option<Duration>,
}

/// The notes that end a crash loop.
pub trait CrashNotes {
    /// Notes that the relay `run` begins to work. Returns how many others have crashed in the last ten minutes, or have begun in
    /// them and not ended.
    ///
    /// # Errors
    /// It may be noted or not.
    fn begin_run(&self, run: Uuid) -> impl Future<Output = Result<usize, OutboxError>> + Send;

    /// Deletes the note of a run that has ended in good order, or has worked for a while.
    ///
    /// # Errors
    /// For ten minutes it will be taken for one that crashed.
    fn end_run(&self, run: Uuid) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Deletes all notes of a run, because if it ends from now on, its events are not the reason.
    ///
    /// # Errors
    /// For a day its events will be taken for the reason that it ended.
    fn withdraw(&self, run: Uuid) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// What relays other than `run` have noted of `events` and not deleted. Each with the place of the event in `events`.
    ///
    /// # Errors
    /// It is not known what they noted.
    fn suspicions(
        &self,
        run: Uuid,
        events: &[Uuid],
    ) -> impl Future<Output = Result<Vec<(usize, Suspicion)>, OutboxError>> + Send;

    /// Notes, before anything else is done, that `run` is about to publish `events` together.
    ///
    /// # Errors
    /// It may be noted or not.
    fn mark(&self, run: Uuid, events: &[Uuid]) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Notes that `run` still works a while after it began to publish `events`: if it crashes later, the reason may be another one.
    ///
    /// # Errors
    /// They stay noted as they were.
    fn outlived(&self, run: Uuid, events: &[Uuid]) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Deletes, for each of `events`, the note of one relay that crashed some time after it began to publish the event alone: the
    /// event may be tried once more.
    ///
    /// # Errors
    /// Nothing was deleted.
    fn forgive(&self, events: &[Uuid]) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Deletes all notes of `events`: they were published, or not tried, and nobody crashed.
    ///
    /// # Errors
    /// They stay noted for a day.
    fn clear(&self, events: &[Uuid]) -> impl Future<Output = Result<(), OutboxError>> + Send;
}

/// A store of events.
pub trait Outbox: CrashNotes + Operate + Send + Sync + 'static {
    /// One connection's worth of claiming and settling.
    type Lane: Lane;
    /// What wakes a relay that sleeps.
    type Wakeup: Wakeup;

    /// A new lane. It connects when it is first used, and again after every error.
    fn lane(&self) -> Self::Lane;

    /// A way to be woken; `None` where the store or the configuration has none, and the relay can only poll.
    fn wakeup(&self) -> Option<Self::Wakeup>;

    /// Makes the store ready for a run: looks whether it fits this binary and can be written to, and adds the days ahead.
    ///
    /// # Errors
    /// What stands in the way. [`OutboxError::is_final`] tells whether waiting can help.
    fn prepare(&self) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Registers this relay with its configuration, see [`register`]. From when it returns, no relay of another configuration
    /// routes what is committed, unless it registers later. `once`: it ends when nothing is due, and supersedes nobody.
    ///
    /// # Errors
    /// It may be registered or not.
    fn register(
        &self,
        configuration: &Arc<Configuration>,
        once: bool,
    ) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Does a registered relay's part in the register, and returns when to do it next. `idle` is how long ago some lane looked
    /// for events.
    ///
    /// # Errors
    /// It is to be tried again soon.
    fn attend(&self, idle: Duration) -> impl Future<Output = Result<Duration, OutboxError>> + Send;

    /// How the configurations of other relays differ, where such relays have been at work for at least `lasting`.
    fn differences(&self, lasting: Duration) -> Vec<String>;

    /// Ends the registration.
    ///
    /// # Errors
    /// Others will find out that this relay is gone.
    fn deregister(&self) -> impl Future<Output = Result<(), OutboxError>> + Send;
}

/// One loop's access to the store.
///
/// Its futures are never cancelled: a dropped one would leave a connection in an unknown state. After an error the
/// connection is gone, and with it every claim it held.
pub trait Lane: Send {
    /// Claims some events. An earlier claim must have been settled.
    ///
    /// After a settle that failed it first proves that the store can be written to: else the same events would be published again
    /// and again.
    ///
    /// # Errors
    /// Nothing was claimed.
    fn claim(&mut self, request: ClaimRequest<'_>) -> impl Future<Output = Result<Claim, OutboxError>> + Send;

    /// For a claim whose destination notes that events were given to it by another: an epoch above `floor`, and which of
    /// `noted` still wait for `destination`. Only who holds the claim gets an answer.
    ///
    /// # Errors
    /// The claim is lost, or may be.
    fn renew(
        &mut self,
        floor: i64,
        noted: &[SentBefore],
        destination: &str,
    ) -> impl Future<Output = Result<RenewedClaim, OutboxError>> + Send;

    /// Records what became of the claimed events, in one transaction, and gives up the claim. An event none of whose verdicts
    /// changes anything stays as it is; so does one that is not mentioned.
    ///
    /// # Errors
    /// Whether it was recorded is unknown; the next claim finds what was not.
    fn settle(&mut self, deliveries: &Deliveries<'_>) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Makes due events pending that were scheduled: delayed ones, and those owed to one of `destinations`.
    ///
    /// # Errors
    /// Nothing was changed.
    fn promote(
        &mut self,
        destinations: &[&str],
        max_events: usize,
    ) -> impl Future<Output = Result<Promoted, OutboxError>> + Send;

    /// Whether there is anything to claim, or to promote for one of `destinations`: one cheap statement, for a relay that sleeps.
    ///
    /// # Errors
    /// It is not known.
    fn peek(&mut self, destinations: &[&str]) -> impl Future<Output = Result<Peek, OutboxError>> + Send;

    /// Whether some event still waits for a retry or for its destination.
    ///
    /// # Errors
    /// It is not known.
    fn has_owed(&mut self) -> impl Future<Output = Result<bool, OutboxError>> + Send;

    /// The highest id of a pending event; `None` where none is pending.
    ///
    /// # Errors
    /// It is not known.
    fn last_id(&mut self) -> impl Future<Output = Result<Option<i64>, OutboxError>> + Send;

    /// Whether an event with an id up to this one is pending, whoever holds it.
    ///
    /// # Errors
    /// It is not known.
    fn is_pending_up_to(&mut self, id: i64) -> impl Future<Output = Result<bool, OutboxError>> + Send;
}

/// Whether producers will wake a sleeper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Armed {
    /// From now on they will. Look once more, then sleep.
    Yes,
    /// Another relay sleeps armed, and its wake-up reaches this one too. Look once more, sleep a while, ask again: when
    /// that one dies, nobody is woken.
    Standby,
    /// A producer is in flight that will not wake anybody: keep looking.
    No,
}

/// How a relay sleeps without a poll storm and without costing producers anything while it is awake.
pub trait Wakeup: Send {
    /// Asks to be woken.
    ///
    /// # Errors
    /// It cannot be done now; polling goes on.
    fn arm(&mut self) -> impl Future<Output = Result<Armed, OutboxError>> + Send;

    /// Sleeps until woken, at most this long; returns whether it was. May be cancelled.
    ///
    /// # Errors
    /// The connection was lost: look at once.
    fn wait(&mut self, at_most: Duration) -> impl Future<Output = Result<bool, OutboxError>> + Send;

    /// No longer needs to be woken.
    ///
    /// # Errors
    /// The connection was lost, which disarms too.
    fn disarm(&mut self) -> impl Future<Output = Result<(), OutboxError>> + Send;
}
