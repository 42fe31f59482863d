//! What only Redis Streams have: faults of the server, credentials, and the fields of an entry.

use std::time::Duration;

use outbox_relay::event::{Event, Fault, Outcome};
use outbox_relay::secret::Secret;
use outbox_relay::sink::Sink;
use outbox_relay::sink::redis::RedisAddress;
use outbox_relay::sink::redis_stream::{RedisStream, RedisStreamConfig};

use crate::readback::RedisClient;
use crate::servers::{Server, redis};
use crate::support::{assert_all_delivered, assert_all_failed, error, event, keyed, publish, unique};

/// Longer than any answer takes, and shorter than a test waits.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);

pub(crate) fn sink(url: &str, stream: &str) -> RedisStream {
    at(RedisAddress::Url(Secret::inline(url)), stream)
}

pub(crate) fn at(address: RedisAddress, stream: &str) -> RedisStream {
    RedisStream::new(RedisStreamConfig {
        address,
        stream: stream.parse().unwrap(),
        max_length: None,
        source: "outbox".into(),
        timeout: TIMEOUT,
        exactly_once: true,
    })
}

/// Returns a `redis://` URL with a user and a password.
pub(crate) fn url_as(server: &Server, user: &str, password: &str) -> String {
    format!("redis://{user}:{password}@127.0.0.1:{}/0", server.port())
}

pub(crate) fn of_key(key: &str, ids: std::ops::RangeInclusive<i64>) -> Vec<Event> {
    ids.map(|id| keyed(id, key)).collect()
}

pub(crate) fn ids(events: &[Event]) -> Vec<i64> {
    events.iter().map(|event| event.row.id).collect()
}

