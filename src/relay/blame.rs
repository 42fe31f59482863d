//! Decides whether the uncharged failures of a call are caused by the destination or by the events that failed.
//!
//! If a destination takes some events and fails others, in the same call or at the same moment, it works, and the failures
//! are about those events: a source that EventBridge does not allow, a stream of another owner. Their keys wait, and the
//! destination is not paused. If it takes nothing, the destination is the cause. Time is passed in.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::event::{Fault, Outcome, PublishError};

/// A call that is refused within this time after a delivery is presumed to be refused because of its events: a destination
/// that took events a moment ago more likely refuses these than all. If they are refused again and nothing was delivered
/// meanwhile, it refuses all.
const LATELY: Duration = Duration::from_secs(5);

/// At most this many calls in a row are presumed to be refused because of their events. A burst of bad events takes about as
/// many, and a busy relay makes them within a moment.
const PRESUMED_CALLS: u32 = 10;

/// The largest number of events to remember, which is more than fail at a time. At this number the memory is cleared, and
/// all events count as new.
const MAX_REMEMBERED: usize = 10_000;

/// The facts about one event of a call that the judgement needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    pub(super) event_id: Uuid,
    /// The event has waited for this destination before, because of its own uncharged failure.
    pub(super) blocked_before: bool,
}

/// The facts about one call that the judgement needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub(super) begun: Instant,
    pub(super) now: Instant,
    /// False if the call was admitted in an earlier state of the breaker. Then its deliveries say nothing about the
    /// destination's present state.
    pub(super) current: bool,
    /// The result of this call decides whether the breaker closes.
    pub(super) probe: bool,
}

/// The results of the calls to one destination so far.
#[derive(Debug, Default)]
pub(super) struct Blame {
    last_delivery: Option<Instant>,
    /// The events of refused calls that were blamed because of a recent delivery. Cleared by the next delivery.
    presumed: HashSet<Uuid>,
    presumed_calls: u32,
    /// The events that failed for a reason that may pass, with the time of the last failure.
    failed_once: HashMap<Uuid, Instant>,
}

