//! Unusual input: each kind has a defined outcome, and the healthy events beside it arrive.

use std::sync::Arc;
use std::time::Duration;

use outbox_relay::event::Tally;
use outbox_relay::relay::{Drained, Relay, RelayConfig};
use outbox_relay::route::{Route, Router, Unrouted};
use outbox_relay::secret::Secret;
use outbox_relay::sink::eventbridge::{EventBridge, EventBridgeConfig};
use outbox_relay::sink::redis::RedisAddress;
use outbox_relay::sink::redis_stream::{RedisStream, RedisStreamConfig};
use outbox_relay::sink::{Format, Sink};
use outbox_relay::{EmitError, NewEvent, NewEventError};
use tokio_util::sync::CancellationToken;
use wildmatch::WildMatch;

use crate::harness::{Setup, column, count, refused, sql};
use crate::readback::{Entry, RedisClient};
use crate::servers::redis;
use crate::stores::{Client, Store};
use crate::stub::EventBridgeStub;
use crate::support::{eventbridge_config, sdk, unique};

/// A store and a relay to two destinations: `redis`, a stream, and `bus`, an EventBridge that gets bare payloads.
pub(crate) struct Scene<S: Store> {
    pub(crate) connection: S::Connection,
    relay: Arc<Relay<S::Outbox>>,
    stream: String,
    bus: EventBridgeStub,
    _store: S,
}

impl<S: Store> Scene<S> {
    pub(crate) async fn start() -> Self {
        Self::with(|_| {}, vec![]).await
    }

    pub(crate) async fn with(change: impl FnOnce(&mut RelayConfig), routes: Vec<Route>) -> Self {
        let store = S::new().await;
        let (stream, bus) = (unique("bad-input"), EventBridgeStub::start().await);
        let address = RedisAddress::Url(Secret::inline(redis().url()));
        let timeout = Duration::from_secs(30);
        let stream_sink = RedisStream::new(RedisStreamConfig {
            address,
            stream: stream.parse().unwrap(),
            max_length: None,
            source: "outbox".into(),
            timeout,
            exactly_once: true,
        });
        let bare = EventBridgeConfig { format: Format::Payload, ..eventbridge_config(bus.url()) };
        let bus_sink = EventBridge::with_sdk_config(&sdk(), bare);
        let destinations: [(&str, Arc<dyn Sink>); 2] = [("redis", Arc::new(stream_sink)), ("bus", Arc::new(bus_sink))];
        let mut setup = Setup::new(&store, destinations.to_vec());
        change(&mut setup.relay);
        setup.router = Router::new(routes, 2);
        Self { connection: store.connect().await, relay: setup.relay(), stream, bus, _store: store }
    }

    pub(crate) async fn emit(&mut self, event: NewEvent) {
        self.connection.emit(event).await.unwrap();
    }

    /// Emits `sick` among healthy events: one before it and one after it of its key, one of another key, and one without a
    /// key.
    pub(crate) async fn emit_among_healthy(&mut self, sick: NewEvent) {
        self.emit(healthy("before").key("order", "42")).await;
        self.emit(sick.key("order", "42")).await;
        self.emit(healthy("after").key("order", "42")).await;
        self.emit(healthy("other").key("order", "43")).await;
        self.emit(healthy("keyless")).await;
    }

    pub(crate) async fn drain(&self) -> Drained {
        self.relay.drain(CancellationToken::new()).await.unwrap()
    }

    pub(crate) fn entries(&self) -> Vec<Entry> {
        RedisClient::connect(redis()).entries(&self.stream)
    }

    /// The types of the stream's events, in order.
    fn in_stream(&self) -> Vec<String> {
        self.entries().iter().map(|entry| entry.field("type").to_owned()).collect()
    }

    /// The types and payloads that EventBridge was sent.
    pub(crate) fn at_bus(&self) -> Vec<(String, String)> {
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        self.bus.requests().iter().flatten().map(|entry| (text(&entry["DetailType"]), text(&entry["Detail"]))).collect()
    }

