//! Splits a batch into requests that may be in flight together, and keeps the events of each key in order.
//!
//! All events of a key that are in flight together are in one request, in order. Events that do not fit wait for the next
//! round, which starts when every request of this round is answered. A key that failed is not sent again. If the destination
//! has several places that one request cannot span, such as the slots of a Redis Cluster, a request holds events of one place.
//! A key's events that go to another place wait for a later round.

use foldhash::{HashMap, HashMapExt, HashSet, HashSetExt};

use crate::event::{Event, Key, Outcome};

/// The limits of one request and of one round.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The most events in one request, from 1.
    pub request_events: usize,
    /// The most events of one key in one request, from 1. It is 1 if the destination may take a later event of a request and
    /// refuse an earlier one.
    pub request_key_events: usize,
    /// The most bytes in one request. A larger event is sent alone.
    pub request_bytes: usize,
    /// The most requests in flight together, from 1.
    pub requests: usize,
}

/// The state of one publish call: the outcomes of its events so far.
pub struct Rounds<'a> {
    events: &'a [&'a Event],
    places: Vec<u16>,
    outcomes: Vec<Option<Outcome>>,
    stopped: HashSet<Key<'a>>,
    ended: bool,
}

impl<'a> Rounds<'a> {
    /// Returns the state in which no event has an answer. `place` returns the place of the event with an index.
    pub fn new(events: &'a [&'a Event], place: impl FnMut(usize) -> u16) -> Self {
        let places = (0..events.len()).map(place).collect();
        Self { events, places, outcomes: vec![None; events.len()], stopped: HashSet::new(), ended: false }
    }

    /// Changes the places of all events.
    pub fn move_to_places(&mut self, place: impl FnMut(usize) -> u16) {
        self.places = (0..self.events.len()).map(place).collect();
    }

    /// Returns the next requests to send together, as indexes into the events, ascending within a request. Empty: nothing is
    /// left to send. `bytes` returns the size of an event in a request.
    pub fn next(&self, limits: Limits, bytes: impl Fn(usize) -> usize) -> Vec<Vec<usize>> {
        if self.ended {
            return Vec::new();
        }
        // A key is placed with all of its events that one request can hold. If it were placed with its first event only, the
        // request would be full before the last one, and most keys would take several rounds.
        let mut requests: Vec<Load> = Vec::new();
        for group in self.groups(limits, bytes) {
            match requests.iter().position(|request| request.fits(&group, limits)) {
                Some(request) => requests[request].add(group),
                None if requests.len() < limits.requests => requests.push(group),
                None => {}
            }
        }
        requests.iter_mut().for_each(|request| request.members.sort_unstable());
        requests.into_iter().map(|request| request.members).collect()
    }

    /// Returns the events that are still to be sent: of each key its first events, as many as one request can hold, and each
    /// event without a key by itself.
    fn groups(&self, limits: Limits, bytes: impl Fn(usize) -> usize) -> Vec<Load> {
        let mut groups: Vec<Load> = Vec::new();
        // The group of each key. `None`: the group is complete, and the later events of the key wait.
        let mut group_of: HashMap<Key<'a>, Option<usize>> = HashMap::new();
        for (index, event) in self.events.iter().enumerate() {
            let key = event.key();
            if self.outcomes[index].is_some() || key.is_some_and(|key| self.stopped.contains(&key)) {
                continue;
            }
            let load = Load { place: self.places[index], bytes: bytes(index), members: vec![index] };
            let Some(key) = key else {
                groups.push(load);
                continue;
            };
            match group_of.get(&key) {
                None => {
                    groups.push(load);
                    group_of.insert(key, Some(groups.len() - 1));
                }
                Some(&Some(group))
                    if groups[group].members.len() < limits.request_key_events && groups[group].fits(&load, limits) =>
                {
                    groups[group].add(load);
                }
                Some(_) => {
                    group_of.insert(key, None);
                }
            }
        }
        groups
    }

    /// Records an outcome. Any outcome but a delivery stops the event's key. A failure that does not charge the event ends the
    /// call.
    pub fn answer(&mut self, index: usize, outcome: Outcome) {
        if !matches!(outcome, Outcome::Delivered { .. })
            && let Some(key) = self.events[index].key()
        {
            self.stopped.insert(key);
        }
        self.ended |= matches!(&outcome, Outcome::Failed(error) if !error.fault.charges_event());
        self.outcomes[index] = Some(outcome);
    }

    /// Ends the call: nothing more is sent.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// Whether the call has ended, so that nothing more is sent.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Returns every event's outcome. Events without an answer are [`Outcome::Held`].
    pub fn into_outcomes(self) -> Vec<Outcome> {
        self.outcomes.into_iter().map(|outcome| outcome.unwrap_or(Outcome::Held)).collect()
    }
}

/// Events that are sent in one request, all to one place.
struct Load {
    place: u16,
    bytes: usize,
    members: Vec<usize>,
}

