//! The circuit breaker of one destination: asked before anything is claimed for it, told afterwards.
//!
//! It charges nobody and forgets nothing: while it refuses, events wait in the outbox. Time is passed in.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The pause after the first failure in a row; it doubles with each further one. Short, because most failures are
/// blips, and long enough that a refused connection is not a busy loop.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// How many strained calls in a row lengthen the pause: to 800 ms, which is time for any token bucket to refill.
const MAX_STRAIN: u32 = 5;

/// When a breaker opens, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BreakerPolicy {
    /// Failures within the window that open it.
    pub threshold: u32,
    /// How far back failures count.
    pub window: Duration,
    /// How long it stays open before one call is let through.
    pub recovery: Duration,
}

/// What a caller may do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Go ahead.
    Yes,
    /// Go ahead with a small batch: this call decides whether the breaker closes. It must be answered with
    /// [`Breaker::succeeded`], [`Breaker::failed`] or [`Breaker::unused`].
    Probe,
    /// Not before this instant.
    No(Instant),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed { not_before: Option<Instant> },
    Open { until: Instant },
    HalfOpen { since: Instant },
}

/// See the module.
#[derive(Debug)]
pub struct Breaker {
    policy: BreakerPolicy,
    state: State,
    failures: VecDeque<Instant>,
    consecutive: u32,
}

impl Breaker {
    /// A closed breaker.
    pub fn new(policy: BreakerPolicy) -> Self {
        Self { policy, state: State::Closed { not_before: None }, failures: VecDeque::new(), consecutive: 0 }
    }

    /// Asks for leave to call the destination now. After the recovery time exactly one caller gets a probe.
    pub fn admit(&mut self, now: Instant) -> Admission {
        match self.peek(now) {
            Admission::Probe => {
                self.state = State::HalfOpen { since: now };
                Admission::Probe
            }
            other => other,
        }
    }

    /// What [`Self::admit`] would answer, without taking the probe.
    pub fn peek(&self, now: Instant) -> Admission {
        match self.state {
            State::Closed { not_before: Some(at) } if at > now => Admission::No(at),
            State::Closed { .. } => Admission::Yes,
            State::Open { until } if until > now => Admission::No(until),
            State::Open { .. } => Admission::Probe,
            // A prober that never came back (its task died) must not keep the destination shut for ever.
            State::HalfOpen { since } if since + self.policy.recovery <= now => Admission::Probe,
            State::HalfOpen { since } => Admission::No(since + self.policy.recovery),
        }
    }

    /// Whether it is open or probing: the destination is down, not just catching its breath.
    pub fn is_open(&self) -> bool {
        !matches!(self.state, State::Closed { .. })
    }

    /// A call was answered. Returns whether this closed the breaker.
    pub fn succeeded(&mut self) -> bool {
        let was_open = self.is_open();
        self.state = State::Closed { not_before: None };
        self.consecutive = 0;
        if was_open {
            self.failures.clear();
        }
        was_open
    }

    /// A call failed by the destination's fault. Returns whether this opened the breaker.
    pub fn failed(&mut self, now: Instant) -> bool {
        self.consecutive = self.consecutive.saturating_add(1);
        self.failures.push_back(now);
        while self.failures.front().is_some_and(|at| *at + self.policy.window < now) {
            self.failures.pop_front();
        }
        match self.state {
            State::Open { .. } => false, // a straggler that was admitted before it opened
            State::HalfOpen { .. } => self.open(now),
            State::Closed { .. } if self.failures.len() >= self.policy.threshold as usize => self.open(now),
            State::Closed { .. } => {
                self.state = State::Closed { not_before: Some(now + self.pause()) };
                false
            }
        }
    }

    /// A call was answered in part, as when a destination throttles: pauses, but never opens, because the destination works.
    pub fn strained(&mut self, now: Instant) {
        self.consecutive = self.consecutive.saturating_add(1).min(MAX_STRAIN);
        self.state = State::Closed { not_before: Some(now + self.pause()) };
    }

    /// The destination is set up wrongly: opens at once, whatever the threshold. Returns whether it was closed.
    pub fn misconfigured(&mut self, now: Instant) -> bool {
        let was_open = self.is_open();
        self.open(now);
        !was_open
    }

