//! What only Redis Pub/Sub has: messages, channels, and publishing without subscribers.

use std::time::Duration;

use outbox_relay::event::{Event, Fault, Outcome};
use outbox_relay::secret::Secret;
use outbox_relay::sink::redis::RedisAddress;
use outbox_relay::sink::redis_pubsub::{RedisPubSub, RedisPubSubConfig};
use outbox_relay::sink::{Format, Sink};
use serde_json::{Value, json};

use crate::readback::{RedisClient, Subscriber};
use crate::servers::{Server, redis};
use crate::support::{assert_all_delivered, error, event, keyed, publish, unique};

pub(crate) fn sink(url: &str, channel: &str, format: Format) -> RedisPubSub {
    let address = RedisAddress::Url(Secret::inline(url));
    RedisPubSub::new(RedisPubSubConfig {
        address,
        channel: channel.parse().unwrap(),
        format,
        source: "outbox".into(),
        timeout: Duration::from_secs(30),
        exactly_once: true,
    })
}

#[tokio::test]
async fn a_message_is_a_cloudevent_with_the_payload_as_its_data() {
    let channel = unique("cloudevents");
    let mut subscriber = Subscriber::new(redis(), &channel);
    let event = Event {
        correlation_id: Some("req-7f3a".into()),
        headers: vec![("tenant".into(), "acme".into())],
        payload: br#"{"total": 1e400}"#.to_vec(),
        ..keyed(7, "42")
    };
    let outcomes = publish(&sink(redis().url(), &channel, Format::CloudEvents), &[event]).await;
    assert_eq!(outcomes, [Outcome::Delivered { message_id: None }], "the number of receivers is no identity");
    let [(to, message)] = subscriber.messages().try_into().unwrap();
    assert_eq!(to, channel);
    assert_eq!(
        message,
        concat!(
            r#"{"specversion":"1.0","id":"00000000-0000-0000-0000-000000000007","source":"shop","type":"order.created","#,
            r#""subject":"42","time":"2026-01-01T00:00:00Z","datacontenttype":"application/json","sequence":"7","#,
            r#""partitionkey":"order:42","correlationid":"req-7f3a","schemaversion":1,"tenant":"acme","#,
            r#""data":{"total": 1e400}}"#
        )
    );
}

#[tokio::test]
async fn a_bare_payload_is_what_a_plain_json_parse_expects() {
    let channel = unique("bare");
    let mut subscriber = Subscriber::new(redis(), &channel);
    let payloads = [r#"{"n": 1}"#, "[1, 2]", "null", r#""\ud83d\ude00 é""#];
    let batch: Vec<Event> =
        (1..).zip(payloads).map(|(id, payload)| Event { payload: payload.into(), ..event(id) }).collect();
    assert_all_delivered(&publish(&sink(redis().url(), &channel, Format::Payload), &batch).await);
    let messages: Vec<String> = subscriber.messages().into_iter().map(|(_, message)| message).collect();
    assert_eq!(messages, payloads);
    assert_eq!(serde_json::from_str::<Value>(&messages[0]).unwrap(), json!({ "n": 1 }));
}

#[tokio::test]
async fn a_channel_is_named_by_the_event_and_a_key_keeps_its_order_across_channels() {
    let prefix = unique("named");
    let mut subscriber = Subscriber::new(redis(), &prefix);
    let sink = sink(redis().url(), &format!("{prefix}:{{aggregate_type}}:{{event_type}}"), Format::Payload);
    let types = ["order.created", "order.paid", "order.sent"];
    let batch: Vec<Event> = (1..=300)
        .map(|id| Event { event_type: types[usize::try_from(id % 3).unwrap()].into(), ..keyed(id, "42") })
        .collect();
    assert_all_delivered(&publish(&sink, &batch).await);
    let messages = subscriber.messages();
    let expected: Vec<(String, String)> = batch
        .iter()
        .map(|event| (format!("{prefix}:order:{}", event.event_type), format!("{{\"n\": {}}}", event.row.id)))
        .collect();
    assert_eq!(messages, expected);
    assert_eq!(
        sink.check().await.unwrap(),
        format!("127.0.0.1:{}, database 0, not encrypted, channels by template", redis().port())
    );
}

#[tokio::test]
async fn a_channel_without_permission_is_a_misconfiguration() {
    let server = Server::start("redis", &[]);
    let mut client = RedisClient::connect(&server);
    client.tell("ACL SETUSER relay on >pw ~* resetchannels &mine +@all");
    let url = format!("redis://relay:pw@127.0.0.1:{}/0", server.port());
    assert_all_delivered(&publish(&sink(&url, "mine", Format::Payload), &[event(1)]).await);
    let outcomes = publish(&sink(&url, "other", Format::Payload), &[event(2)]).await;
    assert_eq!(error(&outcomes[0]).fault, Fault::Misconfigured, "{}", error(&outcomes[0]));
}

#[tokio::test]
async fn a_stream_key_of_the_same_name_is_no_trouble() {
    let (name, mut client) = (unique("both"), RedisClient::connect(redis()));
    client.tell(&format!("SET {name} x"));
    let mut subscriber = Subscriber::new(redis(), &name);
    assert_all_delivered(&publish(&sink(redis().url(), &name, Format::Payload), &[event(1)]).await);
    assert_eq!(subscriber.messages(), [(name, r#"{"n": 1}"#.to_owned())]);
}
