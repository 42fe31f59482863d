//! An EventBridge that throttles, refuses, answers wrongly or not at all, and the effect on a relay and its events.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use outbox_relay::event::{Event, Fault, Outcome};
use outbox_relay::sink::eventbridge::{EventBridge, EventBridgeConfig};
use serde_json::{Value, json};

use super::{assert_first_in_order, assert_logged_once, load, until_empty};
use crate::binary::{Running, relay};
use crate::harness::{Setup, count, eventually, sql};
use crate::moto::MotoBus;
use crate::proxy::Proxy;
use crate::redis_tls::TlsRedis;
use crate::servers::{database, moto};
use crate::stub::{EntryReply, EventBridgeStub, Reply};
use crate::support::{assert_all_failed, error, event, eventbridge_config, keyed, publish, sdk, unique};

const EVENTS: i64 = 60;

/// The keys and ids of the entries that the stub got, in order.
fn arrivals(stub: &EventBridgeStub) -> Vec<(String, i64)> {
    let of_entry = |entry: &Value| {
        let detail: Value = serde_json::from_str(entry["Detail"].as_str().unwrap()).unwrap();
        (detail["subject"].as_str().unwrap().to_owned(), detail["sequence"].as_str().unwrap().parse().unwrap())
    };
    stub.requests().iter().flatten().map(of_entry).collect()
}

/// Relays events of some keys to a bus at `url`, where `stub` answers. All arrive in order, and none is charged. Returns how
/// many entries arrived again.
async fn delivered_to(stub: &EventBridgeStub, url: &str) -> usize {
    let database = database().await;
    let mut connection = database.connect().await;
    load(&mut connection, EVENTS, 6).await;
    let config =
        EventBridgeConfig { requests_in_flight: 1, timeout: Duration::from_secs(2), ..eventbridge_config(url) };
    let sink = Arc::new(EventBridge::with_sdk_config(&sdk(), config));
    let mut setup = Setup::new(&database, vec![("bus", sink)]);
    setup.relay.lanes = 1;
    let running = setup.run();
    until_empty(&mut connection).await;
    running.stop().await;
    assert_logged_once(&mut connection, EVENTS).await;
    let (distinct, repeats) = assert_first_in_order(arrivals(stub));
    assert_eq!(distinct, usize::try_from(EVENTS).unwrap());
    repeats
}

/// As [`delivered_to`], with these answers first.
async fn delivered_after(replies: impl IntoIterator<Item = Reply>) -> usize {
    let stub = EventBridgeStub::start().await;
    stub.script(replies);
    delivered_to(&stub, stub.url()).await
}

#[tokio::test]
async fn f09_a_clock_that_aws_takes_for_wrong_is_a_misconfiguration_told_in_its_words() {
    for (code, message) in [
        ("InvalidSignatureException", "Signature expired: 20260101T000000Z is now earlier than 20260101T005500Z"),
        ("RequestTimeTooSkewed", "The difference between the request time and the current time is too large."),
        ("RequestExpired", "Request has expired."),
    ] {
        let stub = EventBridgeStub::start().await;
        stub.script([Reply::Refused(code, message)]);
        let sink = EventBridge::with_sdk_config(&sdk(), eventbridge_config(stub.url()));
        let outcomes = publish(&sink, &[event(1), event(2)]).await;
        assert_all_failed(&outcomes, Fault::Misconfigured, code);
        assert_eq!(error(&outcomes[0]).message, message);
    }
    // Three entries are refused once, and none is charged.
    delivered_after([Reply::Refused("InvalidSignatureException", "Signature not yet current")]).await;
}

#[tokio::test]
async fn f46_throttled_requests_and_entries_cost_time_and_nobody_pays() {
    let throttled = EntryReply::Failed("ThrottlingException");
    let entries = [EntryReply::Accepted, throttled].repeat(5);
    let mut replies = vec![Reply::ThrottleRequest; 8];
    replies.extend([Reply::Entries(entries.clone()), Reply::ServerError, Reply::Entries(entries)]);
    delivered_after(replies).await;
}

#[tokio::test]
async fn f47_entries_that_fail_alone_are_repeated_alone_and_their_keys_stay_in_order() {
    let failed = |index, code| Reply::FailEntry(index, code);
    let replies = [
        failed(0, "InternalFailure"),
        failed(9, "InternalException"),
        failed(4, "ServiceUnavailable"),
        failed(0, "SomethingThatAwsAddsNextYear"),
        Reply::Entries(vec![EntryReply::Failed("InternalFailure"); 10]),
    ];
    let repeats = delivered_after(replies).await;
    assert!(repeats <= 14, "{repeats} repeats: only what failed may be sent again");
}

