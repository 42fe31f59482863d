//! Amazon EventBridge: `PutEvents` on a classic event bus.
//!
//! Every entry has its own answer, and HTTP 200 says nothing about any of them. EventBridge keeps no order and drops no
//! repeats; what order there is comes from sending a key's events in turn.
//!
//! - `client`: the AWS client and its credentials.
//! - `fault`: whose fault a failure is.

mod client;
mod fault;

use std::error::Error;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use aws_config::{Region, SdkConfig};
use aws_sdk_eventbridge::config::http::HttpResponse;
use aws_sdk_eventbridge::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_eventbridge::primitives::DateTime;
use aws_sdk_eventbridge::types::PutEventsRequestEntry;
use futures_util::future::join_all;
use tokio::sync::Semaphore;

use client::CurrentClient;

use crate::event::{Event, Fault, MAX_EVENT_TYPE_CHARS, Outcome, PublishError};
use crate::sink::rounds::{Limits, Rounds};
use crate::sink::{Format, Sink, cloudevent};

/// The most entries that `PutEvents` takes.
const REQUEST_ENTRIES: usize = 10;
/// The longest `Source`, in characters.
const MAX_SOURCE_CHARS: usize = 256;
/// The longest `TraceHeader`, in characters. A longer one would have the whole request refused, so it stays behind.
const MAX_TRACE_HEADER_CHARS: usize = 500;
/// The deepest nesting of `Detail`.
const MAX_DEPTH: usize = 1000;
/// What a `Time` counts in the size of an entry.
const TIME_BYTES: usize = 14;
/// Becomes an event's `TraceHeader`. `traceparent` does not: EventBridge takes X-Ray's format only.
const TRACE_HEADER: &str = "x-amzn-trace-id";

/// The variables that name another endpoint, the more special one first.
pub const ENDPOINT_VARIABLES: [&str; 2] = ["AWS_ENDPOINT_URL_EVENTBRIDGE", "AWS_ENDPOINT_URL"];

/// EventBridge's limit since January 2026.
pub const DEFAULT_MAX_ENTRY_BYTES: usize = 1_048_576;
/// 8,000 events/s at 40 ms a call need 32 requests of 10 in flight; twice that leaves room for slower calls.
pub const DEFAULT_REQUESTS_IN_FLIGHT: usize = 64;

/// One event bus, and how to publish to it.
#[derive(Debug, Clone)]
pub struct EventBridgeConfig {
    /// Name or ARN of the bus.
    pub bus: String,
    /// `Source` of events that have none of their own.
    pub source: String,
    /// What goes into `Detail`.
    pub format: Format,
    /// Overrides the AWS environment and profile.
    pub region: Option<String>,
    /// Overrides the AWS environment and profile, for EventBridge only.
    pub endpoint_url: Option<String>,
    /// The limit of an entry, and of all entries of a request together. Some AWS partitions are still at 262,144.
    pub max_entry_bytes: usize,
    /// `PutEvents` calls in flight together within one publish, from 1.
    pub requests_in_flight: usize,
    /// The longest wait for one `PutEvents` call.
    pub timeout: Duration,
}

/// Kibibytes of entries in flight from all lanes together. Each is held several times while its request is made and sent.
const IN_FLIGHT_KIB: u32 = 8 * 1024;

/// How long a bus that was seen is taken to be there.
const VERIFY_INTERVAL: Duration = Duration::from_secs(600);

/// The sink. Clients, connections and credentials are shared by all calls.
pub struct EventBridge {
    client: CurrentClient,
    config: EventBridgeConfig,
    /// When the bus was last seen.
    verified: Mutex<Option<Instant>>,
    in_flight: Semaphore,
}

impl EventBridge {
    /// A sink with credentials, region and endpoint from AWS's usual places. Missing ones show at the first call, as
    /// [`Fault::Misconfigured`].
    pub async fn new(config: EventBridgeConfig) -> Self {
        let client = CurrentClient::from_environment(&config).await;
        Self::with_client(client, config)
    }

    /// A sink with what `sdk` holds, where `config` does not override it. Retries and timeouts of `sdk` are ignored.
    pub fn with_sdk_config(sdk: &SdkConfig, config: EventBridgeConfig) -> Self {
        Self::with_client(CurrentClient::with_sdk_config(sdk, &config), config)
    }

    fn with_client(client: CurrentClient, config: EventBridgeConfig) -> Self {
        Self { client, config, verified: Mutex::new(None), in_flight: Semaphore::new(IN_FLIGHT_KIB as usize) }
    }

