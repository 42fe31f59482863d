//! CloudEvents 1.0 attributes of an event, as JSON (structured mode) or as fields.
//!
//! The payload is copied as the database printed it, and never parsed.

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::event::Event;

/// The attribute that marks an event which is deliberately published once more. Its value is the time at which that replay
/// began. It is one of the [`RESERVED_HEADERS`](crate::RESERVED_HEADERS), so no other event has it.
pub const REPLAYED: &str = "replayed";

/// Calls `attribute` with every CloudEvents attribute that `event` has, then with its headers, but not with the payload.
/// `default_source` replaces an empty source, which the specification does not allow. It does not allow other attributes to
/// be empty either, and consumers' libraries refuse such events. Empty ones are left out.
pub fn attributes<'a>(event: &'a Event, default_source: &'a str, mut attribute: impl FnMut(&'a str, &str)) {
    attribute("specversion", "1.0");
    attribute("id", event.event_id.hyphenated().encode_lower(&mut uuid::Uuid::encode_buffer()));
    attribute("source", source(event, default_source));
    attribute("type", &event.event_type);
    if let Some(subject) = non_empty(event.aggregate_id.as_ref()) {
        attribute("subject", subject);
    }
    if let Some(time) = rfc3339(event.created_at) {
        attribute("time", &time);
    }
    attribute("datacontenttype", "application/json");
    attribute("sequence", &event.row.id.to_string());
    if let Some(key) = non_empty(event.key().map(|key| key.to_string()).as_ref()) {
        attribute("partitionkey", key);
    }
    if let Some(id) = non_empty(event.correlation_id.as_ref()) {
        attribute("correlationid", id);
    }
    if let Some(id) = non_empty(event.causation_id.as_ref()) {
        attribute("causationid", id);
    }
    attribute("schemaversion", &event.schema_version.to_string());
    for (name, value) in &event.headers {
        attribute(name, value);
    }
}

fn non_empty(text: Option<&String>) -> Option<&str> {
    text.map(String::as_str).filter(|text| !text.is_empty())
}

/// Returns the event's source, or the destination's default if the event has none.
pub fn source<'a>(event: &'a Event, default_source: &'a str) -> &'a str {
    if event.source.is_empty() { default_source } else { &event.source }
}

/// Appends the event as one line of structured-mode JSON, with the line end.
pub fn push_line(lines: &mut Vec<u8>, event: &Event, source: &str) {
    let begin = lines.len();
    push_json(lines, event, source);
    end_line(lines, begin);
}

/// Turns the JSON from `begin` on into one line. A store that keeps payloads as text keeps their line ends. In JSON those stand
/// only between tokens, so they can become spaces.
pub fn end_line(lines: &mut Vec<u8>, begin: usize) {
    lines[begin..].iter_mut().filter(|byte| matches!(byte, b'\n' | b'\r')).for_each(|byte| *byte = b' ');
    lines.push(b'\n');
}

/// Returns the event as structured-mode JSON. `data` is the payload, byte for byte.
pub fn json(event: &Event, default_source: &str) -> Vec<u8> {
    let mut json = Vec::with_capacity(event.payload.len() + 384);
    push_json(&mut json, event, default_source);
    json
}

/// Appends the event as structured-mode JSON to `json`.
pub fn push_json(json: &mut Vec<u8>, event: &Event, default_source: &str) {
    push_attributes(json, event, default_source);
    json.extend_from_slice(&event.payload);
    json.push(b'}');
}

/// Returns the length in bytes of the result of [`json`], without copying the payload.
pub fn json_bytes(event: &Event, default_source: &str) -> usize {
    let mut attributes = Vec::with_capacity(384);
    push_attributes(&mut attributes, event, default_source);
    attributes.len() + event.payload.len() + 1
}

/// Appends the JSON up to the payload.
fn push_attributes(json: &mut Vec<u8>, event: &Event, default_source: &str) {
    json.push(b'{');
    attributes(event, default_source, |name, value| {
        push_string(json, name);
        json.push(b':');
        if name == "schemaversion" {
            json.extend_from_slice(value.as_bytes()); // the one attribute that is a number
        } else {
            push_string(json, value);
        }
        json.push(b',');
    });
    json.extend_from_slice(b"\"data\":");
}

fn push_string(json: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(json, text).expect("a string is JSON, and a Vec takes every byte");
}

/// Returns the time as RFC 3339 in UTC, as `CloudEvents` requires. `None`: RFC 3339 has no form for years before 0.
fn rfc3339(at: OffsetDateTime) -> Option<String> {
    at.format(&Rfc3339).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::testing::{event, keyed};

    #[test]
    fn json_has_the_attributes_and_the_payload_byte_for_byte() {
        let mut event = keyed(7, "4\"2");
        event.payload = br#"{"a": 1e400,  "b":"\ud83d\ude00"}"#.to_vec();
        event.correlation_id = Some("req-1".into());
        event.headers = vec![("traceparent".into(), "00-ab-cd-01".into())];
        let json = String::from_utf8(json(&event, "outbox")).expect("UTF-8");
        assert_eq!(
            json,
            concat!(
                r#"{"specversion":"1.0","id":"00000000-0000-0000-0000-000000000007","source":"outbox","type":"order.created","#,
                r#""subject":"4\"2","time":"1970-01-01T00:00:00Z","datacontenttype":"application/json","sequence":"7","#,
                r#""partitionkey":"order:4\"2","correlationid":"req-1","schemaversion":1,"traceparent":"00-ab-cd-01","#,
                r#""data":{"a": 1e400,  "b":"\ud83d\ude00"}}"#
            )
        );
    }

    #[test]
    fn an_event_without_a_key_has_neither_subject_nor_partition_key() {
        let json: serde_json::Value = serde_json::from_slice(&json(&event(1), "outbox")).expect("JSON");
        assert_eq!(json.get("subject"), None);
        assert_eq!(json.get("partitionkey"), None);
        assert_eq!(json["data"], serde_json::json!({}));
    }

    #[test]
    fn an_attribute_that_is_there_is_not_empty() {
        let mut event = keyed(1, "");
        (event.correlation_id, event.causation_id) = (Some(String::new()), Some(String::new()));
        let names = |event: &Event| {
            let mut names = Vec::new();
            attributes(event, "outbox", |name, value| {
                assert_ne!(value, "", "{name}");
                names.push(name.to_owned());
            });
            names
        };
        assert!(names(&event).contains(&"partitionkey".to_owned()), "order: is a key");
        event.created_at = OffsetDateTime::UNIX_EPOCH - time::Duration::days(800_000);
        assert!(!names(&event).contains(&"time".to_owned()), "before the year 0");
        event.aggregate_type = None;
        assert!(!names(&event).contains(&"partitionkey".to_owned()));
    }
}
