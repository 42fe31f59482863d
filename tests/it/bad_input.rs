//! Input that nobody expects: each has a defined outcome, and the healthy events beside it arrive.

use std::sync::Arc;
use std::time::Duration;

use outbox_relay::event::Tally;
use outbox_relay::outbox::postgres::PgOutbox;
use outbox_relay::relay::{Drained, Relay, RelayConfig};
use outbox_relay::route::{Route, Router, Unrouted};
use outbox_relay::secret::Secret;
use outbox_relay::sink::eventbridge::{EventBridge, EventBridgeConfig};
use outbox_relay::sink::redis::RedisAddress;
use outbox_relay::sink::redis_stream::RedisStream;
use outbox_relay::sink::{Format, Sink};
use outbox_relay::{EmitError, NewEvent, NewEventError, emit};
use sqlx::{AssertSqlSafe, PgConnection};
use tokio_util::sync::CancellationToken;
use wildmatch::WildMatch;

use crate::readback::{Entry, RedisClient};
use crate::servers::{Database, database, redis};
use crate::stub::EventBridgeStub;
use crate::support::{eventbridge_config, relay_config, relay_with, sdk, unique};

/// A database and a relay from it to `redis`, a stream, and `bus`, an EventBridge that gets the bare payload.
struct Scene {
    connection: PgConnection,
    relay: Arc<Relay<PgOutbox>>,
    stream: String,
    bus: EventBridgeStub,
    _database: Database,
}

/// One row of `event_dead_letter`.
#[derive(Debug, PartialEq)]
struct DeadLetter {
    destination: String,
    code: String,
    attempts: i32,
    payload: String,
}

impl Scene {
    async fn start() -> Self {
        Self::with(|_| {}, vec![]).await
    }

    async fn with(change: impl FnOnce(&mut RelayConfig), routes: Vec<Route>) -> Self {
        let database = database().await;
        let (stream, bus) = (unique("bad-input"), EventBridgeStub::start().await);
        let address = RedisAddress::Url(Secret::inline(redis().url()));
        let timeout = Duration::from_secs(30);
        let stream_sink = RedisStream::new(address, stream.parse().unwrap(), None, "outbox".into(), timeout);
        let bare = EventBridgeConfig { format: Format::Payload, ..eventbridge_config(bus.url()) };
        let bus_sink = EventBridge::with_sdk_config(&sdk(), bare);
        let destinations: [(&str, Arc<dyn Sink>); 2] = [("redis", Arc::new(stream_sink)), ("bus", Arc::new(bus_sink))];
        let mut config = relay_config();
        change(&mut config);
        let relay = relay_with(&database, &destinations, Router::new(routes, 2), config);
        Self { connection: database.connect().await, relay, stream, bus, _database: database }
    }

    async fn emit(&mut self, event: NewEvent) {
        emit(&mut self.connection, event).await.unwrap();
    }

    /// Emits `sick` between events that are not: one before it and one after it of its key, one of another key and one
    /// of none.
    async fn emit_among_healthy(&mut self, sick: NewEvent) {
        self.emit(healthy("before").key("order", "42")).await;
        self.emit(sick.key("order", "42")).await;
        self.emit(healthy("after").key("order", "42")).await;
        self.emit(healthy("other").key("order", "43")).await;
        self.emit(healthy("keyless")).await;
    }

