//! The contract of a store. It has two parts:
//!
//! - [`Outbox`], for the engine: claim events, settle their deliveries, and sleep until there are more. This is the hot path,
//!   so the engine is compiled once for each kind of store.
//! - [`Operate`], for commands and for rare work. It is used through `dyn`.
//!
//! [`postgres`] and [`sqlite`] implement both, and have all SQL. [`database`] finds out which of them a URL names, and is the
//! only place that matches on it. [`past`] is for the commands about the log and the history. [`error`] has the errors with
//! advice, [`standstill`] the causes that keep events from moving, [`sample`] the figures for the metrics,
//! [`status`] what `relay status` shows, and [`register`] decides which of several configurations routes. [`deliveries`] are the verdicts on a batch, and
//! `records` turns them into rows.

mod config;
pub mod database;
mod decode;
pub mod deliveries;
pub mod error;
pub mod mend;
mod number;
pub mod operate;
mod partitions;
pub mod past;
pub mod pause;
#[cfg(feature = "postgres")]
pub mod postgres;
mod proof;
mod quote;
mod records;
pub mod register;
pub mod sample;
mod shape;
#[cfg(feature = "sqlite")]
pub mod sqlite;
pub mod standstill;
pub mod status;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::event::{ClaimId, Event, PublishError, RenewedClaim, SentBefore};
pub use config::{OutboxConfig, Usage};
pub use deliveries::{Deliveries, Delivery, NO_DESTINATION};
pub use error::OutboxError;
pub use operate::{Check, CheckRequest, Migrated, Operate};
use pause::Pauses;
use register::Configuration;
pub use standstill::Standstill;

/// The version of a store's schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SchemaVersion {
    /// The last migration that was applied, or 0 if none was.
    pub found: i32,
    /// The migration that a relay must know to work with the schema. Each migration may raise it.
    pub needs: i32,
}

impl SchemaVersion {
    /// Returns a description if a relay whose newest migration is `known` can work with this schema, and an error otherwise.
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

/// The limits of a claim.
#[derive(Debug, Clone, Copy)]
pub struct ClaimRequest<'a> {
    /// The largest number of events.
    pub max_events: usize,
    /// The approximate limit in bytes of events. One event is always returned, however large.
    pub max_bytes: usize,
    /// The largest payload in bytes. Larger payloads are not read, nor are values over a limit of the schema; their events
    /// come with a defect.
    pub max_payload: usize,
    /// The names of all configured destinations.
    pub destinations: &'a [String],
}

/// The answer to a claim.
#[derive(Debug)]
pub enum Claim {
    /// Events that belong to the lane until it settles.
    Batch {
        /// The events, in the order of `id` for each key; never empty.
        claimed: Vec<Claimed>,
        /// More events can be claimed at once.
        full: bool,
        /// The identity of this claim, different for each claim.
        claim_id: ClaimId,
    },
    /// Events are pending, and other lanes or relays hold all of them.
    Busy,
    /// Another relay's configuration routes, and no event is due that this relay must deliver.
    Superseded,
    /// No event is pending.
    Empty,
}

/// One claimed event with its state in the store.
#[derive(Debug)]
pub struct Claimed {
    /// The event.
    pub event: Event,
    /// `available_at` is not in the future.
    pub due: bool,
    /// How long ago it was emitted when the claim read it, by the store's clock. A delayed event that was never tried counts from
    /// `available_at` on.
    pub age: Duration,
    /// Why the event cannot be published, such as a payload over the limit. If the defect charges no event, it is why the
    /// event must wait.
    pub defect: Option<PublishError>,
    /// The event failed before without being charged an attempt, and waited.
    pub blocked_before: bool,
    /// The destinations at which an earlier event of the same key still waits.
    pub blocked_by: Vec<BlockedBy>,
}

/// A destination at which an earlier event of the same key waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockedBy {
    /// The name of the destination.
    pub destination: String,
    /// How long until that event is due.
    pub remaining: Duration,
}

/// The notes about an event that was being published when a relay crashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suspicion {
    /// How many events were published together in the last such call.
    pub together: usize,
    /// How many relays crashed as soon as they began to publish this event alone.
    pub crashes_alone: usize,
    /// How many relays crashed some time after they began to publish this event alone.
    pub deaths_alone: usize,
}

/// The result of a promotion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Promoted {
    /// How many scheduled events became pending.
    pub count: usize,
    /// How long until the next scheduled event is due, if there is one.
    pub next_due: Option<Duration>,
}

