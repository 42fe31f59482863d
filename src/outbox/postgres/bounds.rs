//! Up to which id a partition has nothing left, so that a claim need not walk over its dead rows.
//!
//! While any session holds an old snapshot, a deleted row stays in the table and its indexes: every scan from the left of a
//! partition would walk over all that has died there since. A bound skips them, and must never hide a row that lives:
//!
//! - The row of a transaction still in flight has a lower id than what was read beside it. Whoever inserts locks the table
//!   before the id is drawn, until its end. So of the last id drawn at some time, and of all before it, everything is known
//!   once those who held that lock afterwards are gone: that id is the *horizon*, and no bound lies beyond it.
//! - A row that a claim did not read, or a settle left where it was, lies above the bound that they lead to.
//! - A row that is moved into a partition, or put back, has an old id. Whoever does that raises `event_outbox_moves`, see
//!   `migrations/postgres/0009_moved_events.sql`, and a claim that reads another number than the last one forgets all bounds.
//! - A row that somebody inserts with an id of their own announces itself by nothing. So the bounds are forgotten once a
//!   minute.
//!
//! Behind a transaction-pooling proxy nothing tells when the server was replaced by one that lags behind: no bounds there.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a row that somebody inserted with an id of their own may stay hidden.
const LIFETIME: Duration = Duration::from_secs(60);

/// So many events are settled between two questions for the horizon: about as many dead rows are still walked over.
const EVENTS_BETWEEN_QUESTIONS: usize = 1000;

/// What the lanes of a relay share.
#[derive(Debug, Clone, Default)]
pub(super) struct Bounds(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    known: Known,
    /// When the first of the bounds may have been set.
    since: Option<Instant>,
    /// The horizon to be, once these transactions are gone.
    next: Option<Writers>,
    /// Events settled since the last question.
    settled: usize,
}

/// What a claim goes by.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    /// The number of moves that all this holds for.
    pub(super) moves: i64,
    /// How often bounds were forgotten: what was read by older ones leads to none.
    era: u64,
    /// Everything with an id up to this one is committed or will never be.
    pub(super) horizon: Option<i64>,
    /// By partition: nothing with an id up to this one is left there.
    pub(super) bounds: Arc<BTreeMap<i16, i64>>,
}

/// The last id drawn, and then the transactions that might have drawn it or one before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Writers {
    pub(super) last_id: i64,
    pub(super) transactions: Vec<String>,
}

/// What a claim has read; if all of it is deleted, bounds follow.
#[derive(Debug)]
pub(super) struct Reading {
    era: u64,
    /// By partition: nothing with an id up to this one is left there but what was read.
    reached: Vec<(i16, i64)>,
    rows: usize,
}

impl Known {
    /// Above which id to read each of these partitions.
    pub(super) fn bounds_of(&self, partitions: &[i32]) -> Vec<i64> {
        let bound = |&partition| self.bounds.get(&i16::try_from(partition).ok()?).copied();
        partitions.iter().map(|partition| bound(partition).unwrap_or(i64::MIN)).collect()
    }

    /// A reading of so many rows, `last` gives for each partition the id of the last one that was read, if there may be more.
    pub(super) fn reading(&self, last: impl Iterator<Item = (i32, Option<i64>)>, rows: usize) -> Option<Reading> {
        let horizon = self.horizon?;
        // Of the same id there may be another row, for another destination.
        let reached = |last: Option<i64>| last.map_or(horizon, |last| horizon.min(last - 1));
        let reached = last.filter_map(|(partition, last)| Some((i16::try_from(partition).ok()?, reached(last)))).collect();
        Some(Reading { era: self.era, reached, rows })
    }
}

impl Bounds {
    /// What a claim starts from, and whether it is to ask for the writers.
    pub(super) fn known(&self) -> (Known, bool) {
        let mut state = self.state();
        if state.since.is_some_and(|since| since.elapsed() > LIFETIME) {
            let Known { moves, horizon, .. } = state.known;
            state.forget(Known { moves, horizon, ..Known::default() });
        }
        (state.known.clone(), state.settled >= EVENTS_BETWEEN_QUESTIONS)
    }

    /// Takes note of what a claim found: the number of moves, and the writers where it asked. Returns what holds now.
    pub(super) fn found(&self, moves: i64, writers: Option<Writers>) -> Known {
        let mut state = self.state();
        if state.known.moves != moves {
            // The horizon too: whoever raised the number may still be in flight, and is among the writers asked for next.
            state.forget(Known { moves, ..Known::default() });
            state.next = None;
            state.settled = EVENTS_BETWEEN_QUESTIONS;
        } else if let Some(writers) = writers {
            state.wrote(writers);
        }
        state.known.clone()
    }

    /// `deleted` rows of a reading are gone, by a transaction that has committed.
    pub(super) fn settled(&self, reading: Option<Reading>, deleted: usize) {
        let mut state = self.state();
        state.settled += deleted;
        let of_now = |reading: &Reading| reading.rows == deleted && reading.era == state.known.era;
        let Some(reading) = reading.filter(of_now) else { return };
        state.since.get_or_insert_with(Instant::now);
        let bounds = Arc::make_mut(&mut state.known.bounds);
        for (partition, reached) in reading.reached {
            let bound = bounds.entry(partition).or_insert(reached);
            *bound = (*bound).max(reached);
        }
    }

