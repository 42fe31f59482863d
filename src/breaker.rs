//! The circuit breaker of one destination. It admits or refuses each call, and the result of the call is reported to it.
//!
//! It charges no event and loses none: while it refuses calls, events wait in the outbox. Time is passed in.
//!
//! Only calls that were admitted in the present state count. A call that was admitted before the breaker opened says nothing
//! about the destination's present state: it neither closes the breaker nor prolongs the pause.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::retry::doubled;

/// The pause after the first failure in a row. It doubles with each further failure. It is short, because most failures are
/// blips, and long enough that a refused connection does not make a busy loop.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// How many strained calls in a row lengthen the pause: to 800 ms, which is time for any token bucket to refill.
const MAX_STRAIN: u32 = 5;

/// When a breaker opens, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BreakerPolicy {
    /// The number of failures within the window that opens the breaker.
    pub threshold: u32,
    /// How far back failures count.
    pub window: Duration,
    /// How long the breaker stays open before it admits one call.
    pub recovery: Duration,
}

/// Whether a caller may call the destination now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// The caller may call.
    Yes,
    /// The caller may call with a small batch. The result decides whether the breaker closes.
    Probe,
    /// The caller may not call before this instant.
    No(Instant),
}

/// The permission to make one call. The result of the call is reported with it, so that calls that were admitted in an earlier
/// state do not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "the breaker must learn what became of the call"]
pub struct Ticket {
    state: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed { not_before: Option<Instant> },
    Open { until: Instant },
    HalfOpen { since: Instant },
}

/// The state of a breaker, as it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BreakerState {
    /// The destination works: every call is admitted.
    Closed = 0,
    /// One call is under way that decides whether the breaker closes.
    Probing = 1,
    /// No call is admitted.
    Open = 2,
}

/// The circuit breaker of one destination.
#[derive(Debug)]
pub struct Breaker {
    policy: BreakerPolicy,
    state: State,
    /// The number of states before this one.
    number: u64,
    /// The times of failed calls since the last call that was answered.
    failures: VecDeque<Instant>,
    consecutive: u32,
}

impl Breaker {
    /// Creates a closed breaker.
    pub fn new(policy: BreakerPolicy) -> Self {
        Self { policy, state: State::Closed { not_before: None }, number: 0, failures: VecDeque::new(), consecutive: 0 }
    }

    /// Asks for permission to call the destination now. After the recovery time exactly one caller gets a probe.
    ///
    /// # Errors
    /// The instant before which no call is admitted.
    pub fn admit(&mut self, now: Instant) -> Result<Ticket, Instant> {
        match self.peek(now) {
            Admission::No(until) => return Err(until),
            Admission::Probe => self.enter(State::HalfOpen { since: now }),
            Admission::Yes => {}
        }
        Ok(Ticket { state: self.number })
    }

    /// Returns the answer that [`Self::admit`] would give, without using up the probe.
    pub fn peek(&self, now: Instant) -> Admission {
        match self.state {
            State::Closed { not_before: Some(at) } if at > now => Admission::No(at),
            State::Closed { .. } => Admission::Yes,
            State::Open { until } if until > now => Admission::No(until),
            State::Open { .. } => Admission::Probe,
            // A probe whose task has panicked is never reported. It must not keep the breaker open for ever.
            State::HalfOpen { since } if since + self.policy.recovery <= now => Admission::Probe,
            State::HalfOpen { since } => Admission::No(since + self.policy.recovery),
        }
    }

    /// Returns whether calls are admitted, probed or refused.
    pub fn state(&self) -> BreakerState {
        match self.state {
            State::Closed { .. } => BreakerState::Closed,
            State::HalfOpen { .. } => BreakerState::Probing,
            State::Open { .. } => BreakerState::Open,
        }
    }

    /// Returns whether the breaker is open or probing: the destination is down, and not only paused for a moment.
    pub fn is_open(&self) -> bool {
        !matches!(self.state, State::Closed { .. })
    }

    /// Returns whether a call was admitted in the present state.
    pub fn is_current(&self, ticket: Ticket) -> bool {
        ticket.state == self.number
    }

