//! Polling for work, and sleeping between polls. One lane of a relay at a time waits for work here; when it finds some, the next
//! lane waits. A lane whose last batch was full claims again by itself, see `lane`. A drain is a run of `relay --once`, which
//! ends when nothing is due.
//!
//! - `schedule`: when to poll next.
//! - `sleeper`: sleeping until a producer notifies.
//! - `drain`: when a drain is over.

mod drain;
mod schedule;
mod sleeper;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::outbox::{Outbox, OutboxError};
use crate::relay::claim::{Claimer, Polled, Work};
use drain::Drain;
use schedule::{AWAKE_INTERVAL, POLL_INTERVAL, Schedule};
use sleeper::Sleeper;

/// The longest pause between two polls that is derived from the time a slow store takes.
const LONGEST_PACE: Duration = Duration::from_millis(10);

/// The time between two polls of a relay when another configuration routes new events.
const SUPERSEDED_INTERVAL: Duration = Duration::from_millis(500);

/// The longest time between two polls while another relay holds all pending events. It bounds how long the events of a relay
/// that was killed wait for this one.
const HELD_INTERVAL: Duration = Duration::from_millis(50);

/// The time between two polls of a drain while others hold all pending events.
const DRAIN_HELD_INTERVAL: Duration = Duration::from_millis(250);

/// Finds work and hands it out to the lane that holds the poller, which is behind a mutex of all lanes.
pub(super) struct Poller<W> {
    schedule: Schedule,
    sleeper: Sleeper<W>,
    drain: Drain,
}

impl<W: crate::outbox::Wakeup> Poller<W> {
    /// Creates a poller. `wakeup` ends a sleep early, if the store has one.
    pub(super) fn new(wakeup: Option<W>) -> Self {
        Self { schedule: Schedule::new(Instant::now()), sleeper: Sleeper::new(wakeup), drain: Drain::default() }
    }

    /// Promotes scheduled events if the time for that has come. While all lanes have work, none of them polls, but scheduled
    /// events must still be promoted.
    pub(super) async fn promote_if_due<O: Outbox<Wakeup = W>>(
        &mut self,
        claimer: &mut Claimer<O>,
    ) -> Result<(), OutboxError> {
        if self.schedule.is_promotion_due(Instant::now()) {
            self.schedule.promote(claimer).await?;
        }
        Ok(())
    }

    /// Polls until there is work. Returns `None` when the relay is stopped, or the drain is over.
    pub(super) async fn wait_for_work<O: Outbox<Wakeup = W>>(
        &mut self,
        claimer: &mut Claimer<O>,
    ) -> Result<Option<Work>, OutboxError> {
        loop {
            let next_poll = self.schedule.last_poll + pace(claimer);
            if claimer.shared.drained.load(Ordering::SeqCst)
                || !claimer.sleep(next_poll.saturating_duration_since(Instant::now())).await
            {
                return Ok(None);
            }
            claimer.relay.polled();
            let now = Instant::now();
            if let Some(until) = claimer.relay.paused_until(now) {
                let all_down = claimer.relay.destinations.iter().all(|destination| claimer.relay.is_away(destination));
                if claimer.is_drain() && claimer.is_alone() && all_down {
                    drain::give_up(claimer).await?;
                    return Ok(None);
                }
                claimer.sleep(until - now).await; // a batch that is settled meanwhile does not end the pause
                claimer.relay.refresh_pauses().await?;
                continue;
            }
            self.schedule.last_poll = now;
            if claimer.shared.scheduled.swap(false, Ordering::SeqCst) {
                self.schedule.promote_now(now);
            }
            self.promote_if_due(claimer).await?;
            // This is checked before the poll, because events that a lane held then may be pending again now.
            let alone = claimer.is_alone();
            let polled = claimer.poll().await?;
            if let Polled::Found(work) = polled {
                self.schedule.worked(Instant::now());
                return Ok(Some(work));
            }
            self.schedule.missed();
            if claimer.is_drain() {
                if alone && self.drain.is_over(&polled, &mut self.schedule, claimer).await? {
                    return Ok(None);
                }
                claimer.rest(if matches!(polled, Polled::Empty) { POLL_INTERVAL } else { DRAIN_HELD_INTERVAL }).await;
                continue;
            }
            match polled {
                Polled::Superseded => claimer.rest(SUPERSEDED_INTERVAL).await,
                Polled::HeldByOthers => claimer.rest(self.schedule.interval(HELD_INTERVAL)).await,
                _ if self.schedule.is_awake(now) => claimer.rest(self.schedule.interval(AWAKE_INTERVAL)).await,
                _ => {
                    if let Some(work) = self.sleeper.sleep_until_notified(&mut self.schedule, claimer).await? {
                        self.schedule.worked(Instant::now());
                        return Ok(Some(work));
                    }
                }
            }
        }
    }
}

/// How long after a poll the next may begin. If the store is slow because it is busy, the pause is longer, so that others can
/// use the store.
fn pace<O: Outbox>(claimer: &Claimer<O>) -> Duration {
    let in_store = Duration::from_micros(claimer.shared.store_us.load(Ordering::SeqCst));
    in_store.saturating_mul(2).clamp(POLL_INTERVAL, LONGEST_PACE)
}
