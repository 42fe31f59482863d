//! The types that all other modules share: an event, its row and its key, an outcome, an error and a verdict.
//!
//! Nothing here knows a database, a destination or a clock.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use time::OffsetDateTime;
use uuid::Uuid;

use crate::text::shown;

pub(crate) use crate::emit::HeaderName;
pub use crate::emit::{
    MAX_EVENT_TYPE_CHARS, MAX_HEADERS_BYTES, MAX_TEXT_BYTES, NewEvent, NewEventError, RESERVED_HEADERS,
};

/// The place of a row in the outbox.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RowKey {
    /// Where the store finds the row again when it settles. Only the store knows its meaning.
    pub locator: i64,
    /// The partition, which is the unit of claiming. A lower number is more urgent.
    pub partition: i16,
    /// The id of the row. Ids ascend in the order of insertion.
    pub id: i64,
    /// Empty: the event is still to be routed. Otherwise the one destination that the row is for.
    pub destination: String,
}

/// The ordering key: `aggregate_type` (empty where null) and `aggregate_id`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key<'a> {
    /// The kind of thing, as in `order`.
    pub aggregate_type: &'a str,
    /// The identity of the thing, as in `42`.
    pub aggregate_id: &'a str,
}

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.aggregate_type.is_empty() {
            f.write_str(self.aggregate_id)
        } else {
            write!(f, "{}:{}", self.aggregate_type, self.aggregate_id)
        }
    }
}

/// A claimed event, as it goes to the destinations.
#[derive(Clone)]
pub struct Event {
    /// Its row in the outbox.
    pub row: RowKey,
    /// The event's identity for consumers.
    pub event_id: Uuid,
    /// What happened, as in `order.created`.
    pub event_type: String,
    /// The application that emitted the event. Empty: the destination's default is used.
    pub source: String,
    /// The first half of the key.
    pub aggregate_type: Option<String>,
    /// The second half of the key. `None`: the event has no key and needs no order.
    pub aggregate_id: Option<String>,
    /// The payload's JSON as the database prints it, passed through and never parsed.
    pub payload: Vec<u8>,
    /// The headers: names and values.
    pub headers: Vec<(String, String)>,
    /// An id that all events of one business operation share.
    pub correlation_id: Option<String>,
    /// The id of what caused the event.
    pub causation_id: Option<String>,
    /// The version of the payload's schema.
    pub schema_version: i32,
    /// When the emitting transaction began, by the database's clock.
    pub created_at: OffsetDateTime,
    /// The number of attempts charged so far.
    pub attempts: i32,
}

impl Event {
    /// The ordering key, where the event has one.
    pub fn key(&self) -> Option<Key<'_>> {
        self.aggregate_id.as_deref().map(|aggregate_id| Key {
            aggregate_type: self.aggregate_type.as_deref().unwrap_or_default(),
            aggregate_id,
        })
    }
}

impl Event {
    /// About how many bytes of memory the event takes: the sum of all fields whose size its emitter chose.
    pub fn bytes(&self) -> usize {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let headers: usize = self.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
        let key = text(&self.aggregate_type) + text(&self.aggregate_id);
        self.payload.len() + headers + self.source.len() + key + text(&self.correlation_id) + text(&self.causation_id)
    }
}

impl fmt::Debug for Event {
    /// Prints identities only: payloads and headers never reach a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event")
            .field("row", &self.row)
            .field("event_id", &self.event_id)
            .field("event_type", &self.event_type)
            .finish_non_exhaustive()
    }
}

/// The cause of a failed publish. It decides what becomes of the event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The destination refused this event: it is charged, tried again with backoff, then dead-lettered.
    Event,
    /// No attempt can ever succeed, as with an entry over the destination's size limit: the event is dead-lettered at once.
    Unfit,
    /// The destination is down: it is paused, and no event is charged. Every error that is not classified counts as this.
    Destination,
    /// The destination is set up wrongly, and a person must act: it is paused, an error is logged, and no event is charged.
    Misconfigured,
    /// It is unknown whether the event arrived, as after a timeout: it stays pending and is not charged.
    Unknown,
}

