//! Bounds: the id up to which a partition has no row left, so that a claim need not walk over its dead rows.
//!
//! While any session holds an old snapshot, a deleted row stays in the table and its indexes. Every scan from the left of a
//! partition would walk over all rows that were deleted there since. A bound skips them, and must never hide a row that exists:
//!
//! - A transaction in flight may hold a row with a lower id than the rows that are read meanwhile. A transaction that inserts
//!   locks the table before it draws the id, and holds that lock until its end. So, once all transactions that held the lock
//!   after an id was drawn have ended, all rows up to that id are known. That id is the *horizon*, and no bound lies beyond it.
//! - A row that a claim did not read, or that a settle left where it was, lies above the bound that follows from them.
//! - A row that is moved into a partition, or put back, has an old id. Whoever moves it raises `event_outbox_moves`, see
//!   `migrations/postgres/0009_moved_events.sql`. A claim that reads another number than the last one forgets all bounds.
//! - Ids go back if a table is truncated or restored, or a sequence is set back. The next query for the last id detects that,
//!   and all bounds are forgotten. A relay that finds no events asks each time.
//! - Nothing announces a row that somebody inserts with an id of their own. So such rows are searched for below all bounds once
//!   a minute. Where walking over the dead rows takes longer, the search takes a hundredth of the time.
//!
//! Behind a transaction-pooling proxy nothing shows that the server was replaced by one that lags behind. So there are no
//! bounds there.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a row that somebody inserted with an id of their own may stay hidden.
const SEARCH_INTERVAL: Duration = Duration::from_secs(60);

/// After a search for such rows, no other begins for this many times as long as it took.
const REST: u32 = 100;

/// The horizon is asked for once this many rows were deleted beyond it, because claims still walk over these.
const EVENTS_BEYOND: usize = 1000;

/// The shortest time between two queries for the horizon. While a transaction lasts long, more queries would not help.
const QUESTION_INTERVAL: Duration = Duration::from_millis(10);

/// The bounds that the lanes of a relay share.
#[derive(Debug, Clone)]
pub(super) struct Bounds {
    state: Arc<Mutex<State>>,
    /// Whether to ask for the horizon. Without a horizon there are no bounds.
    asks: bool,
}

#[derive(Debug, Default)]
struct State {
    known: BoundsSnapshot,
    next_search: Option<Instant>,
    /// The partition that was searched last.
    searched: i16,
    /// The next horizon, which holds once these transactions have ended, and how many events were settled when it was drawn.
    next: Option<(Writers, usize)>,
    settled: usize,
    /// How many events were settled when the present horizon was drawn.
    within: usize,
    asked: Option<Instant>,
    /// The life of the ids to which all this applies, see [`Drawn`]; empty if it is not known yet.
    life: String,
}

/// The bounds that hold for one claim.
#[derive(Debug, Clone, Default)]
pub(super) struct BoundsSnapshot {
    /// The number of reinsertions for which all this holds.
    pub(super) reinsertions: i64,
    /// How often bounds were forgotten. No bound follows from a read that used older ones.
    era: u64,
    /// Everything with an id up to this one is committed or will never be.
    horizon: Option<i64>,
    /// By partition: no row with an id up to this one is left there.
    pub(super) bounds: Arc<BTreeMap<i16, i64>>,
}

/// The last id drawn, and the transactions that may have drawn it or an earlier one. They are listed after it is read.
#[derive(Debug)]
pub(super) struct Writers {
    pub(super) drawn: Drawn,
    pub(super) transactions: Vec<String>,
}

/// The last id drawn, and the life of the ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Drawn {
    /// The last id that was drawn; 0 where none was.
    pub(super) last_id: i64,
    /// Distinguishes the ids of one table and sequence from those of a table or a sequence that took its place.
    pub(super) life: String,
}

/// What a claim has read. If all its rows are deleted, bounds follow.
#[derive(Debug)]
pub(super) struct ReadExtent {
    era: u64,
    /// By partition: if a row with an id up to this one is left there, it was read.
    reached: Vec<(i16, i64)>,
    rows: usize,
}