#[tokio::test]
async fn f48_expired_or_unknown_credentials_are_a_misconfiguration_and_nobody_pays() {
    for code in
        ["ExpiredTokenException", "UnrecognizedClientException", "InvalidClientTokenId", "MissingAuthenticationToken"]
    {
        let stub = EventBridgeStub::start().await;
        stub.script([Reply::Refused(code, "The security token included in the request is expired")]);
        let sink = EventBridge::with_sdk_config(&sdk(), eventbridge_config(stub.url()));
        assert_all_failed(&publish(&sink, &[event(1), event(2)]).await, Fault::Misconfigured, code);
    }
    let expired = Reply::Refused("ExpiredTokenException", "The security token included in the request is expired");
    delivered_after([expired, Reply::AccessDenied]).await;
}

/// A credentials file like those of `aws configure` and of agents that rotate keys.
fn credentials(key: &str) -> String {
    format!("[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")
}

#[tokio::test]
async fn f48_credentials_that_rotate_in_their_file_are_taken_up_without_a_restart() {
    let (database, stub) = (database().await, EventBridgeStub::start().await);
    stub.script(std::iter::repeat_n(Reply::Expired("OLD"), 1000));
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), credentials("OLD")).unwrap();
    let variables = [
        ("DATABASE_URL", database.url()),
        ("AWS_EVENTBRIDGE_BUS_NAME", "orders"),
        ("AWS_REGION", "eu-west-1"),
        ("AWS_ENDPOINT_URL", stub.url()),
        ("AWS_SHARED_CREDENTIALS_FILE", file.path().to_str().unwrap()),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("EVENT_CIRCUIT_BREAKER_RECOVERY_TIMEOUT", "200"),
    ];
    let mut connection = database.connect().await;
    load(&mut connection, 20, 2).await;
    let mut running = Running::start(relay(&["run"], &variables));
    running.until_log("destination misconfigured");
    assert!(running.log().contains("ExpiredTokenException"), "{}", running.log());
    assert_eq!(count(&mut connection, "event_outbox where attempts = 0").await, 20);
    std::fs::write(file.path(), credentials("NEW")).unwrap();
    until_empty(&mut connection).await;
    super::stop(running);
    assert_logged_once(&mut connection, 20).await;
}

/// The size of an entry as AWS documents it, for `entry` as it was sent.
fn size_by_the_manual(entry: &Value) -> usize {
    let length = |name: &str| entry[name].as_str().map_or(0, str::len);
    let time = if entry["Time"].is_null() { 0 } else { 14 };
    time + length("Source") + length("DetailType") + length("Detail")
}

fn any_text(longest: usize) -> String {
    std::iter::repeat_with(|| fastrand::char(..)).filter(|c| *c != '\0').take(fastrand::usize(1..longest)).collect()
}

#[tokio::test]
async fn f49_what_is_sent_and_what_is_refused_agree_with_the_size_that_aws_documents() {
    let (unlimited, limited) = (EventBridgeStub::start().await, EventBridgeStub::start().await);
    let any_event = |id: i64| Event {
        event_type: any_text(100),
        source: any_text(100),
        payload: serde_json::to_vec(&json!({ "any": any_text(400) })).unwrap(),
        ..event(id)
    };
    let events: Vec<Event> = (1..=400).map(any_event).collect();
    let sink = EventBridge::with_sdk_config(&sdk(), eventbridge_config(unlimited.url()));
    publish(&sink, &events).await;
    let id = |entry: &Value| {
        serde_json::from_str::<Value>(entry["Detail"].as_str().unwrap()).unwrap()["sequence"].to_string()
    };
    let sizes: Vec<(String, usize)> =
        unlimited.requests().iter().flatten().map(|entry| (id(entry), size_by_the_manual(entry))).collect();
    assert_eq!(sizes.len(), 400);
    // The middle one has exactly the largest size that fits.
    let mut sorted: Vec<usize> = sizes.iter().map(|(_, size)| *size).collect();
    sorted.sort_unstable();
    let max_entry_bytes = sorted[200];

    let config = EventBridgeConfig { max_entry_bytes, ..eventbridge_config(limited.url()) };
    let outcomes = publish(&EventBridge::with_sdk_config(&sdk(), config), &events).await;
    let fitting: HashSet<String> =
        sizes.into_iter().filter(|(_, size)| *size <= max_entry_bytes).map(|(id, _)| id).collect();
    let sent: Vec<String> = limited.requests().iter().flatten().map(id).collect();
    assert_eq!(sent.len(), fitting.len());
    assert_eq!(sent.into_iter().collect::<HashSet<_>>(), fitting);
    for request in limited.requests() {
        assert!(request.len() <= 10 && request.iter().map(size_by_the_manual).sum::<usize>() <= max_entry_bytes);
    }
    let refused: Vec<Outcome> = outcomes.into_iter().filter(|outcome| matches!(outcome, Outcome::Failed(_))).collect();
    assert_eq!(refused.len(), 400 - fitting.len());
    assert_all_failed(&refused, Fault::Unfit, "entry_too_large");
}

