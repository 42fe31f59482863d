//! The EventBridge sink alone, against a stub that fails in every way in which EventBridge and the network can fail.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_config::credential_process::CredentialProcessProvider;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_eventbridge::config::SharedCredentialsProvider;
use outbox_relay::event::{Event, Fault, Outcome};
use outbox_relay::sink::eventbridge::{EventBridge, EventBridgeConfig};
use outbox_relay::sink::{Format, Sink};
use serde_json::{Value, json};
use tokio::sync::Barrier;

use crate::stub::{EntryReply, EventBridgeStub, Reply};
use crate::support::{
    assert_all_failed, error, event, eventbridge_config as config, keyed, publish, publish_until, sdk,
};

/// A text that is in every payload and must not appear in an error.
const CANARY: &str = "4929-1234";

fn sink(stub: &EventBridgeStub) -> EventBridge {
    with(stub, |_| {})
}

fn with(stub: &EventBridgeStub, change: impl FnOnce(&mut EventBridgeConfig)) -> EventBridge {
    let mut config = config(stub.url());
    change(&mut config);
    EventBridge::with_sdk_config(&sdk(), config)
}

fn events(ids: std::ops::RangeInclusive<i64>) -> Vec<Event> {
    ids.map(event).collect()
}

fn delivered(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Delivered { message_id: Some(_) })
}

/// Returns the outcomes when every request is answered with `reply`.
async fn publish_three(reply: Reply) -> Vec<Outcome> {
    let stub = EventBridgeStub::start().await;
    stub.script([reply]);
    let outcomes = publish(&sink(&stub), &events(1..=3)).await;
    assert_eq!(stub.requests().len(), 1, "nothing is sent twice");
    outcomes
}

fn ids(request: &[Value]) -> Vec<i64> {
    let detail = |entry: &Value| serde_json::from_str::<Value>(entry["Detail"].as_str().unwrap()).unwrap();
    request.iter().map(|entry| detail(entry)["sequence"].as_str().unwrap().parse().unwrap()).collect()
}

#[tokio::test]
async fn an_entry_carries_source_type_time_bus_trace_and_the_cloudevent() {
    let stub = EventBridgeStub::start().await;
    let mut event = Event { source: String::new(), ..keyed(7, "42") };
    event.headers = vec![("X-Amzn-Trace-Id".into(), "Root=1-a".into()), ("traceparent".into(), "00-ab-cd-01".into())];
    let outcomes = publish(&sink(&stub), &[event]).await;
    assert_eq!(outcomes, [Outcome::Delivered { message_id: Some("stub-1".into()) }]);
    let entry = &stub.requests()[0][0];
    assert_eq!(entry["Source"], "outbox");
    assert_eq!(entry["DetailType"], "order.created");
    assert_eq!(entry["Time"], 1_767_225_600);
    assert_eq!(entry["EventBusName"], "orders");
    assert_eq!(entry["TraceHeader"], "Root=1-a");
    let detail: Value = serde_json::from_str(entry["Detail"].as_str().unwrap()).unwrap();
    assert_eq!(detail["id"], "00000000-0000-0000-0000-000000000007");
    assert_eq!(detail["partitionkey"], "order:42");
    assert_eq!(detail["data"], json!({ "n": 7 }));
}

#[tokio::test]
async fn f100_a_bare_payload_is_told_again_by_the_event_id_among_its_resources() {
    let stub = EventBridgeStub::start().await;
    publish(&with(&stub, |config| config.format = Format::Payload), &[event(7)]).await;
    publish(&sink(&stub), &[event(7)]).await;
    let requests = stub.requests();
    assert_eq!(requests[0][0]["Resources"], json!(["urn:uuid:00000000-0000-0000-0000-000000000007"]));
    assert_eq!(requests[1][0]["Resources"], Value::Null, "the document has the field");
}