    /// Reports that a call was answered, which ends earlier failures. Returns whether this closed the breaker.
    pub fn succeeded(&mut self, ticket: Ticket) -> bool {
        if !self.is_current(ticket) {
            return false;
        }
        let was_open = self.is_open();
        self.close(None);
        self.consecutive = 0;
        self.failures.clear();
        was_open
    }

    /// Reports that a call failed by the destination's fault. Returns whether this opened the breaker.
    pub fn failed(&mut self, ticket: Ticket, now: Instant) -> bool {
        if !self.is_current(ticket) {
            return false;
        }
        self.consecutive = self.consecutive.saturating_add(1);
        self.failures.push_back(now);
        while self.failures.front().is_some_and(|at| *at + self.policy.window < now) {
            self.failures.pop_front();
        }
        if self.is_open() || self.failures.len() >= self.policy.threshold as usize {
            self.open(now);
            return true;
        }
        self.close(Some(now + self.pause()));
        false
    }

    /// Reports that a call was answered in part, for example because the destination throttles. This pauses the destination,
    /// but never opens the breaker, because the destination works. Returns whether this closed the breaker.
    pub fn strained(&mut self, ticket: Ticket, now: Instant) -> bool {
        if !self.is_current(ticket) {
            return false;
        }
        let was_open = self.is_open();
        self.consecutive = self.consecutive.saturating_add(1).min(MAX_STRAIN);
        self.close(Some(now + self.pause()));
        self.failures.clear();
        was_open
    }

    /// Reports that the destination is configured wrongly. This opens the breaker at once, whatever the threshold. Returns
    /// whether it was closed.
    pub fn misconfigured(&mut self, ticket: Ticket, now: Instant) -> bool {
        if !self.is_current(ticket) {
            return false;
        }
        let was_open = self.is_open();
        self.open(now);
        !was_open
    }

    /// Reports that an admitted call says nothing about the destination. If it was the probe, the next caller gets the probe.
    pub fn unused(&mut self, ticket: Ticket, now: Instant) {
        if self.is_current(ticket) && matches!(self.state, State::HalfOpen { .. }) {
            self.enter(State::Open { until: now });
        }
    }

    /// The pause after this many failures in a row.
    fn pause(&self) -> Duration {
        doubled(FIRST_PAUSE, self.consecutive.saturating_sub(1), self.policy.recovery)
    }

    fn open(&mut self, now: Instant) {
        self.enter(State::Open { until: now + self.policy.recovery });
        self.failures.clear();
    }

