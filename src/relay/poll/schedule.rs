//! Decides when to poll next, from the results of the last polls.

use std::time::{Duration, Instant};

use crate::outbox::{Outbox, OutboxError};
use crate::relay::claim::{Claimer, Promotion};
use crate::retry::doubled;

/// The shortest time between two polls of one relay. While producers are busy, it makes batches bigger. After the last event,
/// the poll interval of a relay that stays awake starts at this time and doubles.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// The longest time between two polls of a relay that is awake.
pub(super) const AWAKE_INTERVAL: Duration = Duration::from_millis(16);

/// The shortest and the longest time that a relay stays awake after its last work.
const LINGER: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// A sleep shorter than this doubles the time to stay awake. Under load a relay must not repeatedly fall asleep and make
/// producers notify it.
const SHORT_SLEEP: Duration = Duration::from_millis(50);

/// How often a relay that is awake promotes scheduled events, if it knows of none that is due earlier.
const PROMOTION_INTERVAL: Duration = Duration::from_secs(1);

/// When to poll next.
pub(super) struct Schedule {
    pub(super) last_poll: Instant,
    last_work: Instant,
    linger: Duration,
    /// The number of polls in a row that found nothing.
    misses: u32,
    next_promotion: Instant,
}

impl Schedule {
    pub(super) fn new(now: Instant) -> Self {
        Self { last_poll: now, last_work: now, linger: LINGER.0, misses: 0, next_promotion: now }
    }

    /// Records that work was found, or that a producer has just notified.
    pub(super) fn worked(&mut self, now: Instant) {
        self.last_work = now;
        self.misses = 0;
    }

    /// Records that a poll found nothing.
    pub(super) fn missed(&mut self) {
        self.misses = self.misses.saturating_add(1);
    }

    /// Returns the wait after the polls in a row that found nothing, `at_most` at the longest.
    pub(super) fn interval(&self, at_most: Duration) -> Duration {
        doubled(POLL_INTERVAL, self.misses.saturating_sub(1), at_most)
    }

    /// Returns whether the last work is so recent that the relay should not fall asleep.
    pub(super) fn is_awake(&self, now: Instant) -> bool {
        now.duration_since(self.last_work) < self.linger
    }

    /// Records that a sleeper that fell asleep at `begun` was woken.
    pub(super) fn notified(&mut self, begun: Instant, now: Instant) {
        let short = now.duration_since(begun) < SHORT_SLEEP;
        self.linger = if short { (self.linger * 2).min(LINGER.1) } else { LINGER.0 };
        self.worked(now);
        // The notification may be about a delayed event, which a promotion makes pending. Events that are due come first: a poll
        // for them takes place before that.
        self.next_promotion = self.next_promotion.min(now + LINGER.0 / 2);
    }

    /// Returns whether scheduled events are to be promoted now.
    pub(super) fn is_promotion_due(&self, now: Instant) -> bool {
        self.next_promotion <= now
    }

    /// Makes a promotion due.
    pub(super) fn promote_now(&mut self, now: Instant) {
        self.next_promotion = now;
    }

    /// Promotes due events. Returns how long until there may be more, which is zero if some became pending.
    pub(super) async fn promote<O: Outbox>(&mut self, claimer: &mut Claimer<O>) -> Result<Duration, OutboxError> {
        let Promotion { promoted, next } = claimer.promote().await?;
        self.next_promotion = Instant::now() + next.min(PROMOTION_INTERVAL);
        Ok(if promoted { Duration::ZERO } else { next })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_doubles_with_each_poll_that_finds_nothing() {
        let mut schedule = Schedule::new(Instant::now());
        let mut next = || {
            schedule.missed();
            schedule.interval(AWAKE_INTERVAL).as_millis()
        };
        assert_eq!([(); 6].map(|()| next()), [2, 4, 8, 16, 16, 16]);
        schedule.worked(Instant::now());
        schedule.missed();
        assert_eq!(schedule.interval(AWAKE_INTERVAL), POLL_INTERVAL);
    }

    #[test]
    fn a_relay_that_is_notified_again_soon_stays_awake_longer_each_time_and_a_second_at_most() {
        let now = Instant::now();
        let mut schedule = Schedule::new(now);
        for _ in 0..10 {
            schedule.notified(now, now);
        }
        assert!(schedule.is_awake(now + Duration::from_millis(999)) && !schedule.is_awake(now + LINGER.1));
        schedule.notified(now, now + SHORT_SLEEP);
        assert!(!schedule.is_awake(now + SHORT_SLEEP + LINGER.0));
    }
}