impl Fault {
    /// The name of this cause in logs, one of a fixed set.
    pub fn label(self) -> &'static str {
        match self {
            Self::Event => "event",
            Self::Unfit => "unfit",
            Self::Destination => "destination",
            Self::Misconfigured => "misconfigured",
            Self::Unknown => "unknown_outcome",
        }
    }

    /// Whether the failed attempt is charged to the event.
    pub fn charges_event(self) -> bool {
        matches!(self, Self::Event | Self::Unfit)
    }
}

/// A failed publish of one event. It is stored, counted and judged like other data, and so it is not passed on by `?`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishError {
    /// The cause, which decides what becomes of the event.
    pub fault: Fault,
    /// The destination's own code, or one of ours in lower case.
    pub code: String,
    /// The text for a person. It never holds the payload.
    pub message: String,
    /// The error says nothing about any event, even if the destination took others a moment before: the destination refused the
    /// relay itself, or nothing was sent.
    pub of_destination: bool,
}

impl PublishError {
    /// The longest message that is stored, in characters.
    const MAX_MESSAGE_CHARS: usize = 500;

    /// The longest code that is stored, in characters.
    const MAX_CODE_CHARS: usize = 100;

    /// Returns an error whose code and message are escaped and cut to what is stored.
    pub fn new(fault: Fault, code: impl Into<String>, message: impl AsRef<str>) -> Self {
        // The text of a destination cannot be trusted.
        let code = shown(&code.into(), Self::MAX_CODE_CHARS);
        Self { fault, code, message: shown(message.as_ref(), Self::MAX_MESSAGE_CHARS), of_destination: false }
    }

    /// Marks the error as one that says nothing about any event, such as a wrong password.
    #[must_use]
    pub fn of_destination(self) -> Self {
        Self { of_destination: true, ..self }
    }
}

impl fmt::Display for PublishError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

/// The result of publishing one event, as the sink reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// This event's own reply was a success.
    Delivered {
        /// The id that the destination gave the message, if it gave one.
        message_id: Option<String>,
    },
    /// This event's own reply was a failure, or it is unknown whether the event arrived.
    Failed(PublishError),
    /// The event was not sent: an earlier event of its key failed, or the call ended before.
    Held,
}

/// The identity of a claim, for destinations that can refuse an outdated claim.
#[derive(Debug, Clone)]
pub struct ClaimId {
    /// The outbox of the claim. Two outboxes that publish to the same place have different names.
    pub outbox: Arc<str>,
    /// A number read while the claim held its partitions. Of two claims of a partition, the later never has the lower epoch.
    pub epoch: i64,
    /// A number that differs between claims of the same epoch.
    pub token: u64,
}

/// An event that was published before, according to the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentBefore {
    /// The partition in which it was claimed.
    pub partition: i16,
    /// Its id in the outbox.
    pub id: i64,
    /// The event's identity for consumers. After a failover of the database the same `id` may be another event's.
    pub event_id: Uuid,
}

/// The outbox's answer when a claim asks about events that were published before.
#[derive(Debug)]
pub struct RenewedClaim {
    /// The claim's epoch from now on.
    pub epoch: i64,
    /// The events that still wait, by their indexes in the question.
    pub pending: Vec<usize>,
}

/// The consequence of an outcome, which is settled in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Delivered.
    Published {
        /// The id that the destination gave the message, if it gave one.
        message_id: Option<String>,
    },
    /// The event is charged. The next attempt is made after the delay.
    Retry {
        /// The time to wait, by the database's clock.
        delay: Duration,
        /// The error of the failed attempt.
        error: PublishError,
    },
    /// The event failed for a reason that concerns its key and not the destination. It is not charged, and its key waits, each
    /// time longer.
    Block {
        /// The error of the failed attempt.
        error: PublishError,
    },
    /// The event is given up and becomes a dead letter.
    DeadLetter {
        /// The error of the last attempt.
        error: PublishError,
    },
    /// The configuration sends the event to no destination.
    Drop {
        /// The part of the configuration that decided this.
        reason: &'static str,
    },
    /// The event is not charged and still pending.
    Wait(Wait),
}

