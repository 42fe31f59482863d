//! The event that applications emit.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use uuid::Uuid;

/// The longest event type, in characters: EventBridge's limit for `DetailType`, and a CHECK of the schema.
pub const MAX_EVENT_TYPE_CHARS: usize = 128;

/// The longest source, correlation id and causation id, and the longest of both halves of a key together, in bytes. The
/// schema has the same limits.
pub const MAX_TEXT_BYTES: usize = 16_384;

/// The largest size in bytes of all headers together, as the JSON that the database prints. The schema has the same limit.
pub const MAX_HEADERS_BYTES: usize = 262_144;

/// Header names that would hide an attribute which consumers rely on, in any case and with any space around them. The schema
/// refuses them too. (`replayed` marks events that `relay replay` publishes once more.)
pub const RESERVED_HEADERS: [&str; 16] = [
    "specversion",
    "id",
    "source",
    "type",
    "subject",
    "time",
    "datacontenttype",
    "dataschema",
    "sequence",
    "partitionkey",
    "correlationid",
    "causationid",
    "schemaversion",
    "data",
    "data_base64",
    "replayed",
];

/// An error in the name of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeaderName {
    Empty,
    Reserved,
}

impl HeaderName {
    /// Returns what is wrong with a name, if anything. Case and surrounding space do not matter, because readers of an event
    /// may trim names or ignore their case.
    pub(crate) fn trouble(name: &str) -> Option<Self> {
        let name = name.trim_matches(|c: char| c.is_whitespace() || c.is_control());
        if name.is_empty() {
            Some(Self::Empty)
        } else {
            RESERVED_HEADERS.iter().any(|reserved| reserved.eq_ignore_ascii_case(name)).then_some(Self::Reserved)
        }
    }
}

/// An event that an application is about to emit. Pass it to [`emit`](fn@crate::emit) inside the transaction that it belongs
/// to.
///
/// ```
/// # fn main() -> Result<(), outbox_relay::NewEventError> {
/// use outbox_relay::NewEvent;
///
/// let event = NewEvent::new("order.created", &serde_json::json!({ "total": "12.50" }))?
///     .key("order", "42")
///     .correlation_id("req-7f3a")
///     .header("tenant", "acme");
/// assert_eq!(event.event_type(), "order.created");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct NewEvent {
    pub(crate) event_id: Uuid,
    pub(crate) event_type: String,
    pub(crate) source: String,
    pub(crate) aggregate_type: Option<String>,
    pub(crate) aggregate_id: Option<String>,
    pub(crate) payload: String,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) correlation_id: Option<String>,
    pub(crate) causation_id: Option<String>,
    pub(crate) schema_version: i32,
    pub(crate) priority: i16,
    pub(crate) delay: Duration,
}

impl NewEvent {
    /// Creates an event with `payload` as its JSON.
    ///
    /// # Errors
    /// [`NewEventError::Payload`] if `payload` cannot be written as JSON.
    pub fn new(event_type: impl Into<String>, payload: &impl Serialize) -> Result<Self, NewEventError> {
        let payload = serde_json::to_string(payload).map_err(NewEventError::Payload)?;
        Ok(Self::from_json(event_type, payload))
    }

    /// Creates an event whose payload is already JSON text. PostgreSQL checks it when it is inserted.
    pub fn from_json(event_type: impl Into<String>, payload: impl Into<String>) -> Self {
        Self {
            event_id: Uuid::new_v4(),
            event_type: event_type.into(),
            source: String::new(),
            aggregate_type: None,
            aggregate_id: None,
            payload: payload.into(),
            headers: BTreeMap::new(),
            correlation_id: None,
            causation_id: None,
            schema_version: 1,
            priority: 0,
            delay: Duration::ZERO,
        }
    }

    /// Sets the ordering key. Events with the same key are published in order.
    #[must_use]
    pub fn key(mut self, aggregate_type: impl Into<String>, aggregate_id: impl Into<String>) -> Self {
        self.aggregate_type = Some(aggregate_type.into());
        self.aggregate_id = Some(aggregate_id.into());
        self
    }

    /// Sets the module or service that emits the event. Without a source, consumers see the relay's default.
    #[must_use]
    pub fn source(mut self, source: impl Into<String>) -> Self {
        self.source = source.into();
        self
    }

