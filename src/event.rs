//! The vocabulary: what applications emit, what the relay claims, and what became of it.
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

/// Which row of the outbox.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RowKey {
    /// Where the store finds it again when it settles; means nothing to anyone else.
    pub locator: i64,
    /// The unit of claiming; lower is more urgent.
    pub partition: i16,
    /// Insertion order.
    pub id: i64,
    /// Empty: to be routed. Set: the one destination still owed.
    pub destination: String,
}

/// The ordering key: `aggregate_type` (empty where null) and `aggregate_id`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key<'a> {
    /// As in `order`.
    pub aggregate_type: &'a str,
    /// As in `42`.
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
    /// Its identity for consumers.
    pub event_id: Uuid,
    /// What happened, as in `order.created`.
    pub event_type: String,
    /// Who emitted it; empty: the destination's default.
    pub source: String,
    /// First half of the key.
    pub aggregate_type: Option<String>,
    /// Second half of the key; `None`: no order wanted.
    pub aggregate_id: Option<String>,
    /// The payload's JSON as the database prints it, passed through and never parsed.
    pub payload: Vec<u8>,
    /// Flat headers, by name.
    pub headers: Vec<(String, String)>,
    /// Shared by all events of one business operation.
    pub correlation_id: Option<String>,
    /// What caused it.
    pub causation_id: Option<String>,
    /// Version of the payload's schema.
    pub schema_version: i32,
    /// When the emitting transaction began, by the database's clock.
    pub created_at: OffsetDateTime,
    /// Attempts charged so far.
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
    /// About how many bytes of memory it takes: all that its emitter chose the size of.
    pub fn bytes(&self) -> usize {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let headers: usize = self.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
        let key = text(&self.aggregate_type) + text(&self.aggregate_id);
        self.payload.len() + headers + self.source.len() + key + text(&self.correlation_id) + text(&self.causation_id)
    }
}

impl fmt::Debug for Event {
    /// Identities only: payloads and headers never reach a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event")
            .field("row", &self.row)
            .field("event_id", &self.event_id)
            .field("event_type", &self.event_type)
            .finish_non_exhaustive()
    }
}

/// Whose fault a failed publish is; decides what becomes of the event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The destination judged this event bad: charge it, try again with backoff, then dead-letter.
    Event,
    /// No attempt can ever succeed, as with an entry over the destination's size limit: dead-letter at once.
    Unfit,
    /// The destination is unwell: pause it, charge nobody. Also every error nobody has classified.
    Destination,
    /// The destination is set up wrongly, and a human must act: pause it, alarm, charge nobody.
    Misconfigured,
    /// Nobody knows whether it arrived, as after a timeout: leave the event pending, charge nobody.
    Unknown,
}

impl Fault {
    /// The bounded label of this kind in logs.
    pub fn label(self) -> &'static str {
        match self {
            Self::Event => "event",
            Self::Unfit => "unfit",
            Self::Destination => "destination",
            Self::Misconfigured => "misconfigured",
            Self::Unknown => "unknown_outcome",
        }
    }

    /// Whether the event pays for it.
    pub fn charges_event(self) -> bool {
        matches!(self, Self::Event | Self::Unfit)
    }
}

/// A failed publish of one event. It is data: stored, counted and judged, so it does not travel by `?`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishError {
    /// Whose fault it is.
    pub fault: Fault,
    /// The destination's own code, or one of ours in lower case.
    pub code: String,
    /// What a person reads; never holds the payload.
    pub message: String,
    /// It says nothing about any event, whatever the destination took a moment before: it refused whoever asked, or nothing was
    /// sent.
    pub of_destination: bool,
}

impl PublishError {
    /// The longest message that is stored, in characters.
    const MAX_MESSAGE_CHARS: usize = 500;

    /// The same of a code.
    const MAX_CODE_CHARS: usize = 100;

