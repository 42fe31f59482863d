//! What `relay status` shows, as data: the same for every store.
//!
//! Nothing here is counted over a whole table, which may have millions of rows. A count ends at a limit, and says so.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::outbox::pause::Pauses;
use crate::outbox::register::Registration;

/// The largest number of rows that are counted for one figure.
pub const MOST_COUNTED: u64 = 1000;

/// The number of blocked keys that are listed at most.
pub const MOST_KEYS: usize = 50;

/// How many minutes of tallies are kept and shown.
pub const MINUTES: usize = 15;

/// What is asked.
#[derive(Debug, Clone, Copy, Default)]
pub struct StatusRequest {
    /// List the blocked keys.
    pub keys: bool,
}

/// The state of an outbox, its destinations and its relays, at one moment.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Status {
    /// The time of the database, in UTC.
    pub at: String,
    /// Events that no relay has routed yet.
    pub unrouted: Unrouted,
    /// Each destination that a relay has configured, that is owed an event, that is paused, or that took events lately; by
    /// name.
    pub destinations: Vec<DestinationStatus>,
    /// The blocked keys, those blocked for longest first; empty unless they were asked for.
    pub blocked_keys: Vec<BlockedKey>,
    /// The relays in the register.
    pub relays: Vec<RelayStatus>,
    /// Who keeps events from moving: locks, old snapshots, prepared transactions. One text for people each.
    pub obstacles: Vec<Obstacle>,
    /// The parts that could not be read, and why.
    pub unread: Vec<String>,
}

/// Events that no relay has routed yet. Each becomes owed to its destinations when it is claimed.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Unrouted {
    /// Events that can be claimed now.
    pub pending: Count,
    /// For how many seconds the oldest of them has been due.
    pub oldest_due_seconds: Option<f64>,
    /// Events that their producer delayed.
    pub delayed: Count,
    /// About how many rows the whole outbox has, by the statistics of the database.
    pub estimated_rows: Option<u64>,
}

/// A number of rows that was counted up to a limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// The number of rows; [`MOST_COUNTED`] at most.
    pub count: u64,
    /// There are more rows than were counted.
    pub more: bool,
}

impl Count {
    /// `counted` ends one above the limit.
    pub(super) fn capped(counted: i64) -> Self {
        let counted = u64::try_from(counted).unwrap_or_default();
        Self { count: counted.min(MOST_COUNTED), more: counted > MOST_COUNTED }
    }
}

/// One destination.
#[derive(Debug, Clone, Serialize)]
pub struct DestinationStatus {
    /// Its name.
    pub name: String,
    /// Whether it takes events.
    pub state: State,
    /// For how many seconds it has been in this state, if that is known.
    pub state_seconds: Option<f64>,
    /// Why it takes no events: the last error, or who paused it.
    pub reason: Option<String>,
    /// What operators have paused of it.
    pub pauses: Vec<PauseStatus>,
    /// Events that are due and wait for it.
    pub pending: Count,
    /// How many seconds ago the oldest of these was emitted.
    pub oldest_due_seconds: Option<f64>,
    /// Events that failed there and are tried again.
    pub retrying: Count,
    /// Events that wait behind an earlier event of their key.
    pub waiting_behind: Count,
    /// Events that wait until a person acts.
    pub parked: Count,
    /// Events that became dead letters in the last 24 hours and are still dead letters.
    pub dead_letters: Count,
    /// Events that it took, a second, over the last minute or two.
    pub published_per_second: f64,
    /// Events that it took in each of the last minutes; the present one is the last.
    pub published_by_minute: Vec<u64>,
}

impl DestinationStatus {
    /// Creates the status of a destination of which nothing is known.
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            state: State::NoRelay,
            state_seconds: None,
            reason: None,
            pauses: Vec::new(),
            pending: Count::default(),
            oldest_due_seconds: None,
            retrying: Count::default(),
            waiting_behind: Count::default(),
            parked: Count::default(),
            dead_letters: Count::default(),
            published_per_second: 0.0,
            published_by_minute: vec![0; MINUTES],
        }
    }
}