/// What an uncharged event waits for. No wait ends before the event's own `available_at`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// For the next claim. Its row stays pending and does not change.
    InPlace,
    /// For its own `available_at`, for which its row is scheduled.
    UntilDue,
    /// For its destination, which takes nothing now, or which this relay does not know. Its row is scheduled, out of the way of
    /// the events behind it, until a relay has a destination of this name that takes events.
    ForDestination,
    /// For an operator, who has paused its type at its destination. Its row is scheduled and looked at again after a while; a
    /// resume makes it due at once.
    WhilePaused,
    /// For an earlier event of its key, which is due at the same destination after this time, by the database's clock. Its row
    /// is scheduled for then.
    BehindKey(Duration),
}

/// After this time an event is looked at again whose type is paused: a relay may have held it back just when it was resumed.
const PAUSED: Duration = Duration::from_secs(300);

impl Wait {
    /// The time after which the row is due again. `None`: the row does not change.
    pub fn delay(self) -> Option<Duration> {
        match self {
            Self::InPlace => None,
            Self::UntilDue | Self::ForDestination => Some(Duration::ZERO),
            Self::WhilePaused => Some(PAUSED),
            Self::BehindKey(delay) => Some(delay),
        }
    }
}

/// Counts of deliveries by how they ended, over one batch or a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Deliveries that are recorded.
    pub published: u64,
    /// Failed attempts that were charged and are tried again.
    pub retried: u64,
    /// Events that became dead letters.
    pub dead_lettered: u64,
    /// Events that the configuration dropped.
    pub dropped: u64,
    /// Events that are uncharged and still pending.
    pub waiting: u64,
}

impl Tally {
    /// Counts one verdict.
    pub fn count(&mut self, verdict: &Verdict) {
        match verdict {
            Verdict::Published { .. } => self.published += 1,
            Verdict::Retry { .. } => self.retried += 1,
            Verdict::DeadLetter { .. } => self.dead_lettered += 1,
            Verdict::Drop { .. } => self.dropped += 1,
            Verdict::Wait(_) | Verdict::Block { .. } => self.waiting += 1,
        }
    }

    /// Adds another tally to this one.
    pub fn add(&mut self, other: Self) {
        self.published += other.published;
        self.retried += other.retried;
        self.dead_lettered += other.dead_lettered;
        self.dropped += other.dropped;
        self.waiting += other.waiting;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_cut_and_cleaned_before_it_is_stored() {
        let error = PublishError::new(Fault::Event, "X".repeat(600), "é".repeat(600));
        assert_eq!((error.code, error.message), ("X".repeat(100), "é".repeat(500)));
        let error = PublishError::new(Fault::Event, "X\n", "é\0");
        assert_eq!((error.code, error.message), ("X\\n".to_owned(), "é\\u{0}".to_owned()));
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A small event without a key, for unit tests.
    pub(crate) fn event(id: i64) -> Event {
        Event {
            row: RowKey { locator: 0, partition: 576, id, destination: String::new() },
            event_id: Uuid::from_u128(id.unsigned_abs().into()),
            event_type: "order.created".into(),
            source: String::new(),
            aggregate_type: None,
            aggregate_id: None,
            payload: b"{}".to_vec(),
            headers: vec![],
            correlation_id: None,
            causation_id: None,
            schema_version: 1,
            created_at: OffsetDateTime::UNIX_EPOCH,
            attempts: 0,
        }
    }

    /// A small event with the key `order:<key>`.
    pub(crate) fn keyed(id: i64, key: &str) -> Event {
        Event { aggregate_type: Some("order".into()), aggregate_id: Some(key.into()), ..event(id) }
    }
}
