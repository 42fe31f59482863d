//! What a settle writes: verdicts turned into rows of the tables, the same for every store.

use crate::event::{Event, PublishError, RowKey, Verdict};
use crate::outbox::Delivery;

/// Everything one settle writes. Of a row that somebody else has taken away or changed meanwhile nothing is recorded.
#[derive(Default)]
pub(super) struct Records<'a> {
    /// The rows that go, because all or part of what they owed is decided.
    pub(super) rows: Vec<&'a RowKey>,
    pub(super) log: Vec<LogEntry<'a>>,
    pub(super) dead_letters: Vec<DeadLetter<'a>>,
    pub(super) history: Vec<Kept<'a>>,
    pub(super) owed: Vec<Owed<'a>>,
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
    pub(super) row: &'a RowKey,
    pub(super) destination: &'a str,
    pub(super) attempts: i32,
    pub(super) error: &'a PublishError,
}

/// A row of the history.
pub(super) struct Kept<'a> {
    pub(super) row: &'a RowKey,
    pub(super) destination: &'a str,
}

/// A scheduled row of the outbox: what one destination is still owed.
pub(super) struct Owed<'a> {
    pub(super) row: &'a RowKey,
    pub(super) destination: &'a str,
    pub(super) attempts: i32,
    pub(super) delay_seconds: f64,
    /// Why it was charged; `None`: it was not, and keeps what it has.
    pub(super) error: Option<String>,
}

impl<'a> Records<'a> {
    /// The records of `deliveries`, which are grouped by event. An event that only waits in place leaves none.
    pub(super) fn new(deliveries: &'a [Delivery<'a>], history: bool) -> Self {
        let mut records = Self::default();
        for group in deliveries.chunk_by(|a, b| std::ptr::eq(a.event, b.event)) {
            if group.iter().all(|delivery| delivery.verdict == Verdict::Wait { park: None }) {
                continue;
            }
            records.rows.push(&group[0].event.row);
            group.iter().for_each(|delivery| records.record(delivery, history));
        }
        records
    }

    fn record(&mut self, delivery: &'a Delivery<'a>, history: bool) {
        let (row, destination) = (&delivery.event.row, delivery.destination);
        let attempts = delivery.event.attempts.saturating_add(1);
        let (status, message_id, error) = match &delivery.verdict {
            Verdict::Published { message_id } => {
                if history {
                    self.history.push(Kept { row, destination });
                }
                ("published", message_id.as_deref(), None)
            }
            Verdict::Retry { delay, error } => {
                let (delay_seconds, error) = (delay.as_secs_f64(), error.to_string());
                self.owed.push(Owed { row, destination, attempts, delay_seconds, error: Some(error.clone()) });
                ("failed", None, Some(error))
            }
            Verdict::DeadLetter { error } => {
                self.dead_letters.push(DeadLetter { row, destination, attempts, error });
                ("dead_lettered", None, Some(error.to_string()))
            }
            Verdict::Drop { reason } => ("dropped", None, Some((*reason).to_owned())),
            Verdict::Wait { park } => {
                let (attempts, delay_seconds) = (delivery.event.attempts, park.unwrap_or_default().as_secs_f64());
                self.owed.push(Owed { row, destination, attempts, delay_seconds, error: None });
                return;
            }
        };
        let duration_ms = i32::try_from(delivery.duration.as_millis()).unwrap_or(i32::MAX);
        self.log.push(LogEntry { event: delivery.event, destination, status, message_id, error, duration_ms });
    }
}