impl BoundsSnapshot {
    /// Returns, for each of these partitions, the id above which to read it.
    pub(super) fn bounds_of(&self, partitions: &[i16]) -> Vec<i64> {
        partitions.iter().map(|partition| self.bounds.get(partition).copied().unwrap_or(i64::MIN)).collect()
    }

    /// Returns the same bounds, raised to these ids where they are higher.
    pub(super) fn behind(mut self, passed: &BTreeMap<i16, i64>) -> Self {
        for (&partition, &id) in passed {
            let bound = Arc::make_mut(&mut self.bounds).entry(partition).or_insert(id);
            *bound = (*bound).max(id);
        }
        self
    }

    /// What a read of so many rows covers. `last` has for each partition the id of the last row that was read, if there may be
    /// more.
    pub(super) fn read_extent(&self, last: impl Iterator<Item = (i16, Option<i64>)>, rows: usize) -> ReadExtent {
        let horizon = self.horizon.unwrap_or(i64::MIN);
        // There may be another row with the same id, for another destination.
        let reached = |last: Option<i64>| last.map_or(horizon, |last| horizon.min(last - 1));
        let reached = last.map(|(partition, last)| (partition, reached(last))).collect();
        ReadExtent { era: self.era, reached, rows }
    }
}

impl Bounds {
    /// There are no bounds yet, and behind a `pooled` connection there never will be.
    pub(super) fn new(pooled: bool) -> Self {
        Self { state: Arc::default(), asks: !pooled }
    }

    /// Returns the bounds that a claim starts from, and whether the claim is to ask for the writers.
    pub(super) fn known(&self) -> (BoundsSnapshot, bool) {
        let state = self.state();
        let ask = self.asks
            && state.settled - state.within >= EVENTS_BEYOND
            && state.asked.is_none_or(|asked| asked.elapsed() >= QUESTION_INTERVAL);
        (state.known.clone(), ask)
    }

    /// Returns the bounds that hold at this number of reinsertions.
    pub(super) fn at(&self, reinsertions: i64) -> BoundsSnapshot {
        let mut state = self.state();
        state.at(reinsertions);
        state.known.clone()
    }

    /// Takes in the answer to the query for the writers. Returns the bounds that hold now.
    pub(super) fn wrote(&self, reinsertions: i64, writers: Writers) -> BoundsSnapshot {
        let mut state = self.state();
        if state.known.reinsertions == reinsertions {
            state.wrote(writers);
        } else {
            // Whoever raised the number may have begun to write after the writers were listed.
            state.at(reinsertions);
        }
        state.known.clone()
    }

    /// Takes in how far ids have come. Returns whether these are other ids than before, so that all bounds were forgotten.
    pub(super) fn drew(&self, drawn: &Drawn) -> bool {
        self.state().drew(drawn)
    }

    /// Takes in that `deleted` rows of a read are gone, by a transaction that has committed.
    pub(super) fn settled(&self, reading: Option<ReadExtent>, deleted: usize) {
        let mut state = self.state();
        state.settled += deleted;
        let of_now = |reading: &ReadExtent| reading.rows == deleted && reading.era == state.known.era;
        let Some(reading) = reading.filter(of_now) else { return };
        let bounds = Arc::make_mut(&mut state.known.bounds);
        for (partition, reached) in reading.reached {
            let bound = bounds.entry(partition).or_insert(reached);
            *bound = (*bound).max(reached);
        }
    }

    /// Takes in that a search by the bounds `known` found no row in any partition.
    pub(super) fn empty(&self, known: &BoundsSnapshot) {
        let mut state = self.state();
        if let Some(horizon) = known.horizon.filter(|_| known.era == state.known.era) {
            let bounds = Arc::make_mut(&mut state.known.bounds);
            bounds.values_mut().for_each(|bound| *bound = (*bound).max(horizon));
        }
    }