#[tokio::test]
async fn f50_an_endpoint_that_no_authority_vouches_for_or_that_has_no_name_costs_time_and_nobody_pays() {
    let database = database().await;
    let mut connection = database.connect().await;
    load(&mut connection, EVENTS, 6).await;
    let stub = EventBridgeStub::start().await;
    // The server speaks Redis, but its certificate is refused before that matters.
    let stranger = TlsRedis::start();
    let strange = stranger.url().replace("rediss:", "https:");
    for url in ["https://events.nowhere.invalid", &strange] {
        let sink = EventBridge::with_sdk_config(&sdk(), eventbridge_config(url));
        let outcomes = publish(&sink, &[keyed(1, "a"), keyed(2, "a")]).await;
        assert_all_failed(&outcomes, Fault::Destination, "connection_failed");
        let drained = Setup::new(&database, vec![("bus", Arc::new(sink))]).drain().await;
        assert!(drained.undelivered);
        assert_eq!(count(&mut connection, "event_outbox where attempts = 0 and status = 'pending'").await, EVENTS);
        println!("F50: {}", error(&outcomes[0]));
    }
    let sink = EventBridge::with_sdk_config(&sdk(), eventbridge_config(stub.url()));
    Setup::new(&database, vec![("bus", Arc::new(sink))]).drain().await;
    assert_logged_once(&mut connection, EVENTS).await;
}

#[tokio::test]
async fn f51_an_answer_that_is_lost_after_the_bus_took_the_entries_repeats_those_and_nobody_pays() {
    let stub = EventBridgeStub::start().await;
    let port = stub.url().rsplit_once(':').unwrap().1.parse().unwrap();
    let proxy = Proxy::to(port);
    proxy.drop_answers(3, "PutEvents");
    let repeats = delivered_to(&stub, &proxy.url(stub.url(), port)).await;
    assert_eq!(proxy.count(), 3, "too few answers were lost");
    assert!((10..=30).contains(&repeats), "{repeats} repeats: at most three requests of 10 entries");
}

#[tokio::test]
async fn f51_an_answer_that_comes_too_late_is_no_answer() {
    let late = Reply::Slow(Duration::from_secs(4)); // the sink waits 2
    let repeats = delivered_after([late.clone(), Reply::Ok, late]).await;
    assert!((10..=20).contains(&repeats), "{repeats} repeats: at most two requests of 10 entries");
}

#[tokio::test]
async fn f52_a_bus_that_does_not_exist_takes_no_event_at_moto_nor_at_the_stub() {
    let database = database().await;
    let mut connection = database.connect().await;
    load(&mut connection, 20, 2).await;
    let (stub, name) = (EventBridgeStub::start().await, unique("right"));
    let there = MotoBus::create(moto(), &name);
    for url in [moto().url(), stub.url()] {
        let config = EventBridgeConfig { bus: "wrong".into(), ..eventbridge_config(url) };
        let sink = EventBridge::with_sdk_config(&sdk(), config);
        let outcomes = publish(&sink, &[event(1)]).await;
        assert_all_failed(&outcomes, Fault::Misconfigured, "ResourceNotFoundException");
        assert!(error(&outcomes[0]).message.contains("AWS_EVENTBRIDGE_BUS_NAME"));
        assert!(Setup::new(&database, vec![("bus", Arc::new(sink))]).drain().await.undelivered);
        assert_eq!(count(&mut connection, "event_outbox where attempts = 0").await, 20);
    }
    assert!(stub.requests().is_empty());
    // Makes events due that a refused probe has postponed.
    sql(&mut connection, "update event_outbox set available_at = now()").await;
    let right = there.sink(outbox_relay::sink::Format::CloudEvents);
    Setup::new(&database, vec![("bus", Arc::new(right))]).drain().await;
    assert_eq!(there.events().len(), 20);
    assert_logged_once(&mut connection, 20).await;
}

