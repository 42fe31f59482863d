//! The causes that keep events from being published, as texts for people.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::outbox::quote::literal;
use crate::text::shown;

/// The cause of a standstill: an event is due, and no relay claims it.
pub const NOT_TAKEN: &str = "not_taken";

/// How much longer than the publish timeout an event may be due while a relay works on earlier events.
pub(super) const TAKEN_AFTER: Duration = Duration::from_secs(15);

/// A cause that keeps events from moving. The store finds it, or the engine reports it. A daemon logs it, shows it in
/// systemd's status, and logs its end; `relay check` prints it as a failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standstill {
    /// The kind, which is the same as long as the standstill lasts, such as `table_locked`.
    pub cause: &'static str,
    /// Distinguishes standstills with the same cause, for example by a destination's name. Empty if there can be only one.
    pub about: String,
    /// What stands still, since when, why, and what to do about it. It contains no payload, header value or secret.
    pub text: String,
}

impl Standstill {
    /// Creates the only standstill of its kind.
    pub fn new(cause: &'static str, text: impl Into<String>) -> Self {
        Self { cause, about: String::new(), text: text.into() }
    }

    /// Sets [`Self::about`]. It must not change while the standstill lasts, as a count would.
    #[must_use]
    pub fn about(self, about: impl Into<String>) -> Self {
        Self { about: about.into(), ..self }
    }
}

/// `count` events are due, are the first of their partitions, and are claimed by no relay. The other arguments describe the
/// first of these events.
pub(super) fn not_taken(count: usize, id: i64, event_type: &str, due: Duration, who: &str) -> Standstill {
    let due = due.as_secs();
    let text = format!(
        "event {id} (type {event_type:?}) has been due for {due} s and nobody takes it, nor the events behind it ({count} such \
         partitions){who}: look whether another relay hangs, and at the log of each"
    );
    Standstill::new(NOT_TAKEN, text)
}

/// The cause of a standstill: keys wait though their destination works. The engine leaves it out while the destination is down.
pub(crate) const KEYS_BLOCKED: &str = "keys_blocked";

/// The longest error of an event in the text of a standstill, in characters.
const MAX_ERROR_CHARS: usize = 500;

/// Returns whether this is the text of [`KEYS_BLOCKED`] about that destination.
pub(crate) fn is_blocked_at(text: &str, destination: &str) -> bool {
    text.starts_with(&format!("destination {destination} takes other events, and not these"))
}

/// The first of the events that stand still together.
pub(super) struct First {
    pub(super) id: i64,
    /// Empty if the event stands for all its destinations.
    pub(super) destination: String,
    pub(super) error: String,
}

/// `count` events wait until a person acts, and `behind` events wait behind them. `now` is the present time in SQL. `forever`
/// is the `available_at` of parked events.
pub(super) fn parked(count: i64, behind: i64, first: &First, now: &str, forever: &str) -> Standstill {
    let First { id, destination, error } = first;
    let row = format!("id = {id} and destination = {}", literal(destination));
    let (count, behind, error) = (counted(count), counted(behind), shown(error, MAX_ERROR_CHARS));
    let text = format!(
        "parked until somebody acts: {count} events, and behind them by their keys {behind}; the first has id {id} ({error}); mend \
         the cause, then publish it again: update event_outbox set available_at = {now} where {row}; or be done with it: delete \
         from event_outbox where {row}; what is behind it follows within ten minutes; all of them: select id, destination, last_error from event_outbox where status = \
         'scheduled' and available_at = '{forever}' and last_error is not null;"
    );
    Standstill::new("events_parked", text)
}

/// `count` events can be neither settled nor parked. Their rows say what became of them.
pub(super) fn kept(count: usize, first: &First) -> Standstill {
    let First { id, destination, error } = first;
    let (row, error) = (format!("id = {id} and destination = {}", literal(destination)), shown(error, MAX_ERROR_CHARS));
    let text = format!(
        "{count} events can be neither settled nor parked, and are left out until somebody acts; the others go on; the first has \
         id {id} ({error}); mend the cause, and then be done with it: delete from event_outbox where {row}; or publish it again: \
         update event_outbox set available_at = pg_catalog.now() where {row};"
    );
    Standstill::new("events_kept_out", text)
}

/// Like `kept`, for events into whose rows nothing can be written.
pub(super) fn remembered(count: usize, first: &First) -> Standstill {
    let First { id, destination, error } = first;
    let (destination, error) = (literal(destination), shown(error, MAX_ERROR_CHARS));
    let text = format!(
        "{count} events can be neither settled nor parked, and nothing can be noted of them in the database: this relay leaves \
         them out, and each relay that starts publishes them again; the others go on; the first has id {id} and destination = \
         {destination} ({error}); mend the cause: then they are published once more and settled"
    );
    Standstill::new("events_remembered", text)
}

