//! Limits the log lines about single events and sums up the work: the first few lines of a kind are logged, then counts.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::event::Tally;

/// How many lines of a kind are logged singly before they are only counted.
const FIRST: usize = 5;

/// How often the counts of the lines that were not logged are logged.
const SUM_INTERVAL: Duration = Duration::from_secs(10);

/// After this time without a line, a kind starts anew: its next lines are logged singly again.
const FORGET_AFTER: Duration = Duration::from_secs(60);

/// How often the work is summed up.
const WORK_INTERVAL: Duration = Duration::from_secs(60);

/// How many kinds are counted separately. A destination chooses its codes, so further codes count as one kind.
const MAX_KINDS: usize = 200;

/// Decides which lines about single events are logged. All code that logs such lines shares it.
pub(super) struct Report {
    kinds: Mutex<HashMap<LineKind, Seen>>,
    work: Mutex<Work>,
}

/// A kind of line. Lines of one kind differ only in their event.
#[derive(Clone, PartialEq, Eq, Hash)]
struct LineKind {
    what: &'static str,
    destination: String,
    code: String,
}

struct Seen {
    logged: usize,
    more: u64,
    /// When the first line that `more` counts came.
    since: Instant,
    last: Instant,
}

struct Work {
    since: Instant,
    tally: Tally,
    oldest: Duration,
}

impl Work {
    fn new() -> Self {
        Self { since: Instant::now(), tally: Tally::default(), oldest: Duration::ZERO }
    }
}

impl Report {
    pub(super) fn new() -> Self {
        Self { kinds: Mutex::default(), work: Mutex::new(Work::new()) }
    }

    /// Returns whether the line about one more event is logged. If not, the event is counted, and the count is logged as "9
    /// more `what`".
    pub(super) fn admits(&self, what: &'static str, destination: &str, code: &str) -> bool {
        let now = Instant::now();
        let mut kinds = self.kinds();
        let mut kind = LineKind { what, destination: destination.to_owned(), code: code.to_owned() };
        if kinds.len() >= MAX_KINDS && !kinds.contains_key(&kind) {
            kind.code = "various codes".to_owned();
        }
        let seen = kinds.entry(kind).or_insert(Seen { logged: 0, more: 0, since: now, last: now });
        seen.last = now;
        if seen.logged < FIRST {
            seen.logged += 1;
            return true;
        }
        if seen.more == 0 {
            seen.since = now;
        }
        seen.more += 1;
        false
    }

    /// Adds a batch that was settled. `oldest` is the age of its oldest event.
    pub(super) fn settled(&self, tally: Tally, oldest: Duration) {
        let mut work = self.work();
        work.tally.add(tally);
        work.oldest = work.oldest.max(oldest);
    }

    /// Logs the counts that are due. With `all`, logs all counts, because the relay ends.
    pub(super) fn tick(&self, all: bool) {
        let now = Instant::now();
        let mut sums = Vec::new();
        self.kinds().retain(|kind, seen| {
            if seen.more > 0 && (all || now - seen.since >= SUM_INTERVAL) {
                sums.push((kind.clone(), std::mem::take(&mut seen.more), now - seen.since));
            }
            now - seen.last < FORGET_AFTER
        });
        for (LineKind { what, destination, code }, count, time) in sums {
            let seconds = time.as_secs();
            tracing::warn!(destination, code, count, seconds, "{count} more {what}");
        }
        let mut work = self.work();
        if now - work.since < WORK_INTERVAL {
            return;
        }
        let Work { since, tally, oldest } = std::mem::replace(&mut *work, Work::new());
        drop(work);
        if tally != Tally::default() {
            tracing::info!(
                published = tally.published,
                retried = tally.retried,
                dead_lettered = tally.dead_lettered,
                dropped = tally.dropped,
                oldest_event_s = oldest.as_secs(),
                "worked for {} s",
                (now - since).as_secs()
            );
        }
    }

    fn kinds(&self) -> MutexGuard<'_, HashMap<LineKind, Seen>> {
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::captured;

    #[test]
    fn f92_the_work_is_summed_up_once_a_minute_while_there_is_any() {
        let report = Report::new();
        let a_minute_later = || {
            report.work().since -= WORK_INTERVAL;
            captured(|| report.tick(false))
        };
        assert_eq!(a_minute_later(), "", "nothing was done");
        let tally = Tally { published: 3, retried: 2, dead_lettered: 1, ..Tally::default() };
        report.settled(tally, Duration::from_secs(40));
        report.settled(tally, Duration::from_secs(7));
        assert_eq!(captured(|| report.tick(false)), "", "the minute is not over");
        let line = a_minute_later();
        for part in ["worked for 60 s", "published=6", "retried=4", "dead_lettered=2", "oldest_event_s=40"] {
            assert!(line.contains(part), "{part:?} is missing in {line}");
        }
        assert_eq!(a_minute_later(), "", "it was said");
    }

    #[test]
    fn the_first_of_a_kind_are_logged_and_the_others_counted() {
        let report = Report::new();
        let admitted = |code| (0..1000).filter(|_| report.admits("failed", "bus", code)).count();
        assert_eq!((admitted("A"), admitted("B"), admitted("A")), (FIRST, FIRST, 0));
        let more: u64 = report.kinds().values().map(|seen| seen.more).sum();
        assert_eq!(more, 3000 - 2 * FIRST as u64);
        report.tick(true);
        assert!(report.kinds().values().all(|seen| seen.more == 0));
        assert_eq!(admitted("A"), 0, "the storm lasts");
    }

    #[test]
    fn codes_without_number_take_no_memory_without_bound() {
        let report = Report::new();
        let admitted = (0..10_000).filter(|code| report.admits("failed", "bus", &code.to_string())).count();
        assert_eq!(admitted, MAX_KINDS + FIRST);
        assert_eq!(report.kinds().len(), MAX_KINDS + 1);
    }
}
