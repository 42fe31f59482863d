//! Makes an entry of an event, and checks whether EventBridge can take it.

use aws_sdk_eventbridge::primitives::DateTime;
use aws_sdk_eventbridge::types::PutEventsRequestEntry;

use crate::event::{Event, Fault, MAX_EVENT_TYPE_CHARS, PublishError};
use crate::sink::eventbridge::EventBridge;
use crate::sink::{Format, cloudevent};

/// The longest `Source`, in characters.
const MAX_SOURCE_CHARS: usize = 256;
/// The longest `TraceHeader`, in characters. A longer one is left out, because EventBridge would refuse the whole request.
const MAX_TRACE_HEADER_CHARS: usize = 500;
/// The deepest nesting of `Detail`.
const MAX_DEPTH: usize = 1000;
/// The bytes that `Time` adds to the size of an entry.
const TIME_BYTES: usize = 14;
/// The header that becomes an event's `TraceHeader`. It is not `traceparent`, because EventBridge takes X-Ray's format only.
const TRACE_HEADER: &str = "x-amzn-trace-id";

impl EventBridge {
    /// Returns the event's `Detail`, or an error if EventBridge cannot take the event.
    pub(super) fn detail(&self, event: &Event) -> Result<String, PublishError> {
        self.check_names(event)?;
        if event.payload.len() > self.config.max_entry_bytes {
            let bytes = match self.config.format {
                Format::CloudEvents => cloudevent::json_bytes(event, &self.config.source),
                Format::Payload => event.payload.len(),
            };
            return Err(self.too_large(self.entry_bytes(event, bytes)));
        }
        let (detail, envelope) = match self.config.format {
            Format::CloudEvents => (cloudevent::json(event, &self.config.source), 1),
            Format::Payload if !event.payload.trim_ascii_start().starts_with(b"{") => {
                return Err(unfit("payload_not_an_object", "as a bare Detail, a payload must be a JSON object"));
            }
            Format::Payload => (event.payload.clone(), 0),
        };
        // Each level of nesting takes a byte, so a short payload needs no scan.
        if event.payload.len() > MAX_DEPTH - envelope && depth(&event.payload) > MAX_DEPTH - envelope {
            return Err(unfit("payload_too_deep", format!("Detail is nested deeper than {MAX_DEPTH} levels")));
        }
        let detail = String::from_utf8(detail).map_err(|_| unfit("payload_not_utf8", "the payload is not UTF-8"))?;
        let bytes = self.entry_bytes(event, detail.len());
        if bytes > self.config.max_entry_bytes {
            return Err(self.too_large(bytes));
        }
        Ok(detail)
    }

    fn too_large(&self, bytes: usize) -> PublishError {
        let limit = self.config.max_entry_bytes;
        unfit("entry_too_large", format!("the entry has {bytes} bytes, and the limit is {limit}"))
    }

    fn check_names(&self, event: &Event) -> Result<(), PublishError> {
        let characters = event.event_type.chars().count();
        if characters > MAX_EVENT_TYPE_CHARS {
            let message = format!("DetailType has {characters} characters, and the limit is {MAX_EVENT_TYPE_CHARS}");
            return Err(unfit("detail_type_too_long", message));
        }
        // A bad default source is no event's fault.
        let fault = if event.source.is_empty() { Fault::Misconfigured } else { Fault::Unfit };
        let source = cloudevent::source(event, &self.config.source);
        if source.is_empty() {
            return Err(PublishError::new(fault, "source_missing", "EventBridge wants a Source: set a default"));
        }
        let characters = source.chars().count();
        if characters > MAX_SOURCE_CHARS {
            let message = format!("Source has {characters} characters, and the limit is {MAX_SOURCE_CHARS}");
            return Err(PublishError::new(fault, "source_too_long", message));
        }
        if source.starts_with("aws.") {
            return Err(PublishError::new(fault, "source_reserved", "a Source that begins with \"aws.\" is AWS's own"));
        }
        Ok(())
    }

