//! What every sink guarantees. Each sink runs the tests under its own name, as in
//! `sinks::redis_stream::an_empty_batch_has_no_answers`.

mod places;

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use outbox_relay::event::{Event, Fault, Outcome};
use outbox_relay::sink::Sink;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::support::{
    assert_all_delivered, assert_all_failed, event, is_uncharged, keyed, publish, publish_until,
    publish_until_delivered,
};
use places::{BusPlace, ChannelPlace, FilePlace, HandlerPlace, PagePlace, StreamPlace, StubPlace};

/// A destination, its sink, and a reader of what has arrived.
trait Place {
    /// The number of events of a test with many events.
    const MANY: i64 = 800;
    /// Uses the shared server, under a name of its own.
    async fn start() -> Self;
    fn sink(&self) -> &dyn Sink;
    /// Returns all that arrived since the last call, in order of arrival.
    fn arrived(&mut self) -> Vec<Arrival>;
}

/// A destination on a server of its own, which can stop. It may lose what it has stored.
trait Mortal: Place {
    async fn start_alone() -> Self;
    fn go_down(&mut self);
    async fn come_back(&mut self);
}

/// A destination that limits the size of an event.
trait Limited: Place {
    const REFUSAL: &str;
    fn over_the_limit(event: Event) -> Event;
}

/// An event as a consumer reads it.
#[derive(Debug, Deserialize)]
struct Arrival {
    id: String,
    source: String,
    r#type: String,
    subject: Option<String>,
    sequence: String,
    partitionkey: Option<String>,
    data: Box<RawValue>,
}

impl Arrival {
    fn parse(json: &str) -> Self {
        serde_json::from_str(json).unwrap_or_else(|error| panic!("{error} in {json}"))
    }

    fn sequence(&self) -> i64 {
        self.sequence.parse().unwrap()
    }
}

/// The sequences of each key, in order of arrival. Events without a key are under the empty key, in ascending order.
fn by_key(arrivals: &[Arrival]) -> BTreeMap<String, Vec<i64>> {
    let mut keys: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    for arrival in arrivals {
        keys.entry(arrival.partitionkey.clone().unwrap_or_default()).or_default().push(arrival.sequence());
    }
    keys.entry(String::new()).or_default().sort_unstable();
    keys
}

fn expected_by_key<'a>(events: impl IntoIterator<Item = &'a Event>) -> BTreeMap<String, Vec<i64>> {
    let mut keys: BTreeMap<String, Vec<i64>> = BTreeMap::from([(String::new(), vec![])]);
    for event in events {
        let key = event.key().map(|key| key.to_string()).unwrap_or_default();
        keys.entry(key).or_default().push(event.row.id);
    }
    keys
}

/// Events of seven keys in turn; every eighth event has no key.
fn several_keys(ids: std::ops::RangeInclusive<i64>) -> Vec<Event> {
    ids.map(|id| if id % 8 == 0 { event(id) } else { keyed(id, &(id % 8).to_string()) }).collect()
}

async fn all_arrive_in_order_per_key_with_their_ids<P: Place>() {
    let mut place = P::start().await;
    let events = several_keys(1..=P::MANY);
    let (some, more) = events.split_at(events.len() / 3);
    for batch in [&some[..1], &some[1..], more] {
        assert_all_delivered(&publish(place.sink(), batch).await);
    }
    let arrived = place.arrived();
    assert_eq!(by_key(&arrived), expected_by_key(&events));
    for arrival in arrived {
        assert_eq!(arrival.id, event(arrival.sequence()).event_id.to_string());
    }
}

async fn a_thousand_events_of_one_key_arrive_in_order<P: Place>() {
    let mut place = P::start().await;
    let events: Vec<Event> = (1..=1000).map(|id| keyed(id, "42")).collect();
    assert_all_delivered(&publish(place.sink(), &events).await);
    let arrived: Vec<i64> = place.arrived().iter().map(Arrival::sequence).collect();
    assert_eq!(arrived, (1..=1000).collect::<Vec<_>>());
}

async fn lanes_publish_at_the_same_time<P: Place>() {
    let mut place = P::start().await;
    let all: Vec<Event> = (0..P::MANY).map(|id| keyed(id, &(id * 8 / P::MANY).to_string())).collect();
    let lanes = all.chunk_by(|a, b| a.key() == b.key());
    for outcomes in join_all(lanes.map(|events| publish(place.sink(), events))).await {
        assert_all_delivered(&outcomes);
    }
    assert_eq!(by_key(&place.arrived()), expected_by_key(&all));
}

