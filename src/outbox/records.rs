//! The rows that a settle writes. They follow from the verdicts in the same way for every store.

use crate::event::{Event, Fault, PublishError, Verdict, Wait};
use crate::outbox::deliveries::Delivery;

/// The last error of a row that could not be settled begins with this code. The row waits until a person acts.
pub(super) const SETTLE_FAILED: &str = "settle_failed";

/// This word follows that code if the event is still owed, and so blocks its key.
const RETRY: &str = "retry";

/// Everything that one settle writes. Nothing is recorded for a row that somebody else has deleted or changed meanwhile.
#[derive(Default)]
pub(super) struct Records<'a> {
    /// The events that are owed to no destination any more. Their rows are deleted.
    pub(super) gone: Vec<&'a Event>,
    /// For each event that is still owed to some destination, what the first of them is owed. The row is changed in place.
    pub(super) moved: Vec<Owed<'a>>,
    /// For the events of `moved`, what each further destination is owed. Each becomes a new row.
    pub(super) copies: Vec<Owed<'a>>,
    pub(super) log: Vec<LogEntry<'a>>,
    pub(super) dead_letters: Vec<DeadLetter<'a>>,
    pub(super) history: Vec<HistoryRow<'a>>,
}

/// A row of the processing log.
pub(super) struct LogEntry<'a> {
    pub(super) event: &'a Event,
    pub(super) destination: &'a str,
    pub(super) status: &'static str,
    pub(super) message_id: Option<&'a str>,
    pub(super) error: Option<String>,
    pub(super) duration_ms: i32,
}

/// A row of the dead letters.
pub(super) struct DeadLetter<'a> {
    pub(super) event: &'a Event,
    pub(super) destination: &'a str,
    pub(super) attempts: i32,
    pub(super) error: &'a PublishError,
}

/// A row of the history.
pub(super) struct HistoryRow<'a> {
    pub(super) event: &'a Event,
    pub(super) destination: &'a str,
}

/// The delay of a row that waits as long as the time since its first failure, from a second to five minutes, spread by half
/// so that rows that failed together are not retried together each time.
pub(super) const GROWING: f64 = -1.0;

/// A scheduled row of the outbox: an event that one destination is still owed.
pub(super) struct Owed<'a> {
    pub(super) event: &'a Event,
    pub(super) destination: &'a str,
    pub(super) attempts: i32,
    /// [`GROWING`] waits as long as the time since the first failure. `None` waits until a person acts.
    pub(super) delay_seconds: Option<f64>,
    /// Why the event failed, or cannot be settled. `None` if neither; then the row keeps its error.
    pub(super) error: Option<String>,
}