    /// Adds a header. Consumers see it as an attribute of this name.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.insert(name.into(), value.into());
        self
    }

    /// Sets the identifier that all events of one business operation share.
    #[must_use]
    pub fn correlation_id(mut self, id: impl Into<String>) -> Self {
        self.correlation_id = Some(id.into());
        self
    }

    /// Sets the event or command that caused this event.
    #[must_use]
    pub fn causation_id(mut self, id: impl Into<String>) -> Self {
        self.causation_id = Some(id.into());
        self
    }

    /// Sets the version of the payload's schema, from 1.
    #[must_use]
    pub fn schema_version(mut self, version: i32) -> Self {
        self.schema_version = version;
        self
    }

    /// Sets the priority, from 0 (the default) to 9; 9 comes first. Order within a key holds among equal priorities.
    #[must_use]
    pub fn priority(mut self, priority: u8) -> Self {
        self.priority = priority.into();
        self
    }

    /// Delays the event for this long after its transaction began. It delays no other event.
    #[must_use]
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// Replaces the random event id, for callers whose events already have one.
    #[must_use]
    pub fn event_id(mut self, event_id: Uuid) -> Self {
        self.event_id = event_id;
        self
    }

    /// The event type, as in `order.created`.
    pub fn event_type(&self) -> &str {
        &self.event_type
    }

    /// Checks that the schema will accept the event. This is done before the insert, because a refused insert would end the
    /// caller's transaction.
    pub(crate) fn validate(&self) -> Result<(), NewEventError> {
        let characters = self.event_type.chars().count();
        if !(1..=MAX_EVENT_TYPE_CHARS).contains(&characters) {
            return Err(NewEventError::EventType { characters });
        }
        if !(0..=9).contains(&self.priority) {
            return Err(NewEventError::Priority { priority: self.priority });
        }
        if self.schema_version < 1 {
            return Err(NewEventError::SchemaVersion { version: self.schema_version });
        }
        for name in self.headers.keys() {
            match HeaderName::trouble(name) {
                Some(HeaderName::Empty) => return Err(NewEventError::EmptyHeader),
                Some(HeaderName::Reserved) => return Err(NewEventError::ReservedHeader { name: name.clone() }),
                None => {}
            }
        }
        let texts = [
            ("event_type", Some(&self.event_type)),
            ("source", Some(&self.source)),
            ("aggregate_type", self.aggregate_type.as_ref()),
            ("aggregate_id", self.aggregate_id.as_ref()),
            ("correlation_id", self.correlation_id.as_ref()),
            ("causation_id", self.causation_id.as_ref()),
        ];
        if let Some((field, _)) = texts.iter().find(|(_, text)| text.is_some_and(|text| text.contains('\0'))) {
            return Err(NewEventError::Nul { field });
        }
        if self.headers.iter().any(|(name, value)| name.contains('\0') || value.contains('\0')) {
            return Err(NewEventError::Nul { field: "headers" });
        }
        // The event type has its own limit.
        if let Some((field, bytes)) = texts[1..].iter().find_map(|(field, text)| {
            text.map(String::len).filter(|bytes| *bytes > MAX_TEXT_BYTES).map(|bytes| (*field, bytes))
        }) {
            return Err(NewEventError::TooLong { field, bytes, most: MAX_TEXT_BYTES });
        }
        // PostgreSQL prints a space after each colon and each comma.
        let spaces = (2 * self.headers.len()).saturating_sub(1);
        let bytes = serde_json::to_string(&self.headers).map_or(0, |json| json.len() + spaces);
        if bytes > MAX_HEADERS_BYTES {
            return Err(NewEventError::TooLong { field: "headers", bytes, most: MAX_HEADERS_BYTES });
        }
        unstorable_escape(&self.payload).map_or(Ok(()), Err)
    }
}

/// Returns the error of JSON text with an escape that `jsonb` cannot store: `\u0000`, or half a surrogate pair.
fn unstorable_escape(json: &str) -> Option<NewEventError> {
    // The UTF-16 unit of an escape, which begins after its backslash.
    let unit = |escape: &str| u16::from_str_radix(escape.strip_prefix('u')?.get(..4)?, 16).ok();
    let mut rest = json;
    while let Some(at) = rest.find('\\') {
        let escape = &rest[at + 1..];
        let low =
            |behind: &str| behind.strip_prefix('\\').and_then(unit).filter(|unit| (0xDC00..0xE000).contains(unit));
        rest = match unit(escape) {
            Some(0) => return Some(NewEventError::Nul { field: "payload" }),
            Some(0xD800..0xDC00) if low(&escape[5..]).is_some() => &escape[11..],
            Some(0xD800..0xE000) => return Some(NewEventError::Surrogate),
            // Skips the escaped character, so that `\\u0000`, an escaped backslash and five plain characters, is not taken
            // for NUL.
            _ => &escape[escape.chars().next().map_or(0, char::len_utf8)..],
        };
    }
    None
}