#[tokio::test]
async fn f53_answers_that_make_no_sense_are_no_answers_and_the_relay_goes_on() {
    let five = Reply::Entries(vec![EntryReply::Accepted; 5]);
    let twelve = Reply::Entries(vec![EntryReply::Accepted; 12]);
    let bodies = [
        "",
        "null",
        "[]",
        "{}",
        "{\"Entries\": null}",
        "{\"Entries\": 7}",
        "<html>",
        "\u{0}\u{1}",
        "{\"Entries\": [{\"EventId\": 7}]}",
    ];
    let mut replies = vec![Reply::Garbled, Reply::Truncated, Reply::WrongCount, five, twelve];
    replies.extend(bodies.map(|body| Reply::Body(body.to_owned())));
    let unknown = replies.len();
    let repeats = delivered_after(replies).await;
    assert!(repeats <= 10 * unknown, "{repeats}");
}

#[tokio::test]
async fn f53_of_any_garbled_answer_only_what_it_clearly_says_is_believed() {
    let answer = json!({
        "FailedEntryCount": 1,
        "Entries": [{ "EventId": "a" }, { "ErrorCode": "InternalFailure", "ErrorMessage": "x" }, { "EventId": "c" }],
    });
    let (stub, good) = (EventBridgeStub::start().await, answer.to_string());
    let sink = EventBridge::with_sdk_config(&sdk(), eventbridge_config(stub.url()));
    let events = [event(1), event(2), event(3)];
    let mut believed = 0;
    for _ in 0..400 {
        let mut body = good.clone().into_bytes();
        for _ in 0..fastrand::usize(1..4) {
            let at = fastrand::usize(..body.len());
            match fastrand::u8(..4) {
                0 => body.truncate(at.max(1)),
                1 => body[at] = fastrand::u8(b' '..127),
                2 => _ = body.remove(at),
                // No digit, because the client's parser accepts 01, which is not JSON, as an unambiguous answer.
                _ => body.insert(at, *fastrand::choice(b"{}[]\",:n").unwrap()),
            }
            if body.is_empty() {
                body.push(b'{');
            }
        }
        let body = String::from_utf8(body).unwrap();
        stub.script([Reply::Body(body.clone())]);
        let outcomes = publish(&sink, &events).await;
        let parsed: Option<Value> = serde_json::from_str(&body).ok();
        for (index, outcome) in outcomes.iter().enumerate() {
            if !matches!(outcome, Outcome::Delivered { .. }) {
                continue;
            }
            believed += 1;
            let entries = parsed.as_ref().and_then(|parsed| parsed["Entries"].as_array());
            let entry = &entries.unwrap_or_else(|| panic!("an event was delivered with this answer: {body}"))[index];
            assert_eq!(entries.unwrap().len(), 3, "{body}");
            assert!(entry["EventId"].is_string() && entry["ErrorCode"].is_null(), "{body}");
        }
    }
    println!("F53: of 400 garbled answers for 3 events each, {believed} entries were still clear");
}

#[tokio::test]
async fn f46_a_relay_that_is_throttled_for_long_asks_ever_less_often() {
    let stub = EventBridgeStub::start().await;
    stub.script(std::iter::repeat_n(Reply::ThrottleRequest, 10_000));
    let database = database().await;
    let mut connection = database.connect().await;
    load(&mut connection, 1000, 10).await;
    let sink = Arc::new(EventBridge::with_sdk_config(&sdk(), eventbridge_config(stub.url())));
    let running = Setup::new(&database, vec![("bus", sink)]).run();
    eventually("it is throttled", async || stub.requests().len() >= 5).await;
    tokio::time::sleep(Duration::from_secs(2)).await; // until its breaker has opened, after five failed calls
    let before = stub.requests().len();
    tokio::time::sleep(Duration::from_secs(2)).await; // the duration of the fault
    let more = stub.requests().len() - before;
    running.stop().await;
    // Every 200 ms there is one probe with at most 10 events of 10 keys, which is one request.
    assert!((1..=25).contains(&more), "{more} requests in 2 s");
    assert_eq!(count(&mut connection, "event_outbox where attempts = 0 and status = 'pending'").await, 1000);
}