    /// Returns the size of an entry in bytes, as AWS counts it: without the name of the bus and the trace header.
    pub(super) fn entry_bytes(&self, event: &Event, detail_bytes: usize) -> usize {
        TIME_BYTES
            + cloudevent::source(event, &self.config.source).len()
            + event.event_type.len()
            + detail_bytes
            + self.resource(event).map_or(0, |resource| resource.len())
    }

    /// Returns the resource that carries the event's id if `Detail` is the bare payload. Without it no consumer could recognise a
    /// repeat.
    fn resource(&self, event: &Event) -> Option<String> {
        (self.config.format == Format::Payload).then(|| event.event_id.urn().to_string())
    }

    pub(super) fn entry(&self, event: &Event, detail: String) -> PutEventsRequestEntry {
        let trace = event.headers.iter().find(|(name, value)| {
            name.eq_ignore_ascii_case(TRACE_HEADER) && (1..=MAX_TRACE_HEADER_CHARS).contains(&value.chars().count())
        });
        PutEventsRequestEntry::builder()
            .time(DateTime::from_secs_and_nanos(event.created_at.unix_timestamp(), event.created_at.nanosecond()))
            .source(cloudevent::source(event, &self.config.source))
            .detail_type(&event.event_type)
            .detail(detail)
            .event_bus_name(&self.config.bus)
            .set_resources(self.resource(event).map(|resource| vec![resource]))
            .set_trace_header(trace.map(|(_, value)| value.clone()))
            .build()
    }
}

fn unfit(code: &str, message: impl AsRef<str>) -> PublishError {
    PublishError::new(Fault::Unfit, code, message)
}

