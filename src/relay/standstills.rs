//! Standstills: causes that keep events from moving. The store finds them, or the engine reports them; they are logged and
//! shown.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use tokio::sync::watch as channel;
use tokio_util::sync::CancellationToken;

use crate::outbox::pause::Pause;
use crate::outbox::standstill::{KEYS_BLOCKED, NOT_TAKEN};
use crate::outbox::{Outbox, Standstill};
use crate::relay::{Relay, sleep};

/// How often the store is asked while something looks stuck, and while nothing does. So a standstill is logged within ten
/// seconds.
const STUCK_INTERVAL: Duration = Duration::from_secs(5);
const IDLE_INTERVAL: Duration = Duration::from_secs(8);

/// How often the relay checks for standstills by itself, without a query to the store.
const TICK: Duration = Duration::from_secs(1);

/// The cause of the note that an operator has paused a destination.
const PAUSED: &str = "destination_paused";

/// Something looks stuck when a query to the store stays unanswered for this long, or when others hold all pending events for
/// this long.
const PATIENCE: Duration = Duration::from_secs(3);

/// A standstill that lasts is logged again after this time.
const REPEAT: Duration = Duration::from_secs(60);

/// The standstills that a relay knows.
pub(super) struct Standstills {
    state: Mutex<State>,
    shown: channel::Sender<Vec<Standstill>>,
}

#[derive(Default)]
struct State {
    known: BTreeMap<(&'static str, String), Reported>,
    /// The start times of the queries that the store has not answered yet.
    asking: BTreeMap<u64, Instant>,
    last_question: u64,
    /// Since when every answer has been that others hold all pending events.
    busy_since: Option<Instant>,
    /// The last query failed.
    failed: bool,
}

struct Reported {
    text: String,
    source: Source,
    since: OffsetDateTime,
    logged: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Store,
    Engine,
    /// The engine. Nothing stands still because of it.
    Note,
}

/// A query to the store, from its start until it is answered.
pub(super) struct Asking<'a> {
    standstills: &'a Standstills,
    number: u64,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.standstills.state().asking.remove(&self.number);
    }
}

/// The last answer of the store to a claim, reduced to whether events move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ClaimAnswer {
    /// Events were claimed, or none is pending.
    Moving,
    /// Events are pending, and others hold all of them.
    Busy,
    /// The store did not answer.
    Failed,
}

impl Standstills {
    pub(super) fn new() -> Self {
        Self { state: Mutex::default(), shown: channel::Sender::new(Vec::new()) }
    }

    /// Returns a receiver that follows the standstills.
    pub(super) fn shown(&self) -> channel::Receiver<Vec<Standstill>> {
        self.shown.subscribe()
    }