async fn a_mixture_arrives_whole<P: Place>() {
    let mut place = P::start().await;
    let payloads = ["{}", "[]", "null", "true", "-1.5", r#""text""#, r#"[{"a": [1, {"b": null}]}]"#];
    let keys = ["42", "", "a:b", "\"quoted\"\n", "Ærø 🦀", &"k".repeat(10_000)];
    let mut events: Vec<Event> = Vec::new();
    for id in 1..=90 {
        let at = usize::try_from(id).unwrap();
        let large = || format!("\"{}\"", "x".repeat(20_000)).into_bytes();
        let mut event = match at % 3 {
            0 => event(id),
            _ => keyed(id, keys[at % keys.len()]),
        };
        event.aggregate_type = event.aggregate_type.filter(|_| at % 4 != 0);
        event.payload = if at.is_multiple_of(10) { large() } else { payloads[at % payloads.len()].into() };
        event.source = if at.is_multiple_of(2) { String::new() } else { "inventory/é".into() };
        event.event_type = if at.is_multiple_of(5) { "é".repeat(128) } else { "inventory:product.created".into() };
        event.correlation_id = at.is_multiple_of(2).then(|| format!("req-{id}"));
        event.causation_id = at.is_multiple_of(3).then(|| format!("\"{id}\""));
        event.schema_version = i32::try_from(id).unwrap();
        event.headers = (0..at % 4).map(|n| (format!("x-header_{n}"), "v\t\"\\".into())).collect();
        events.push(event);
    }
    assert_all_delivered(&publish(place.sink(), &events).await);
    let arrived = place.arrived();
    assert_eq!(by_key(&arrived), expected_by_key(&events));
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    for arrival in arrived {
        let event = &events[usize::try_from(arrival.sequence()).unwrap() - 1];
        assert_eq!(arrival.id, event.event_id.to_string());
        assert_eq!(arrival.r#type, event.event_type);
        assert_eq!(arrival.source, if event.source.is_empty() { "outbox" } else { &event.source });
        assert_eq!(arrival.subject, event.aggregate_id.clone().filter(|id| !id.is_empty()));
        assert_eq!(json(arrival.data.get()), json(std::str::from_utf8(&event.payload).unwrap()));
    }
}

async fn payloads_arrive_byte_for_byte<P: Place>() {
    let mut place = P::start().await;
    let deep = format!("{}{}", "[".repeat(900), "]".repeat(900));
    let payloads = [
        r#"{"a": 1e400, "b": -0.0, "c": 1E+2, "d": 123456789012345678901234567890.10}"#,
        r#"{"escaped": "\ud83e\udd80 \u00e9 \/ \u0000 \ud83d", "plain": "🦀 é / "}"#,
        "{\"a\":1,  \"a\" :\t2}",
        "\"\u{2028}\u{7f}\u{feff}\"",
        "  [ ]  ",
        &deep,
    ];
    let events: Vec<Event> =
        (1..).zip(payloads).map(|(id, payload)| Event { payload: payload.into(), ..keyed(id, "42") }).collect();
    assert_all_delivered(&publish(place.sink(), &events).await);
    let arrived = place.arrived();
    let data: Vec<&str> = arrived.iter().map(|arrival| arrival.data.get()).collect();
    // The reader leaves out blanks after a JSON value.
    assert_eq!(data, payloads.map(str::trim_ascii));
}

async fn an_event_over_the_limit_is_refused_alone<P: Limited>() {
    let mut place = P::start().await;
    let mut events = vec![keyed(1, "a"), keyed(2, "a"), keyed(3, "a"), keyed(4, "b"), event(5), event(6), event(7)];
    for index in [1, 5] {
        events[index] = P::over_the_limit(events[index].clone());
    }
    let outcomes = publish(place.sink(), &events).await;
    for index in [0, 3, 4, 6] {
        assert_all_delivered(&outcomes[index..=index]);
    }
    assert_all_failed(&[outcomes[1].clone(), outcomes[5].clone()], Fault::Unfit, P::REFUSAL);
    assert_eq!(outcomes[2], Outcome::Held, "later events of its key were not sent");
    assert_eq!(by_key(&place.arrived()), expected_by_key([&events[0], &events[3], &events[4], &events[6]]));
}

async fn an_empty_batch_has_no_answers<P: Place>() {
    let mut place = P::start().await;
    assert_eq!(publish(place.sink(), &[]).await, []);
    assert!(place.arrived().is_empty());
}

async fn nothing_is_begun_after_the_deadline<P: Place>() {
    let mut place = P::start().await;
    let outcomes = publish_until(place.sink(), &several_keys(1..=20), Instant::now()).await;
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Held));
    assert!(place.arrived().is_empty());
}