/// `count` events of a destination block their keys: they wait without being charged an attempt, or have failed for long. The
/// first of them has failed for `failing`.
pub(super) fn blocked(count: i64, first: &First, failing: Duration, forever: &str) -> Standstill {
    let First { id, destination, error } = first;
    let (count, error) = (counted(count), shown(error, MAX_ERROR_CHARS));
    let since = humantime::format_duration(Duration::from_secs(failing.as_secs()));
    let text = format!(
        "destination {destination} takes other events, and not these, which are tried again after growing waits and hold back \
         their keys: {count}, the first with id {id}, failing for {since} ({error}); mend the cause, or be done with it: delete \
         from event_outbox where id = {id} and destination = {}; all of them: select * from event_blocked_keys where \
         next_attempt_at < '{forever}';",
        literal(destination)
    );
    Standstill::new(KEYS_BLOCKED, text).about(destination)
}

/// `events` events have formats that this relay does not know, and `behind` events wait behind them.
pub(super) fn unknown_formats(events: i64, formats: &str, behind: i64, since: &str) -> Standstill {
    let text = format!(
        "{events} events of format {formats} wait, which this relay does not know, and {behind} behind them by their keys; the \
         oldest since {since}: start a relay of the version that they were made for, or delete them: delete from event_outbox \
         where format in ({formats});"
    );
    Standstill::new("format_unknown", text)
}

/// A count as text. The count is cut off at one more than [`MOST_COUNTED`].
fn counted(count: i64) -> String {
    if count > MOST_COUNTED { format!("more than {MOST_COUNTED}") } else { count.to_string() }
}

/// The largest number of rows that are counted, because there may be millions.
pub(super) const MOST_COUNTED: i64 = 1000;

/// Events that are owed to a destination which no relay has configured.
pub(super) struct Unconfigured {
    pub(super) destination: String,
    /// One more than the limit if there are more events than are counted.
    pub(super) count: i64,
    /// How long ago the first of them was emitted.
    pub(super) oldest: Option<Duration>,
    /// The statements that move the events to another destination, and that dead-letter them.
    pub(super) move_them: String,
    pub(super) give_them_up: String,
}

impl Unconfigured {
    pub(super) fn told(self) -> Standstill {
        let Self { destination, count, oldest, move_them, give_them_up } = self;
        let count = counted(count);
        let oldest = oldest.map_or_else(String::new, |oldest| {
            format!(", the oldest emitted {} ago", humantime::format_duration(Duration::from_secs(oldest.as_secs())))
        });
        let text = format!(
            "events wait for the destination {destination:?}, which is not configured: {count}{oldest}; configure it again, or \
             give them to another destination: {move_them}; or make dead letters of them: {give_them_up};"
        );
        Standstill::new("destination_unconfigured", text).about(destination)
    }
}

/// How long each state has been seen by every search. It is needed because PostgreSQL hides the times of other roles, and a
/// file has none.
#[derive(Debug, Clone, Default)]
pub(super) struct Memory {
    seen: Arc<Mutex<HashMap<String, Seen>>>,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    first: Instant,
    now: bool,
    /// The state has not lasted long enough to be a standstill.
    brief: bool,
}

impl Memory {
    /// Records that this search sees a state. Returns for how long every search has seen it.
    pub(super) fn seen(&self, what: &str) -> Duration {
        let mut seen = self.all();
        let seen =
            seen.entry(what.to_owned()).or_insert_with(|| Seen { first: Instant::now(), now: true, brief: false });
        (seen.now, seen.brief) = (true, false);
        seen.first.elapsed()
    }

    /// Marks a state that may be over in a moment, so that another search is worthwhile then.
    pub(super) fn is_brief(&self, what: &str) {
        if let Some(seen) = self.all().get_mut(what) {
            seen.brief = true;
        }
    }

    /// Ends a search: forgets the states that it did not see. Returns whether it saw one that may be over in a moment.
    pub(super) fn forget_unseen(&self) -> bool {
        let mut seen = self.all();
        seen.retain(|_, seen| std::mem::replace(&mut seen.now, false));
        seen.values().any(|seen| seen.brief)
    }

    /// Returns whether no state is remembered.
    pub(super) fn is_empty(&self) -> bool {
        self.all().is_empty()
    }

    fn all(&self) -> MutexGuard<'_, HashMap<String, Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