    /// Begins a query to the store. A query that stays unanswered looks stuck.
    pub(super) fn asking(&self) -> Asking<'_> {
        let mut state = self.state();
        state.last_question += 1;
        let number = state.last_question;
        state.asking.insert(number, Instant::now());
        drop(state);
        Asking { standstills: self, number }
    }

    /// Records an answer of the store.
    pub(super) fn answered(&self, answer: ClaimAnswer) {
        let mut state = self.state();
        state.failed = answer == ClaimAnswer::Failed;
        match answer {
            ClaimAnswer::Moving => state.busy_since = None,
            ClaimAnswer::Busy => {
                state.busy_since.get_or_insert_with(Instant::now);
            }
            ClaimAnswer::Failed => {}
        }
    }

    /// Reports a standstill that the engine has found by itself. It is logged when it is new, and then once a minute.
    pub(super) fn report(&self, standstill: Standstill) {
        self.add(standstill, Source::Engine, true);
    }

    /// Reports a standstill that was just logged in other words.
    pub(super) fn report_logged(&self, standstill: Standstill) {
        self.add(standstill, Source::Engine, false);
    }

    /// Shows a condition that stops no events. It is not logged.
    pub(super) fn note(&self, standstill: Standstill) {
        self.add(standstill, Source::Note, false);
    }

    /// Ends a standstill or a condition that was reported or noted. Does nothing if it was neither.
    pub(super) fn clear(&self, cause: &'static str, about: &str) {
        let ended = |key: &(&'static str, String), known: &Reported| {
            key.0 == cause && key.1 == about && known.source != Source::Store
        };
        self.end(ended);
    }

    /// Replaces the standstills that the store has found. Those that are not among the new ones have ended.
    fn found(&self, standstills: Vec<Standstill>) {
        let keys: Vec<_> = standstills.iter().map(|found| (found.cause, found.about.clone())).collect();
        standstills.into_iter().for_each(|standstill| self.add(standstill, Source::Store, true));
        self.end(|key, known| known.source == Source::Store && !keys.contains(key));
    }

    fn add(&self, Standstill { cause, about, text }: Standstill, source: Source, log: bool) {
        let mut state = self.state();
        match state.known.get_mut(&(cause, about.clone())) {
            Some(known) => known.text = text,
            None => {
                if log {
                    tracing::error!(cause, about, "{text}");
                }
                let known = Reported { text, source, since: OffsetDateTime::now_utc(), logged: Instant::now() };
                state.known.insert((cause, about), known);
            }
        }
        self.show(&state);
    }

    fn end(&self, ended: impl Fn(&(&'static str, String), &Reported) -> bool) {
        let mut state = self.state();
        state.known.retain(|key, known| {
            let over = ended(key, known);
            if over {
                let (cause, about) = key;
                tracing::info!(cause, about, since = %utc(known.since), "over: {}", known.text);
            }
            !over
        });
        self.show(&state);
    }

    /// Logs again each standstill that has lasted for a minute since it was logged.
    fn repeat(&self) {
        for ((cause, about), known) in &mut self.state().known {
            if known.source != Source::Note && known.logged.elapsed() >= REPEAT {
                known.logged = Instant::now();
                tracing::error!(cause, about, since = %utc(known.since), "still: {}", known.text);
            }
        }
    }

    fn looks_stuck(&self) -> bool {
        let state = self.state();
        state.failed
            || state.known.values().any(|known| known.source == Source::Store)
            || state.busy_since.is_some_and(|since| since.elapsed() >= PATIENCE)
            || state.asking.values().any(|begun| begun.elapsed() >= PATIENCE)
    }

    fn show(&self, state: &State) {
        let now: Vec<_> = state
            .known
            .iter()
            .map(|((cause, about), known)| Standstill { cause, about: about.clone(), text: known.text.clone() })
            .collect();
        self.shown.send_if_modified(|shown| {
            let changed = *shown != now;
            *shown = now;
            changed
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<O: Outbox> Relay<O> {
    /// Asks the store for standstills, and logs those that are new and those that have ended.
    pub(super) async fn find_standstills(&self) {
        match self.outbox.standstills(&self.names).await {
            Ok(mut found) => {
                // While all destinations are down no event is claimed, and the log already says so.
                if self.paused_until(Instant::now()).is_some() {
                    found.retain(|standstill| standstill.cause != NOT_TAKEN);
                }
                // The keys wait with everything else that is owed to a destination that is down, and the log already says so.
                let down = |name: &str| self.destinations.iter().any(|there| there.name == name && there.is_down());
                found.retain(|standstill| standstill.cause != KEYS_BLOCKED || !down(&standstill.about));
                self.standstills.found(found);
            }
            // The next claim meets the same error and logs it.
            Err(error) => tracing::debug!(error = error.explain(), "the store was not asked what stands still"),
        }
    }

    fn report_destinations(&self) {
        let pauses = self.outbox.pauses();
        let about = |pause: &Pause| format!("{} {}", pause.destination, pause.event_type);
        for pause in pauses.iter() {
            self.standstills.note(Standstill::new(PAUSED, pause.described()).about(about(pause)));
        }
        self.standstills.end(|key, _| key.0 == PAUSED && !pauses.iter().any(|pause| about(pause) == key.1));
        for destination in &self.destinations {
            let (cause, name) = ("destination_down", &destination.name);
            if destination.is_down() {
                let text = format!("destination {name} is down or misconfigured: its events wait");
                self.standstills.report_logged(Standstill::new(cause, text).about(name));
            } else {
                self.standstills.clear(cause, name);
            }
        }
    }

    /// Asks for standstills until `stop`: at once, and then every few seconds.
    pub(super) async fn watch_standstills(&self, stop: &CancellationToken) {
        let ask = async {
            loop {
                self.find_standstills().await;
                let asked = Instant::now();
                let due =
                    || asked.elapsed() >= if self.standstills.looks_stuck() { STUCK_INTERVAL } else { IDLE_INTERVAL };
                while !due() {
                    if !sleep(TICK, stop).await {
                        return;
                    }
                }
            }
        };
        let repeat = async {
            loop {
                self.report_destinations();
                self.standstills.repeat();
                self.metrics.paused(&self.outbox.pauses());
                self.metrics.standstills(self.standstills.shown.borrow().iter().map(|there| there.cause));
                if !sleep(TICK, stop).await {
                    return;
                }
            }
        };
        tokio::join!(ask, repeat);
    }
}

/// The time in UTC, for people, to the second.
fn utc(time: OffsetDateTime) -> String {
    let (date, (hour, minute, second)) = (time.date(), time.to_hms());
    format!("{date} {hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::captured;

    fn causes(standstills: &Standstills) -> Vec<(&'static str, String)> {
        standstills.shown().borrow().iter().map(|shown| (shown.cause, shown.about.clone())).collect()
    }

    #[test]
    fn what_the_store_no_longer_finds_is_over_and_what_the_engine_reports_stays_until_it_is_cleared() {
        let standstills = Standstills::new();
        standstills.report(Standstill::new("down", "a").about("redis"));
        standstills.found(vec![Standstill::new("locked", "by 1")]);
        standstills.found(vec![Standstill::new("locked", "by 2")]);
        assert_eq!(causes(&standstills), [("down", "redis".to_owned()), ("locked", String::new())]);
        assert_eq!(standstills.shown().borrow()[1].text, "by 2");
        assert!(standstills.looks_stuck());
        standstills.found(vec![]);
        assert_eq!(causes(&standstills), [("down", "redis".to_owned())]);
        standstills.clear("down", "eventbridge");
        assert_eq!(causes(&standstills).len(), 1);
        standstills.clear("down", "redis");
        assert_eq!(causes(&standstills), []);
    }

    #[test]
    fn what_lasts_is_logged_at_once_then_once_a_minute_and_once_when_it_is_over() {
        let standstills = Standstills::new();
        let locked = || vec![Standstill::new("locked", "by 1")];
        let later = |by: Duration| {
            standstills.state().known.values_mut().for_each(|known| known.logged -= by);
            captured(|| standstills.repeat())
        };
        assert!(captured(|| standstills.found(locked())).contains("by 1"));
        assert_eq!(captured(|| standstills.found(locked())), "", "it is no other one");
        assert_eq!(later(REPEAT / 2), "");
        for _ in 0..2 {
            let line = later(REPEAT);
            assert!(line.contains("still: by 1") && line.contains("since="), "{line}");
            assert_eq!(captured(|| standstills.repeat()), "");
        }
        assert!(captured(|| standstills.found(Vec::new())).contains("over: by 1"));
        assert_eq!(later(REPEAT), "");
        // A condition that stops no events is shown, and not logged.
        assert_eq!(captured(|| standstills.note(Standstill::new("polls", "x"))) + &later(REPEAT), "");
    }

    #[test]
    fn a_failed_claim_looks_stuck_at_once_and_an_unanswered_question_after_a_while() {
        let standstills = Standstills::new();
        standstills.answered(ClaimAnswer::Busy);
        let asking = standstills.asking();
        assert!(!standstills.looks_stuck());
        standstills.answered(ClaimAnswer::Failed);
        assert!(standstills.looks_stuck());
        standstills.answered(ClaimAnswer::Moving);
        standstills.state().asking.values_mut().for_each(|begun| *begun -= PATIENCE);
        assert!(standstills.looks_stuck());
        drop(asking);
        assert!(!standstills.looks_stuck());
    }
}
