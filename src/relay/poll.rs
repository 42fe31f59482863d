//! Looking for work, and sleeping while there is none.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::breaker::Admission;
use crate::event::Tally;
use crate::failpoint::{crash_on_many, failpoint};
use crate::outbox::{Armed, Claim, ClaimRequest, Deliveries, Lane as _, Outbox, OutboxError, Standstill, Wakeup};
use crate::relay::destination::Destination;
use crate::relay::lane::{Busy, Ending, Lane, Work};
use crate::relay::standstills::Answer;
use crate::relay::{Relay, sleep};

/// The shortest time between two looks of one relay: while producers are busy it makes bigger batches, and after the
/// last event it is where the poll interval of a relay that is still awake starts.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// The longest of these, which a store that is busy with others gets.
const POLL_INTERVAL_AT_MOST: Duration = Duration::from_millis(10);

/// The longest time between two looks of a relay that is awake.
const AWAKE_INTERVAL: Duration = Duration::from_millis(16);

/// The time between two looks of a relay that is superseded by another configuration.
const SUPERSEDED_INTERVAL: Duration = Duration::from_millis(500);

/// The longest time between two looks while all that is pending is another relay's; it bounds how long the events of a
/// relay that was killed wait for this one.
const BUSY_INTERVAL: Duration = Duration::from_millis(50);

/// The same for a drain.
const HELD_INTERVAL: Duration = Duration::from_millis(250);

/// The note that polling is all that is left.
const NOT_WOKEN: &str = "not_woken";

/// How long a relay stays awake after its last work, at least and at most.
const LINGER: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// A sleep shorter than this doubles the time to stay awake: under load a relay must not fall asleep and make producers
/// notify it, over and over.
const SHORT_SLEEP: Duration = Duration::from_millis(50);

/// How long a relay sleeps before it asks whether the one that is armed still is: when that one dies, nobody is notified.
const STANDBY_INTERVAL: Duration = Duration::from_secs(2);

/// How often a relay that is awake promotes scheduled events, where it knows of none that is due earlier.
const PROMOTION_INTERVAL: Duration = Duration::from_secs(1);

/// Events in a batch that probes a destination: the fewer, the less can be repeated if it is still unwell.
const PROBE_EVENTS: usize = 10;

/// The right to look for work; owned by the lane that looks.
pub(super) struct Poller<W> {
    wakeup: Option<W>,
    pub(super) schedule: Schedule,
}

/// What a relay knows about when to look next.
pub(super) struct Schedule {
    last_poll: Instant,
    last_work: Instant,
    linger: Duration,
    /// Looks in a row that found nothing.
    misses: u32,
    pub(super) next_promotion: Instant,
    /// The warning that wake-ups do not work was given.
    warned: bool,
    /// What a drain waits for that others hold.
    held: Option<Held>,
}

/// Events that were pending when a drain had nothing left to claim.
#[derive(Clone, Copy)]
struct Held {
    last_id: i64,
    /// How long whoever holds them may take.
    until: Instant,
}

impl<W> Poller<W> {
    pub(super) fn new(wakeup: Option<W>) -> Self {
        let now = Instant::now();
        let schedule = Schedule {
            last_poll: now,
            last_work: now,
            linger: LINGER.0,
            misses: 0,
            next_promotion: now,
            warned: false,
            held: None,
        };
        Self { wakeup, schedule }
    }
}

/// What a look found.
pub(super) enum Polled<W> {
    /// A batch, claimed.
    Found(Work<W>),
    /// Only what others hold.
    Busy,
    /// Another configuration routes.
    Superseded,
    /// Nothing.
    Empty,
}

impl<O: Outbox> Relay<O> {
    /// Until when every destination is paused; `None` where one would take events.
    pub(super) fn paused_until(&self, now: Instant) -> Option<Instant> {
        let mut admissions = self.destinations.iter().map(|destination| destination.admission(now));
        admissions.try_fold(now + PROMOTION_INTERVAL, |paused, admission| match admission {
            Admission::No(until) => Some(paused.min(until)),
            Admission::Yes | Admission::Probe => None,
        })
    }

    /// How many events to take at once: few while a destination is to be probed.
    fn batch_events(&self, now: Instant) -> usize {
        let probing = self.destinations.iter().any(|destination| destination.admission(now) == Admission::Probe);
        if probing { PROBE_EVENTS.min(self.config.batch_events) } else { self.config.batch_events }
    }