#[tokio::test]
async fn the_payloads_bytes_arrive_as_they_were() {
    let stub = EventBridgeStub::start().await;
    let payload = r#"{"a": 1e400,  "b":"\ud83d\ude00 é\u0000", "c":123456789012345678901234567890}"#;
    let event = Event { payload: payload.into(), ..event(1) };
    publish(&with(&stub, |config| config.format = Format::Payload), std::slice::from_ref(&event)).await;
    publish(&sink(&stub), &[event]).await;
    let requests = stub.requests();
    assert_eq!(requests[0][0]["Detail"], payload);
    let detail = requests[1][0]["Detail"].as_str().unwrap();
    assert!(detail.ends_with(&format!(r#","data":{payload}}}"#)), "{detail}");
}

#[tokio::test]
async fn f46_a_throttled_request_is_the_destinations_fault() {
    assert_all_failed(&publish_three(Reply::ThrottleRequest).await, Fault::Destination, "ThrottlingException");
}

#[tokio::test]
async fn f46_after_a_throttled_request_no_further_round_begins() {
    let stub = EventBridgeStub::start().await;
    stub.script([Reply::ThrottleRequest]);
    let outcomes = publish(&with(&stub, |config| config.requests_in_flight = 1), &events(1..=30)).await;
    assert_eq!(stub.requests().len(), 1);
    assert_all_failed(&outcomes[..10], Fault::Destination, "ThrottlingException");
    assert!(outcomes[10..].iter().all(|outcome| *outcome == Outcome::Held));
}

#[tokio::test]
async fn f46_throttled_entries_fail_alone_and_the_others_are_delivered() {
    let stub = EventBridgeStub::start().await;
    let throttled = EntryReply::Failed("ThrottlingException");
    stub.script([Reply::Entries(vec![EntryReply::Accepted, throttled, EntryReply::Accepted, throttled])]);
    let outcomes = publish(&sink(&stub), &events(1..=4)).await;
    assert!(delivered(&outcomes[0]) && delivered(&outcomes[2]));
    assert_all_failed(&[outcomes[1].clone(), outcomes[3].clone()], Fault::Destination, "ThrottlingException");
}

#[tokio::test]
async fn f47_an_internal_failure_of_the_third_of_ten_entries_is_its_own() {
    let stub = EventBridgeStub::start().await;
    stub.script([Reply::FailEntry(2, "InternalFailure")]);
    let outcomes = publish(&sink(&stub), &events(1..=10)).await;
    assert_all_failed(&outcomes[2..3], Fault::Destination, "InternalFailure");
    assert_eq!(outcomes.iter().filter(|outcome| delivered(outcome)).count(), 9);
}

#[tokio::test]
async fn f47_a_malformed_entry_is_charged_and_stops_only_its_key() {
    let stub = EventBridgeStub::start().await;
    stub.script([Reply::FailEntry(0, "MalformedDetail")]);
    let batch: Vec<Event> = (1..=11).map(|id| keyed(id, "a")).chain((12..=23).map(|id| keyed(id, "b"))).collect();
    let outcomes = publish(&with(&stub, |config| config.requests_in_flight = 1), &batch).await;
    assert_all_failed(&outcomes[..1], Fault::Event, "MalformedDetail");
    assert_eq!(outcomes[10], Outcome::Held);
    assert!(outcomes[11..].iter().all(delivered));
}

#[tokio::test]
async fn f49_eleven_events_are_two_requests_and_never_one() {
    let stub = EventBridgeStub::start().await;
    let outcomes = publish(&sink(&stub), &events(1..=11)).await;
    assert!(outcomes.iter().all(delivered));
    let mut sizes: Vec<usize> = stub.requests().iter().map(Vec::len).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [1, 10]);
}

#[tokio::test]
async fn f49_a_request_holds_no_more_bytes_than_the_limit() {
    let stub = EventBridgeStub::start().await;
    let large = |id| Event { payload: format!("{{\"a\":\"{}\"}}", "x".repeat(400)).into(), ..event(id) };
    let batch: Vec<Event> = (1..=4).map(large).collect();
    let change = |config: &mut EventBridgeConfig| {
        config.format = Format::Payload;
        config.max_entry_bytes = 1000; // an entry has 484
    };
    assert!(publish(&with(&stub, change), &batch).await.iter().all(delivered));
    assert_eq!(stub.requests().iter().map(Vec::len).collect::<Vec<_>>(), [2, 2]);
}

#[tokio::test]
async fn f49_an_oversize_entry_is_refused_alone_and_never_sent() {
    let stub = EventBridgeStub::start().await;
    let payload = format!("{{\"a\":\"{}\"}}", CANARY.repeat(200)).into_bytes();
    let large = Event { payload, ..keyed(2, "a") };
    let batch = [keyed(1, "a"), large, keyed(3, "a"), keyed(4, "b")];
    let outcomes = publish(&with(&stub, |config| config.max_entry_bytes = 1000), &batch).await;
    assert!(delivered(&outcomes[0]) && delivered(&outcomes[3]));
    assert_all_failed(&outcomes[1..2], Fault::Unfit, "entry_too_large");
    assert_eq!(outcomes[2], Outcome::Held, "its key stops at it");
    assert!(!error(&outcomes[1]).message.contains(CANARY));
    assert_eq!(stub.requests().iter().map(|request| ids(request)).collect::<Vec<_>>(), [[1, 4]]);
}

#[tokio::test]
async fn a_detail_type_over_128_characters_is_refused_and_never_sent() {
    let stub = EventBridgeStub::start().await;
    let batch = [Event { event_type: "é".repeat(129), ..event(1) }, Event { event_type: "é".repeat(128), ..event(2) }];
    let outcomes = publish(&sink(&stub), &batch).await;
    assert_all_failed(&outcomes[..1], Fault::Unfit, "detail_type_too_long");
    assert!(delivered(&outcomes[1]));
    assert_eq!(stub.requests().iter().map(|request| ids(request)).collect::<Vec<_>>(), [[2]]);
}

#[tokio::test]
async fn a_bare_payload_that_is_no_object_is_refused_and_never_sent() {
    let stub = EventBridgeStub::start().await;
    let array = Event { payload: b"[1]".to_vec(), ..event(1) };
    let outcomes = publish(&with(&stub, |config| config.format = Format::Payload), &[array]).await;
    assert_all_failed(&outcomes, Fault::Unfit, "payload_not_an_object");
    assert!(stub.requests().is_empty());
}

#[tokio::test]
async fn f51_no_answer_within_the_timeout_is_an_unknown_outcome() {
    let stub = EventBridgeStub::start().await;
    stub.script([Reply::Slow(Duration::from_secs(600))]);
    let outcomes = publish(&with(&stub, |config| config.timeout = Duration::from_millis(300)), &events(1..=3)).await;
    assert_all_failed(&outcomes, Fault::Unknown, "timeout");
}

#[tokio::test]
async fn f51_a_connection_closed_after_the_request_is_an_unknown_outcome() {
    assert_all_failed(&publish_three(Reply::CutAfterRequest).await, Fault::Unknown, "connection_lost");
}

#[tokio::test]
async fn f51_a_connection_reset_after_the_request_is_an_unknown_outcome() {
    assert_all_failed(&publish_three(Reply::ResetAfterRequest).await, Fault::Unknown, "connection_lost");
}

#[tokio::test]
async fn f51_a_reused_connection_cut_after_the_request_is_an_unknown_outcome_too() {
    let stub = EventBridgeStub::start().await;
    stub.script([Reply::Ok, Reply::CutAfterRequest, Reply::Ok, Reply::ResetAfterRequest]);
    let sink = sink(&stub);
    for id in [1, 3] {
        assert!(publish(&sink, &[event(id)]).await.iter().all(delivered));
        assert_all_failed(&publish(&sink, &[event(id + 1)]).await, Fault::Unknown, "connection_lost");
    }
    assert_eq!(stub.requests().len(), 4, "nothing is sent twice");
}

#[tokio::test]
async fn f53_an_answer_cut_short_is_an_unknown_outcome() {
    assert_all_failed(&publish_three(Reply::Truncated).await, Fault::Unknown, "unreadable_answer");
}

#[tokio::test]
async fn f53_a_garbled_success_is_an_unknown_outcome_and_its_body_is_not_quoted() {
    let stub = EventBridgeStub::start().await;
    stub.script([Reply::Garbled]);
    let event = Event { payload: format!("{{\"card\":\"{CANARY}\"}}").into(), ..event(1) };
    let outcomes = publish(&sink(&stub), &[event]).await;
    assert_all_failed(&outcomes, Fault::Unknown, "unreadable_answer");
    assert!(!error(&outcomes[0]).message.contains(CANARY));
}

#[tokio::test]
async fn f53_a_wrong_number_of_answers_is_an_unknown_outcome_for_all() {
    assert_all_failed(&publish_three(Reply::WrongCount).await, Fault::Unknown, "wrong_entry_count");
    let four = Reply::Entries(vec![EntryReply::Accepted; 4]);
    assert_all_failed(&publish_three(four).await, Fault::Unknown, "wrong_entry_count");
}

#[tokio::test]
async fn f53_an_answer_without_id_and_code_is_an_unknown_outcome() {
    let outcomes = publish_three(Reply::Entries(vec![EntryReply::Accepted, EntryReply::Blank, EntryReply::Accepted]));
    let outcomes = outcomes.await;
    assert!(delivered(&outcomes[0]) && delivered(&outcomes[2]));
    assert_all_failed(&outcomes[1..2], Fault::Unknown, "empty_answer");
}

#[tokio::test]
async fn a_server_error_is_the_destinations_fault() {
    assert_all_failed(&publish_three(Reply::ServerError).await, Fault::Destination, "http_503");
}

#[tokio::test]
async fn f50_a_refused_connection_is_the_destinations_fault() {
    let stub = EventBridgeStub::start().await;
    let sink = sink(&stub);
    drop(stub);
    let outcomes = publish(&sink, &events(1..=3)).await;
    assert_all_failed(&outcomes, Fault::Destination, "connection_failed");
    assert!(error(&outcomes[0]).message.contains("Connection refused"), "{}", error(&outcomes[0]));
}

#[tokio::test]
async fn f50_a_name_that_does_not_resolve_and_a_failed_tls_handshake_are_the_destinations_fault() {
    let stub = EventBridgeStub::start().await;
    for url in ["http://nowhere.invalid", &stub.url().replace("http:", "https:")] {
        let sink = EventBridge::with_sdk_config(&sdk(), config(url));
        assert_all_failed(&publish(&sink, &events(1..=3)).await, Fault::Destination, "connection_failed");
    }
}

#[tokio::test]
async fn f48_access_denied_is_a_misconfiguration() {
    assert_all_failed(&publish_three(Reply::AccessDenied).await, Fault::Misconfigured, "AccessDeniedException");
}

#[tokio::test]
async fn f48_missing_credentials_are_a_misconfiguration_and_nothing_is_sent() {
    let stub = EventBridgeStub::start().await;
    let none =
        SdkConfig::builder().behavior_version(BehaviorVersion::latest()).region(Region::new("eu-west-1")).build();
    let failing = SharedCredentialsProvider::new(CredentialProcessProvider::new("exit 7".into()));
    let failing = sdk().into_builder().credentials_provider(failing).build();
    for (sdk, code) in [(none, "not_sent"), (failing, "no_credentials")] {
        let sink = EventBridge::with_sdk_config(&sdk, config(stub.url()));
        assert_all_failed(&publish(&sink, &events(1..=3)).await, Fault::Misconfigured, code);
        assert_eq!(sink.check().await.unwrap_err().fault, Fault::Misconfigured);
    }
    assert!(stub.requests().is_empty());
}

#[tokio::test]
async fn a_missing_region_and_an_endpoint_that_is_no_url_are_misconfigurations() {
    let no_region = EventBridgeConfig { endpoint_url: None, ..config("") };
    let outcomes =
        publish(&EventBridge::with_sdk_config(&sdk().into_builder().region(None).build(), no_region), &[event(1)])
            .await;
    assert_all_failed(&outcomes, Fault::Misconfigured, "not_sent");
    for url in ["localhost:4566", "not a url"] {
        let event = Event { payload: format!("{{\"card\":\"{CANARY}\"}}").into(), ..event(1) };
        let outcomes = publish(&EventBridge::with_sdk_config(&sdk(), config(url)), &[event]).await;
        assert!(!error(&outcomes[0]).message.contains(CANARY));
        assert_all_failed(&outcomes, Fault::Misconfigured, "not_sent");
    }
}

#[tokio::test]
async fn a_request_refused_for_its_content_is_sent_one_by_one_and_only_the_culprit_pays() {
    let stub = EventBridgeStub::start().await;
    let invalid = Reply::Invalid("1 validation error detected: Value '[{4929-1234}]' at 'entries' failed to satisfy");
    stub.script([invalid.clone(), Reply::Ok, invalid]);
    let batch = [keyed(1, "a"), keyed(2, "a"), keyed(3, "a")];
    let outcomes = publish(&sink(&stub), &batch).await;
    assert!(delivered(&outcomes[0]));
    assert_all_failed(&outcomes[1..2], Fault::Event, "ValidationException");
    assert_eq!(outcomes[2], Outcome::Held);
    assert!(!error(&outcomes[1]).message.contains(CANARY));
    let requests = stub.requests();
    assert_eq!(requests.iter().map(|request| ids(request)).collect::<Vec<_>>(), [vec![1, 2, 3], vec![1], vec![2]]);
    assert_eq!(requests[0][0], requests[1][0]);
}

#[tokio::test]
async fn events_of_a_key_are_never_in_two_requests_at_once() {
    let stub = EventBridgeStub::start().await;
    let batch: Vec<Event> = (1..=25).map(|id| keyed(id, "a")).collect();
    assert!(publish(&sink(&stub), &batch).await.iter().all(delivered));
    assert_eq!(stub.peak(), 1);
    let sent: Vec<Vec<i64>> = stub.requests().iter().map(|request| ids(request)).collect();
    assert_eq!(sent, [(1..=10).collect::<Vec<_>>(), (11..=20).collect(), (21..=25).collect()]);
}

#[tokio::test]
async fn a_thousand_keys_go_with_as_many_requests_in_flight_as_allowed() {
    let stub = EventBridgeStub::start().await;
    let barrier = Arc::new(Barrier::new(16));
    stub.script(std::iter::repeat_n(Reply::OkTogether(barrier), 16));
    let batch: Vec<Event> = (1..=1000).map(|id| keyed(id, &id.to_string())).collect();
    assert!(publish(&sink(&stub), &batch).await.iter().all(delivered));
    assert_eq!(stub.peak(), 16);
    assert_eq!(stub.requests().len(), 100);
}

#[tokio::test]
async fn nothing_is_begun_after_the_deadline() {
    let stub = EventBridgeStub::start().await;
    let outcomes = publish_until(&sink(&stub), &events(1..=3), Instant::now()).await;
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Held));
    assert!(stub.requests().is_empty());
}