/// Returns how deeply JSON text is nested. For other bytes it returns some number.
fn depth(json: &[u8]) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0_usize, 0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use aws_config::{BehaviorVersion, SdkConfig};

    use super::*;
    use crate::event::testing::event;
    use crate::sink::eventbridge::{DEFAULT_MAX_ENTRY_BYTES, DEFAULT_REQUESTS_IN_FLIGHT, EventBridgeConfig};

    const LIMIT: usize = DEFAULT_MAX_ENTRY_BYTES;

    fn sink(format: Format, max_entry_bytes: usize) -> EventBridge {
        let sdk = SdkConfig::builder().behavior_version(BehaviorVersion::latest()).build();
        let config = EventBridgeConfig {
            bus: "orders".into(),
            source: "shop".into(),
            format,
            region: None,
            endpoint_url: None,
            max_entry_bytes,
            requests_in_flight: DEFAULT_REQUESTS_IN_FLIGHT,
            timeout: Duration::from_secs(1),
        };
        EventBridge::with_sdk_config(&sdk, config)
    }

    fn refused(sink: &EventBridge, event: &Event, code: &str) {
        let error = sink.detail(event).expect_err("a refusal");
        assert_eq!((error.fault, error.code.as_str()), (Fault::Unfit, code));
    }

    fn with_payload(payload: impl Into<Vec<u8>>) -> Event {
        Event { payload: payload.into(), ..event(1) }
    }

    /// The length of `urn:uuid:` and a UUID.
    const RESOURCE_BYTES: usize = 9 + 36;

    fn nested(levels: usize) -> Vec<u8> {
        [br#"{"a":"#.repeat(levels - 1), b"{}".to_vec(), b"}".repeat(levels - 1)].concat()
    }

    #[test]
    fn the_size_of_an_entry_is_time_source_type_detail_and_resources_in_utf8_bytes() {
        let sink = sink(Format::CloudEvents, LIMIT);
        let mut event = event(1);
        event.headers = vec![("x-amzn-trace-id".into(), "Root=1-5e1b4151".into())];
        assert_eq!(sink.entry_bytes(&event, r#"{"a":"é"}"#.len()), 14 + 4 + 13 + 10);
        event.source = "café".into();
        assert_eq!(sink.entry_bytes(&event, 0), 14 + 5 + 13);
        let sink = self::sink(Format::Payload, LIMIT);
        assert_eq!(sink.entry_bytes(&event, 0), 14 + 5 + 13 + RESOURCE_BYTES);
    }

    #[test]
    fn an_entry_fits_up_to_the_limit_and_not_a_byte_beyond() {
        let size = 14 + "shop".len() + "order.created".len() + "{}".len() + RESOURCE_BYTES;
        assert_eq!(sink(Format::Payload, size).detail(&event(1)).expect("it fits"), "{}");
        let error = sink(Format::Payload, size - 1).detail(&event(1)).expect_err("it does not");
        assert_eq!((error.fault, error.code.as_str()), (Fault::Unfit, "entry_too_large"));
        assert_eq!(error.message, "the entry has 78 bytes, and the limit is 77");
    }

    #[test]
    fn names_that_eventbridge_refuses_are_refused_before() {
        let sink = sink(Format::CloudEvents, LIMIT);
        let from = |source: &str| Event { source: source.into(), ..event(1) };
        let typed = |characters| Event { event_type: "é".repeat(characters), ..event(1) };
        assert!(sink.detail(&typed(128)).is_ok());
        refused(&sink, &typed(129), "detail_type_too_long");
        assert!(sink.detail(&from(&"é".repeat(256))).is_ok());
        refused(&sink, &from(&"é".repeat(257)), "source_too_long");
        refused(&sink, &from("aws.s3"), "source_reserved");
        assert!(sink.detail(&from("awsome")).is_ok());
    }

    #[test]
    fn a_bad_default_source_is_not_the_fault_of_an_event() {
        let mut sink = sink(Format::CloudEvents, LIMIT);
        for (source, code) in [("aws.shop", "source_reserved"), ("", "source_missing")] {
            sink.config.source = source.into();
            let error = sink.detail(&event(1)).expect_err("a refusal");
            assert_eq!((error.fault, error.code.as_str()), (Fault::Misconfigured, code));
        }
    }

    #[test]
    fn only_a_trace_header_that_eventbridge_takes_is_passed_on() {
        let sink = sink(Format::CloudEvents, LIMIT);
        let with = |value: &str| Event { headers: vec![("X-Amzn-Trace-Id".into(), value.into())], ..event(1) };
        let header = |event: &Event| sink.entry(event, String::new()).trace_header;
        assert_eq!(header(&with("Root=1-a")).as_deref(), Some("Root=1-a"));
        assert_eq!(header(&with(&"x".repeat(501))), None);
        assert_eq!(header(&with("")), None);
    }

    #[test]
    fn a_bare_payload_must_be_an_object_and_an_enveloped_one_need_not() {
        let [events, bare] = [Format::CloudEvents, Format::Payload].map(|format| sink(format, LIMIT));
        for payload in ["[1]", " \n\"{\"", "null", ""] {
            assert!(events.detail(&with_payload(payload)).is_ok());
            refused(&bare, &with_payload(payload), "payload_not_an_object");
        }
        assert!(bare.detail(&with_payload(" \r\n\t{}")).is_ok());
        refused(&bare, &with_payload(*b"{\xff}"), "payload_not_utf8");
        refused(&events, &with_payload(*b"\xff"), "payload_not_utf8");
    }

    #[test]
    fn detail_may_be_nested_a_thousand_levels_and_the_envelope_is_one() {
        let [events, bare] = [Format::CloudEvents, Format::Payload].map(|format| sink(format, LIMIT));
        assert!(bare.detail(&with_payload(nested(1000))).is_ok());
        refused(&bare, &with_payload(nested(1001)), "payload_too_deep");
        assert!(events.detail(&with_payload(nested(999))).is_ok());
        refused(&events, &with_payload(nested(1000)), "payload_too_deep");
        assert!(bare.detail(&with_payload([br#"{"a":""#.as_slice(), &[b'['; 2000], br#""}"#].concat())).is_ok());
    }

    #[test]
    fn depth_counts_brackets_outside_of_strings_and_takes_any_bytes() {
        let table: [(&[u8], usize); 9] = [
            (b"", 0),
            (b"1", 0),
            (br#"[{"a":[]},[]]"#, 3),
            (br#"{"[[[":"{{{"}"#, 1),
            (br#"["\"[[["]"#, 1),
            (br#"["\\",[]]"#, 2),
            (b"]]]}}[", 1),
            (b"\"[[[\\", 0),
            (b"\xff[\0\xfe[", 2),
        ];
        for (json, expected) in table {
            assert_eq!(depth(json), expected, "{}", json.escape_ascii());
        }
    }
}