    /// An admitted caller made no call after all: a probe goes back to the next caller.
    pub fn unused(&mut self, now: Instant) {
        if matches!(self.state, State::HalfOpen { .. }) {
            self.state = State::Open { until: now };
        }
    }

    /// The pause that the failures in a row call for.
    fn pause(&self) -> Duration {
        let doubled = FIRST_PAUSE.saturating_mul(1 << self.consecutive.saturating_sub(1).min(16));
        doubled.min(self.policy.recovery)
    }

    fn open(&mut self, now: Instant) -> bool {
        self.state = State::Open { until: now + self.policy.recovery };
        self.failures.clear();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn breaker() -> (Breaker, Instant) {
        let policy = BreakerPolicy { threshold: 3, window: 60 * SECOND, recovery: 30 * SECOND };
        (Breaker::new(policy), Instant::now())
    }

    #[test]
    fn a_failure_pauses_and_the_pause_doubles() {
        let (mut breaker, now) = breaker();
        assert!(!breaker.failed(now));
        assert_eq!(breaker.admit(now), Admission::No(now + FIRST_PAUSE));
        assert_eq!(breaker.admit(now + FIRST_PAUSE), Admission::Yes);
        assert!(!breaker.failed(now));
        assert_eq!(breaker.admit(now), Admission::No(now + 2 * FIRST_PAUSE));
        assert!(!breaker.is_open());
    }

    #[test]
    fn it_opens_at_the_threshold_and_lets_one_probe_through_after_recovery() {
        let (mut breaker, now) = breaker();
        assert_eq!([breaker.failed(now), breaker.failed(now), breaker.failed(now)], [false, false, true]);
        assert_eq!(breaker.admit(now + 29 * SECOND), Admission::No(now + 30 * SECOND));
        let later = now + 30 * SECOND;
        assert_eq!(breaker.admit(later), Admission::Probe);
        assert_eq!(breaker.admit(later), Admission::No(later + 30 * SECOND));
        assert!(breaker.succeeded());
        assert_eq!(breaker.admit(later), Admission::Yes);
        assert!(!breaker.failed(later), "the failures of the last outage are forgotten");
    }

    #[test]
    fn a_failed_probe_opens_it_again() {
        let (mut breaker, now) = breaker();
        assert_eq!((0..3).filter(|_| breaker.failed(now)).count(), 1);
        let later = now + 30 * SECOND;
        assert_eq!(breaker.admit(later), Admission::Probe);
        assert!(breaker.failed(later));
        assert_eq!(breaker.admit(later), Admission::No(later + 30 * SECOND));
    }

    #[test]
    fn an_unused_probe_goes_to_the_next_caller_and_a_lost_one_expires() {
        let (mut breaker, now) = breaker();
        assert!(breaker.misconfigured(now));
        let later = now + 30 * SECOND;
        assert_eq!(breaker.admit(later), Admission::Probe);
        breaker.unused(later);
        assert_eq!(breaker.admit(later), Admission::Probe);
        assert_eq!(breaker.admit(later + 30 * SECOND), Admission::Probe);
    }

    #[test]
    fn failures_outside_the_window_do_not_count() {
        let (mut breaker, now) = breaker();
        breaker.failed(now);
        breaker.failed(now);
        assert!(!breaker.failed(now + 61 * SECOND));
        assert!(!breaker.is_open());
    }

    #[test]
    fn strain_pauses_a_little_longer_each_time_and_never_opens() {
        let (mut breaker, now) = breaker();
        (0..100).for_each(|_| breaker.strained(now));
        assert_eq!(breaker.admit(now), Admission::No(now + 16 * FIRST_PAUSE));
        assert!(!breaker.is_open());
        assert!(!breaker.succeeded());
        assert_eq!(breaker.admit(now), Admission::Yes);
    }

    #[test]
    fn a_straggler_does_not_prolong_an_open_breaker() {
        let (mut breaker, now) = breaker();
        assert!(breaker.misconfigured(now));
        assert!(!breaker.failed(now + 10 * SECOND));
        assert_eq!(breaker.admit(now + 30 * SECOND), Admission::Probe);
    }
}