/// The state of a destination, as one call shows it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum CallHealth<'a> {
    /// The destination answered.
    Answered,
    /// The destination works, and needs a short pause.
    Strained(&'a PublishError),
    /// The destination is down.
    Failed(&'a PublishError),
    /// The destination is configured wrongly.
    Misconfigured(&'a PublishError),
    /// The call says nothing about the destination.
    Silent,
}

/// The judgement on one call.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Judgement<'a> {
    pub(super) health: CallHealth<'a>,
    /// The places of the events whose keys wait. All other events that failed uncharged stay in place.
    pub(super) blocked: Vec<usize>,
}

impl Blame {
    /// Judges a call.
    pub(super) fn judge<'a>(
        &mut self,
        candidate: impl Fn(usize) -> Candidate,
        outcomes: &'a [Outcome],
        call: Call,
    ) -> Judgement<'a> {
        let Call { begun, now, .. } = call;
        let delivered = outcomes.iter().any(|outcome| matches!(outcome, Outcome::Delivered { .. }));
        if delivered && call.current {
            self.last_delivery = Some(now);
            self.presumed.clear();
            self.presumed_calls = 0;
        }
        if !self.failed_once.is_empty() {
            for (place, outcome) in outcomes.iter().enumerate() {
                if matches!(outcome, Outcome::Delivered { .. }) {
                    self.failed_once.remove(&candidate(place).event_id);
                }
            }
        }
        let failed: Vec<(usize, &PublishError)> = uncharged(outcomes).collect();
        let answered = delivered
            || outcomes.iter().any(|outcome| matches!(outcome, Outcome::Failed(error) if error.fault == Fault::Event));
        let Some(&(_, first)) = failed.first() else {
            return Judgement {
                health: if answered { CallHealth::Answered } else { CallHealth::Silent },
                blocked: Vec::new(),
            };
        };
        // An error of the destination itself, such as a wrong password, is not caused by events, even if others were taken a
        // moment ago.
        if let Some(&(_, error)) = failed.iter().find(|(_, error)| error.of_destination) {
            let health = match error.fault {
                Fault::Misconfigured => CallHealth::Misconfigured(error),
                _ if delivered => CallHealth::Strained(error),
                _ => CallHealth::Failed(error),
            };
            return Judgement { health, blocked: Vec::new() };
        }
        let refused = failed.iter().find(|(_, error)| error.fault == Fault::Misconfigured).map(|(_, error)| *error);
        let candidates: Vec<(usize, &PublishError, Candidate)> =
            failed.iter().map(|&(place, error)| (place, error, candidate(place))).collect();
        let others_succeed = delivered || self.last_delivery.is_some_and(|at| at >= begun);
        if others_succeed || self.is_known(&candidates) {
            return self.blame_events(&candidates, delivered, now);
        }
        if refused.is_some()
            && self.presumed_calls < PRESUMED_CALLS
            && self.last_delivery.is_some_and(|at| at + LATELY >= begun)
            && !candidates.iter().any(|(_, _, candidate)| self.presumed.contains(&candidate.event_id))
        {
            self.presumed_calls += 1;
            self.presumed.extend(candidates.iter().map(|(_, _, candidate)| candidate.event_id));
            return self.blame_events(&candidates, false, now);
        }
        let passing = candidates.iter().filter(|(_, error, _)| error.fault != Fault::Misconfigured);
        passing.for_each(|(_, _, candidate)| self.remember(candidate.event_id, now));
        // Events that were blocked before, and the events of a refused probe, have to wait, so that the next probe is made with
        // other events.
        let out_of_the_way = |error: &PublishError, candidate: &Candidate| {
            candidate.blocked_before || call.probe && error.fault == Fault::Misconfigured
        };
        let blocked = candidates.iter().filter(|(_, error, candidate)| out_of_the_way(error, candidate));
        Judgement {
            health: match refused {
                Some(error) => CallHealth::Misconfigured(error),
                None if answered => CallHealth::Strained(first),
                None => CallHealth::Failed(first),
            },
            blocked: blocked.map(|(place, _, _)| *place).collect(),
        }
    }

    /// Returns whether the destination has taken an event since `then`.
    pub(super) fn delivered_since(&self, then: Instant) -> bool {
        self.last_delivery.is_some_and(|at| at > then)
    }

    /// Returns whether all of these events have failed before while the destination took others.
    fn is_known(&self, candidates: &[(usize, &PublishError, Candidate)]) -> bool {
        candidates.iter().all(|(_, error, candidate)| {
            let again = self.failed_once.get(&candidate.event_id).is_some_and(|at| self.last_delivery > Some(*at));
            !self.presumed.contains(&candidate.event_id)
                && (candidate.blocked_before || again && error.fault != Fault::Misconfigured)
        })
    }

    /// The keys of events that are refused wait. An event that failed for a reason that may pass is retried once, after a
    /// short pause of the destination; after the second failure its key waits too.
    fn blame_events<'a>(
        &mut self,
        candidates: &[(usize, &'a PublishError, Candidate)],
        delivered: bool,
        now: Instant,
    ) -> Judgement<'a> {
        let mut health = if delivered { CallHealth::Answered } else { CallHealth::Silent };
        let mut blocked = Vec::new();
        for (place, error, candidate) in candidates {
            let again = candidate.blocked_before || self.failed_once.contains_key(&candidate.event_id);
            if error.fault == Fault::Misconfigured || again {
                blocked.push(*place);
            } else {
                health = CallHealth::Strained(error);
            }
            if error.fault != Fault::Misconfigured {
                self.remember(candidate.event_id, now);
            }
        }
        Judgement { health, blocked }
    }

    fn remember(&mut self, event_id: Uuid, now: Instant) {
        if self.failed_once.len() >= MAX_REMEMBERED {
            self.failed_once.clear();
        }
        self.failed_once.insert(event_id, now);
    }
}