async fn a_payload_with_line_breaks_is_one_event<P: Place>() {
    let mut place = P::start().await;
    let payload = "{\r\n  \"a\": [1,\n2]\n}";
    let events: Vec<Event> = (1..=3).map(|id| Event { payload: payload.into(), ..keyed(id, "42") }).collect();
    assert_all_delivered(&publish(place.sink(), &events).await);
    let arrived = place.arrived();
    assert_eq!(arrived.iter().map(Arrival::sequence).collect::<Vec<_>>(), [1, 2, 3]);
    for arrival in arrived {
        let data: serde_json::Value = serde_json::from_str(arrival.data.get()).unwrap();
        assert_eq!(data, serde_json::json!({"a": [1, 2]}));
    }
}

async fn a_check_publishes_nothing<P: Place>() {
    let mut place = P::start().await;
    assert!(!place.sink().check().await.unwrap().is_empty());
    assert!(place.arrived().is_empty());
}

async fn nobody_pays_while_it_is_down_and_all_arrive_when_it_is_back<P: Mortal>() {
    let mut place = P::start_alone().await;
    let events = several_keys(1..=P::MANY);
    let (before, after) = events.split_at(events.len() / 3);
    assert_all_delivered(&publish(place.sink(), before).await);
    assert_eq!(by_key(&place.arrived()), expected_by_key(before));
    place.go_down();
    for _ in 0..2 {
        let soon = Instant::now() + Duration::from_millis(500);
        let outcomes = publish_until(place.sink(), after, soon).await;
        assert!(outcomes.iter().all(is_uncharged), "{outcomes:?}");
        assert!(
            outcomes.iter().any(|outcome| matches!(outcome, Outcome::Failed(_))),
            "the breaker must count this failure"
        );
    }
    place.come_back().await;
    publish_until_delivered(place.sink(), after).await;
    let mut arrived = place.arrived();
    let mut seen = HashSet::new();
    arrived.retain(|arrival| seen.insert(arrival.id.clone()));
    assert_eq!(by_key(&arrived), expected_by_key(after));
}

macro_rules! run {
    ($place:ident: $($test:ident)*) => {
        $(#[tokio::test] async fn $test() { super::$test::<super::$place>().await; })*
    };
}

/// Defines the tests that every sink runs, and those that only some run.
macro_rules! contract {
    ($name:ident, $place:ident: $($more:ident)*) => {
        mod $name {
            run!($place:
                all_arrive_in_order_per_key_with_their_ids
                lanes_publish_at_the_same_time
                a_mixture_arrives_whole
                an_empty_batch_has_no_answers
                nothing_is_begun_after_the_deadline
                a_payload_with_line_breaks_is_one_event
                a_check_publishes_nothing
                $($more)*);
        }
    };
}

contract!(redis_stream, StreamPlace:
    a_thousand_events_of_one_key_arrive_in_order
    payloads_arrive_byte_for_byte
    an_event_over_the_limit_is_refused_alone
    nobody_pays_while_it_is_down_and_all_arrive_when_it_is_back);
contract!(redis_pubsub, ChannelPlace:
    a_thousand_events_of_one_key_arrive_in_order
    payloads_arrive_byte_for_byte
    an_event_over_the_limit_is_refused_alone
    nobody_pays_while_it_is_down_and_all_arrive_when_it_is_back);
// moto parses events and is slow, so the stub runs the tests of exact bytes and of a thousand events.
contract!(eventbridge_moto, BusPlace:
    an_event_over_the_limit_is_refused_alone
    nobody_pays_while_it_is_down_and_all_arrive_when_it_is_back);
contract!(eventbridge_stub, StubPlace:
    a_thousand_events_of_one_key_arrive_in_order
    payloads_arrive_byte_for_byte
    an_event_over_the_limit_is_refused_alone);
contract!(file, FilePlace:
    a_thousand_events_of_one_key_arrive_in_order
    payloads_arrive_byte_for_byte
    nobody_pays_while_it_is_down_and_all_arrive_when_it_is_back);

contract!(handler, HandlerPlace:
    a_thousand_events_of_one_key_arrive_in_order
    payloads_arrive_byte_for_byte
    nobody_pays_while_it_is_down_and_all_arrive_when_it_is_back);

contract!(stdout, PagePlace:
    a_thousand_events_of_one_key_arrive_in_order
    payloads_arrive_byte_for_byte
    nobody_pays_while_it_is_down_and_all_arrive_when_it_is_back);