#[tokio::test]
async fn an_entry_has_exactly_the_documented_fields() {
    let (stream, mut client) = (unique("fields"), RedisClient::connect(redis()));
    let full = Event {
        source: String::new(),
        event_type: "inventory:product.created".into(),
        correlation_id: Some("req-7f3a".into()),
        causation_id: Some("cmd-1".into()),
        schema_version: 3,
        headers: vec![("tenant".into(), "Ærø \"1\"\n".into()), ("traceparent".into(), "00-ab-cd-01".into())],
        ..keyed(7, "42")
    };
    let outcomes = publish(&sink(redis().url(), &stream), &[full, event(8)]).await;
    let entries = client.entries(&stream);
    let own = |fields: &[(&str, &str)]| -> Vec<(String, String)> {
        fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    assert_eq!(
        entries[0].fields,
        own(&[
            ("specversion", "1.0"),
            ("id", "00000000-0000-0000-0000-000000000007"),
            ("source", "outbox"),
            ("type", "inventory:product.created"),
            ("subject", "42"),
            ("time", "2026-01-01T00:00:00Z"),
            ("datacontenttype", "application/json"),
            ("sequence", "7"),
            ("partitionkey", "order:42"),
            ("correlationid", "req-7f3a"),
            ("causationid", "cmd-1"),
            ("schemaversion", "3"),
            ("tenant", "Ærø \"1\"\n"),
            ("traceparent", "00-ab-cd-01"),
            ("data", r#"{"n": 7}"#),
        ])
    );
    assert_eq!(
        entries[1].fields,
        own(&[
            ("specversion", "1.0"),
            ("id", "00000000-0000-0000-0000-000000000008"),
            ("source", "shop"),
            ("type", "order.created"),
            ("time", "2026-01-01T00:00:00Z"),
            ("datacontenttype", "application/json"),
            ("sequence", "8"),
            ("schemaversion", "1"),
            ("data", r#"{"n": 8}"#),
        ])
    );
    let answers: Vec<Outcome> =
        entries.iter().map(|entry| Outcome::Delivered { message_id: Some(entry.id.clone()) }).collect();
    assert_eq!(outcomes, answers, "the message id is the id of the entry");
}

#[tokio::test]
async fn a_stream_is_named_by_the_event() {
    let (prefix, mut client) = (unique("by"), RedisClient::connect(redis()));
    let sink = sink(redis().url(), &format!("{prefix}/{{source}}/{{aggregate_type}}/{{event_type}}"));
    let nameless = Event { source: String::new(), event_type: "a.b".into(), ..event(2) };
    assert_all_delivered(&publish(&sink, &[keyed(1, "42"), nameless, keyed(3, "42")]).await);
    assert_eq!(client.sequences(&format!("{prefix}/shop/order/order.created")), [1, 3]);
    assert_eq!(client.sequences(&format!("{prefix}/outbox//a.b")), [2]);
    assert_eq!(
        sink.check().await.unwrap(),
        format!("127.0.0.1:{}, database 0, not encrypted, streams by template", redis().port())
    );
}

#[tokio::test]
async fn a_stream_is_trimmed_about_to_its_maximum_length() {
    let (stream, mut client) = (unique("trimmed"), RedisClient::connect(redis()));
    let address = RedisAddress::Url(Secret::inline(redis().url()));
    let sink = RedisStream::new(RedisStreamConfig {
        address,
        stream: stream.parse().unwrap(),
        max_length: Some(200),
        source: "outbox".into(),
        timeout: TIMEOUT,
        exactly_once: true,
    });
    assert_all_delivered(&publish(&sink, &(1..=1000).map(event).collect::<Vec<_>>()).await);
    let left = client.sequences(&stream);
    // Redis drops whole nodes, of 100 entries by default.
    assert!((200..=300).contains(&left.len()), "{} entries are left", left.len());
    assert_eq!(left.last(), Some(&1000));
}

#[tokio::test]
async fn the_database_number_is_respected() {
    let (stream, mut client) = (unique("database"), RedisClient::connect(redis()));
    let parts = |database| RedisAddress::Parts {
        host: "127.0.0.1".into(),
        port: redis().port(),
        database,
        username: None,
        password: None,
    };
    let by_url = sink(&redis().url().replace("/0", "/3"), &stream);
    assert_all_delivered(&publish(&by_url, &[event(1)]).await);
    let by_parts = at(parts(4), &stream);
    assert_all_delivered(&publish(&by_parts, &[event(2)]).await);
    assert_eq!(
        by_parts.check().await.unwrap(),
        format!("127.0.0.1:{}, database 4, not encrypted, stream {stream:?}", redis().port())
    );
    assert_eq!(client.sequences(&stream), [0; 0]);
    for (database, sequence) in [(3, 1), (4, 2)] {
        client.tell(&format!("SELECT {database}"));
        assert_eq!(client.sequences(&stream), [sequence]);
    }
    assert_all_failed(&publish(&at(parts(99), &stream), &[event(3)]).await, Fault::Misconfigured, "ERR");
}

#[tokio::test]
async fn a_server_without_the_command_is_a_misconfiguration() {
    let server = Server::start("redis", &["--set", "rename-command=XADD \"\""]);
    let outcomes = publish(&sink(server.url(), "events"), &of_key("a", 1..=3)).await;
    assert_all_failed(&outcomes[..1], Fault::Misconfigured, "ERR");
    assert!(outcomes[1..].iter().all(|outcome| *outcome == Outcome::Held));
}

#[tokio::test]
async fn no_such_host_and_a_refused_port_are_the_destinations_fault() {
    for url in ["redis://nowhere.invalid", "redis://127.0.0.1:1"] {
        let sink = sink(url, "events");
        let outcomes = publish(&sink, &[event(1), event(2)]).await;
        assert_all_failed(&outcomes, Fault::Destination, "connect");
        assert_eq!(sink.check().await.unwrap_err().fault, Fault::Destination);
    }
}

#[tokio::test]
async fn an_address_that_is_none_is_a_misconfiguration_and_shows_no_password() {
    for url in ["http://:s3cret@localhost", "redis://:s3cret@localhost:port", "s3cret"] {
        let outcomes = publish(&sink(url, "events"), &[event(1)]).await;
        assert_all_failed(&outcomes, Fault::Misconfigured, "redis_address");
        assert!(!error(&outcomes[0]).message.contains("s3cret"), "{}", error(&outcomes[0]));
    }
    let missing = at(RedisAddress::Url(Secret::File("/nowhere/redis-url".into())), "events");
    let outcomes = publish(&missing, &[event(1)]).await;
    assert_all_failed(&outcomes, Fault::Misconfigured, "redis_address");
    assert!(error(&outcomes[0]).message.contains("/nowhere/redis-url"), "{}", error(&outcomes[0]));
}