    /// How long there is nothing to promote: until the next event is due, or a paused destination takes events again; at most
    /// a polling interval.
    fn rest(&self, now: Instant, next_due: Option<Duration>) -> Duration {
        let next_back = self.destinations.iter().filter_map(|destination| match destination.admission(now) {
            Admission::No(until) => Some(until - now),
            Admission::Yes | Admission::Probe => None,
        });
        next_back.chain(next_due).fold(self.config.polling_interval, Duration::min)
    }

    fn ready_destinations(&self, now: Instant) -> Vec<&str> {
        self.destinations
            .iter()
            .filter(|destination| !matches!(destination.admission(now), Admission::No(_)))
            .map(|destination| destination.name.as_str())
            .collect()
    }
}

impl<O: Outbox> Lane<O> {
    /// Tries to claim a batch.
    pub(super) async fn poll(&mut self) -> Result<Polled<O::Wakeup>, OutboxError> {
        let relay = Arc::clone(&self.relay);
        relay.polled();
        if !relay.crash_guard.has_begun() {
            if !self.lane.peek(&[]).await?.pending {
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
        let claim = self.lane.claim(request).await;
        drop(asking);
        relay.standstills.answered(match &claim {
            Ok(Claim::Batch { .. } | Claim::Empty | Claim::Superseded) => Answer::Moving,
            Ok(Claim::Busy) => Answer::Busy,
            Err(_) => Answer::Failed,
        });
        let claim = claim?;
        if let Claim::Batch { claimed, .. } = &claim {
            crash_on_many(claimed.len());
        }
        self.eager = matches!(claim, Claim::Batch { full: true, .. });
        Ok(match claim {
            Claim::Batch { claimed: batch, claim_id, .. } => {
                busy.claimed();
                Polled::Found(Work { batch, claim_id, begun, busy })
            }
            // Not only after a batch is settled: a relay that has nothing to do is ready again too.
            Claim::Busy => {
                relay.ready();
                Polled::Busy
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

    /// Looks until there is work; `None` at the end.
    pub(super) async fn wait_for_work(
        &mut self,
        poller: &mut Poller<O::Wakeup>,
    ) -> Result<Option<Work<O::Wakeup>>, OutboxError> {
        let Poller { wakeup, schedule } = poller;
        loop {
            if self.shared.drained.load(Ordering::SeqCst)
                || !sleep((schedule.last_poll + self.pace()).saturating_duration_since(Instant::now()), &self.stop)
                    .await
            {
                return Ok(None);
            }
            self.relay.polled();
            let now = Instant::now();
            if let Some(until) = self.relay.paused_until(now) {
                let all_down = self.relay.destinations.iter().all(Destination::is_down);
                if self.shared.ending == Ending::Drained && self.alone() && all_down {
                    self.give_up_drain().await?;
                    return Ok(None);
                }
                sleep(until - now, &self.stop).await;
                continue;
            }
            schedule.last_poll = now;
            if self.shared.scheduled.swap(false, Ordering::SeqCst) || schedule.next_promotion <= now {
                self.promote(schedule).await?;
            }
            // Asked before the look: what a lane held then may be pending again now.
            let alone = self.alone();
            let polled = self.poll().await?;
            if let Polled::Found(work) = polled {
                schedule.last_work = Instant::now();
                schedule.misses = 0;
                return Ok(Some(work));
            }
            schedule.misses = schedule.misses.saturating_add(1);
            if self.shared.ending == Ending::Drained {
                let rest =
                    if matches!(polled, Polled::Busy | Polled::Superseded) { HELD_INTERVAL } else { POLL_INTERVAL };
                let over = alone && (matches!(polled, Polled::Empty) || !self.is_held_by_others(schedule).await?);
                if over && self.drain_is_over(schedule).await? {
                    return Ok(None);
                }
                self.rest(rest).await;
            } else if matches!(polled, Polled::Superseded) {
                self.rest(SUPERSEDED_INTERVAL).await;
            } else if matches!(polled, Polled::Busy) {
                self.rest(interval(schedule.misses, BUSY_INTERVAL)).await;
            } else if now.duration_since(schedule.last_work) < schedule.linger {
                self.rest(interval(schedule.misses, AWAKE_INTERVAL)).await;
            } else if let Some(work) = self.sleep_until_notified(schedule, wakeup.as_mut()).await? {
                schedule.last_work = Instant::now();
                schedule.misses = 0;
                return Ok(Some(work));
            }
        }
    }

    /// Makes due events pending. Returns how long until there may be more: until the next one is due, a paused destination
    /// takes events again, or a polling interval is over.
    pub(super) async fn promote(&mut self, schedule: &mut Schedule) -> Result<Duration, OutboxError> {
        let relay = Arc::clone(&self.relay);
        let now = Instant::now();
        let limit = relay.batch_events(now);
        failpoint("promote")?;
        let _asking = relay.standstills.asking();
        let promoted = self.lane.promote(&relay.ready_destinations(now), limit).await?;
        let next = if promoted.count >= limit { Duration::ZERO } else { relay.rest(now, promoted.next_due) };
        schedule.next_promotion = Instant::now() + next.min(PROMOTION_INTERVAL);
        Ok(if promoted.count > 0 { Duration::ZERO } else { next })
    }

    /// Sleeps until there may be work: at most a polling interval, less where something is due or a destination may be
    /// back before, and less where a producer wakes us. Returns what the last look before falling asleep found.
    async fn sleep_until_notified(
        &mut self,
        schedule: &mut Schedule,
        wakeup: Option<&mut O::Wakeup>,
    ) -> Result<Option<Work<O::Wakeup>>, OutboxError> {
        let Some(wakeup) = wakeup else {
            let at_most = self.promote(schedule).await?;
            self.rest(at_most).await;
            return Ok(None);
        };
        match wakeup.arm().await {
            Ok(Armed::No) => {
                self.rest(interval(schedule.misses, AWAKE_INTERVAL)).await;
                Ok(None)
            }
            Ok(armed) => {
                schedule.warned = false;
                self.relay.standstills.clear(NOT_WOKEN, "");
                let found = self.sleep_armed_once(schedule, wakeup, armed).await;
                // Whatever happened: as long as it is armed, producers pay for it.
                if let Err(error) = wakeup.disarm().await {
                    tracing::debug!(error = error.explain(), "the connection that wakes this relay was lost");
                }
                found
            }
            Err(error) => {
                let polling = format!(
                    "producers cannot wake this relay; it polls every {} ms until they can: {}",
                    self.relay.config.polling_interval.as_millis(),
                    error.explain()
                );
                if !std::mem::replace(&mut schedule.warned, true) {
                    tracing::warn!("{polling}");
                }
                self.relay.standstills.note(Standstill::new(NOT_WOKEN, polling));
                let at_most = self.promote(schedule).await?;
                self.rest(at_most).await;
                Ok(None)
            }
        }
    }

    async fn sleep_armed_once(
        &mut self,
        schedule: &mut Schedule,
        wakeup: &mut O::Wakeup,
        armed: Armed,
    ) -> Result<Option<Work<O::Wakeup>>, OutboxError> {
        // Once more, now that whoever commits after this will wake us.
        let polled = self.poll().await?;
        let begun = Instant::now();
        let mut woken = false;
        if matches!(polled, Polled::Empty) {
            let at_most = self.promote(schedule).await?;
            woken = self.sleep_armed(schedule, wakeup, armed, at_most).await?;
        }
        if woken {
            let now = Instant::now();
            let short = now.duration_since(begun) < SHORT_SLEEP;
            schedule.linger = if short { (schedule.linger * 2).min(LINGER.1) } else { LINGER.0 };
            schedule.last_work = now;
            schedule.misses = 0;
            // It may have been a delayed event; the others come first.
            schedule.next_promotion = schedule.next_promotion.min(now + LINGER.0 / 2);
        }
        Ok(match polled {
            Polled::Found(work) => Some(work),
            Polled::Busy | Polled::Superseded | Polled::Empty => None,
        })
    }

    /// Sleeps until woken or until there may be work, which it asks for after `at_most` and then once a polling interval:
    /// not all who insert wake anybody. Returns whether it was woken.
    async fn sleep_armed(
        &mut self,
        schedule: &mut Schedule,
        wakeup: &mut O::Wakeup,
        mut armed: Armed,
        at_most: Duration,
    ) -> Result<bool, OutboxError> {
        let mut until = Instant::now() + at_most;
        while !self.stop.is_cancelled() {
            let now = Instant::now();
            if until <= now {
                let relay = Arc::clone(&self.relay);
                relay.polled();
                let asking = relay.standstills.asking();
                let found = self.lane.peek(&relay.ready_destinations(now)).await?;
                drop(asking);
                if found.pending || found.next_due.is_some_and(|due| due.is_zero()) {
                    schedule.next_promotion = now;
                    return Ok(false);
                }
                until = now + relay.rest(now, found.next_due);
            }
            let rest = until.saturating_duration_since(now);
            let slice = if armed == Armed::Standby { rest.min(STANDBY_INTERVAL) } else { rest };
            let waited = tokio::select! {
                waited = wakeup.wait(slice) => waited,
                () = self.shared.settled.notified() => Ok(true),
                () = self.stop.cancelled() => Ok(true),
            };
            match waited {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                Err(error) => {
                    // Whoever committed meanwhile may not have reached us.
                    tracing::warn!(
                        error = error.explain(),
                        "the connection that wakes this relay was lost; looking at once"
                    );
                    return Ok(true);
                }
            }
            if armed == Armed::Standby {
                armed = wakeup.arm().await.unwrap_or(Armed::No);
                if armed != Armed::Standby {
                    return Ok(true);
                }
            }
        }
        Ok(true)
    }

    /// How long after a look the next may begin: where the store is slow because it is busy, it is given as much time for
    /// others.
    fn pace(&self) -> Duration {
        let in_store = Duration::from_micros(self.shared.store_us.load(Ordering::SeqCst));
        in_store.saturating_mul(2).clamp(POLL_INTERVAL, POLL_INTERVAL_AT_MOST)
    }

    /// No other lane of this relay holds anything.
    fn alone(&self) -> bool {
        self.shared.busy.load(Ordering::SeqCst) == 0
    }

    /// Whether a drain that found nothing, alone, has nothing left to do; records what it leaves behind.
    async fn drain_is_over(&mut self, schedule: &mut Schedule) -> Result<bool, OutboxError> {
        let now = Instant::now();
        // Settled before the promotion, which leaves out what is owed to a destination that pauses.
        let pausing = self
            .relay
            .destinations
            .iter()
            .any(|destination| matches!(destination.admission(now), Admission::No(_)) && !destination.is_down());
        if pausing || self.promote(schedule).await?.is_zero() {
            return Ok(false);
        }
        self.end_drain(false).await?;
        Ok(true)
    }

    /// Whether others hold events that a drain must wait for: those that were pending when it had nothing left to claim, for as
    /// long as one publish call may take. Afterwards who holds them is told, and they count as undelivered.
    async fn is_held_by_others(&mut self, schedule: &mut Schedule) -> Result<bool, OutboxError> {
        let held = match schedule.held {
            Some(held) => held,
            None => {
                let until = Instant::now() + self.relay.longest_timeout;
                let Some(last_id) = self.lane.last_id().await? else {
                    return Ok(false);
                };
                *schedule.held.insert(Held { last_id, until })
            }
        };
        if !self.lane.is_pending_up_to(held.last_id).await? {
            return Ok(false);
        }
        if Instant::now() < held.until {
            return Ok(true);
        }
        self.shared.record_holders(self.relay.outbox.holders().await?);
        Ok(false)
    }

    /// Ends a drain whose destinations are all down: nothing more is claimed for them.
    async fn give_up_drain(&mut self) -> Result<(), OutboxError> {
        let pending = match self.poll().await? {
            Polled::Found(work) => {
                self.lane.settle(&Deliveries::default()).await?;
                drop(work);
                true
            }
            Polled::Busy | Polled::Superseded | Polled::Empty => false,
        };
        self.end_drain(pending).await
    }

    async fn end_drain(&mut self, pending: bool) -> Result<(), OutboxError> {
        let owed = self.lane.has_owed().await?;
        self.shared.record(Tally::default(), pending || owed);
        self.shared.drained.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Rests until something may have changed: at most this long.
    async fn rest(&mut self, at_most: Duration) {
        tokio::select! {
            () = tokio::time::sleep(at_most) => {}
            () = self.shared.settled.notified() => {}
            () = self.stop.cancelled() => {}
        }
    }
}

/// The wait after so many looks in a row that found nothing.
fn interval(misses: u32, at_most: Duration) -> Duration {
    (POLL_INTERVAL * (1 << misses.saturating_sub(1).min(8))).min(at_most)
}