/// Why an event cannot be emitted. Nothing was sent to the database.
#[derive(Debug, thiserror::Error)]
pub enum NewEventError {
    /// The payload's `Serialize` implementation failed.
    #[error("the payload cannot be written as JSON")]
    Payload(#[source] serde_json::Error),
    /// The event type does not have 1 to [`MAX_EVENT_TYPE_CHARS`] characters.
    #[error("an event type has 1 to {MAX_EVENT_TYPE_CHARS} characters, this one has {characters}")]
    EventType {
        /// The number of characters.
        characters: usize,
    },
    /// The priority is not in the range 0 to 9.
    #[error("a priority is 0 to 9, not {priority}")]
    Priority {
        /// The priority that the application gave.
        priority: i16,
    },
    /// The schema version is below 1.
    #[error("a schema version starts at 1, not {version}")]
    SchemaVersion {
        /// The given version.
        version: i32,
    },
    /// A header has an empty name, or a name of space only.
    #[error("a header has no name; give it one")]
    EmptyHeader,
    /// A text or the headers have more bytes than the schema allows.
    #[error("{field} has {bytes} bytes, at most {most} are allowed")]
    TooLong {
        /// The column.
        field: &'static str,
        /// The number of bytes.
        bytes: usize,
        /// The largest number of bytes.
        most: usize,
    },
    /// A header has one of the [`RESERVED_HEADERS`].
    #[error("the header name {name:?} is taken by an attribute of the event itself; choose another")]
    ReservedHeader {
        /// The name of the header.
        name: String,
    },
    /// A text contains a NUL character, which PostgreSQL cannot store.
    #[error("{field} holds a NUL character, which PostgreSQL cannot store; remove it")]
    Nul {
        /// The column.
        field: &'static str,
    },
    /// The payload contains half of a surrogate pair, as JavaScript's strings may. PostgreSQL cannot store it.
    #[error("the payload holds half a surrogate pair, as in \"\\ud83d\", which PostgreSQL cannot store; replace it")]
    Surrogate,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_escape_that_cannot_be_stored_is_found_and_an_escaped_backslash_is_none() {
        let nul = |json: &str| matches!(unstorable_escape(json), Some(NewEventError::Nul { field: "payload" }));
        assert!(nul(r#"{"a":"x\u0000"}"#));
        assert!(nul(r#"{"a":"\\\u0000"}"#));
        assert!(nul(r#""\ud83d\ude00\u0000""#));
        for half in
            [r#""\ud83d""#, r#""\uDE00""#, r#""\ud83d\n""#, r#""\ud83d\u0041""#, r#""\ud83d\ud83d\ude00""#, r"\ud83d\"]
        {
            assert!(matches!(unstorable_escape(half), Some(NewEventError::Surrogate)), "{half}");
        }
        for fine in
            [r#"{"a":"\\u0000"}"#, r#"{"a":"\u0001\n"}"#, r#""\ud83d\uDE00\ud83d\ude00""#, r"\", r"\u", r"\u12é", r"\é"]
        {
            assert!(unstorable_escape(fine).is_none(), "{fine}");
        }
    }

    #[test]
    fn what_the_schema_would_refuse_is_refused_before_the_insert() {
        let event = |event_type: &str| NewEvent::from_json(event_type, "{}");
        assert!(event("order.created").validate().is_ok());
        assert!(matches!(event("").validate(), Err(NewEventError::EventType { characters: 0 })));
        assert!(matches!(event(&"é".repeat(129)).validate(), Err(NewEventError::EventType { characters: 129 })));
        assert!(event(&"é".repeat(128)).validate().is_ok());
        assert!(matches!(event("a").priority(10).validate(), Err(NewEventError::Priority { priority: 10 })));
        assert!(matches!(event("a").schema_version(0).validate(), Err(NewEventError::SchemaVersion { .. })));
        for name in ["id", "ID", "Type", " data\t", "\u{a0}Source\n", "replayed"] {
            let refused = event("a").header(name, "x").validate();
            assert!(matches!(refused, Err(NewEventError::ReservedHeader { .. })), "{name:?}");
        }
        for name in ["", " ", "\t\u{2003}"] {
            assert!(matches!(event("a").header(name, "x").validate(), Err(NewEventError::EmptyHeader)), "{name:?}");
        }
        for name in ["traceparent", "x-amzn-trace-id", "_id", "i d", "identity"] {
            assert!(event("a").header(name, "x").validate().is_ok(), "{name:?}");
        }
        assert!(event("a").source("é".repeat(8192)).validate().is_ok());
        let long = event("a").source("é".repeat(8193)).validate();
        assert!(matches!(long, Err(NewEventError::TooLong { field: "source", bytes: 16_386, .. })));
        assert!(matches!(event("a").key("k", "4\0").validate(), Err(NewEventError::Nul { field: "aggregate_id" })));
        let nul = NewEvent::new("a", &"x\0y").expect("a string is JSON");
        assert!(matches!(nul.validate(), Err(NewEventError::Nul { field: "payload" })));
    }
}