    /// The event's `Detail`, if EventBridge can take the event at all.
    fn detail(&self, event: &Event) -> Result<String, PublishError> {
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
        // Nesting takes a byte a level, so a short payload needs no scan.
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
        // The default is nothing that an event could be blamed for.
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

    /// The size of an entry as AWS counts it; the name of the bus and the trace header are free.
    fn entry_bytes(&self, event: &Event, detail_bytes: usize) -> usize {
        TIME_BYTES
            + cloudevent::source(event, &self.config.source).len()
            + event.event_type.len()
            + detail_bytes
            + self.resource(event).map_or(0, |resource| resource.len())
    }

    /// What carries the event's id where `Detail` is the bare payload: else no consumer could know a repeat.
    fn resource(&self, event: &Event) -> Option<String> {
        (self.config.format == Format::Payload).then(|| event.event_id.urn().to_string())
    }

    fn entry(&self, event: &Event, detail: String) -> PutEventsRequestEntry {
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

    /// One `PutEvents` call: an outcome for each entry, or one error for them all.
    async fn put(
        &self,
        entries: Vec<PutEventsRequestEntry>,
        bytes: usize,
        deadline: Instant,
    ) -> Result<Vec<Outcome>, PublishError> {
        let sent = entries.len();
        let kib = u32::try_from(bytes / 1024 + 1).map_or(IN_FLIGHT_KIB, |kib| kib.min(IN_FLIGHT_KIB));
        let room = tokio::time::timeout_at(deadline.into(), self.in_flight.acquire_many(kib)).await;
        if room.is_err() || Instant::now() >= deadline {
            return Ok(vec![Outcome::Held; sent]); // the round began in time, and building its other requests took the rest
        }
        let request = self.client.get().put_events().set_entries(Some(entries)).send();
        let answers = self.call(request, deadline).await?.entries.unwrap_or_default();
        if answers.len() != sent {
            let message = format!("{sent} entries were sent, and {} answers came back", answers.len());
            return Err(PublishError::new(Fault::Unknown, "wrong_entry_count", message));
        }
        Ok(answers.into_iter().map(fault::of_entry).collect())
    }

    /// Awaits a request no longer than its timeout, nor past `deadline`.
    async fn call<T, E: ProvideErrorMetadata + Error + 'static>(
        &self,
        request: impl Future<Output = Result<T, SdkError<E, HttpResponse>>>,
        deadline: Instant,
    ) -> Result<T, PublishError> {
        let until = deadline.min(Instant::now() + self.config.timeout);
        match tokio::time::timeout_at(until.into(), request).await {
            Ok(answer) => answer.map_err(fault::of_request).inspect_err(|error| {
                if error.fault == Fault::Misconfigured {
                    self.client.refused();
                }
            }),
            Err(_) => Err(PublishError::new(Fault::Unknown, "timeout", "no answer in time")),
        }
    }
}

#[async_trait]
impl Sink for EventBridge {
    async fn publish(&self, events: &[&Event], deadline: Instant) -> Vec<Outcome> {
        // Without an answer from the places of credentials the old ones are tried.
        tokio::time::timeout_at(deadline.into(), self.client.renew_if_refused(&self.config)).await.ok();
        let (mut details, mut refusals): (Vec<String>, Vec<Option<PublishError>>) = events
            .iter()
            .map(|event| self.detail(event).map_or_else(|error| (String::new(), Some(error)), |detail| (detail, None)))
            .unzip();
        let max_bytes = self.config.max_entry_bytes;
        // As if it were oversize, an event that is not to be sent rides alone: its turn comes when the earlier events of
        // its key have their answers.
        let size = |index: usize| match refusals[index] {
            Some(_) => max_bytes + 1,
            None => self.entry_bytes(events[index], details[index].len()),
        };
        let sizes: Vec<usize> = (0..events.len()).map(size).collect();
        let mut limits = Limits {
            request_events: REQUEST_ENTRIES,
            request_bytes: max_bytes,
            requests: self.config.requests_in_flight,
        };
        let mut rounds = Rounds::new(events);
        if Instant::now() < deadline
            && refusals.iter().any(Option::is_none)
            && let Err(error) = self.verify(deadline).await
        {
            return vec![Outcome::Failed(error); events.len()];
        }
        while Instant::now() < deadline {
            let requests = rounds.next(limits, |index| sizes[index]);
            if requests.is_empty() {
                break;
            }
            let mut calls = Vec::with_capacity(requests.len());
            for members in requests {
                if let Some(error) = refusals[members[0]].take() {
                    answer(&mut rounds, members[0], Outcome::Failed(error));
                    continue;
                }
                let entry = |&index: &usize| self.entry(events[index], std::mem::take(&mut details[index]));
                let bytes = members.iter().map(|&index| sizes[index]).sum();
                let entries = members.iter().map(entry).collect();
                calls.push(async move { (self.put(entries, bytes, deadline).await, members) });
            }
            for (result, members) in join_all(calls).await {
                match result {
                    Ok(outcomes) => {
                        for (index, outcome) in members.into_iter().zip(outcomes) {
                            answer(&mut rounds, index, outcome);
                        }
                    }
                    // Refused for what is in it, a request was not taken in part either: sent one by one, the others
                    // arrive, and only the culprit pays.
                    Err(error) if error.fault == Fault::Event && members.len() > 1 => {
                        limits.request_events = 1;
                        for index in members {
                            details[index] = self.detail(events[index]).unwrap_or_default();
                        }
                    }
                    Err(error) => {
                        for index in members {
                            answer(&mut rounds, index, Outcome::Failed(error.clone()));
                        }
                    }
                }
            }
        }
        rounds.into_outcomes()
    }

