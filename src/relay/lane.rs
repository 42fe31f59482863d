//! A lane: one loop on one connection, which claims, publishes and settles.
//!
//! A lane whose last batch was full claims again at once. All others queue for the relay's one [`Poller`]: the lane that
//! holds it polls for work, and sleeps while there is none. As soon as it has claimed a batch, the next lane takes over. So
//! an idle relay sends its database one query at a time, however many lanes it has.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::event::Tally;
use crate::failpoint::failpoint;
use crate::outbox::{Deliveries, Lane as _, Outbox, OutboxError};
use crate::relay::claim::{Claimer, HeldClaim, Polled, Work};
use crate::relay::destination::GRACE;
use crate::relay::poll::Poller;
use crate::relay::shared::Shared;
use crate::relay::{Backoff, Relay, sleep};

/// How long a lane that ends waits for the cleanups at destinations that follow its last settle.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(1);

/// A loop that claims, publishes and settles on one connection.
pub(super) struct LaneLoop<O: Outbox> {
    claimer: Claimer<O>,
    poller: Arc<Mutex<Poller<O::Wakeup>>>,
    /// The cleanups that destinations run once their events are settled. They are waited for only when the lane ends.
    cleanups: JoinSet<()>,
}

impl<O: Outbox> LaneLoop<O> {
    pub(super) fn new(
        relay: Arc<Relay<O>>,
        shared: Arc<Shared>,
        poller: Arc<Mutex<Poller<O::Wakeup>>>,
        stop: CancellationToken,
    ) -> Self {
        Self { claimer: Claimer::new(relay, shared, stop), poller, cleanups: JoinSet::new() }
    }

    /// Works until the relay is stopped, or the drain is over. In a drain, an error of the store ends the lane; otherwise it
    /// retries until the store can be used.
    pub(super) async fn run(mut self) -> Result<(), OutboxError> {
        let ended = self.work().await;
        // If a destination does not finish its cleanup now, the next claim sends it one more query.
        drop(tokio::time::timeout(CLEANUP_TIMEOUT, self.cleanups.join_all()).await);
        ended
    }

    async fn work(&mut self) -> Result<(), OutboxError> {
        let mut backoff = Backoff::default();
        loop {
            match self.work_once().await {
                Ok(true) => {
                    backoff = Backoff::default();
                    self.claimer.relay.ready();
                }
                Ok(false) => return Ok(()),
                Err(error) if self.claimer.is_drain() || error.is_final() => {
                    self.claimer.stop.cancel(); // the other lanes settle and end too
                    return Err(error);
                }
                Err(error) => {
                    self.claimer.eager = false;
                    self.claimer.relay.not_ready(error.explain());
                    let wait = backoff.next();
                    self.claimer.pulse.rests(wait);
                    if !sleep(wait, &self.claimer.stop).await {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Claims, publishes and settles one batch. Returns false if the lane is to end.
    async fn work_once(&mut self) -> Result<bool, OutboxError> {
        let Some(mut work) = self.find_work().await? else { return Ok(false) };
        let relay = Arc::clone(&self.claimer.relay);
        let mut marks = match relay.crash_guard.before(&relay.outbox, &mut work.batch, &self.claimer.stop).await {
            Ok(marks) => marks,
            Err(error) => {
                self.claimer.hand_back(work).await?;
                return Err(error);
            }
        };
        let Work { batch, claim_id, begun, busy } = work;
        let publishing = Instant::now();
        relay.watch_call(&mut marks);
        self.claimer.pulse.publishes(relay.longest_timeout + GRACE);
        failpoint("before_publish")?;
        let held = HeldClaim::new(&mut self.claimer.store);
        let give_up = &self.claimer.shared.give_up;
        let (deliveries, after_settle) = relay.publish(&batch, &claim_id, &held, begun, give_up).await;
        if held.is_asking() && give_up.is_cancelled() {
            return Ok(false);
        }
        self.claimer.pulse.asks_store();
        failpoint("acked")?;
        let published = publishing.elapsed();
        let asking = relay.standstills.asking();
        let settled = self.claimer.store.settle(&deliveries).instrument(tracing::debug_span!("settle")).await;
        drop(asking);
        relay.crash_guard.after(&relay.outbox, marks).await;
        settled?;
        let settle = publishing.elapsed() - published;
        self.spawn_cleanup(after_settle);
        relay.metrics.settled(&deliveries, settle);
        relay.tallies.settled(&deliveries);
        let tally = self.record(&deliveries, begun.elapsed().saturating_sub(published));
        tracing::debug!(
            event_count = batch.len(),
            published = tally.published,
            retried = tally.retried,
            dead_lettered = tally.dead_lettered,
            waiting = tally.waiting,
            publish_ms = published.as_secs_f64() * 1000.0,
            settle_ms = settle.as_secs_f64() * 1000.0,
            "batch settled"
        );
        // Apart from priorities, the first event of a batch is its oldest. A wrong clock here affects only this log line.
        let oldest = batch.first().map(|claimed| time::OffsetDateTime::now_utc() - claimed.event.created_at);
        relay.report.settled(tally, oldest.and_then(|age| age.try_into().ok()).unwrap_or_default());
        drop(busy);
        Ok(true)
    }

    /// Records a settled batch in the metrics and the result. `in_store` is the time that the store took for it.
    fn record(&self, deliveries: &Deliveries<'_>, in_store: Duration) -> Tally {
        let shared = &self.claimer.shared;
        let mut tally = Tally::default();
        deliveries.iter().for_each(|delivery| tally.count(&delivery.verdict));
        if tally.retried + tally.waiting > 0 {
            shared.scheduled.store(true, Ordering::SeqCst);
        }
        if !self.claimer.eager {
            shared.store_us.store(u64::try_from(in_store.as_micros()).unwrap_or(u64::MAX), Ordering::SeqCst);
        }
        shared.record(tally, false);
        tally
    }

    /// Starts the cleanups of destinations whose events are settled, before the next claim sends anything there.
    fn spawn_cleanup(&mut self, after_settle: Vec<BoxFuture<'static, ()>>) {
        while self.cleanups.try_join_next().is_some() {}
        for mut cleanup in after_settle {
            if (&mut cleanup).now_or_never().is_none() {
                self.cleanups.spawn(cleanup);
            }
        }
    }

    /// Returns the next batch, or `None` if the lane is to end.
    async fn find_work(&mut self) -> Result<Option<Work>, OutboxError> {
        let Self { claimer, poller, .. } = self;
        if claimer.stop.is_cancelled() {
            return Ok(None);
        }
        if claimer.eager && claimer.relay.paused_until(Instant::now()).is_none() {
            if let Ok(mut poller) = poller.try_lock() {
                poller.promote_if_due(claimer).await?;
            }
            if let Polled::Found(work) = claimer.poll().await? {
                return Ok(Some(work));
            }
        }
        claimer.pulse.queued();
        let mut poller = tokio::select! {
            poller = poller.lock() => poller,
            () = claimer.stop.cancelled() => return Ok(None),
        };
        poller.wait_for_work(claimer).await
    }
}