/// Whether a destination takes events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// No relay finds it down.
    Up,
    /// A relay finds it down, and tries again by itself.
    Down,
    /// It refuses events for a reason that a person must mend.
    Misconfigured,
    /// An operator has paused it.
    Paused,
    /// Relays are at work, and none of them has it.
    NotConfigured,
    /// No relay is at work.
    NoRelay,
}

/// A pause.
#[derive(Debug, Clone, Serialize)]
pub struct PauseStatus {
    /// The types that are held back: a glob, `*` for all.
    pub event_type: String,
    /// Who paused them.
    pub by: String,
    /// For how many seconds they have been paused.
    pub seconds: f64,
    /// The same for people, and how to end it.
    pub text: String,
}

/// A key that waits for its first event.
#[derive(Debug, Clone, Serialize)]
pub struct BlockedKey {
    /// Where the key is blocked.
    pub destination: String,
    /// With `aggregate_id`, the key.
    pub aggregate_type: Option<String>,
    /// `None`: the event has no key, and blocks nobody.
    pub aggregate_id: Option<String>,
    /// `event_outbox.id` of the event that blocks.
    pub outbox_id: i64,
    /// The type of that event.
    pub event_type: String,
    /// The attempts that were charged to it.
    pub attempts: i64,
    /// For how many seconds it has failed.
    pub blocked_seconds: Option<f64>,
    /// In how many seconds it is tried again. `None`: not before a person acts.
    pub next_attempt_seconds: Option<f64>,
    /// Code and message of its last failure.
    pub error: String,
    /// Later events of its key that wait for it.
    pub behind: Count,
}

/// A relay in the register.
#[derive(Debug, Clone, Serialize)]
pub struct RelayStatus {
    /// Host name and process id.
    pub worker: String,
    /// The version of the program.
    pub version: String,
    /// How many seconds ago it started.
    pub age_seconds: f64,
    /// Whether it is at work. `None`: this cannot be seen, because it has no session of its own.
    pub alive: Option<bool>,
    /// It is a run of `relay --once`.
    pub once: bool,
    /// Another relay has taken over, because this one left due events unclaimed.
    pub hung: bool,
    /// Its configuration routes new events.
    pub routes: bool,
    /// The names of its destinations.
    pub destinations: Vec<String>,
    /// How many partitions its lanes hold now, if that can be seen.
    pub partitions_held: Option<u64>,
    /// How many of its lanes have a batch now, if that can be seen.
    pub batches: Option<u64>,
}

/// What keeps events from moving.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Obstacle {
    /// The kind, such as `table_locked`.
    pub cause: String,
    /// What it is, since when, and what to do about it.
    pub text: String,
}

/// A destination that a relay finds down, as it is written in the register.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trouble {
    /// `down` or `misconfigured`.
    pub state: String,
    /// The beginning, in seconds since 1970 by the database's clock.
    pub since: f64,
    /// The last error.
    pub reason: String,
}

/// A destination that this relay finds down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The name of the destination.
    pub destination: String,
    /// `down` or `misconfigured`.
    pub state: &'static str,
    /// When that began, by this machine's clock.
    pub since: std::time::SystemTime,
    /// The last error. It contains no event data.
    pub reason: String,
}

impl Found {
    /// For how many seconds it has lasted.
    pub(super) fn seconds(&self) -> f64 {
        self.since.elapsed().unwrap_or_default().as_secs_f64()
    }
}

/// Deliveries that have ended at one destination since they were counted last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TallyCount {
    /// The name of the destination; empty if the event was decided before it was routed.
    pub destination: String,
    /// Deliveries that it took.
    pub published: u64,
    /// Failed attempts that were charged.
    pub retried: u64,
    /// Events that became dead letters.
    pub dead_lettered: u64,
}

impl TallyCount {
    /// Returns whether nothing was counted.
    pub fn is_zero(&self) -> bool {
        self.published + self.retried + self.dead_lettered == 0
    }
}

/// Published events of one destination in one minute, as a store reads them.
pub(super) struct Minute {
    pub(super) destination: String,
    /// 0 is the present minute.
    pub(super) ago: i64,
    pub(super) published: i64,
}

