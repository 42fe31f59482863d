//! What a relay knows of its writes that the database refuses or swallows.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::outbox::postgres::left_out::LeftOut;

/// A warning about a state that lasts is logged at most once in this time.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// What a relay knows of writes that were refused.
#[derive(Debug, Clone, Default)]
pub(super) struct RefusedWrites {
    pub(super) wary: Arc<AtomicBool>,
    /// A settle failed because of its content. Nothing is published before a proof.
    pub(super) failed: Arc<AtomicBool>,
    /// How many lanes are settling what can be settled.
    salvages: Arc<AtomicUsize>,
    /// Events that could neither be settled nor parked.
    pub(super) left_out: LeftOut,
    warned: Arc<Mutex<Option<Instant>>>,
}

/// Keeps the other lanes from claiming, see [`RefusedWrites::salvaging`].
pub(super) struct Salvaging(Arc<AtomicUsize>);

impl Drop for Salvaging {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl RefusedWrites {
    /// Returns whether settles are to keep their claims if they fail.
    pub(super) fn is_wary(&self) -> bool {
        self.wary.load(Ordering::Relaxed)
    }

    /// Keeps the other lanes of this relay from claiming, until the returned value is dropped.
    pub(super) fn salvaging(&self) -> Salvaging {
        self.salvages.fetch_add(1, Ordering::SeqCst);
        Salvaging(Arc::clone(&self.salvages))
    }

    /// Returns whether a lane is settling what can be settled.
    pub(super) fn is_salvaging(&self) -> bool {
        self.salvages.load(Ordering::SeqCst) > 0
    }

    /// Returns whether nothing is to be published before a proof.
    pub(super) fn is_set(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// Warns that some due rows do not become pending.
    pub(super) fn warn_of_promotions(&self, count: i64) {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_none_or(|at| at.elapsed() >= WARNING_INTERVAL) {
            *warned = Some(Instant::now());
            tracing::warn!(
                count,
                "scheduled events are due, and an update of their rows to `pending` has no effect: look at the triggers on event_outbox"
            );
        }
    }
}