    /// A connection is new: its server may be another, in which ids start lower.
    pub(super) fn forget(&self) {
        let mut state = self.state();
        state.forget(Known::default());
        state.next = None;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn forget(&mut self, known: Known) {
        self.known = Known { era: self.known.era + 1, ..known };
        self.since = None;
    }

    fn wrote(&mut self, writers: Writers) {
        self.settled = 0;
        if self.known.horizon.is_some_and(|horizon| horizon > writers.last_id) {
            // The ids were restarted.
            let moves = self.known.moves;
            self.forget(Known { moves, ..Known::default() });
            self.next = None;
        }
        // A transaction that is prepared for a two-phase commit keeps its locks under another name, `-1/...`.
        let lasts = |name: &String, before: &Writers| name.starts_with("-1/") || before.transactions.contains(name);
        match &self.next {
            Some(before) if writers.transactions.iter().any(|name| lasts(name, before)) => {}
            before => {
                if let Some(before) = before {
                    self.known.horizon = Some(before.last_id);
                }
                self.next = Some(writers);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writers(last_id: i64, transactions: &[&str]) -> Option<Writers> {
        Some(Writers { last_id, transactions: transactions.iter().map(ToString::to_string).collect() })
    }

    /// Bounds with a horizon, and one partition with a bound at it.
    fn settled() -> Bounds {
        let bounds = Bounds::default();
        bounds.found(1, None);
        bounds.found(1, writers(100, &[]));
        let known = bounds.found(1, writers(200, &[]));
        assert_eq!(known.horizon, Some(100));
        bounds.settled(known.reading([(7, None), (8, Some(60))].into_iter(), 5), 5);
        assert_eq!(*bounds.known().0.bounds, BTreeMap::from([(7, 100), (8, 59)]));
        bounds
    }

    #[test]
    fn the_horizon_waits_for_who_was_writing() {
        let bounds = Bounds::default();
        bounds.found(1, None);
        assert_eq!(bounds.found(1, writers(10, &["3/1", "4/1"])).horizon, None);
        assert_eq!(bounds.found(1, writers(20, &["4/1", "5/1"])).horizon, None);
        assert_eq!(bounds.found(1, writers(30, &["5/1", "-1/77"])).horizon, None, "one is prepared now, maybe 4/1");
        assert_eq!(bounds.found(1, writers(40, &["5/1"])).horizon, Some(10));
        assert_eq!(bounds.found(1, writers(50, &["5/2"])).horizon, Some(40));
    }

    #[test]
    fn it_is_asked_for_once_a_thousand_events() {
        let bounds = Bounds::default();
        bounds.found(1, None);
        assert!(bounds.known().1, "at first at once");
        bounds.found(1, writers(10, &[]));
        bounds.settled(None, 999);
        assert!(!bounds.known().1);
        bounds.settled(None, 1);
        assert!(bounds.known().1);
    }

    #[test]
    fn a_bound_never_goes_back() {
        let bounds = settled();
        let known = bounds.known().0;
        bounds.settled(known.reading([(7, Some(50))].into_iter(), 5), 5);
        assert_eq!(bounds.known().0.bounds_of(&[7, 8, 9]), [100, 59, i64::MIN]);
    }

    #[test]
    fn a_row_left_where_it_was_sets_no_bound() {
        let bounds = settled();
        let known = bounds.known().0;
        bounds.settled(known.reading([(9, None)].into_iter(), 5), 4);
        assert_eq!(bounds.known().0.bounds_of(&[9]), [i64::MIN]);
    }

    #[test]
    fn a_move_ends_bounds_and_horizon_and_what_was_read_before() {
        let bounds = settled();
        let read = bounds.known().0.reading([(7, None)].into_iter(), 5);
        let known = bounds.found(2, writers(300, &[]));
        assert_eq!((known.horizon, known.bounds.len()), (None, 0));
        assert!(bounds.known().1, "it is to be asked for again");
        bounds.settled(read, 5);
        assert!(bounds.known().0.bounds.is_empty());
    }

    #[test]
    fn restarted_ids_a_new_connection_and_a_minute_end_bounds() {
        let bounds = settled();
        bounds.found(1, writers(3, &[]));
        assert!(bounds.known().0.bounds.is_empty());
        let bounds = settled();
        bounds.forget();
        assert!(bounds.known().0.bounds.is_empty());
        let bounds = settled();
        let read = bounds.known().0.reading([(7, None)].into_iter(), 5);
        bounds.state().since = Instant::now().checked_sub(LIFETIME + Duration::from_secs(1));
        let known = bounds.known().0;
        assert_eq!((known.horizon, known.bounds.len()), (Some(100), 0));
        bounds.settled(read, 5);
        assert!(bounds.known().0.bounds.is_empty(), "it was read by an old bound");
    }
}