    /// Returns the bounds below which to search for hidden rows, if that is due. The caller must do the search.
    pub(super) fn to_search(&self) -> Option<Vec<(i16, i64)>> {
        let mut state = self.state();
        let now = Instant::now();
        let due = *state.next_search.get_or_insert(now + SEARCH_INTERVAL) <= now;
        if !due {
            return None;
        }
        state.next_search = Some(now + SEARCH_INTERVAL);
        let bounds = &state.known.bounds;
        let rest = bounds.range((Bound::Excluded(state.searched), Bound::Unbounded));
        let all = rest.chain(bounds.range(..=state.searched)).map(|(&partition, &bound)| (partition, bound));
        let set: Vec<_> = all.filter(|(_, bound)| *bound > i64::MIN).collect();
        (!set.is_empty()).then_some(set)
    }

    /// Takes in the result of a search. `found` has, for each partition that the search reached, whether a row is hidden there.
    /// `all`: it reached all partitions. `took` is how long it took.
    pub(super) fn searched(&self, found: &[(i16, bool)], all: bool, took: Duration) {
        let mut state = self.state();
        let rest = took * REST;
        state.next_search = Some(Instant::now() + if all { rest.max(SEARCH_INTERVAL) } else { rest });
        if let Some((last, _)) = found.last() {
            state.searched = *last;
        }
        for (partition, _) in found.iter().filter(|(_, hidden)| *hidden) {
            Arc::make_mut(&mut state.known.bounds).insert(*partition, i64::MIN);
            state.known.era += 1;
        }
    }