    /// Closes the breaker. If it is closed already, this sets its pause without a new state, so that calls under way still
    /// count.
    fn close(&mut self, not_before: Option<Instant>) {
        let state = State::Closed { not_before };
        if self.is_open() { self.enter(state) } else { self.state = state }
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        self.number += 1;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn breaker() -> (Breaker, Instant) {
        let policy = BreakerPolicy { threshold: 3, window: 60 * SECOND, recovery: 30 * SECOND };
        (Breaker::new(policy), Instant::now())
    }

    /// Makes a call that is admitted as soon as possible and fails at once. Returns whether that opened the breaker, and
    /// when.
    fn fail(breaker: &mut Breaker, now: Instant) -> (bool, Instant) {
        let at = if let Admission::No(until) = breaker.peek(now) { until } else { now };
        let ticket = breaker.admit(at).unwrap();
        (breaker.failed(ticket, at), at)
    }

    #[test]
    fn a_failure_pauses_and_the_pause_doubles() {
        let (mut breaker, now) = breaker();
        assert_eq!(fail(&mut breaker, now), (false, now));
        assert_eq!(breaker.admit(now), Err(now + FIRST_PAUSE));
        let later = now + FIRST_PAUSE;
        assert_eq!(fail(&mut breaker, later), (false, later));
        assert_eq!(breaker.admit(later), Err(later + 2 * FIRST_PAUSE));
        assert!(!breaker.is_open());
    }

    #[test]
    fn it_opens_at_the_threshold_and_lets_one_probe_through_after_recovery() {
        let (mut breaker, now) = breaker();
        let tickets = [(); 3].map(|()| breaker.admit(now).unwrap());
        assert_eq!(tickets.map(|ticket| breaker.failed(ticket, now)), [false, false, true]);
        assert_eq!(breaker.admit(now + 29 * SECOND), Err(now + 30 * SECOND));
        let later = now + 30 * SECOND;
        assert_eq!(breaker.peek(later), Admission::Probe);
        let probe = breaker.admit(later).unwrap();
        assert_eq!(breaker.admit(later), Err(later + 30 * SECOND));
        assert!(breaker.succeeded(probe));
        assert_eq!(fail(&mut breaker, later), (false, later), "the failures of the last outage are forgotten");
    }

    #[test]
    fn a_failed_probe_opens_it_again() {
        let (mut breaker, now) = breaker();
        let ticket = breaker.admit(now).unwrap();
        assert!(breaker.misconfigured(ticket, now));
        let later = now + 30 * SECOND;
        assert_eq!(fail(&mut breaker, later), (true, later));
        assert_eq!(breaker.admit(later), Err(later + 30 * SECOND));
    }

    #[test]
    fn an_unused_probe_goes_to_the_next_caller_and_a_lost_one_expires() {
        let (mut breaker, now) = breaker();
        let ticket = breaker.admit(now).unwrap();
        assert!(breaker.misconfigured(ticket, now));
        let later = now + 30 * SECOND;
        let unused = breaker.admit(later).unwrap();
        breaker.unused(unused, later);
        let lost = breaker.admit(later).unwrap();
        let another = breaker.admit(later + 30 * SECOND).unwrap();
        assert!(!breaker.succeeded(lost) && breaker.is_open(), "a probe that was given up does not decide");
        assert!(breaker.succeeded(another));
    }

    #[test]
    fn failures_outside_the_window_or_before_a_success_do_not_count() {
        let (mut breaker, now) = breaker();
        let tickets = [(); 9].map(|()| breaker.admit(now).unwrap());
        assert!(!breaker.failed(tickets[0], now) && !breaker.failed(tickets[1], now));
        assert!(!breaker.failed(tickets[2], now + 61 * SECOND));
        assert!(!breaker.failed(tickets[3], now + 61 * SECOND));
        assert!(!breaker.succeeded(tickets[4]));
        assert!(!breaker.failed(tickets[5], now + 61 * SECOND));
        assert!(!breaker.failed(tickets[6], now + 61 * SECOND));
        assert!(!breaker.strained(tickets[7], now + 61 * SECOND));
        assert!(!breaker.failed(tickets[8], now + 61 * SECOND));
        assert!(!breaker.is_open());
    }

    #[test]
    fn strain_pauses_a_little_longer_each_time_and_never_opens() {
        let (mut breaker, now) = breaker();
        let ticket = breaker.admit(now).unwrap();
        (0..100).for_each(|_| _ = breaker.strained(ticket, now));
        assert_eq!(breaker.admit(now), Err(now + 16 * FIRST_PAUSE));
        assert!(!breaker.is_open());
        assert!(!breaker.succeeded(ticket));
        assert_eq!(breaker.peek(now), Admission::Yes);
    }

    #[test]
    fn f65_a_call_that_was_admitted_before_the_breaker_opened_neither_closes_it_nor_prolongs_its_pause() {
        let (mut breaker, now) = breaker();
        let stragglers = [(); 5].map(|()| breaker.admit(now).unwrap());
        let ticket = breaker.admit(now).unwrap();
        assert!(breaker.misconfigured(ticket, now));
        let soon = now + 10 * SECOND;
        assert!(!breaker.succeeded(stragglers[0]));
        assert!(!breaker.failed(stragglers[1], soon));
        assert!(!breaker.misconfigured(stragglers[2], soon));
        assert!(!breaker.strained(stragglers[3], soon));
        breaker.unused(stragglers[4], soon);
        assert_eq!(breaker.admit(soon), Err(now + 30 * SECOND));
        // They do not decide for the probe either.
        let probe = breaker.admit(now + 30 * SECOND).unwrap();
        assert!(!breaker.succeeded(stragglers[0]) && breaker.is_open());
        assert!(!breaker.misconfigured(stragglers[2], now + 31 * SECOND));
        breaker.unused(stragglers[4], now + 31 * SECOND);
        assert_eq!(breaker.admit(now + 31 * SECOND), Err(now + 60 * SECOND));
        assert!(breaker.succeeded(probe));
        // The calls of the outage do not count in the time after it.
        assert!(!breaker.misconfigured(ticket, now + 32 * SECOND) && !breaker.is_open());
    }
}
