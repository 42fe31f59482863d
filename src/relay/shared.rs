//! The state that the lanes of one run share.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::event::Tally;
use crate::relay::Drained;

/// When the lanes of a relay end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// When the relay is stopped.
    Stop,
    /// When nothing is due that this relay could claim.
    Drained,
}

/// The state that the lanes of one run share.
pub(super) struct Shared {
    pub(super) ending: Ending,
    /// The number of lanes that hold a claim or ask for one.
    pub(super) busy: AtomicUsize,
    /// The number of claims that are held, whose events are being published or settled.
    pub(super) claims: AtomicUsize,
    /// Notified when a lane has settled: the events that it held may be claimed by another lane.
    pub(super) settled: Notify,
    /// An event was scheduled since the last promotion.
    pub(super) scheduled: AtomicBool,
    /// The drain is over.
    pub(super) drained: AtomicBool,
    /// The microseconds that the store took for the last batch that was not full.
    pub(super) store_us: AtomicU64,
    /// Cancelled when publish calls are no longer waited for, because the relay must end.
    pub(super) give_up: CancellationToken,
    result: Mutex<Drained>,
}

impl Shared {
    pub(super) fn new(ending: Ending) -> Self {
        Self {
            ending,
            busy: AtomicUsize::new(0),
            claims: AtomicUsize::new(0),
            settled: Notify::new(),
            scheduled: AtomicBool::new(false),
            drained: AtomicBool::new(false),
            store_us: AtomicU64::new(0),
            give_up: CancellationToken::new(),
            result: Mutex::default(),
        }
    }

    /// Returns what all lanes did together, and whether a drain left something undelivered.
    pub(super) fn result(&self) -> Drained {
        self.result.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Adds a batch to the result.
    pub(super) fn record(&self, tally: Tally, undelivered: bool) {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        result.tally.add(tally);
        result.undelivered |= undelivered;
    }

    /// Records who holds the events for which a drain has waited.
    pub(super) fn record_holders(&self, holders: Vec<String>) {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        (result.undelivered, result.held_by) = (true, holders);
    }
}