#[tokio::test]
async fn no_request_lasts_past_the_deadline_and_what_was_not_sent_by_then_is_held() {
    let stub = EventBridgeStub::start().await;
    stub.script([Reply::Slow(Duration::from_secs(600))]);
    let batch: Vec<Event> = (1..=25).map(|id| keyed(id, "a")).collect();
    let outcomes = publish_until(&sink(&stub), &batch, Instant::now() + Duration::from_secs(1)).await;
    assert_all_failed(&outcomes[..10], Fault::Unknown, "timeout");
    assert!(outcomes[10..].iter().all(|outcome| *outcome == Outcome::Held));
    assert_eq!(stub.requests().len(), 1);
}

#[tokio::test]
async fn a_check_names_the_bus_and_sends_no_event() {
    let stub = EventBridgeStub::start().await;
    assert_eq!(sink(&stub).check().await.unwrap(), "event bus \"orders\" in eu-west-1, not encrypted");
    assert!(stub.requests().is_empty());
}

#[tokio::test]
async fn f52_a_check_of_a_missing_bus_says_what_to_do() {
    let stub = EventBridgeStub::start().await;
    let error = with(&stub, |config| config.bus = "oders".into()).check().await.unwrap_err();
    assert_eq!((error.fault, error.code.as_str()), (Fault::Misconfigured, "ResourceNotFoundException"));
    for part in ["\"oders\"", "AWS_EVENTBRIDGE_BUS_NAME", "Event bus does not exist"] {
        assert!(error.message.contains(part), "{error}");
    }
}