    /// The dead letters as `destination code attempts payload`.
    pub(crate) async fn dead_letters(&mut self) -> Vec<String> {
        let query =
            "select concat_ws(' ', destination, error_code, attempts, payload) from event_dead_letter order by id";
        column(&mut self.connection, query).await
    }

    pub(crate) async fn count(&mut self, table: &str) -> i64 {
        count(&mut self.connection, table).await
    }

    /// The healthy events of [`Self::emit_among_healthy`] arrived at both destinations, and `sick` at those given.
    #[track_caller]
    pub(crate) fn assert_arrived(&self, sick: &str, in_stream: bool, at_bus: bool) {
        let expected = |with_sick| {
            let mut types = vec!["after", "before", "keyless", "other"];
            types.extend(Some(sick).filter(|_| with_sick));
            types.sort_unstable();
            types
        };
        let mut stream = self.in_stream();
        let place = |event_type: &str| stream.iter().position(|found| found == event_type);
        assert!(place("before") < place("after"));
        assert!(!in_stream || (place("before") < place(sick) && place(sick) < place("after")));
        stream.sort_unstable();
        assert_eq!(stream, expected(in_stream), "in the stream");
        let mut bus: Vec<String> = self.at_bus().into_iter().map(|(event_type, _)| event_type).collect();
        bus.sort_unstable();
        assert_eq!(bus, expected(at_bus), "at the bus");
    }
}

pub(crate) fn healthy(event_type: &str) -> NewEvent {
    NewEvent::from_json(event_type, "{}")
}

