//! The CloudEvents encoder: valid JSON for any event, the payload byte for byte, and the size that EventBridge counts.
#![no_main]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use aws_config::{BehaviorVersion, Region, SdkConfig};
use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use outbox_relay::event::{Event, Outcome, RESERVED_HEADERS, RowKey};
use outbox_relay::sink::eventbridge::{EventBridge, EventBridgeConfig};
use outbox_relay::sink::{Batch, Format, Sink, cloudevent};
use serde_json::value::RawValue;
use time::OffsetDateTime;
use tokio::runtime::{Builder, Runtime};

thread_local! {
    static SINK: RefCell<(Runtime, EventBridge)> = RefCell::new(sink());
}

/// A sink with so low a limit that every event is too large, because its error has the event's size.
fn sink() -> (Runtime, EventBridge) {
    let runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
    let sdk = SdkConfig::builder().behavior_version(BehaviorVersion::latest()).region(Region::new("eu-west-1")).build();
    let config = EventBridgeConfig {
        bus: "main".into(),
        region: None,
        endpoint_url: Some("http://localhost".into()),
        requests_in_flight: 1,
        source: "outbox".into(),
        format: Format::CloudEvents,
        max_entry_bytes: 0,
        timeout: Duration::from_secs(30),
    };
    (runtime, EventBridge::with_sdk_config(&sdk, config))
}

fn text(bytes: &mut Unstructured<'_>) -> Result<String> {
    Ok(bytes.arbitrary::<&str>()?.chars().take(100).collect())
}

fn maybe(bytes: &mut Unstructured<'_>) -> Result<Option<String>> {
    bytes.arbitrary::<bool>()?.then(|| text(bytes)).transpose()
}

/// An event that a store may contain: no header has a reserved name, and the payload is JSON.
fn event(bytes: &mut Unstructured<'_>) -> Result<Event> {
    let mut headers = BTreeMap::new();
    for _ in 0..bytes.int_in_range(0..=2)? {
        headers.insert(text(bytes)?, text(bytes)?);
    }
    headers.retain(|name, _| !RESERVED_HEADERS.contains(&name.as_str()));
    Ok(Event {
        row: RowKey { locator: 0, partition: 1, id: bytes.arbitrary()?, destination: String::new() },
        event_id: uuid::Uuid::from_bytes(bytes.arbitrary()?),
        event_type: text(bytes)?,
        source: text(bytes)?,
        aggregate_type: maybe(bytes)?,
        aggregate_id: maybe(bytes)?,
        headers: headers.into_iter().collect(),
        correlation_id: maybe(bytes)?,
        causation_id: maybe(bytes)?,
        schema_version: bytes.arbitrary()?,
        created_at: OffsetDateTime::from_unix_timestamp(bytes.int_in_range(-377_705_116_800..=253_402_300_799)?)
            .unwrap_or(OffsetDateTime::UNIX_EPOCH),
        attempts: 0,
        payload: bytes.bytes(bytes.len())?.to_vec(),
    })
}

/// Whether this is JSON that is not nested deeper than serde_json can read inside an envelope.
fn is_json(payload: &[u8]) -> bool {
    let brackets = payload.iter().filter(|byte| matches!(byte, b'[' | b'{')).count();
    brackets < 100 && serde_json::from_slice::<&RawValue>(payload).is_ok()
}

fuzz_target!(|data: &[u8]| {
    run(&mut Unstructured::new(data)).ok();
});

fn run(bytes: &mut Unstructured<'_>) -> Result<()> {
    let event = event(bytes)?;
    let json = cloudevent::json(&event, "outbox");
    assert!(json.ends_with(&[b"\"data\":", event.payload.as_slice(), b"}"].concat()), "byte for byte");
    if !is_json(&event.payload) {
        return Ok(());
    }
    let document: BTreeMap<String, &RawValue> = serde_json::from_slice(&json).expect("JSON");
    let string = |name: &str| document.get(name).map(|value| serde_json::from_str::<String>(value.get()).expect(name));
    assert_eq!(document["data"].get().as_bytes(), event.payload.trim_ascii());
    assert_eq!(string("specversion").as_deref(), Some("1.0"));
    assert_eq!(string("id"), Some(event.event_id.to_string()));
    assert_eq!(string("type").as_deref(), Some(event.event_type.as_str()));
    assert_eq!(string("sequence"), Some(event.row.id.to_string()));
    assert_eq!(string("source").as_deref(), Some(if event.source.is_empty() { "outbox" } else { &event.source }));
    assert_eq!(string("subject"), event.aggregate_id.clone().filter(|id| !id.is_empty()));
    assert_eq!(string("correlationid"), event.correlation_id.clone().filter(|id| !id.is_empty()));
    assert_ne!(string("time").as_deref(), Some(""), "an empty attribute is left out");
    assert_eq!(document["schemaversion"].get(), event.schema_version.to_string());
    for (name, value) in &event.headers {
        assert_eq!(string(name).as_ref(), Some(value));
    }

    let (types, source) = (event.event_type.chars().count(), event.source.chars().count());
    if types <= 128 && source <= 256 && !event.source.starts_with("aws.") {
        let outcomes = SINK.with_borrow(|(runtime, sink)| {
            runtime.block_on(sink.publish(&Batch::new(&[&event], Instant::now() + Duration::from_secs(30))))
        });
        let Outcome::Failed(error) = &outcomes.outcomes[0] else { panic!("too large") };
        let source = if event.source.is_empty() { "outbox" } else { &event.source };
        let size = 14 + source.len() + event.event_type.len() + json.len();
        assert_eq!(error.message, format!("the entry has {size} bytes, and the limit is 0"));
    }
    Ok(())
}