#[tokio::test]
async fn f52_nothing_is_put_on_a_bus_that_does_not_exist_though_aws_would_answer_with_success() {
    let stub = EventBridgeStub::start().await;
    let sink = with(&stub, |config| config.bus = "oders".into());
    assert_all_failed(&publish(&sink, &events(1..=3)).await, Fault::Misconfigured, "ResourceNotFoundException");
    assert!(stub.requests().is_empty());
}

#[tokio::test]
async fn a_bus_that_cannot_be_asked_for_yet_costs_time_and_no_event() {
    let stub = EventBridgeStub::start().await;
    stub.script_descriptions([Reply::ThrottleRequest]);
    let sink = sink(&stub);
    assert_all_failed(&publish(&sink, &events(1..=3)).await, Fault::Destination, "ThrottlingException");
    assert!(stub.requests().is_empty());
    assert!(publish(&sink, &events(1..=3)).await.iter().all(delivered));
}

#[tokio::test]
async fn a_check_without_permission_names_the_actions_to_allow() {
    let stub = EventBridgeStub::start().await;
    stub.script_descriptions([Reply::AccessDenied]);
    let error = sink(&stub).check().await.unwrap_err();
    assert_eq!(error.fault, Fault::Misconfigured);
    assert!(error.message.contains("events:DescribeEventBus") && error.message.contains("events:PutEvents"), "{error}");
}

#[tokio::test]
async fn a_check_without_an_answer_is_the_destinations_fault() {
    let stub = EventBridgeStub::start().await;
    stub.script_descriptions([Reply::CutAfterRequest]);
    assert_eq!(sink(&stub).check().await.unwrap_err().fault, Fault::Destination);
}
