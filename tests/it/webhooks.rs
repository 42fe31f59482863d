//! Real input: a webhook of every kind that GitHub sends, through one relay to Redis and EventBridge.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use outbox_relay::event::Tally;
use outbox_relay::secret::Secret;
use outbox_relay::sink::eventbridge::EventBridge;
use outbox_relay::sink::redis::RedisAddress;
use outbox_relay::sink::redis_stream::{RedisStream, RedisStreamConfig};
use outbox_relay::sink::{Format, Sink};
use outbox_relay::{NewEvent, emit};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use sqlx::{Connection, PgConnection};
use tokio_util::sync::CancellationToken;

use crate::moto::MotoBus;
use crate::readback::RedisClient;
use crate::servers::{database, moto, redis};
use crate::stub::EventBridgeStub;
use crate::support::{eventbridge_config, relay_to, sdk, unique};

#[derive(Deserialize)]
struct Kind {
    name: String,
    examples: Vec<Box<RawValue>>,
}

/// An event as it is stored before it is published.
struct Stored {
    id: i64,
    event_id: String,
    event_type: String,
    aggregate_id: Option<String>,
    payload: String,
}

fn webhooks() -> Vec<NewEvent> {
    let compressed = include_bytes!("../data/github-webhooks.json.gz");
    let mut json = String::new();
    flate2::read::GzDecoder::new(compressed.as_slice()).read_to_string(&mut json).unwrap();
    let kinds: Vec<Kind> = serde_json::from_str(&json).unwrap();
    assert_eq!(kinds.len(), 58);
    let mut events = Vec::new();
    for kind in kinds {
        for example in kind.examples {
            let payload: Value = serde_json::from_str(example.get()).unwrap();
            let event_type = match payload["action"].as_str() {
                Some(action) => format!("github.{}.{action}", kind.name),
                None => format!("github.{}", kind.name),
            };
            let event = NewEvent::from_json(event_type, example.get()).source("github");
            events.push(match payload["repository"]["full_name"].as_str() {
                Some(repository) => event.key("repository", repository),
                None => event,
            });
        }
    }
    assert_eq!(events.len(), 329);
    events
}

/// Emits all webhooks in one transaction. Returns the events as stored.
async fn emit_all(connection: &mut PgConnection) -> Vec<Stored> {
    let mut transaction = connection.begin().await.unwrap();
    for event in webhooks() {
        emit(&mut *transaction, event).await.unwrap();
    }
    transaction.commit().await.unwrap();
    let query = "select id, event_id::text, event_type, aggregate_id, payload::text from event_outbox order by id";
    let rows: Vec<(i64, String, String, Option<String>, String)> =
        sqlx::query_as(query).fetch_all(connection).await.unwrap();
    let stored =
        |(id, event_id, event_type, aggregate_id, payload)| Stored { id, event_id, event_type, aggregate_id, payload };
    rows.into_iter().map(stored).collect()
}

/// The ids of each key, in order, without the events that have no key.
fn by_key<'a>(ids: impl IntoIterator<Item = (Option<&'a str>, i64)>) -> BTreeMap<&'a str, Vec<i64>> {
    let mut keys: BTreeMap<&str, Vec<i64>> = BTreeMap::new();
    for (key, id) in ids {
        if let Some(key) = key {
            keys.entry(key).or_default().push(id);
        }
    }
    keys
}

/// An event as EventBridge's `Detail`.
#[derive(Deserialize)]
struct Detail<'a> {
    id: &'a str,
    sequence: &'a str,
    #[serde(borrow)]
    data: &'a RawValue,
}

