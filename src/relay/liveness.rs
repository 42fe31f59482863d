//! Whether the lanes make progress. At each step a lane says how long the step may take. A step that lasts longer hangs: only
//! a restart helps then.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

/// How long work at the store may take from one step to the next. Each statement has a timeout of its own, of a minute at the
/// longest, and a step may be several statements.
const STORE_TIME: Duration = Duration::from_secs(300);

/// How much longer than planned a step may take, because the machine may be busy.
const SLACK: Duration = Duration::from_secs(15);

/// How long all lanes may wait for one another.
const LONGEST_QUEUE: Duration = Duration::from_secs(60);

/// What a lane does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    /// It waits for the lane that polls.
    Queued = 0,
    /// It sleeps.
    Rests = 1,
    /// It asks the store, or waits for its answer.
    AsksStore = 2,
    /// It waits for destinations.
    Publishes = 3,
}

impl Step {
    fn told(self) -> &'static str {
        match self {
            Self::Queued => "has waited for other lanes",
            Self::Rests => "has slept",
            Self::AsksStore => "has worked at the store",
            Self::Publishes => "has published a batch",
        }
    }
}

/// The present step of one lane.
#[derive(Debug)]
pub(super) struct Pulse {
    lane: u64,
    begun: Instant,
    step: AtomicU8,
    /// When the step began, in milliseconds after `begun`.
    since: AtomicU64,
    /// When it must be over.
    until: AtomicU64,
}

impl Pulse {
    /// The lane waits for the lane that polls, however long that takes.
    pub(super) fn queued(&self) {
        self.set(Step::Queued, Duration::MAX);
    }

    /// The lane sleeps, `at_most` at the longest.
    pub(super) fn rests(&self, at_most: Duration) {
        self.set(Step::Rests, at_most);
    }

    /// The lane asks the store.
    pub(super) fn asks_store(&self) {
        self.set(Step::AsksStore, STORE_TIME);
    }

    /// The lane publishes a batch, which may take `at_most`.
    pub(super) fn publishes(&self, at_most: Duration) {
        self.set(Step::Publishes, at_most);
    }

    fn set(&self, step: Step, at_most: Duration) {
        let now = self.begun.elapsed();
        self.step.store(step as u8, Ordering::Relaxed);
        self.since.store(milliseconds(now), Ordering::Relaxed);
        self.until.store(milliseconds(now.saturating_add(at_most).saturating_add(SLACK)), Ordering::Relaxed);
    }

    fn step(&self) -> Step {
        match self.step.load(Ordering::Relaxed) {
            0 => Step::Queued,
            1 => Step::Rests,
            2 => Step::AsksStore,
            _ => Step::Publishes,
        }
    }

    /// How long the step has lasted, in milliseconds.
    fn lasted(&self, now: u64) -> u64 {
        now.saturating_sub(self.since.load(Ordering::Relaxed))
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The steps of all lanes of a relay.
#[derive(Debug)]
pub(super) struct Pulses {
    begun: Instant,
    lanes: Mutex<(u64, Vec<Weak<Pulse>>)>,
}

impl Pulses {
    pub(super) fn new() -> Self {
        Self { begun: Instant::now(), lanes: Mutex::default() }
    }

    /// Adds a lane, which is watched until it is dropped.
    pub(super) fn add(&self) -> Arc<Pulse> {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        lanes.0 += 1;
        let (since, until) = (AtomicU64::new(0), AtomicU64::new(u64::MAX));
        let pulse =
            Arc::new(Pulse { lane: lanes.0, begun: self.begun, step: AtomicU8::new(Step::Queued as u8), since, until });
        pulse.queued();
        lanes.1.retain(|lane| lane.strong_count() > 0);
        lanes.1.push(Arc::downgrade(&pulse));
        pulse
    }

    /// Returns what hangs, as text for people, or `None` if the lanes make progress.
    pub(super) fn hung(&self) -> Option<String> {
        self.hung_at(milliseconds(self.begun.elapsed()))
    }

    fn hung_at(&self, now: u64) -> Option<String> {
        let lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let lanes: Vec<Arc<Pulse>> = lanes.1.iter().filter_map(Weak::upgrade).collect();
        if let Some(lane) = lanes.iter().find(|lane| lane.until.load(Ordering::Relaxed) < now) {
            let step = lane.until.load(Ordering::Relaxed).saturating_sub(lane.since.load(Ordering::Relaxed)) / 1000;
            return Some(format!(
                "lane {} {} since {}, which should have ended within {step} s",
                lane.lane,
                lane.step().told(),
                ago(lane.lasted(now))
            ));
        }
        let shortest = lanes.iter().map(|lane| (lane.step(), lane.lasted(now))).min_by_key(|(_, lasted)| *lasted);
        let all_queue = lanes.iter().all(|lane| lane.step() == Step::Queued);
        let (_, lasted) = shortest.filter(|(_, lasted)| all_queue && *lasted > milliseconds(LONGEST_QUEUE))?;
        Some(format!("all lanes have waited for one another since {}", ago(lasted)))
    }
}

/// The time so many milliseconds ago, for people. Unlike a duration, it stays the same while something lasts.
fn ago(ms: u64) -> String {
    let then = SystemTime::now().checked_sub(Duration::from_millis(ms)).unwrap_or(SystemTime::UNIX_EPOCH);
    humantime::format_rfc3339_seconds(then).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_lasts_longer_than_it_may_is_told_with_its_lane() {
        let pulses = Pulses::new();
        let lanes = [pulses.add(), pulses.add()];
        lanes[1].publishes(Duration::from_secs(30));
        assert_eq!(pulses.hung_at(44_000), None);
        let told = pulses.hung_at(50_000).unwrap_or_default();
        assert!(told.starts_with("lane 2 has published a batch since ") && told.ends_with("within 45 s"), "{told}");
        lanes[1].asks_store();
        assert_eq!(pulses.hung_at(100_000), None, "it has gone on");
        lanes[1].rests(Duration::from_secs(3600));
        assert_eq!(pulses.hung_at(3_600_000), None);
        assert!(pulses.hung_at(3_700_000).is_some_and(|told| told.starts_with("lane 2 has slept since ")));
        drop(lanes);
        assert_eq!(pulses.hung_at(u64::MAX), None, "no lane is left");
    }

    #[test]
    fn lanes_may_wait_for_the_one_that_polls_but_not_all_of_them() {
        let pulses = Pulses::new();
        let lanes = [pulses.add(), pulses.add()];
        assert_eq!(pulses.hung_at(50_000), None);
        let told = pulses.hung_at(70_000).unwrap_or_default();
        assert!(told.starts_with("all lanes have waited for one another since "), "{told}");
        lanes[0].rests(Duration::from_secs(3600));
        assert_eq!(pulses.hung_at(70_000), None);
    }
}