    /// An error with code and message escaped, and cut to what is worth storing.
    pub fn new(fault: Fault, code: impl Into<String>, message: impl AsRef<str>) -> Self {
        // A destination's text is not ours to trust.
        let code = shown(&code.into(), Self::MAX_CODE_CHARS);
        Self { fault, code, message: shown(message.as_ref(), Self::MAX_MESSAGE_CHARS), of_destination: false }
    }

    /// The same, and no event has to do with it, as where a password is wrong.
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

/// What a destination did with one event: a sink's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// This event's own reply was a success.
    Delivered {
        /// What the destination calls it, where it says.
        message_id: Option<String>,
    },
    /// This event's own reply was a failure, or its fate is unknown.
    Failed(PublishError),
    /// Not sent: an earlier event of its key failed, or the call ended before its turn.
    Held,
}

/// What sets one claim apart from all others, for destinations that can refuse an outdated one.
#[derive(Debug, Clone)]
pub struct ClaimId {
    /// Which outbox: no two that publish to the same place have the same.
    pub outbox: Arc<str>,
    /// Read when the claim held its partitions: of two claims of a partition, the later never has the lower one.
    pub epoch: i64,
    /// Tells claims of the same epoch apart.
    pub token: u64,
}

/// An event that a destination says it was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentBefore {
    /// The partition in which it was claimed.
    pub partition: i16,
    /// Its id in the outbox.
    pub id: i64,
    /// Its identity for consumers: after a failover of the database the same `id` may be another event's.
    pub event_id: Uuid,
}

/// What a claim learns when it asks about noted events.
#[derive(Debug)]
pub struct RenewedClaim {
    /// The claim's epoch from now on.
    pub epoch: i64,
    /// Which of the events still wait: their places in the question.
    pub pending: Vec<usize>,
}

/// What follows from an outcome: the record that is settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Delivered.
    Published {
        /// What the destination calls it.
        message_id: Option<String>,
    },
    /// Charged; next attempt after the delay.
    Retry {
        /// How long to wait, counted by the database's clock.
        delay: Duration,
        /// Why.
        error: PublishError,
    },
    /// Failed for a reason that concerns its key and not the destination: uncharged, and its key waits, each time longer.
    Block {
        /// Why.
        error: PublishError,
    },
    /// Given up.
    DeadLetter {
        /// Why.
        error: PublishError,
    },
    /// Not wanted anywhere, by configuration.
    Drop {
        /// Which part of the configuration says so.
        reason: &'static str,
    },
    /// Uncharged and still owed.
    Wait(Wait),
}

/// What an event waits for that is not charged. No wait ends before the event's own `available_at`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// For the next claim. Its row stays pending, as it is.
    InPlace,
    /// For its own `available_at`, for which its row is scheduled.
    UntilDue,
    /// For its destination, which takes nothing now, or which this relay does not know. Its row is scheduled, out of the way of
    /// the events behind it, until a relay has a destination of this name that takes events.
    ForDestination,
    /// For an earlier event of its key, which is due at the same destination after this time, by the database's clock. Its row
    /// is scheduled for then.
    BehindKey(Duration),
}

impl Wait {
    /// After how long its row is due again; `None`: the row does not change.
    pub fn delay(self) -> Option<Duration> {
        match self {
            Self::InPlace => None,
            Self::UntilDue | Self::ForDestination => Some(Duration::ZERO),
            Self::BehindKey(delay) => Some(delay),
        }
    }
}

/// How many deliveries ended how, over a pass or a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Delivered and recorded.
    pub published: u64,
    /// Charged, to be tried again.
    pub retried: u64,
    /// Given up.
    pub dead_lettered: u64,
    /// Dropped by setting.
    pub dropped: u64,
    /// Still owed, uncharged.
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

    /// A small keyless event, for the unit tests of the pure parts.
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

    /// The same with the key `order:<key>`.
    pub(crate) fn keyed(id: i64, key: &str) -> Event {
        Event { aggregate_type: Some("order".into()), aggregate_id: Some(key.into()), ..event(id) }
    }
}