/// The part of a relay among the relays of one store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It takes all events.
    Works,
    /// Another relay works, and this one takes over when that one ends.
    StandsBy {
        /// Who works, as text for people.
        behind: String,
    },
    /// Another configuration routes new events. This relay delivers what is owed to these destinations, which that one lacks.
    Superseded {
        /// Destinations that the routing configuration does not have.
        left: Vec<String>,
    },
}

/// What a sleeping relay finds when it checks for work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peek {
    /// Some event is pending, whoever may hold it.
    pub pending: bool,
    /// How long until a scheduled event is due, if there is one.
    pub next_due: Option<Duration>,
}

/// The notes that end a crash loop.
pub trait CrashNotes {
    /// Notes that the relay `run` begins to work. Returns how many other relays crashed in the last ten minutes, or began in
    /// that time and have not ended.
    ///
    /// # Errors
    /// The note may be written or not.
    fn begin_run(&self, run: Uuid) -> impl Future<Output = Result<usize, OutboxError>> + Send;

    /// Deletes the note of a run that has ended normally, or has worked for a while.
    ///
    /// # Errors
    /// The run counts as crashed for ten minutes.
    fn end_run(&self, run: Uuid) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Deletes all notes of a run, so that its events are not taken for the cause if it ends from now on.
    ///
    /// # Errors
    /// For a day the run's events may be taken for the cause of its end.
    fn withdraw(&self, run: Uuid) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Returns the notes of relays other than `run` about `events`, each with the place of the event in `events`.
    ///
    /// # Errors
    /// The notes cannot be read.
    fn suspicions(
        &self,
        run: Uuid,
        events: &[Uuid],
    ) -> impl Future<Output = Result<Vec<(usize, Suspicion)>, OutboxError>> + Send;

    /// Notes, before anything else is done, that `run` is about to publish `events` together.
    ///
    /// # Errors
    /// The notes may be written or not.
    fn mark(&self, run: Uuid, events: &[Uuid]) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Notes that `run` still works a while after it began to publish `events`. If it crashes later, there may be another
    /// cause.
    ///
    /// # Errors
    /// The notes stay as they were.
    fn outlived(&self, run: Uuid, events: &[Uuid]) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Deletes, for each of `events`, the note of one relay that crashed some time after it began to publish the event alone.
    /// So the event may be tried once more.
    ///
    /// # Errors
    /// Nothing was deleted.
    fn forgive(&self, events: &[Uuid]) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Deletes all notes of `events`: they were published, or not tried, and no relay crashed.
    ///
    /// # Errors
    /// The notes stay for a day.
    fn clear(&self, events: &[Uuid]) -> impl Future<Output = Result<(), OutboxError>> + Send;
}

/// A store of events.
pub trait Outbox: CrashNotes + Operate + Send + Sync + 'static {
    /// A connection that claims and settles.
    type Lane: Lane;
    /// The means to wake a sleeping relay.
    type Wakeup: Wakeup;

    /// Creates a lane. It connects when it is first used, and again after every error.
    fn lane(&self) -> Self::Lane;

    /// Creates a wake-up. Returns `None` if the store or the configuration has none, so that the relay can only poll.
    fn wakeup(&self) -> Option<Self::Wakeup>;

    /// Prepares the store for a run: checks that it fits this binary and can be written to, and adds the days ahead.
    ///
    /// # Errors
    /// The obstacle. [`OutboxError::is_final`] says whether waiting can help.
    fn prepare(&self) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Registers this relay with its configuration, see [`register`]. After it returns, no relay with another configuration
    /// routes newly committed events, unless it registers later. With `once`, the relay ends when nothing is due, and
    /// supersedes no other.
    ///
    /// # Errors
    /// The relay may be registered or not.
    fn register(
        &self,
        configuration: &Arc<Configuration>,
        once: bool,
    ) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Does a registered relay's periodic work in the register, and returns the time until it is to be called again. `idle`
    /// is how long ago a lane last polled for events.
    ///
    /// # Errors
    /// It is to be called again soon.
    fn attend(&self, idle: Duration) -> impl Future<Output = Result<Duration, OutboxError>> + Send;

    /// Returns the part of this relay among the relays of the store, as far as it is known without a query.
    fn standing(&self) -> Standing;

    /// Returns how the configurations of other relays differ, if such relays have been at work for at least `lasting`.
    fn differences(&self, lasting: Duration) -> Vec<String>;

    /// Returns what operators have paused, as this relay last read it. A claim reads it anew if it has changed.
    fn pauses(&self) -> Arc<Pauses>;

    /// Reads the pauses anew if they have changed. It is called while everything is paused, and nothing is claimed.
    ///
    /// # Errors
    /// They are as they were.
    fn refresh_pauses(&self) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Ends the registration.
    ///
    /// # Errors
    /// Other relays will find out that this relay is gone.
    fn deregister(&self) -> impl Future<Output = Result<(), OutboxError>> + Send;
}

