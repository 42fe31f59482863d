//! The connection of one lane to the store, and the batches that it claims.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::breaker::Admission;
use crate::event::{ClaimId, RenewedClaim, SentBefore};
use crate::failpoint::{crash_on_many, failpoint};
use crate::outbox::{self, Peek};
use crate::outbox::{Claim, ClaimRequest, Claimed, Deliveries, Lane as _, Outbox, OutboxError};
use crate::relay::destination::Destination;
use crate::relay::guard::Busy;
use crate::relay::liveness::Pulse;
use crate::relay::shared::{Ending, Shared};
use crate::relay::standstills::ClaimAnswer;
use crate::relay::{Relay, sleep};
use crate::sink::ClaimCheck;

/// The longest time between two checks whether any destination accepts events, while all are paused.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The number of events in a batch that probes a destination. If the destination is still down, these may be published twice.
const PROBE_EVENTS: usize = 10;

/// One lane's connection to the store, with the state that it needs to claim events.
pub(super) struct Claimer<O: Outbox> {
    pub(super) relay: Arc<Relay<O>>,
    pub(super) shared: Arc<Shared>,
    pub(super) store: O::Lane,
    pub(super) stop: CancellationToken,
    /// The last batch was full, so more events are likely pending.
    pub(super) eager: bool,
    /// The present step of the lane.
    pub(super) pulse: Arc<Pulse>,
}

/// A claimed batch that is not settled yet.
pub(super) struct Work {
    pub(super) batch: Vec<Claimed>,
    pub(super) claim_id: ClaimId,
    /// The start of its claim.
    pub(super) begun: Instant,
    pub(super) busy: Busy,
}

/// The result of a poll.
pub(super) enum Polled {
    /// A batch, which is claimed now.
    Found(Work),
    /// Events are pending, and others hold all of them.
    HeldByOthers,
    /// Another configuration routes new events, and nothing else is due.
    Superseded,
    /// Nothing is due.
    Empty,
}

/// The result of a promotion.
pub(super) struct Promotion {
    /// Some events became pending.
    pub(super) promoted: bool,
    /// How long nothing is to be promoted: until the next event is due, a paused destination accepts events again, or a
    /// polling interval is over.
    pub(super) next: Duration,
}

impl<O: Outbox> Claimer<O> {
    pub(super) fn new(relay: Arc<Relay<O>>, shared: Arc<Shared>, stop: CancellationToken) -> Self {
        let (store, pulse) = (relay.outbox.lane(), relay.pulses.add());
        Self { relay, shared, store, stop, eager: false, pulse }
    }

    /// Tries to claim a batch.
    pub(super) async fn poll(&mut self) -> Result<Polled, OutboxError> {
        let relay = Arc::clone(&self.relay);
        relay.polled();
        self.pulse.asks_store();
        relay.metrics.polls.inc();
        if !relay.crash_guard.has_begun() {
            if !self.store.peek(&[]).await?.pending {
                relay.ready();
                return Ok(Polled::Empty);
            }
            relay.crash_guard.begin(&relay.outbox, relay.config.batch_events).await?;
        }
        let request = ClaimRequest {
            max_events: relay.crash_guard.claim_events(relay.batch_events(Instant::now())),
            max_bytes: relay.config.batch_bytes,
            max_payload: relay.config.max_payload,
            destinations: &relay.names,
        };
        let mut busy = Busy::new(Arc::clone(&self.shared));
        let begun = Instant::now();
        let asking = relay.standstills.asking();
        let claim = self.store.claim(request).instrument(tracing::debug_span!("claim")).await;
        drop(asking);
        relay.standstills.answered(match &claim {
            Ok(Claim::Batch { .. } | Claim::Empty | Claim::Superseded) => ClaimAnswer::Moving,
            Ok(Claim::Busy) => ClaimAnswer::Busy,
            Err(_) => ClaimAnswer::Failed,
        });
        let claim = claim?;
        self.eager = matches!(claim, Claim::Batch { full: true, .. });
        Ok(match claim {
            Claim::Batch { claimed: batch, claim_id, .. } => {
                crash_on_many(batch.len());
                busy.claimed();
                relay.metrics.claimed(batch.len(), begun.elapsed());
                Polled::Found(Work { batch, claim_id, begun, busy })
            }
            // A relay that has nothing to do is ready again too, and not only a relay that has settled a batch.
            Claim::Busy => {
                relay.ready();
                Polled::HeldByOthers
            }
            Claim::Superseded => {
                relay.ready();
                Polled::Superseded
            }
            Claim::Empty => {
                relay.ready();
                Polled::Empty
            }
        })
    }

    /// Gives up a claim. Its events stay pending.
    pub(super) async fn hand_back(&mut self, work: Work) -> Result<(), OutboxError> {
        self.pulse.asks_store();
        let settled = self.store.settle(&Deliveries::default()).await;
        drop(work);
        settled
    }

    /// Makes due events pending.
    pub(super) async fn promote(&mut self) -> Result<Promotion, OutboxError> {
        let relay = Arc::clone(&self.relay);
        let now = Instant::now();
        let limit = relay.batch_events(now);
        self.pulse.asks_store();
        failpoint("promote")?;
        let _asking = relay.standstills.asking();
        let pauses = relay.outbox.pauses();
        let promoted = self.store.promote(&relay.ready_destinations(now), limit).await?;
        // A destination that was resumed may have due events.
        let changed = !Arc::ptr_eq(&pauses, &relay.outbox.pauses());
        let next =
            if promoted.count >= limit || changed { Duration::ZERO } else { relay.next_due(now, promoted.next_due) };
        Ok(Promotion { promoted: promoted.count > 0, next })
    }

