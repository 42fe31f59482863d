//! A lane: one loop on one connection.
//!
//! A lane whose last batch was full claims again at once. All others queue for the relay's one [`Poller`]: its holder
//! looks for work, and sleeps while there is none; as soon as it has claimed some, the next lane takes over. So an idle
//! relay asks its database one question at a time, however many lanes it has.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::{Mutex as AsyncMutex, Notify};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::event::{ClaimId, RenewedClaim, SentBefore, Tally};
use crate::failpoint::failpoint;
use crate::outbox::{self, Claimed, Deliveries, Lane as _, Outbox, OutboxError};
use crate::relay::poll::{Polled, Poller};
use crate::relay::{Backoff, Drained, Relay, sleep};
use crate::sink::ClaimCheck;

/// How long a lane that ends waits for destinations to have heard of its last settle.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(1);

/// When a relay's lanes are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// When told to stop.
    Stop,
    /// When nothing is due that this relay could claim.
    Drained,
}

/// What the lanes of a relay share.
pub(super) struct Shared<W> {
    pub(super) ending: Ending,
    pub(super) poller: AsyncMutex<Poller<W>>,
    /// Lanes that hold, or may come to hold, a claim.
    pub(super) busy: AtomicUsize,
    /// A lane has settled: what it held may be claimed by another.
    pub(super) settled: Notify,
    /// Something was scheduled since the last promotion.
    pub(super) scheduled: AtomicBool,
    pub(super) drained: AtomicBool,
    /// Microseconds that the store took for the last batch that was not full.
    pub(super) store_us: AtomicU64,
    /// Claims that are held: published, or being recorded.
    pub(super) claims: AtomicUsize,
    /// Cancelled when publish calls are no longer waited for: the relay is to end.
    pub(super) give_up: CancellationToken,
    result: Mutex<Drained>,
}

impl<W> Shared<W> {
    pub(super) fn new(wakeup: Option<W>, ending: Ending) -> Self {
        Self {
            ending,
            poller: AsyncMutex::new(Poller::new(wakeup)),
            busy: AtomicUsize::new(0),
            settled: Notify::new(),
            scheduled: AtomicBool::new(false),
            drained: AtomicBool::new(false),
            store_us: AtomicU64::new(0),
            claims: AtomicUsize::new(0),
            give_up: CancellationToken::new(),
            result: Mutex::default(),
        }
    }

    /// What all lanes did together, and whether a drain left something undelivered.
    pub(super) fn result(&self) -> Drained {
        self.result.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn record(&self, tally: Tally, undelivered: bool) {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        result.tally.add(tally);
        result.undelivered |= undelivered;
    }

    /// Others hold what a drain has waited for.
    pub(super) fn record_holders(&self, holders: Vec<String>) {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        (result.undelivered, result.held_by) = (true, holders);
    }
}

/// Counts a lane as busy from before its claim until after its settle, whatever happens between.
pub(super) struct Busy<W> {
    shared: Arc<Shared<W>>,
    /// It holds a claim, whose end concerns the others.
    claimed: bool,
}

impl<W> Busy<W> {
    pub(super) fn new(shared: Arc<Shared<W>>) -> Self {
        shared.busy.fetch_add(1, Ordering::SeqCst);
        Self { shared, claimed: false }
    }

    pub(super) fn claimed(&mut self) {
        self.claimed = true;
        self.shared.claims.fetch_add(1, Ordering::SeqCst);
    }
}

impl<W> Drop for Busy<W> {
    fn drop(&mut self) {
        self.shared.busy.fetch_sub(1, Ordering::SeqCst);
        if self.claimed {
            self.shared.claims.fetch_sub(1, Ordering::SeqCst);
            self.shared.settled.notify_one();
        }
    }
}

/// A claimed batch on its way to being settled.
pub(super) struct Work<W> {
    pub(super) batch: Vec<Claimed>,
    pub(super) claim_id: ClaimId,
    /// When its claim began.
    pub(super) begun: Instant,
    pub(super) busy: Busy<W>,
}

/// One loop; see the module.
pub(super) struct Lane<O: Outbox> {
    pub(super) relay: Arc<Relay<O>>,
    pub(super) shared: Arc<Shared<O::Wakeup>>,
    pub(super) lane: O::Lane,
    pub(super) stop: CancellationToken,
    /// The last batch was full: there is more.
    pub(super) eager: bool,
    /// What destinations are being told of what is settled; nothing waits for it but the lane's end.
    cleanups: JoinSet<()>,
}

/// The store, as far as sinks may ask it while they publish.
struct ClaimLedger<'a, L> {
    lane: AsyncMutex<&'a mut L>,
    /// A question is under way. Where publishing was given up meanwhile, the connection cannot be used any more.
    asking: AtomicBool,
}

