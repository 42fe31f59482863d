//! Finds the one event on which a destination's code panics.
//!
//! A panic ends the call, and the outcome of its events is unknown. They are published again in smaller groups, apart from
//! all others, until the event that causes the panic is alone. This is kept in memory only, because the process survives a
//! panic.

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use uuid::Uuid;

use crate::event::Event;

/// How many times fewer events than in the last panic are published together.
const NARROWING: usize = 32;

/// An event that was alone in this many panics is taken for the cause.
pub(super) const PANICS_ALONE: u32 = 3;

/// The largest number of events to remember, which is more than panic at a time. At this number the memory is cleared, and
/// narrowing begins anew.
const MAX_REMEMBERED: usize = 100_000;

/// The events of calls that panicked, until they are answered.
#[derive(Debug, Default)]
pub(super) struct Panics(HashMap<Uuid, Panicked>);

#[derive(Debug, Clone, Copy)]
struct Panicked {
    /// How many events were published together when the event last panicked.
    together: usize,
    alone: u32,
    since: Instant,
}

impl Panicked {
    fn limit(self) -> usize {
        (self.together / NARROWING).max(1)
    }
}

/// The places of the events that are published now, in two calls one after the other. All others wait for the next batch.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Split {
    pub(super) unsuspected: Vec<usize>,
    pub(super) suspects: Vec<usize>,
}

impl Panics {
    /// Returns how to publish `events` if some of them were part of a panic.
    pub(super) fn split(&self, events: &[&Event]) -> Option<Split> {
        if self.0.is_empty() || !events.iter().any(|event| self.0.contains_key(&event.event_id)) {
            return None;
        }
        // A key stops at its first event that is left out.
        let (mut stopped, mut left_out) = (HashSet::new(), HashSet::new());
        let mut split = Split { unsuspected: Vec::new(), suspects: Vec::new() };
        let (mut limit, mut heads) = (usize::MAX, Vec::new());
        for (place, event) in events.iter().enumerate() {
            let key = event.key();
            match self.0.get(&event.event_id) {
                None if key.is_some_and(|key| stopped.contains(&key)) => {}
                None => split.unsuspected.push(place),
                Some(panicked) => {
                    if key.is_none_or(|key| stopped.insert(key)) {
                        heads.push((panicked.alone, place));
                    }
                    if key.is_some_and(|key| left_out.contains(&key)) {
                        continue;
                    }
                    let together = limit.min(panicked.limit());
                    if panicked.alone == 0 && split.suspects.len() < together {
                        limit = together;
                        split.suspects.push(place);
                    } else {
                        key.map(|key| left_out.insert(key));
                    }
                }
            }
        }
        // All events that are left were alone already. The one that was alone the least often is next.
        if split.suspects.is_empty() {
            split.suspects.extend(heads.into_iter().min().map(|(_, place)| place));
        }
        Some(split)
    }

    /// Records that a call with these events panicked. If the event was alone, returns how often it was alone, and since
    /// when.
    pub(super) fn panicked(&mut self, events: &[&Event], now: Instant) -> Option<(u32, Instant)> {
        if self.0.len() >= MAX_REMEMBERED {
            self.0.clear();
        }
        for event in events {
            let known = self.0.entry(event.event_id).or_insert(Panicked { together: 0, alone: 0, since: now });
            known.together = events.len();
        }
        let [event] = events else { return None };
        let known = self.0.get_mut(&event.event_id)?;
        known.alone = known.alone.saturating_add(1);
        Some((known.alone, known.since))
    }

    /// Records that these events were answered.
    pub(super) fn answered<'a>(&mut self, events: impl Iterator<Item = &'a Event>) {
        if !self.0.is_empty() {
            for event in events {
                self.0.remove(&event.event_id);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::event::testing::{event, keyed};

    #[test]
    fn f63_what_panicked_together_comes_again_in_a_smaller_group_apart_from_the_others() {
        let events: Vec<Event> = (0..70).map(event).collect();
        let refs: Vec<&Event> = events.iter().collect();
        let mut panics = Panics::default();
        assert_eq!(panics.split(&refs), None);
        assert_eq!(panics.panicked(&refs[..64], Instant::now()), None);
        let split = panics.split(&refs).unwrap();
        assert_eq!(split, Split { unsuspected: (64..70).collect(), suspects: vec![0, 1] });
        panics.panicked(&refs[..2], Instant::now());
        assert_eq!(panics.split(&refs).unwrap().suspects, [0]);
        // The event that was alone already waits until each of the others of its group was alone.
        assert_eq!(panics.panicked(&refs[..1], Instant::now()).unwrap().0, 1);
        assert_eq!(panics.split(&refs).unwrap().suspects, [1]);
        panics.answered(std::iter::once(refs[1]));
        assert_eq!(panics.split(&refs[..1]).unwrap().suspects, [0]);
        assert_eq!(panics.panicked(&refs[..1], Instant::now()).unwrap().0, 2);
        panics.answered(std::iter::once(refs[0]));
        assert_eq!(panics.split(&refs[..2]), None);
    }

    #[test]
    fn f63_a_key_keeps_its_order_in_groups() {
        let events = [keyed(1, "a"), keyed(2, "b"), keyed(3, "a"), keyed(4, "b"), event(5), keyed(6, "c")];
        let refs: Vec<&Event> = events.iter().collect();
        let mut panics = Panics::default();
        panics.panicked(&[refs[0], refs[2]], Instant::now());
        panics.panicked(&refs[1..2], Instant::now());
        // The fourth waits behind the second, which was alone; the third behind the first, which is to be alone.
        assert_eq!(panics.split(&refs).unwrap(), Split { unsuspected: vec![4, 5], suspects: vec![0] });
        panics.panicked(&refs[..1], Instant::now());
        panics.panicked(&refs[..1], Instant::now());
        assert_eq!(panics.split(&refs).unwrap().suspects, [1], "it was alone less often");
    }
}