    /// Asks whether anything is pending or due. This costs the store less than a claim.
    pub(super) async fn peek(&mut self) -> Result<Peek, OutboxError> {
        let relay = Arc::clone(&self.relay);
        relay.polled();
        self.pulse.asks_store();
        relay.metrics.polls.inc();
        let _asking = relay.standstills.asking();
        self.store.peek(&relay.ready_destinations(Instant::now())).await
    }

    /// Returns whether no lane of this relay holds a claim or asks for one.
    pub(super) fn is_alone(&self) -> bool {
        self.shared.busy.load(Ordering::SeqCst) == 0
    }

    /// Returns whether the lanes end when nothing is due.
    pub(super) fn is_drain(&self) -> bool {
        self.shared.ending == Ending::Drained
    }

    /// Waits until something may have changed, for `at_most` at the longest.
    pub(super) async fn rest(&mut self, at_most: Duration) {
        self.pulse.rests(at_most);
        tokio::select! {
            () = tokio::time::sleep(at_most) => {}
            () = self.shared.settled.notified() => {}
            () = self.stop.cancelled() => {}
        }
    }

    /// Sleeps. Returns false at once when the relay is stopped.
    pub(super) async fn sleep(&mut self, duration: Duration) -> bool {
        self.pulse.rests(duration);
        sleep(duration, &self.stop).await
    }
}

impl<O: Outbox> Relay<O> {
    /// Returns until when all destinations are paused, or `None` if at least one accepts events.
    pub(super) fn paused_until(&self, now: Instant) -> Option<Instant> {
        let pauses = self.outbox.pauses();
        let mut admissions = self.destinations.iter().map(|destination| match pauses.is_whole(&destination.name) {
            true => Admission::No(now + LONGEST_PAUSE),
            false => destination.admission(now),
        });
        admissions.try_fold(now + LONGEST_PAUSE, |paused, admission| match admission {
            Admission::No(until) => Some(paused.min(until)),
            Admission::Yes | Admission::Probe => None,
        })
    }

    /// How many events to claim at once: few while a destination is to be probed.
    fn batch_events(&self, now: Instant) -> usize {
        let pauses = self.outbox.pauses();
        let probing = self
            .destinations
            .iter()
            .any(|destination| destination.admission(now) == Admission::Probe && !pauses.is_whole(&destination.name));
        if probing { PROBE_EVENTS.min(self.config.batch_events) } else { self.config.batch_events }
    }

    /// How long nothing is to be promoted: until the next event is due, or a paused destination accepts events again, and for
    /// a polling interval at the longest.
    pub(super) fn next_due(&self, now: Instant, next_due: Option<Duration>) -> Duration {
        let next_back = self.destinations.iter().filter_map(|destination| match destination.admission(now) {
            Admission::No(until) => Some(until - now),
            Admission::Yes | Admission::Probe => None,
        });
        next_back.chain(next_due).fold(self.config.polling_interval, Duration::min)
    }

    /// Looks whether anything was resumed, if anything is paused. For a relay that does not claim meanwhile.
    pub(super) async fn refresh_pauses(&self) -> Result<(), OutboxError> {
        if self.outbox.pauses().is_empty() { Ok(()) } else { self.outbox.refresh_pauses().await }
    }

    /// Returns whether the destination takes nothing until somebody acts, or it is found up again.
    pub(super) fn is_away(&self, destination: &Destination) -> bool {
        destination.is_down() || self.outbox.pauses().is_whole(&destination.name)
    }

    /// The names of the destinations that accept events and are not paused.
    fn ready_destinations(&self, now: Instant) -> Vec<&str> {
        let pauses = self.outbox.pauses();
        self.destinations
            .iter()
            .filter(|destination| !matches!(destination.admission(now), Admission::No(_)))
            .filter(|destination| !pauses.is_whole(&destination.name))
            .map(|destination| destination.name.as_str())
            .collect()
    }
}

/// The claim of the batch that is being published, for sinks that check whether it is still held.
pub(super) struct HeldClaim<'a, L> {
    store: Mutex<&'a mut L>,
    /// A query is under way. If publishing is given up meanwhile, the connection cannot be used any more.
    asking: AtomicBool,
}

impl<'a, L: outbox::Lane> HeldClaim<'a, L> {
    pub(super) fn new(store: &'a mut L) -> Self {
        Self { store: Mutex::new(store), asking: AtomicBool::new(false) }
    }

    /// Returns whether a query was sent and is not answered.
    pub(super) fn is_asking(&self) -> bool {
        self.asking.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl<L: outbox::Lane> ClaimCheck for HeldClaim<'_, L> {
    async fn renew(&self, floor: i64, noted: &[SentBefore], destination: &str) -> Option<RenewedClaim> {
        let mut store = self.store.lock().await;
        self.asking.store(true, Ordering::SeqCst);
        let renewed = store.renew(floor, noted, destination).await;
        self.asking.store(false, Ordering::SeqCst);
        match renewed {
            Ok(renewed) => {
                tracing::debug!(
                    destination,
                    noted = noted.len(),
                    pending = renewed.pending.len(),
                    "found what another claim has published"
                );
                Some(renewed)
            }
            Err(error) => {
                tracing::warn!(
                    destination,
                    error = error.explain(),
                    "the claim was lost; its events are not published"
                );
                None
            }
        }
    }
}