fn text_of(length: usize) -> String {
    format!(r#"{{"a": "{}"}}"#, "x".repeat(length - 9))
}

fn route(event_type: &str, destinations: &[usize]) -> Route {
    let headers = std::collections::BTreeMap::new();
    Route { event_type: Some(WildMatch::new(event_type)), source: None, headers, destinations: destinations.to_vec() }
}

pub(super) async fn f29_a_payload_over_the_limit_is_dead_lettered_whole_and_one_at_the_limit_is_not<S: Store>() {
    let mut scene = Scene::<S>::with(|config| config.max_payload = 100_000, vec![]).await;
    scene.emit(NewEvent::from_json("fits", text_of(100_000))).await;
    scene.emit_among_healthy(NewEvent::from_json("sick", text_of(100_001))).await;
    let drained = scene.drain().await;
    assert!(drained.undelivered);
    assert_eq!(drained.tally, Tally { published: 10, dead_lettered: 1, ..Tally::default() });
    assert_eq!(scene.dead_letters().await, [format!(" payload_too_large 1 {}", text_of(100_001))]);
    assert!(scene.in_stream().contains(&"fits".to_owned()));
    assert!(scene.at_bus().contains(&("fits".into(), text_of(100_000))));
    assert!(scene.in_stream().iter().all(|event_type| event_type != "sick"));
    assert_eq!(scene.count("event_outbox").await, 0);
}

/// JSON with so many nested objects.
pub(crate) fn deep(levels: usize) -> String {
    format!("{}1{}", r#"{"a": "#.repeat(levels), "}".repeat(levels))
}

pub(super) async fn a_thousand_levels_of_nesting_reach_redis_and_eventbridge<S: Store>() {
    let mut scene = Scene::<S>::start().await;
    scene.emit_among_healthy(NewEvent::from_json("sick", deep(1000))).await;
    assert!(!scene.drain().await.undelivered);
    scene.assert_arrived("sick", true, true);
    assert_eq!(scene.count("event_outbox").await, 0);
}

pub(super) async fn a_bare_payload_that_is_no_object_is_dead_lettered_for_eventbridge_only<S: Store>() {
    for payload in ["[1, 2]", "null"] {
        let mut scene = Scene::<S>::start().await;
        scene.emit_among_healthy(NewEvent::from_json("sick", payload)).await;
        let drained = scene.drain().await;
        assert_eq!((drained.tally.published, drained.tally.dead_lettered), (9, 1));
        scene.assert_arrived("sick", true, false);
        assert_eq!(scene.dead_letters().await, [format!("bus payload_not_an_object 1 {payload}")]);
        assert_eq!(scene.count("event_outbox").await, 0);
    }
}

pub(super) async fn an_event_type_has_128_characters_at_most<S: Store>() {
    let mut scene = Scene::<S>::start().await;
    let longest = "é".repeat(128);
    scene.emit_among_healthy(healthy(&longest)).await;
    assert!(!scene.drain().await.undelivered);
    scene.assert_arrived(&longest, true, true);
    for characters in [0, 129] {
        let refused = scene.connection.emit(healthy(&"é".repeat(characters))).await.unwrap_err();
        assert!(matches!(refused, EmitError::Event(NewEventError::EventType { .. })), "{refused}");
    }
}

pub(super) async fn headers_are_a_flat_map_of_strings_without_reserved_names<S: Store>() {
    let mut scene = Scene::<S>::start().await;
    let insert = |headers: &str| format!("insert into event_outbox (event_type, headers) values ('sick', '{headers}')");
    for headers in [
        r#"{"a": 1}"#,
        r#"{"a": null}"#,
        r#"{"a": true}"#,
        r#"{"a": {"b": "c"}}"#,
        r#"{"a": ["b"]}"#,
        r#"{"a": []}"#,
        r#"{"a": "b", "c": [["d"]]}"#,
        r#"["a"]"#,
        "[]",
        r#""a""#,
        "null",
    ] {
        let words = refused(&mut scene.connection, insert(headers)).await;
        assert!(words.contains("headers_are_a_"), "{headers}: {words}");
    }
    for name in outbox_relay::event::RESERVED_HEADERS {
        let words = refused(&mut scene.connection, insert(&format!(r#"{{"{name}": "x"}}"#))).await;
        assert!(words.contains("headers_take_no_reserved_name"), "{name}: {words}");
        let refused = scene.connection.emit(healthy("sick").header(name, "x")).await.unwrap_err();
        assert!(matches!(refused, EmitError::Event(NewEventError::ReservedHeader { .. })), "{refused}");
    }
    let odd = healthy("odd").header("_id", "not reserved").header("é \"\n", "\\\t🦀");
    let odd = odd.header("x-amzn-trace-id", "Root=1").header("i d", "inside").header("identity", "longer");
    scene.emit_among_healthy(odd).await;
    assert!(!scene.drain().await.undelivered);
    scene.assert_arrived("odd", true, true);
    let entries = scene.entries();
    let odd = entries.iter().find(|entry| entry.field("type") == "odd").unwrap();
    assert_eq!((odd.field("_id"), odd.field("é \"\n")), ("not reserved", "\\\t🦀"));
    assert_eq!((odd.field("x-amzn-trace-id"), odd.field("i d"), odd.field("identity")), ("Root=1", "inside", "longer"));
}

pub(super) async fn a_key_may_be_long_or_empty<S: Store>() {
    let mut scene = Scene::<S>::start().await;
    // Ten kilobytes that do not compress would not fit into an index.
    let long: String = (0..2500).map(|n: u64| format!("{:04x}", n.wrapping_mul(0x9E37_79B9) >> 7 & 0xFFFF)).collect();
    let keys = [("order", long.as_str()), ("", long.as_str()), ("order", ""), ("", "")];
    for n in 0..50 {
        for (index, (aggregate_type, aggregate_id)) in keys.iter().enumerate() {
            scene.emit(healthy(&format!("{index}.{n}")).key(*aggregate_type, *aggregate_id)).await;
        }
    }
    assert!(!scene.drain().await.undelivered);
    let arrived = scene.in_stream();
    assert_eq!(arrived.len(), 200);
    for index in 0..keys.len() {
        let of_key: Vec<&String> = arrived.iter().filter(|name| name.starts_with(&format!("{index}."))).collect();
        assert!(of_key.iter().zip(0..50).all(|(name, n)| **name == format!("{index}.{n}")), "{of_key:?}");
    }
    let entries = scene.entries();
    let attribute = |event_type: &str, name: &str| {
        let entry = entries.iter().find(|entry| entry.field("type") == event_type).unwrap();
        entry.get(name).map(str::to_owned)
    };
    assert_eq!(attribute("0.0", "partitionkey"), Some(format!("order:{long}")));
    assert_eq!(attribute("2.0", "partitionkey"), Some("order:".into()));
    assert_eq!((attribute("3.0", "partitionkey"), attribute("3.0", "subject")), (None, None));
}

pub(super) async fn a_thousand_events_of_one_key_and_ten_thousand_keys_arrive_in_order<S: Store>() {
    let mut scene = Scene::<S>::with(|_| {}, vec![route("*", &[0])]).await;
    let insert = "insert into event_outbox (event_type, aggregate_type, aggregate_id)
                  select 'order.created', 'order', ";
    // Every eleventh event has the key `one`.
    let key = "case when i % 11 = 0 then 'one' else cast(i as text) end";
    sql(&mut scene.connection, format!("{insert} {key} from {}", S::numbers(11_000))).await;
    sql(&mut scene.connection, format!("{insert} {key} from {} where i % 11 <> 0", S::numbers(11_000))).await;
    let drained = scene.drain().await;
    assert!(!drained.undelivered);
    assert_eq!(drained.tally.published, 21_000);
    let mut keys: std::collections::BTreeMap<String, Vec<i64>> = std::collections::BTreeMap::new();
    for entry in scene.entries() {
        keys.entry(entry.field("subject").into()).or_default().push(entry.field("sequence").parse().unwrap());
    }
    assert_eq!(keys.len(), 10_001);
    for (key, sequences) in keys {
        assert_eq!(sequences.len(), if key == "one" { 1000 } else { 2 }, "{key}");
        assert!(sequences.is_sorted(), "{key}");
    }
}

pub(super) async fn f54_an_event_without_a_route_is_dead_lettered_or_by_setting_dropped<S: Store>() {
    let known = || ["before", "after", "other", "keyless"].map(|event_type| route(event_type, &[0, 1])).to_vec();
    let mut scene = Scene::<S>::with(|_| {}, known()).await;
    scene.emit_among_healthy(NewEvent::from_json("sick", r#"{"a": 1}"#)).await;
    let drained = scene.drain().await;
    assert!(drained.undelivered);
    assert_eq!(drained.tally, Tally { published: 8, dead_lettered: 1, ..Tally::default() });
    scene.assert_arrived("sick", false, false);
    assert_eq!(scene.dead_letters().await, [r#" unrouted 1 {"a": 1}"#]);

    let mut scene = Scene::<S>::with(|config| config.unrouted = Unrouted::Drop, known()).await;
    scene.emit_among_healthy(healthy("sick")).await;
    let drained = scene.drain().await;
    assert!(!drained.undelivered);
    assert_eq!(drained.tally, Tally { published: 8, dropped: 1, ..Tally::default() });
    scene.assert_arrived("sick", false, false);
    assert_eq!(scene.count("event_dead_letter").await, 0);
    let dropped = "select concat_ws(' ', destination, error) from event_processing_log where status = 'dropped'";
    assert_eq!(column(&mut scene.connection, dropped).await, [" unrouted: dropped, by setting"]);
}

pub(super) async fn an_event_owed_to_a_destination_that_nobody_configured_waits_and_holds_up_nobody<S: Store>() {
    let mut scene = Scene::<S>::start().await;
    scene.emit_among_healthy(healthy("sick")).await;
    let lead_astray = "update event_outbox set destination = 'nowhere' where event_type = 'sick'";
    sql(&mut scene.connection, lead_astray).await;
    for _ in 0..2 {
        assert!(scene.drain().await.undelivered, "something is still owed");
        scene.assert_arrived("sick", false, false);
        let left = "select concat_ws(' ', event_type, destination, attempts) from event_outbox";
        assert_eq!(column(&mut scene.connection, left).await, ["sick nowhere 0"]);
    }
    assert_eq!(scene.count("event_dead_letter").await, 0);
    sql(&mut scene.connection, "update event_outbox set destination = ''").await;
    assert!(!scene.drain().await.undelivered);
    assert!(scene.in_stream().contains(&"sick".to_owned()));
}