    fn place(&self, _: &Event) -> String {
        self.config.bus.clone()
    }

    async fn check(&self) -> Result<String, PublishError> {
        self.describe(Instant::now() + self.config.timeout).await
    }
}

impl EventBridge {
    /// Makes sure that the bus exists before anything is put on it: AWS answers `PutEvents` to one that does not exist with
    /// success, and the events would be lost.
    async fn verify(&self, deadline: Instant) -> Result<(), PublishError> {
        let verified = || self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        let last = *verified();
        if last.is_some_and(|at| at.elapsed() < VERIFY_INTERVAL) {
            return Ok(());
        }
        match self.describe(deadline).await {
            Ok(_) => *verified() = Some(Instant::now()),
            // What was there a while ago is not gone because this call was throttled.
            Err(error) if last.is_some() && error.fault != Fault::Misconfigured => {}
            Err(error) => {
                *verified() = None;
                return Err(error);
            }
        }
        Ok(())
    }

    fn encryption(&self) -> &'static str {
        let endpoint = self.config.endpoint_url.clone();
        let endpoint = endpoint.or_else(|| ENDPOINT_VARIABLES.iter().find_map(|name| std::env::var(name).ok()));
        let plain = endpoint.is_some_and(|url| url.trim_start().to_ascii_lowercase().starts_with("http:"));
        if plain { "not encrypted" } else { "encrypted (TLS)" }
    }

    /// Asks for the bus itself.
    async fn describe(&self, deadline: Instant) -> Result<String, PublishError> {
        let bus = &self.config.bus;
        let client = self.client.get();
        let region = client.config().region().map_or("no region", Region::as_ref);
        let request = client.describe_event_bus().name(bus).send();
        let Err(mut error) = self.call(request, deadline).await else {
            return Ok(format!("event bus {bus:?} in {region}, {}", self.encryption()));
        };
        error.fault = match error.fault {
            Fault::Unknown => Fault::Destination, // nothing was published that could have arrived
            Fault::Event => Fault::Misconfigured, // all that it sent is the name of the bus
            fault => fault,
        };
        if error.code == "not_sent" && client.config().region().is_none() {
            error.message = "there is no AWS region: set AWS_REGION".to_owned();
        } else if error.fault == Fault::Misconfigured && !matches!(error.code.as_str(), "not_sent" | "no_credentials") {
            error.message = format!(
                "event bus {bus:?} in {region}: {}; AWS_EVENTBRIDGE_BUS_NAME and AWS_REGION must name an existing bus, \
                 and the relay needs credentials that allow events:DescribeEventBus and events:PutEvents on it",
                error.message
            );
        }
        Err(error)
    }
}

/// Records an answer. Every failure but an event's own ends the call after its round: the next request would fare no
/// better, and what is unknown must not be overtaken.
fn answer(rounds: &mut Rounds<'_>, index: usize, outcome: Outcome) {
    if matches!(&outcome, Outcome::Failed(error) if !error.fault.charges_event()) {
        rounds.end();
    }
    rounds.answer(index, outcome);
}

fn unfit(code: &str, message: impl AsRef<str>) -> PublishError {
    PublishError::new(Fault::Unfit, code, message)
}

/// How deeply JSON text is nested. Bytes that are no JSON have some depth, too.
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
    use super::*;
    use crate::event::testing::event;
    use aws_config::BehaviorVersion;

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

    /// `urn:uuid:`, and a UUID.
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