    /// Forgets everything, because a connection is new: its server may be another, whose ids start lower.
    pub(super) fn forget(&self) {
        let mut state = self.state();
        state.forget(0);
        state.life.clear();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Partitions that had a bound are remembered: as soon as all partitions are found empty, they have one again.
    fn forget_bounds(&mut self) {
        Arc::make_mut(&mut self.known.bounds).values_mut().for_each(|bound| *bound = i64::MIN);
        self.known.era += 1;
    }

    fn forget(&mut self, reinsertions: i64) {
        self.forget_bounds();
        self.known.reinsertions = reinsertions;
        self.known.horizon = None;
        self.next = None;
        self.within = 0;
    }

    fn at(&mut self, reinsertions: i64) {
        if self.known.reinsertions != reinsertions {
            // The horizon is forgotten too: whoever raised the number may still be in flight.
            self.forget(reinsertions);
        }
    }

    fn drew(&mut self, drawn: &Drawn) -> bool {
        let restarted = self.known.horizon.is_some_and(|horizon| horizon > drawn.last_id);
        let of_another_life = self.life != drawn.life && !self.life.is_empty();
        if self.life != drawn.life {
            self.life.clone_from(&drawn.life);
        }
        if restarted || of_another_life {
            self.forget(self.known.reinsertions);
        }
        restarted || of_another_life
    }

    fn wrote(&mut self, writers: Writers) {
        self.asked = Some(Instant::now());
        self.drew(&writers.drawn);
        // A transaction that is prepared for a two-phase commit keeps its locks under another name, `-1/...`.
        let lasts = |name: &String, before: &Writers| name.starts_with("-1/") || before.transactions.contains(name);
        match &self.next {
            Some((before, _)) if writers.transactions.iter().any(|name| lasts(name, before)) => {}
            before => {
                if let Some((before, settled)) = before {
                    self.known.horizon = Some(before.drawn.last_id);
                    self.within = *settled;
                }
                self.next = Some((writers, self.settled));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writers(last_id: i64, transactions: &[&str]) -> Writers {
        writers_of("1", last_id, transactions)
    }

    fn writers_of(life: &str, last_id: i64, transactions: &[&str]) -> Writers {
        let drawn = Drawn { last_id, life: life.to_owned() };
        Writers { drawn, transactions: transactions.iter().map(ToString::to_string).collect() }
    }

    /// Bounds with a horizon, and one partition with a bound at it.
    fn settled() -> Bounds {
        let bounds = Bounds::new(false);
        bounds.settled(None, EVENTS_BEYOND);
        bounds.at(1);
        bounds.wrote(1, writers(100, &[]));
        let known = bounds.wrote(1, writers(200, &[]));
        assert_eq!(known.horizon, Some(100));
        bounds.settled(known.read_extent([(7, None), (8, Some(60))].into_iter(), 5).into(), 5);
        assert_eq!(*bounds.known().0.bounds, BTreeMap::from([(7, 100), (8, 59)]));
        bounds
    }

    #[test]
    fn the_horizon_waits_for_who_was_writing() {
        let bounds = Bounds::new(false);
        bounds.at(1);
        assert_eq!(bounds.wrote(1, writers(10, &["3/1", "4/1"])).horizon, None);
        assert_eq!(bounds.wrote(1, writers(20, &["4/1", "5/1"])).horizon, None);
        assert_eq!(bounds.wrote(1, writers(30, &["5/1", "-1/77"])).horizon, None, "one is prepared now, maybe 4/1");
        assert_eq!(bounds.wrote(1, writers(40, &["5/1"])).horizon, Some(10));
        assert_eq!(bounds.wrote(1, writers(50, &["5/2"])).horizon, Some(40));
    }

    #[test]
    fn it_is_asked_for_until_no_more_than_a_thousand_dead_lie_beyond() {
        let bounds = Bounds::new(false);
        let asks = || {
            bounds.state().asked = None;
            bounds.known().1
        };
        bounds.at(1);
        bounds.settled(None, 999);
        assert!(!asks());
        bounds.settled(None, 1);
        assert!(asks());
        bounds.wrote(1, writers(1000, &["3/1"]));
        assert!(!bounds.known().1, "not twice in a moment");
        assert!(asks());
        bounds.wrote(1, writers(1000, &["3/1"]));
        bounds.settled(None, 500);
        assert!(asks(), "3/1 may still write");
        bounds.wrote(1, writers(1500, &[]));
        assert!(!asks(), "500 lie beyond");
    }

    #[test]
    fn behind_a_pooler_it_is_never_asked_for() {
        let bounds = Bounds::new(true);
        bounds.settled(None, 10 * EVENTS_BEYOND);
        assert!(!bounds.known().1);
    }

    #[test]
    fn a_bound_never_goes_back() {
        let bounds = settled();
        let known = bounds.known().0;
        bounds.settled(known.read_extent([(7, Some(50))].into_iter(), 5).into(), 5);
        assert_eq!(bounds.known().0.bounds_of(&[7, 8, 9]), [100, 59, i64::MIN]);
    }

    #[test]
    fn where_all_partitions_are_empty_all_that_had_bounds_have_them_at_the_horizon() {
        let bounds = settled();
        let before = bounds.known().0;
        bounds.state().forget_bounds();
        bounds.empty(&before);
        assert_eq!(bounds.known().0.bounds_of(&[7, 8]), [i64::MIN; 2], "who looked went by old bounds");
        bounds.empty(&bounds.known().0);
        assert_eq!(bounds.known().0.bounds_of(&[7, 8, 9]), [100, 100, i64::MIN]);
    }

    #[test]
    fn a_row_left_where_it_was_sets_no_bound() {
        let bounds = settled();
        let known = bounds.known().0;
        bounds.settled(known.read_extent([(9, None)].into_iter(), 5).into(), 4);
        assert_eq!(bounds.known().0.bounds_of(&[9]), [i64::MIN]);
    }

    #[test]
    fn a_partition_read_before_there_was_a_horizon_has_a_bound_once_all_are_empty() {
        let bounds = settled();
        bounds.at(2);
        bounds.settled(Some(bounds.known().0.read_extent([(9, Some(5))].into_iter(), 5)), 5);
        assert_eq!(bounds.known().0.bounds_of(&[9]), [i64::MIN]);
        bounds.wrote(2, writers(300, &[]));
        bounds.wrote(2, writers(400, &[]));
        bounds.empty(&bounds.known().0);
        assert_eq!(bounds.known().0.bounds_of(&[9]), [300]);
    }

    #[test]
    fn a_move_ends_bounds_and_horizon_and_what_was_read_before() {
        let bounds = settled();
        let read = bounds.known().0.read_extent([(7, None)].into_iter(), 5);
        let known = bounds.wrote(2, writers(300, &[]));
        assert_eq!(bounds.wrote(2, writers(300, &[])).horizon, None, "those of before do not count");
        bounds.state().asked = None;
        assert_eq!((known.horizon, known.bounds_of(&[7])), (None, vec![i64::MIN]));
        assert!(bounds.known().1, "the horizon is to be asked for again");
        bounds.settled(Some(read), 5);
        assert_eq!(bounds.known().0.bounds_of(&[7, 8]), [i64::MIN; 2]);
    }

    #[test]
    fn ids_of_another_life_end_bounds() {
        let bounds = settled();
        assert!(!bounds.drew(&writers(300, &[]).drawn));
        assert_eq!(bounds.known().0.bounds_of(&[7]), [100]);
        assert!(bounds.drew(&writers_of("2", 300, &[]).drawn), "the table is another");
        assert_eq!(bounds.known().0.bounds_of(&[7]), [i64::MIN]);
        let bounds = settled();
        assert!(bounds.drew(&writers(99, &[]).drawn), "the sequence was set back");
        assert!(!bounds.drew(&writers(99, &[]).drawn), "once");
        assert_eq!((bounds.known().0.bounds_of(&[7]), bounds.known().0.horizon), (vec![i64::MIN], None));
    }

    #[test]
    fn restarted_ids_and_a_new_connection_end_bounds() {
        let bounds = settled();
        bounds.wrote(1, writers(3, &[]));
        assert_eq!(bounds.known().0.bounds_of(&[7]), [i64::MIN]);
        let bounds = settled();
        bounds.forget();
        assert_eq!(bounds.known().0.bounds_of(&[7]), [i64::MIN]);
    }

    /// Makes the next search due, and begins it.
    fn search(bounds: &Bounds) -> Option<Vec<(i16, i64)>> {
        bounds.state().next_search = Some(Instant::now());
        bounds.to_search()
    }

    #[test]
    fn a_partition_in_which_a_search_finds_a_hidden_row_has_no_bound() {
        let bounds = settled();
        assert_eq!(bounds.to_search(), None, "not at once");
        assert_eq!(search(&bounds), Some(vec![(7, 100), (8, 59)]));
        assert_eq!(bounds.to_search(), None, "one lane is at it");
        let read = bounds.known().0.read_extent([(7, None)].into_iter(), 5);
        bounds.searched(&[(7, true), (8, false)], true, Duration::ZERO);
        assert_eq!(bounds.known().0.bounds_of(&[7, 8]), [i64::MIN, 59]);
        bounds.settled(Some(read), 5);
        assert_eq!(bounds.known().0.bounds_of(&[7]), [i64::MIN], "it was read by an old bound");
        assert_eq!(search(&bounds), Some(vec![(8, 59)]));
    }

    #[test]
    fn a_search_goes_on_where_the_last_one_ended_and_rests_a_hundred_times_as_long() {
        let bounds = settled();
        let rest =
            || bounds.state().next_search.expect("a time").saturating_duration_since(Instant::now()).as_secs_f64();
        search(&bounds);
        bounds.searched(&[(7, false)], false, Duration::from_millis(200));
        assert!((19.0..=20.0).contains(&rest()));
        assert_eq!(search(&bounds), Some(vec![(8, 59), (7, 100)]));
        bounds.searched(&[(8, false), (7, false)], true, Duration::from_millis(200));
        assert!((59.0..=60.0).contains(&rest()));
    }
}