#[tokio::test]
async fn every_webhook_reaches_redis_and_eventbridge_whole_and_in_order() {
    let database = database().await;
    let mut connection = database.connect().await;
    let stored = emit_all(&mut connection).await;
    assert_eq!(stored.len(), 329);
    let expected_order = by_key(stored.iter().map(|event| (event.aggregate_id.as_deref(), event.id)));
    assert!(expected_order.len() > 10 && expected_order["Codertocat/Hello-World"].len() > 200);

    let stream = unique("webhooks");
    let address = RedisAddress::Url(Secret::inline(redis().url()));
    let to_redis = RedisStream::new(RedisStreamConfig {
        address,
        stream: stream.parse().unwrap(),
        max_length: None,
        source: "outbox".into(),
        timeout: Duration::from_secs(30),
        exactly_once: true,
    });
    let bus = MotoBus::with_4_queues(moto(), &stream);
    // The same sink, but to a stub that keeps the bytes it was sent.
    let stub = EventBridgeStub::start().await;
    let to_stub = EventBridge::with_sdk_config(&sdk(), eventbridge_config(stub.url()));
    let destinations: [(&str, Arc<dyn Sink>); 3] = [
        ("redis", Arc::new(to_redis)),
        ("eventbridge", Arc::new(bus.sink(Format::CloudEvents))),
        ("stub", Arc::new(to_stub)),
    ];
    let drained = relay_to(&database, &destinations).drain(CancellationToken::new()).await.unwrap();
    assert!(!drained.undelivered);
    assert_eq!(drained.tally, Tally { published: 3 * 329, ..Tally::default() });

    // The message ids that the destinations assigned.
    let mut message_ids: BTreeMap<(&str, String), String> = BTreeMap::new();

    let entries = RedisClient::connect(redis()).entries(&stream);
    assert_eq!(entries.len(), 329);
    let sequence = |text: &str| text.parse::<i64>().unwrap();
    let key = |key: &str| key.strip_prefix("repository:").unwrap().to_owned();
    let keys: Vec<Option<String>> = entries.iter().map(|entry| entry.get("partitionkey").map(key)).collect();
    let order =
        by_key(keys.iter().zip(&entries).map(|(key, entry)| (key.as_deref(), sequence(entry.field("sequence")))));
    assert_eq!(order, expected_order);
    for entry in entries {
        message_ids.insert(("redis", entry.field("id").into()), entry.id.clone());
        let event = stored.iter().find(|event| event.event_id == entry.field("id")).unwrap();
        assert_eq!(entry.field("type"), event.event_type);
        assert_eq!(entry.field("data"), event.payload, "{}", event.event_type);
    }

    let events = bus.events();
    assert_eq!(events.len(), 329);
    for event in events {
        let detail = &event["detail"];
        let expected = stored.iter().find(|stored| detail["id"] == stored.event_id).unwrap();
        message_ids.insert(("eventbridge", expected.event_id.clone()), event["id"].as_str().unwrap().into());
        assert_eq!(event["source"], "github");
        assert_eq!(event["detail-type"], expected.event_type);
        assert_eq!(detail["type"], expected.event_type);
        assert_eq!(
            detail["data"],
            serde_json::from_str::<Value>(&expected.payload).unwrap(),
            "{}",
            expected.event_type
        );
    }
    assert_eq!(message_ids.len(), 2 * 329, "each event once at each destination");

    let requests = stub.requests();
    let details: Vec<Detail<'_>> = requests
        .iter()
        .flatten()
        .map(|entry| serde_json::from_str(entry["Detail"].as_str().unwrap()).unwrap())
        .collect();
    assert_eq!(details.len(), 329);
    let find = |detail: &Detail<'_>| stored.iter().find(|event| event.event_id == detail.id).unwrap();
    for detail in &details {
        assert_eq!(detail.data.get(), find(detail).payload, "{}", find(detail).event_type);
    }
    let order = details.iter().map(|detail| (find(detail).aggregate_id.as_deref(), sequence(detail.sequence)));
    assert_eq!(by_key(order), expected_order);

    assert_settled(&mut connection, &stored, &message_ids).await;
}

/// The outbox is empty, and the log says `published` once for each event and destination, with the message id.
async fn assert_settled(
    connection: &mut PgConnection,
    stored: &[Stored],
    message_ids: &BTreeMap<(&str, String), String>,
) {
    let left: (i64, i64) =
        sqlx::query_as("select (select count(*) from event_outbox), (select count(*) from event_dead_letter)")
            .fetch_one(&mut *connection)
            .await
            .unwrap();
    assert_eq!(left, (0, 0));
    let log: Vec<(String, String, i64, String, String, i32, String)> = sqlx::query_as(
        "select destination, event_id::text, outbox_id, event_type, status, attempt, message_id
         from event_processing_log order by destination, outbox_id",
    )
    .fetch_all(connection)
    .await
    .unwrap();
    assert_eq!(log.len(), 3 * stored.len());
    let expected =
        ["eventbridge", "redis", "stub"].iter().flat_map(|name| stored.iter().map(move |event| (*name, event)));
    for ((destination, event_id, outbox_id, event_type, status, attempt, message_id), (name, event)) in
        log.into_iter().zip(expected)
    {
        assert_eq!((destination.as_str(), &event_id, outbox_id), (name, &event.event_id, event.id));
        assert_eq!((&event_type, status.as_str(), attempt), (&event.event_type, "published", 1));
        if name != "stub" {
            assert_eq!(message_id, message_ids[&(name, event_id)]); // the stub's ids say nothing about the event
        }
    }
}