impl Status {
    /// Returns the destination of this name, and adds it if there is none.
    pub(super) fn destination(&mut self, name: &str) -> &mut DestinationStatus {
        let place = match self.destinations.binary_search_by(|known| known.name.as_str().cmp(name)) {
            Ok(place) => place,
            Err(place) => {
                self.destinations.insert(place, DestinationStatus::new(name));
                place
            }
        };
        &mut self.destinations[place]
    }

    /// Adds the tallies. `into_minute` is how many seconds of the present minute have passed.
    pub(super) fn add_minutes(&mut self, minutes: Vec<Minute>, into_minute: f64) {
        for Minute { destination, ago, published } in minutes {
            let Some(place) = usize::try_from(ago).ok().and_then(|ago| (MINUTES - 1).checked_sub(ago)) else {
                continue;
            };
            if !destination.is_empty() {
                self.destination(&destination).published_by_minute[place] +=
                    u64::try_from(published).unwrap_or_default();
            }
        }
        for destination in &mut self.destinations {
            let last: u64 = destination.published_by_minute[MINUTES - 2..].iter().sum();
            #[expect(clippy::cast_precision_loss, reason = "it is shown with two digits")]
            let rate = last as f64 / (60.0 + into_minute.clamp(0.0, 60.0));
            destination.published_per_second = rate;
        }
    }

    /// Adds the pauses. A destination that is paused for all types is in that state, whatever relays find.
    pub(super) fn add_pauses(&mut self, pauses: &Pauses) {
        for pause in pauses.iter() {
            let destination = self.destination(&pause.destination);
            destination.pauses.push(PauseStatus {
                event_type: pause.event_type.clone(),
                by: pause.by.clone(),
                seconds: pause.seconds,
                text: pause.described(),
            });
            if pause.is_whole() {
                (destination.state, destination.state_seconds) = (State::Paused, Some(pause.seconds));
            }
        }
    }

    /// Adds the relays, and derives the states of destinations from what they found. `now` is in seconds since 1970 by the
    /// database's clock. `lives` says whether a relay is at work, as far as the store knows better than the register.
    pub(super) fn add_relays(
        &mut self,
        rows: Vec<Registration>,
        now: f64,
        lives: impl Fn(&Registration) -> Option<bool>,
        holds: impl Fn(&Registration) -> Option<(u64, u64)>,
    ) {
        let routing = crate::outbox::register::routing(&rows).map(|row| row.configuration.fingerprint.clone());
        let mut troubles: BTreeMap<String, Trouble> = BTreeMap::new();
        let mut configured: Vec<String> = Vec::new();
        let mut any = false;
        for row in rows {
            let alive = lives(&row);
            let held = holds(&row);
            if alive != Some(false) {
                any = true;
                configured.extend(row.configuration.destinations.keys().cloned());
                for (name, trouble) in row.trouble.clone() {
                    // The state that needs a person counts, then the one that has lasted longer.
                    let worse = |known: &Trouble| {
                        (trouble.state == "misconfigured", -trouble.since)
                            > (known.state == "misconfigured", -known.since)
                    };
                    if troubles.get(&name).is_none_or(worse) {
                        troubles.insert(name, trouble);
                    }
                }
            }
            self.relays.push(RelayStatus {
                routes: alive != Some(false) && routing.as_ref() == Some(&row.configuration.fingerprint),
                age_seconds: row.age.as_secs_f64(),
                destinations: row.configuration.destinations.into_keys().collect(),
                worker: row.worker,
                version: row.version,
                once: row.once,
                hung: row.hung,
                alive,
                partitions_held: held.map(|held| held.0),
                batches: held.map(|held| held.1),
            });
        }
        for name in &configured {
            self.destination(name).state = State::Up;
        }
        if any {
            for destination in &mut self.destinations {
                if destination.state == State::NoRelay {
                    destination.state = State::NotConfigured;
                }
            }
        }
        for (name, trouble) in troubles {
            let destination = self.destination(&name);
            destination.state = if trouble.state == "misconfigured" { State::Misconfigured } else { State::Down };
            destination.state_seconds = Some((now - trouble.since).max(0.0));
            destination.reason = Some(trouble.reason);
        }
    }
}