/// The access of one loop to the store.
///
/// Its futures are never cancelled, because a dropped future would leave the connection in an unknown state. After an error
/// the connection is closed, and its claims have ended.
pub trait Lane: Send {
    /// Claims some events. An earlier claim must have been settled.
    ///
    /// After a settle that failed, it first proves that the store can be written to. Otherwise the same events would be
    /// published again and again.
    ///
    /// # Errors
    /// Nothing was claimed.
    fn claim(&mut self, request: ClaimRequest<'_>) -> impl Future<Output = Result<Claim, OutboxError>> + Send;

    /// For a destination that records which events another claim gave it: returns an epoch above `floor`, and which of
    /// `noted` still wait for `destination`. Only the holder of the claim gets an answer.
    ///
    /// # Errors
    /// The claim is lost, or may be lost.
    fn renew(
        &mut self,
        floor: i64,
        noted: &[SentBefore],
        destination: &str,
    ) -> impl Future<Output = Result<RenewedClaim, OutboxError>> + Send;

    /// Records the deliveries of the claimed events in one transaction, and gives up the claim. An event stays as it is if
    /// none of its verdicts changes anything, or if it has no delivery.
    ///
    /// # Errors
    /// The deliveries may be recorded or not. The next claim finds the events that were not recorded.
    fn settle(&mut self, deliveries: &Deliveries<'_>) -> impl Future<Output = Result<(), OutboxError>> + Send;

    /// Promotes due events that were scheduled: delayed events, and those owed to one of `destinations`.
    ///
    /// # Errors
    /// Nothing was changed.
    fn promote(
        &mut self,
        destinations: &[&str],
        max_events: usize,
    ) -> impl Future<Output = Result<Promoted, OutboxError>> + Send;

    /// Returns whether there is anything to claim, or to promote for one of `destinations`. This is one cheap statement, for
    /// a relay that sleeps.
    ///
    /// # Errors
    /// The store cannot be read.
    fn peek(&mut self, destinations: &[&str]) -> impl Future<Output = Result<Peek, OutboxError>> + Send;

    /// Returns whether any event still waits for a retry or for its destination.
    ///
    /// # Errors
    /// The store cannot be read.
    fn has_owed(&mut self) -> impl Future<Output = Result<bool, OutboxError>> + Send;

    /// Returns the highest id of a pending event, or `None` if none is pending.
    ///
    /// # Errors
    /// The store cannot be read.
    fn last_id(&mut self) -> impl Future<Output = Result<Option<i64>, OutboxError>> + Send;

    /// Returns whether an event with an id up to `id` is pending, whoever holds it.
    ///
    /// # Errors
    /// The store cannot be read.
    fn is_pending_up_to(&mut self, id: i64) -> impl Future<Output = Result<bool, OutboxError>> + Send;
}

/// Whether producers notify a sleeping relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Armed {
    /// Producers will notify it. Poll once more, then sleep.
    Yes,
    /// Another relay sleeps armed, and its notifications reach this relay too. Poll once more, sleep for a while, and arm
    /// again: if that relay ends, nobody is notified.
    Standby,
    /// A producer in flight will not notify anybody: keep polling.
    No,
}

/// Sleeping without frequent polls, and without any cost for producers while the relay is awake.
pub trait Wakeup: Send {
    /// Arms the wake-up: asks producers to notify this relay.
    ///
    /// # Errors
    /// The wake-up cannot be armed now; the relay goes on polling.
    fn arm(&mut self) -> impl Future<Output = Result<Armed, OutboxError>> + Send;

    /// Sleeps until notified, for `at_most` at the longest. Returns whether it was notified. May be cancelled.
    ///
    /// # Errors
    /// The connection was lost: poll at once.
    fn wait(&mut self, at_most: Duration) -> impl Future<Output = Result<bool, OutboxError>> + Send;

    /// Disarms the wake-up.
    ///
    /// # Errors
    /// The connection was lost, which disarms too.
    fn disarm(&mut self) -> impl Future<Output = Result<(), OutboxError>> + Send;
}