/// Returns the failures for which no event is charged, with their places.
fn uncharged(outcomes: &[Outcome]) -> impl Iterator<Item = (usize, &PublishError)> {
    outcomes.iter().enumerate().filter_map(|(place, outcome)| match outcome {
        Outcome::Failed(error) if !error.fault.charges_event() => Some((place, error)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn delivered() -> Outcome {
        Outcome::Delivered { message_id: None }
    }

    fn failed(fault: Fault) -> Outcome {
        Outcome::Failed(PublishError::new(fault, "CODE", ""))
    }

    fn label(health: &CallHealth<'_>) -> &'static str {
        match health {
            CallHealth::Answered => "answered",
            CallHealth::Strained(_) => "strained",
            CallHealth::Failed(_) => "failed",
            CallHealth::Misconfigured(_) => "misconfigured",
            CallHealth::Silent => "silent",
        }
    }

    /// A destination for the tests. Each event is a number; those from 100 on were blocked before.
    struct Place {
        blame: Blame,
        begun: Instant,
    }

    impl Place {
        fn new() -> Self {
            Self { blame: Blame::default(), begun: Instant::now() }
        }

        /// Judges a call from the second `from` to the second `to` with these events.
        fn call(&mut self, from: u32, to: u32, events: &[(u128, Outcome)]) -> (&'static str, Vec<usize>) {
            let outcomes: Vec<Outcome> = events.iter().map(|(_, outcome)| outcome.clone()).collect();
            let candidate = |place: usize| Candidate {
                event_id: Uuid::from_u128(events[place].0),
                blocked_before: events[place].0 >= 100,
            };
            let (begun, now) = (self.begun + from * SECOND, self.begun + to * SECOND);
            let call = Call { begun, now, current: true, probe: false };
            let Judgement { health, blocked } = self.blame.judge(candidate, &outcomes, call);
            (label(&health), blocked)
        }
    }

    #[test]
    fn f64_what_is_refused_among_events_that_are_taken_waits_and_the_destination_goes_on() {
        let mut place = Place::new();
        let mixed = [(1, delivered()), (2, failed(Fault::Misconfigured)), (3, delivered())];
        assert_eq!(place.call(0, 1, &mixed), ("answered", vec![1]));
        // After that, it may fail alone.
        for second in 2..300 {
            assert_eq!(place.call(second, second, &[(102, failed(Fault::Misconfigured))]), ("silent", vec![0]));
        }
    }

    #[test]
    fn f64_where_nothing_is_taken_the_destination_is_at_fault() {
        let mut place = Place::new();
        for fault in [Fault::Misconfigured, Fault::Destination, Fault::Unknown] {
            let label = if fault == Fault::Misconfigured { "misconfigured" } else { "failed" };
            for second in 0..3 {
                assert_eq!(place.call(second, second, &[(1, failed(fault)), (2, failed(fault))]), (label, vec![]));
            }
        }
        // The event that was blocked before makes room for the next probe.
        let both = [(101, failed(Fault::Misconfigured)), (2, failed(Fault::Misconfigured))];
        assert_eq!(place.call(9, 9, &both), ("misconfigured", vec![0]));
        let call = Call { begun: place.begun, now: place.begun, current: true, probe: true };
        let candidate = |_| Candidate { event_id: Uuid::nil(), blocked_before: false };
        let outcomes = [failed(Fault::Misconfigured)];
        assert_eq!(place.blame.judge(candidate, &outcomes, call).blocked, [0], "a probe that is refused");
    }

    #[test]
    fn f64_a_delivery_of_another_call_at_the_same_moment_tells_that_the_destination_works() {
        let mut place = Place::new();
        assert_eq!(place.call(0, 30, &[(1, delivered())]).0, "answered");
        assert_eq!(place.call(10, 31, &[(2, failed(Fault::Misconfigured))]), ("silent", vec![0]));
        assert_eq!(place.call(60, 61, &[(3, failed(Fault::Misconfigured))]), ("misconfigured", vec![]));
    }

    #[test]
    fn f64_shortly_after_a_delivery_a_refused_call_is_its_events_until_they_are_refused_again() {
        let mut place = Place::new();
        assert_eq!(place.call(0, 0, &[(1, delivered())]).0, "answered");
        for event in 10..19 {
            assert_eq!(place.call(1, 1, &[(event, failed(Fault::Misconfigured))]), ("silent", vec![0]));
        }
        assert_eq!(
            place.call(1, 1, &[(102, failed(Fault::Misconfigured)), (3, failed(Fault::Misconfigured))]).1,
            [0, 1]
        );
        assert_eq!(place.call(2, 2, &[(4, failed(Fault::Misconfigured))]), ("misconfigured", vec![]));
        // The failures of blamed events do not make the destination healthy either, until it takes an event.
        assert_eq!(place.call(3, 3, &[(102, failed(Fault::Misconfigured))]), ("misconfigured", vec![0]));
        assert_eq!(place.call(4, 4, &[(5, delivered())]).0, "answered");
        assert_eq!(place.call(5, 5, &[(102, failed(Fault::Misconfigured))]), ("silent", vec![0]));
    }

    #[test]
    fn f64_what_concerns_no_event_is_the_destinations_fault_whatever_it_took_before() {
        let mut place = Place::new();
        for (fault, label) in [(Fault::Misconfigured, "misconfigured"), (Fault::Destination, "failed")] {
            let refused = || Outcome::Failed(PublishError::new(fault, "CODE", "").of_destination());
            for second in 0..9 {
                assert_eq!(place.call(second, second, &[(1, delivered())]).0, "answered");
                // The result is the same at the same moment, again, and for an event that was blocked before.
                assert_eq!(place.call(second, second, &[(2, refused()), (102, refused())]), (label, vec![]));
            }
        }
        let refused = Outcome::Failed(PublishError::new(Fault::Misconfigured, "CODE", "").of_destination());
        assert_eq!(place.call(10, 10, &[(1, delivered()), (2, refused)]), ("misconfigured", vec![]));
    }

    #[test]
    fn f64_a_failure_that_may_pass_strains_the_destination_once_and_blocks_the_event_the_second_time() {
        for fault in [Fault::Destination, Fault::Unknown] {
            let mut place = Place::new();
            let mixed = [(1, delivered()), (2, failed(fault))];
            assert_eq!(place.call(0, 0, &mixed), ("strained", vec![]));
            assert_eq!(place.call(1, 1, &mixed), ("answered", vec![1]));
            assert_eq!(place.call(2, 2, &[(102, failed(fault))]), ("silent", vec![0]));
            // A failure alone is blamed on the event only if others were taken since.
            assert_eq!(place.call(3, 3, &[(4, failed(fault))]), ("failed", vec![]));
            assert_eq!(place.call(4, 4, &[(4, failed(fault))]), ("failed", vec![]));
            assert_eq!(place.call(5, 5, &[(5, delivered())]).0, "answered");
            assert_eq!(place.call(6, 6, &[(4, failed(fault))]), ("silent", vec![0]));
            // After a delivery, counting starts anew.
            assert_eq!(place.call(7, 7, &[(2, delivered())]).0, "answered");
            assert_eq!(place.call(8, 8, &mixed), ("strained", vec![]));
        }
    }

    #[test]
    fn charged_failures_are_answers_and_held_events_say_nothing() {
        let mut place = Place::new();
        assert_eq!(place.call(0, 0, &[(1, failed(Fault::Event)), (2, Outcome::Held)]), ("answered", vec![]));
        assert_eq!(place.call(0, 0, &[(1, failed(Fault::Unfit)), (2, Outcome::Held)]), ("silent", vec![]));
        assert_eq!(place.call(0, 0, &[(1, failed(Fault::Event)), (2, failed(Fault::Destination))]).0, "strained");
    }
}