#[async_trait]
impl<L: outbox::Lane> ClaimCheck for ClaimLedger<'_, L> {
    async fn renew(&self, floor: i64, noted: &[SentBefore], destination: &str) -> Option<RenewedClaim> {
        let mut lane = self.lane.lock().await;
        self.asking.store(true, Ordering::SeqCst);
        let renewed = lane.renew(floor, noted, destination).await;
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

impl<O: Outbox> Lane<O> {
    pub(super) fn new(relay: Arc<Relay<O>>, shared: Arc<Shared<O::Wakeup>>, stop: CancellationToken) -> Self {
        let lane = relay.outbox.lane();
        Self { relay, shared, lane, stop, eager: false, cleanups: JoinSet::new() }
    }

    /// Works until the end. In a drain, trouble with the store ends it; otherwise it is waited out.
    pub(super) async fn run(mut self) -> Result<(), OutboxError> {
        let ended = self.work().await;
        // A destination that does not answer now costs the next claim a question, and is not waited for.
        drop(tokio::time::timeout(CLEANUP_TIMEOUT, self.cleanups.join_all()).await);
        ended
    }

    async fn work(&mut self) -> Result<(), OutboxError> {
        let mut backoff = Backoff::default();
        loop {
            match self.pass().await {
                Ok(true) => {
                    backoff = Backoff::default();
                    self.relay.ready();
                }
                Ok(false) => return Ok(()),
                Err(error) if self.shared.ending == Ending::Drained || error.is_final() => {
                    self.stop.cancel(); // the other lanes settle and end too
                    return Err(error);
                }
                Err(error) => {
                    self.eager = false;
                    self.relay.not_ready(error.explain());
                    if !sleep(backoff.next(), &self.stop).await {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Claim, publish, settle. Returns false at the end.
    async fn pass(&mut self) -> Result<bool, OutboxError> {
        let Some(Work { mut batch, claim_id, begun: claiming, busy }) = self.find().await? else { return Ok(false) };
        let relay = Arc::clone(&self.relay);
        let mut care = match relay.crash_guard.before(&relay.outbox, &mut batch, &self.stop).await {
            Ok(care) => care,
            Err(error) => {
                self.lane.settle(&Deliveries::default()).await?; // gives the claim up
                return Err(error);
            }
        };
        let begun = Instant::now();
        relay.watch_call(&mut care);
        failpoint("before_publish")?;
        let claim_check = ClaimLedger { lane: AsyncMutex::new(&mut self.lane), asking: AtomicBool::new(false) };
        let (deliveries, after_settle) = relay.publish(&batch, &claim_id, &claim_check, &self.shared.give_up).await;
        if claim_check.asking.load(Ordering::SeqCst) && self.shared.give_up.is_cancelled() {
            return Ok(false);
        }
        failpoint("acked")?;
        let published = begun.elapsed();
        let asking = relay.standstills.asking();
        let settled = self.lane.settle(&deliveries).await;
        drop(asking);
        relay.crash_guard.after(&relay.outbox, care).await;
        settled?;
        self.spawn_cleanup(after_settle);
        let mut tally = Tally::default();
        deliveries.iter().for_each(|delivery| tally.count(&delivery.verdict));
        tracing::debug!(
            event_count = batch.len(),
            published = tally.published,
            retried = tally.retried,
            dead_lettered = tally.dead_lettered,
            waiting = tally.waiting,
            publish_ms = published.as_secs_f64() * 1000.0,
            settle_ms = (begun.elapsed() - published).as_secs_f64() * 1000.0,
            "batch settled"
        );
        if tally.retried + tally.waiting > 0 {
            self.shared.scheduled.store(true, Ordering::SeqCst);
        }
        if !self.eager {
            let in_store = (claiming.elapsed() - published).as_micros();
            self.shared.store_us.store(u64::try_from(in_store).unwrap_or(u64::MAX), Ordering::SeqCst);
        }
        // The first event of a batch is its oldest, but for priorities. A wrong clock here concerns this log alone.
        let oldest = batch.first().map(|claimed| time::OffsetDateTime::now_utc() - claimed.event.created_at);
        relay.report.settled(tally, oldest.and_then(|age| age.try_into().ok()).unwrap_or_default());
        self.shared.record(tally, false);
        drop(busy);
        Ok(true)
    }

    /// Begins to tell destinations that their events are settled, ahead of whatever the next claim sends there.
    fn spawn_cleanup(&mut self, after_settle: Vec<BoxFuture<'static, ()>>) {
        while self.cleanups.try_join_next().is_some() {}
        for mut cleanups in after_settle {
            if (&mut cleanups).now_or_never().is_none() {
                self.cleanups.spawn(cleanups);
            }
        }
    }

    /// The next batch; `None` at the end.
    async fn find(&mut self) -> Result<Option<Work<O::Wakeup>>, OutboxError> {
        if self.stop.is_cancelled() {
            return Ok(None);
        }
        let shared = Arc::clone(&self.shared);
        if self.eager && self.relay.paused_until(Instant::now()).is_none() {
            // With all lanes here nobody polls, and what is scheduled must come in its turn all the same.
            if let Ok(mut poller) = shared.poller.try_lock()
                && poller.schedule.next_promotion <= Instant::now()
            {
                self.promote(&mut poller.schedule).await?;
            }
            if let Polled::Found(work) = self.poll().await? {
                return Ok(Some(work));
            }
        }
        let mut poller = tokio::select! {
            poller = shared.poller.lock() => poller,
            () = self.stop.cancelled() => return Ok(None),
        };
        self.wait_for_work(&mut poller).await
    }
}
