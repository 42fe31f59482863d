//! Answers to `PutEvents`: any status with any body, through the whole SDK. Only its own EventId makes an event delivered.
#![no_main]

use std::cell::RefCell;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_smithy_runtime_api::client::http::{HttpConnector, HttpConnectorFuture, SharedHttpConnector, http_client_fn};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_types::body::SdkBody;
use libfuzzer_sys::fuzz_target;
use outbox_relay::event::{Event, Fault, Outcome, RowKey};
use outbox_relay::sink::eventbridge::{EventBridge, EventBridgeConfig};
use outbox_relay::sink::{Batch, Format, Sink};
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};

const EVENTS: usize = 3;

/// Gives every `PutEvents` the same answer.
#[derive(Clone, Debug, Default)]
struct Canned(Arc<Mutex<(u16, Vec<u8>)>>);

impl HttpConnector for Canned {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let put = request.headers().get("x-amz-target").is_some_and(|target| target.ends_with("PutEvents"));
        let answer = self.0.lock().expect("the lock is not poisoned").clone();
        let (status, body) = if put { answer } else { (200, br#"{"Name":"main","Arn":"arn"}"#.to_vec()) };
        HttpConnectorFuture::ready(Ok(HttpResponse::new(status.try_into().expect("a status"), SdkBody::from(body))))
    }
}

static ANSWER: LazyLock<Canned> = LazyLock::new(Canned::default);

thread_local! {
    static SINK: RefCell<(Runtime, EventBridge)> = RefCell::new(sink());
}

fn sink() -> (Runtime, EventBridge) {
    let runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
    let sdk = SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("eu-west-1"))
        .credentials_provider(SharedCredentialsProvider::new(Credentials::from_keys("id", "key", None)))
        .http_client(http_client_fn(|_, _| SharedHttpConnector::new(ANSWER.clone())))
        .build();
    let config = EventBridgeConfig {
        bus: "main".into(),
        region: None,
        endpoint_url: Some("http://localhost".into()),
        requests_in_flight: 1,
        source: "outbox".into(),
        format: Format::Payload,
        max_entry_bytes: 1 << 20,
        timeout: Duration::from_secs(30),
    };
    (runtime, EventBridge::with_sdk_config(&sdk, config))
}

fn event(id: i64) -> Event {
    Event {
        row: RowKey { locator: 0, partition: 1, id, destination: String::new() },
        event_id: uuid::Uuid::from_u128(7),
        event_type: "order.created".into(),
        source: String::new(),
        aggregate_type: None,
        aggregate_id: None,
        payload: b"{}".to_vec(),
        headers: Vec::new(),
        correlation_id: None,
        causation_id: None,
        schema_version: 1,
        created_at: time::OffsetDateTime::UNIX_EPOCH,
        attempts: 0,
    }
}

fuzz_target!(|data: &[u8]| {
    let [first, body @ ..] = data else { return };
    let status = [200, 200, 200, 200, 400, 403, 413, 429, 500, 503, 204, 301][usize::from(*first) % 12];
    *ANSWER.0.lock().expect("the lock is not poisoned") = (status, body.to_vec());
    let events: Vec<Event> = (0..3).map(event).collect();
    let events: Vec<&Event> = events.iter().collect();
    let outcomes = SINK.with_borrow(|(runtime, sink)| {
        runtime.block_on(sink.publish(&Batch::new(&events, Instant::now() + Duration::from_secs(30)))).outcomes
    });
    assert_eq!(outcomes.len(), EVENTS);
    let document = serde_json::from_slice::<Value>(body).unwrap_or_default();
    let entries = document["Entries"].as_array();
    for (at, outcome) in outcomes.iter().enumerate() {
        match outcome {
            Outcome::Delivered { message_id } => {
                let entry = &entries.expect("an event was delivered by an answer without entries")[at];
                assert_eq!(status, 200);
                assert_eq!(entries.map(Vec::len), Some(EVENTS), "an answer with a wrong count delivers nothing");
                assert_eq!(entry["EventId"].as_str(), message_id.as_deref(), "each event has its own EventId");
                assert_eq!(entry["ErrorCode"].as_str(), None);
            }
            Outcome::Failed(error) => {
                assert!(!error.message.contains('\0') && error.message.chars().count() <= 500);
                if status == 200 && entries.is_none_or(|entries| entries.len() != EVENTS) {
                    assert_eq!(error.fault, Fault::Unknown, "{error:?}");
                }
            }
            Outcome::Held => panic!("all three events were sent"),
        }
    }
});