impl<'a> Records<'a> {
    /// Returns the records of these events and their deliveries. An event that only waits in place leaves none.
    pub(super) fn new(groups: impl Iterator<Item = (&'a Event, &'a [Delivery<'a>])>, history: bool) -> Self {
        let mut records = Self::default();
        for (event, group) in groups {
            if group.iter().all(|delivery| delivery.verdict == Verdict::Wait(Wait::InPlace)) {
                continue;
            }
            let owed = group.iter().filter_map(|delivery| records.record(event, delivery, history)).collect();
            records.owe(event, owed);
        }
        records
    }

    /// Returns whether there are no rows to write.
    pub(super) fn is_empty(&self) -> bool {
        self.rows() == 0
    }

    /// Returns how many rows of the outbox are settled.
    pub(super) fn rows(&self) -> usize {
        self.gone.len() + self.moved.len()
    }

    fn owe(&mut self, event: &'a Event, owed: Vec<Owed<'a>>) {
        let mut owed = owed.into_iter();
        match owed.next() {
            None => self.gone.push(event),
            Some(first) => self.moved.push(first),
        }
        self.copies.extend(owed);
    }

    /// Records a delivery. Returns what is still owed.
    fn record(&mut self, event: &'a Event, delivery: &'a Delivery<'a>, history: bool) -> Option<Owed<'a>> {
        let destination = delivery.destination;
        let attempts = event.attempts.saturating_add(1);
        let mut owed = None;
        let (status, message_id, error) = match &delivery.verdict {
            Verdict::Published { message_id } => {
                if history {
                    self.history.push(HistoryRow { event, destination });
                }
                ("published", message_id.as_deref(), None)
            }
            Verdict::Retry { delay, error } => {
                let (delay_seconds, error) = (Some(delay.as_secs_f64()), error.to_string());
                owed = Some(Owed { event, destination, attempts, delay_seconds, error: Some(error.clone()) });
                ("failed", None, Some(error))
            }
            Verdict::DeadLetter { error } => {
                self.dead_letters.push(DeadLetter { event, destination, attempts, error });
                ("dead_lettered", None, Some(error.to_string()))
            }
            Verdict::Drop { reason } => ("dropped", None, Some((*reason).to_owned())),
            Verdict::Block { error } => {
                let (attempts, error) = (event.attempts, Some(error.to_string()));
                return Some(Owed { event, destination, attempts, delay_seconds: Some(GROWING), error });
            }
            Verdict::Wait(wait) => {
                let delay_seconds = Some(wait.delay().unwrap_or_default().as_secs_f64());
                let attempts = event.attempts;
                return Some(Owed { event, destination, attempts, delay_seconds, error: None });
            }
        };
        let duration_ms = i32::try_from(delivery.duration.as_millis()).unwrap_or(i32::MAX);
        self.log.push(LogEntry { event, destination, status, message_id, error, duration_ms });
        owed
    }

    /// Returns the records to write if these records, of one event, cannot be settled because of `reason`. The outcome of the
    /// event is stored in its row instead, or in one row for each destination, until a person acts. None of it is published
    /// again before that.
    pub(super) fn parked(&self, reason: &str) -> Self {
        let done = self.log.iter().filter(|entry| entry.status != "failed").map(|entry| Owed {
            event: entry.event,
            destination: entry.destination,
            attempts: entry.event.attempts,
            delay_seconds: None,
            error: Some(parked_error(entry.status, entry.error.as_deref(), reason)),
        });
        let owed = self.moved.iter().chain(&self.copies).map(|owed| {
            let Owed { event, destination, attempts, delay_seconds, .. } = *owed;
            let error = owed.error.as_deref().map(|error| parked_error("failed", Some(error), reason));
            let delay_seconds = if error.is_some() { None } else { delay_seconds };
            Owed { event, destination, attempts, delay_seconds, error }
        });
        let all: Vec<_> = done.chain(owed).collect();
        let mut records = Self::default();
        if let Some(event) = self.gone.first().copied().or_else(|| self.moved.first().map(|owed| owed.event)) {
            records.owe(event, all);
        }
        records
    }

    /// Like `parked`, but in the one existing row, for when no copies can be made.
    pub(super) fn parked_whole(&self, reason: &str) -> Self {
        let delivered = self.log.iter().filter(|entry| entry.status == "published");
        let delivered: Vec<&str> = delivered.map(|entry| entry.destination).collect();
        let error = Some(parked_whole_error(&delivered, !self.moved.is_empty(), reason));
        let mut records = Self::default();
        let event = self.gone.first().copied().or_else(|| self.moved.first().map(|owed| owed.event));
        if let Some(event) = event {
            let (destination, attempts) = (event.row.destination.as_str(), event.attempts);
            records.moved.push(Owed { event, destination, attempts, delay_seconds: None, error });
        }
        records
    }
}

/// The error text of a parked delivery: its outcome, by its status in the log, and why that cannot be recorded. The word
/// after the code says whether the delivery is to be retried and so blocks its key.
pub(super) fn parked_error(status: &str, error: Option<&str>, reason: &str) -> String {
    let what = match status {
        "published" => "delivered",
        "dropped" => "dropped",
        "dead_lettered" => "given up",
        _ => RETRY,
    };
    let error = error.map(|error| format!("; {error}")).unwrap_or_default();
    bounded(&format!("{SETTLE_FAILED}: {what}, which cannot be recorded: {reason}{error}"))
}

/// Like `parked_error`, for a row that stands for all its destinations, some of which may still be owed the event.
pub(super) fn parked_whole_error(delivered: &[&str], still_owed: bool, reason: &str) -> String {
    let what = match (delivered.is_empty(), still_owed) {
        (true, _) => RETRY.to_owned(),
        (false, true) => format!("{RETRY}, delivered to {}", delivered.join(", ")),
        (false, false) => format!("delivered to {}", delivered.join(", ")),
    };
    bounded(&format!("{SETTLE_FAILED}: {what}, which cannot be recorded: {reason}"))
}

/// Cuts a message to the length that is stored, and removes what a database refuses.
fn bounded(text: &str) -> String {
    PublishError::new(Fault::Event, "", text).message
}