    async fn execute(&mut self, sql: &str) {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut self.connection).await.unwrap();
    }

    /// Inserts past the library; returns the error's SQLSTATE, and the constraint's name where it names one.
    async fn refused(&mut self, columns: &str, values: &str) -> (String, String) {
        let insert = format!("insert into event_outbox ({columns}) values ({values})");
        let error = sqlx::raw_sql(AssertSqlSafe(insert)).execute(&mut self.connection).await.unwrap_err();
        let error = error.as_database_error().unwrap();
        (error.code().unwrap().into_owned(), error.constraint().unwrap_or_default().to_owned())
    }

    async fn drain(&self) -> Drained {
        self.relay.drain(CancellationToken::new()).await.unwrap()
    }

    fn entries(&self) -> Vec<Entry> {
        RedisClient::connect(redis()).entries(&self.stream)
    }

    /// The types of the events in the stream, in its order.
    fn in_stream(&self) -> Vec<String> {
        self.entries().iter().map(|entry| entry.field("type").to_owned()).collect()
    }

    /// The types and payloads of the events that EventBridge was sent.
    fn at_bus(&self) -> Vec<(String, String)> {
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        self.bus.requests().iter().flatten().map(|entry| (text(&entry["DetailType"]), text(&entry["Detail"]))).collect()
    }

    async fn dead_letters(&mut self) -> Vec<DeadLetter> {
        let query = "select destination, error_code, attempts, payload::text from event_dead_letter order by id";
        let rows: Vec<(String, String, i32, String)> =
            sqlx::query_as(query).fetch_all(&mut self.connection).await.unwrap();
        let letter = |(destination, code, attempts, payload)| DeadLetter { destination, code, attempts, payload };
        rows.into_iter().map(letter).collect()
    }

    async fn count(&mut self, table: &'static str) -> i64 {
        let query = AssertSqlSafe(format!("select count(*) from {table}"));
        sqlx::query_scalar(query).fetch_one(&mut self.connection).await.unwrap()
    }

    /// The healthy events of [`Self::emit_among_healthy`] arrived at both destinations, `sick` at those it is named for.
    #[track_caller]
    fn assert_arrived(&self, sick: &str, in_stream: bool, at_bus: bool) {
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

fn healthy(event_type: &str) -> NewEvent {
    NewEvent::from_json(event_type, "{}")
}

fn dead_letter(destination: &str, code: &str, payload: impl Into<String>) -> DeadLetter {
    DeadLetter { destination: destination.into(), code: code.into(), attempts: 1, payload: payload.into() }
}

fn text_of(length: usize) -> String {
    format!(r#"{{"a": "{}"}}"#, "x".repeat(length - 9))
}

#[tokio::test]
async fn a_payload_over_the_limit_is_dead_lettered_whole_and_one_at_the_limit_is_not() {
    // The long one is stored compressed, in less than two kilobytes; the numbers need few bytes anywhere but in text.
    let numbers = format!(r#"{{"a": [{}]}}"#, ["1e100000"; 10].join(", "));
    for payload in [text_of(100_001), numbers] {
        let mut scene = Scene::with(|config| config.max_payload = 100_000, vec![]).await;
        scene.emit(NewEvent::from_json("fits", text_of(100_000))).await;
        scene.emit_among_healthy(NewEvent::from_json("sick", &payload)).await;
        let printed: String = sqlx::query_scalar("select payload::text from event_outbox where event_type = 'sick'")
            .fetch_one(&mut scene.connection)
            .await
            .unwrap();
        let drained = scene.drain().await;
        assert!(drained.undelivered);
        assert_eq!(drained.tally, Tally { published: 10, dead_lettered: 1, ..Tally::default() });
        assert_eq!(scene.dead_letters().await, [dead_letter("", "payload_too_large", printed)]);
        assert!(scene.in_stream().contains(&"fits".to_owned()));
        assert!(scene.at_bus().contains(&("fits".into(), text_of(100_000))));
        assert!(scene.in_stream().iter().all(|event_type| event_type != "sick"));
        assert_eq!(scene.count("event_outbox").await, 0);
    }
}

#[tokio::test]
async fn a_payload_that_postgres_could_not_print_is_refused_at_insert() {
    let mut scene = Scene::start().await;
    // 1.2 GB of text: PostgreSQL makes no more than 1 GB.
    let numbers = format!("'[{}]'", ["1e131071"; 9000].join(","));
    let (code, _) = scene.refused("event_type, payload", &format!("'sick', {numbers}")).await;
    assert_eq!(code, "54000", "a limit of the program");
    scene.emit(healthy("healthy")).await;
    assert!(!scene.drain().await.undelivered);
}

#[tokio::test]
async fn numbers_arrive_with_every_digit() {
    let mut scene = Scene::start().await;
    let digits = "1234567890".repeat(300);
    let payload = format!(r#"{{"huge": 1e400, "long": {digits}, "small": 1e-400, "zero": -0.00}}"#);
    scene.emit_among_healthy(NewEvent::from_json("sick", payload)).await;
    assert!(!scene.drain().await.undelivered);
    scene.assert_arrived("sick", true, true);
    let expected =
        format!(r#"{{"huge": 1{}, "long": {digits}, "zero": 0.00, "small": 0.{}1}}"#, "0".repeat(400), "0".repeat(399));
    let entries = scene.entries();
    let sick = entries.iter().find(|entry| entry.field("type") == "sick").unwrap();
    assert_eq!(sick.field("data"), expected);
    assert!(scene.at_bus().contains(&("sick".into(), expected)));
}

#[tokio::test]
async fn deep_nesting_reaches_redis_and_eventbridge_up_to_its_own_limit() {
    let deep = |levels: usize| format!("{}1{}", r#"{"a": "#.repeat(levels), "}".repeat(levels));
    for (levels, at_bus) in [(1000, true), (1001, false), (6000, false)] {
        let mut scene = Scene::start().await;
        scene.emit_among_healthy(NewEvent::from_json("sick", deep(levels))).await;
        assert_eq!(scene.drain().await.undelivered, !at_bus);
        scene.assert_arrived("sick", true, at_bus);
        let letters = if at_bus { vec![] } else { vec![dead_letter("bus", "payload_too_deep", deep(levels))] };
        assert_eq!(scene.dead_letters().await, letters, "{levels} levels");
        assert_eq!(scene.count("event_outbox").await, 0);
    }
    let mut scene = Scene::start().await;
    let (code, _) =
        scene.refused("event_type, payload", "'sick', (repeat('[', 50000) || repeat(']', 50000))::jsonb").await;
    assert_eq!(code, "54001", "PostgreSQL's own limit, of its stack");
}

#[tokio::test]
async fn a_bare_payload_that_is_no_object_is_dead_lettered_for_eventbridge_only() {
    for payload in ["[1, 2]", "null"] {
        let mut scene = Scene::start().await;
        scene.emit_among_healthy(NewEvent::from_json("sick", payload)).await;
        let drained = scene.drain().await;
        assert_eq!((drained.tally.published, drained.tally.dead_lettered), (9, 1));
        scene.assert_arrived("sick", true, false);
        assert_eq!(scene.dead_letters().await, [dead_letter("bus", "payload_not_an_object", payload)]);
        assert_eq!(scene.count("event_outbox").await, 0);
    }
}

#[tokio::test]
async fn an_event_type_has_128_characters_at_most() {
    let mut scene = Scene::start().await;
    let longest = "é".repeat(128);
    scene.emit_among_healthy(healthy(&longest)).await;
    assert!(!scene.drain().await.undelivered);
    scene.assert_arrived(&longest, true, true);
    let named = ("23514".to_owned(), "event_type_has_1_to_128_characters".to_owned());
    for characters in [0, 129] {
        assert_eq!(scene.refused("event_type", &format!("repeat('é', {characters})")).await, named);
        let refused = emit(&mut scene.connection, healthy(&"é".repeat(characters))).await.unwrap_err();
        assert!(matches!(refused, EmitError::Event(NewEventError::EventType { .. })), "{refused}");
    }
}

#[tokio::test]
async fn headers_are_a_flat_map_of_strings_without_reserved_names() {
    let mut scene = Scene::start().await;
    let flat = ("23514".to_owned(), "headers_are_a_flat_string_map".to_owned());
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
        assert_eq!(scene.refused("event_type, headers", &format!("'sick', '{headers}'")).await, flat, "{headers}");
    }
    let reserved = ("23514".to_owned(), "headers_take_no_reserved_name".to_owned());
    for name in outbox_relay::event::RESERVED_HEADERS {
        let headers = format!(r#"'sick', '{{"{name}": "x"}}'"#);
        assert_eq!(scene.refused("event_type, headers", &headers).await, reserved, "{name}");
        let refused = emit(&mut scene.connection, healthy("sick").header(name, "x")).await.unwrap_err();
        assert!(matches!(refused, EmitError::Event(NewEventError::ReservedHeader { .. })), "{refused}");
    }
    let odd = healthy("odd").header("", "empty").header("ID", "not reserved").header("é \"\n", "\\\t🦀");
    scene.emit_among_healthy(odd).await;
    assert!(!scene.drain().await.undelivered);
    scene.assert_arrived("odd", true, true);
    let entries = scene.entries();
    let odd = entries.iter().find(|entry| entry.field("type") == "odd").unwrap();
    assert_eq!((odd.field(""), odd.field("ID"), odd.field("é \"\n")), ("empty", "not reserved", "\\\t🦀"));
}

#[tokio::test]
async fn what_jsonb_cannot_store_is_refused_before_it_ends_a_transaction() {
    let mut scene = Scene::start().await;
    scene.execute("begin").await;
    for payload in [r#""\u0000""#, r#"{"\u0000": 1}"#, r#""\ud83d""#, r#""\ude80 \ud83e""#] {
        let refused = emit(&mut scene.connection, NewEvent::from_json("sick", payload)).await.unwrap_err();
        let expected = if payload.contains("u0000") { "NUL" } else { "surrogate" };
        assert!(matches!(&refused, EmitError::Event(error) if error.to_string().contains(expected)), "{refused:?}");
    }
    for nul in [healthy("sick").key("order", "\0"), healthy("sick").header("a", "\0"), healthy("\0")] {
        let refused = emit(&mut scene.connection, nul).await.unwrap_err();
        assert!(matches!(refused, EmitError::Event(NewEventError::Nul { .. })), "{refused}");
    }
    scene.emit(NewEvent::from_json("pair", r#"{"a": "\ud83e\udd80 \\u0000"}"#)).await;
    scene.execute("commit").await;
    for (payload, code) in [(r#""\u0000""#, "22P05"), (r#""\ud83d""#, "22P02")] {
        assert_eq!(scene.refused("event_type, payload", &format!("'sick', '{payload}'")).await.0, code);
    }
    assert!(!scene.drain().await.undelivered);
    assert_eq!(scene.at_bus(), [("pair".into(), r#"{"a": "🦀 \\u0000"}"#.into())]);
}

#[tokio::test]
async fn a_key_may_be_long_or_empty() {
    let mut scene = Scene::start().await;
    // Ten kilobytes that do not compress: such a key would not fit into an index.
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

#[tokio::test]
async fn a_thousand_events_of_one_key_and_ten_thousand_keys_arrive_in_order() {
    let mut scene = Scene::with(|_| {}, vec![route("*", &[0])]).await;
    let insert = "insert into event_outbox (event_type, aggregate_type, aggregate_id)
                  select 'order.created', 'order', ";
    // Every eleventh is the one key's.
    scene
        .execute(&format!("{insert} case when n % 11 = 0 then 'one' else n::text end from generate_series(1, 11000) n"))
        .await;
    scene.execute(&format!("{insert} n::text from generate_series(1, 11000) n where n % 11 <> 0")).await;
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

fn route(event_type: &str, destinations: &[usize]) -> Route {
    let headers = std::collections::BTreeMap::new();
    Route { event_type: Some(WildMatch::new(event_type)), source: None, headers, destinations: destinations.to_vec() }
}

#[tokio::test]
async fn an_event_without_a_route_is_dead_lettered_or_by_setting_dropped() {
    let known = || ["before", "after", "other", "keyless"].map(|event_type| route(event_type, &[0, 1])).to_vec();
    let mut scene = Scene::with(|_| {}, known()).await;
    scene.emit_among_healthy(NewEvent::from_json("sick", r#"{"a": 1}"#)).await;
    let drained = scene.drain().await;
    assert!(drained.undelivered);
    assert_eq!(drained.tally, Tally { published: 8, dead_lettered: 1, ..Tally::default() });
    scene.assert_arrived("sick", false, false);
    assert_eq!(scene.dead_letters().await, [dead_letter("", "unrouted", r#"{"a": 1}"#)]);

    let mut scene = Scene::with(|config| config.unrouted = Unrouted::Drop, known()).await;
    scene.emit_among_healthy(healthy("sick")).await;
    let drained = scene.drain().await;
    assert!(!drained.undelivered);
    assert_eq!(drained.tally, Tally { published: 8, dropped: 1, ..Tally::default() });
    scene.assert_arrived("sick", false, false);
    assert_eq!(scene.dead_letters().await, []);
    let dropped: Vec<(String, String)> =
        sqlx::query_as("select destination, error from event_processing_log where status = 'dropped'")
            .fetch_all(&mut scene.connection)
            .await
            .unwrap();
    assert_eq!(dropped, [("".into(), "unrouted: dropped, by setting".into())]);
}

#[tokio::test]
async fn an_event_owed_to_a_destination_that_nobody_configured_waits_and_holds_up_nobody() {
    let mut scene = Scene::start().await;
    scene.emit_among_healthy(healthy("sick")).await;
    scene.execute("update event_outbox set destination = 'nowhere' where event_type = 'sick'").await;
    for _ in 0..2 {
        assert!(scene.drain().await.undelivered, "something is still owed");
        scene.assert_arrived("sick", false, false);
        let left: Vec<(String, String, i32)> =
            sqlx::query_as("select event_type, destination, attempts from event_outbox")
                .fetch_all(&mut scene.connection)
                .await
                .unwrap();
        assert_eq!(left, [("sick".into(), "nowhere".into(), 0)]);
    }
    assert_eq!(scene.dead_letters().await, []);
    scene.execute("update event_outbox set destination = ''").await;
    assert!(!scene.drain().await.undelivered);
    assert!(scene.in_stream().contains(&"sick".to_owned()));
}