impl Load {
    /// Whether one request can hold the events of both.
    fn fits(&self, other: &Self, limits: Limits) -> bool {
        self.place == other.place
            && self.members.len() + other.members.len() <= limits.request_events
            && self.bytes + other.bytes <= limits.request_bytes
    }

    fn add(&mut self, other: Self) {
        self.members.extend(other.members);
        self.bytes += other.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::testing::{event, keyed};
    use crate::event::{Fault, PublishError};

    const LIMITS: Limits = Limits { request_events: 3, request_key_events: 3, request_bytes: 100, requests: 2 };

    fn delivered() -> Outcome {
        Outcome::Delivered { message_id: None }
    }

    #[test]
    fn a_key_rides_in_one_request_and_its_rest_waits_for_the_next_round() {
        let events: Vec<Event> = (1..=5).map(|id| keyed(id, "a")).chain([keyed(6, "b"), event(7)]).collect();
        let refs: Vec<&Event> = events.iter().collect();
        let mut rounds = Rounds::new(&refs, |_| 0);
        assert_eq!(rounds.next(LIMITS, |_| 10), [vec![0, 1, 2], vec![5, 6]]);
        for index in [0, 1, 2, 5, 6] {
            rounds.answer(index, delivered());
        }
        assert_eq!(rounds.next(LIMITS, |_| 10), [vec![3, 4]]);
    }

    #[test]
    fn a_failed_key_takes_no_further_part() {
        let events: Vec<Event> = (1..=5).map(|id| keyed(id, "a")).collect();
        let refs: Vec<&Event> = events.iter().collect();
        let mut rounds = Rounds::new(&refs, |_| 0);
        rounds.answer(0, delivered());
        rounds.answer(1, Outcome::Failed(PublishError::new(Fault::Event, "X", "")));
        rounds.answer(2, Outcome::Held);
        assert!(rounds.next(LIMITS, |_| 10).is_empty());
        let outcomes = rounds.into_outcomes();
        assert_eq!(outcomes.iter().filter(|outcome| **outcome == Outcome::Held).count(), 3);
    }

    #[test]
    fn bytes_count_and_an_oversize_event_rides_alone() {
        let events: Vec<Event> = (1..=4).map(event).collect();
        let refs: Vec<&Event> = events.iter().collect();
        let rounds = Rounds::new(&refs, |_| 0);
        let sizes = [60, 60, 500, 10];
        let limits = Limits { requests: 9, ..LIMITS };
        assert_eq!(rounds.next(limits, |index| sizes[index]), [vec![0, 3], vec![1], vec![2]]);
    }

    #[test]
    fn a_small_event_never_overtakes_a_large_one_of_its_key() {
        // The second of key `a` does not fit beside the first; the third would, and must wait all the same.
        let events = [keyed(1, "a"), keyed(2, "a"), keyed(3, "a")];
        let refs: Vec<&Event> = events.iter().collect();
        let rounds = Rounds::new(&refs, |_| 0);
        let sizes = [60, 60, 10];
        assert_eq!(rounds.next(LIMITS, |index| sizes[index]), [vec![0]]);
    }

    #[test]
    fn a_request_holds_events_of_one_place_and_a_key_waits_between_two() {
        let events = [keyed(1, "a"), event(2), keyed(3, "a"), event(4), keyed(5, "a"), keyed(6, "b")];
        let refs: Vec<&Event> = events.iter().collect();
        let places = [7, 8, 8, 7, 7, 7];
        let mut rounds = Rounds::new(&refs, |index| places[index]);
        // The third goes to another place than the first of its key. The fifth would fit beside the first, and must not overtake.
        assert_eq!(rounds.next(LIMITS, |_| 10), [vec![0, 3, 5], vec![1]]);
        [0, 1, 3, 5].into_iter().for_each(|index| rounds.answer(index, delivered()));
        assert_eq!(rounds.next(LIMITS, |_| 10), [vec![2]]);
        rounds.answer(2, delivered());
        assert_eq!(rounds.next(LIMITS, |_| 10), [vec![4]]);
    }

    #[test]
    fn a_key_is_placed_whole_where_that_is_possible() {
        // Placed one by one, the first request would be full with 1a 2b 3a, and the fourth would have to wait.
        let events = [keyed(1, "a"), keyed(2, "b"), keyed(3, "a"), keyed(4, "b"), event(5)];
        let refs: Vec<&Event> = events.iter().collect();
        assert_eq!(Rounds::new(&refs, |_| 0).next(LIMITS, |_| 10), [vec![0, 2, 4], vec![1, 3]]);
    }

    #[test]
    fn after_its_end_nothing_is_sent() {
        let events = [event(1)];
        let refs: Vec<&Event> = events.iter().collect();
        let mut rounds = Rounds::new(&refs, |_| 0);
        rounds.end();
        assert!(rounds.next(LIMITS, |_| 1).is_empty());
        assert_eq!(rounds.into_outcomes(), [Outcome::Held]);
    }
}
