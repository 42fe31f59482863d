//! The program relays events from a file to every kind of destination.

use std::collections::HashSet;
use std::io::Write;

use outbox_relay::NewEvent;
use serde_json::Value;

use crate::binary::{Running, relay};
use crate::harness::{column, count, eventually};
use crate::moto::MotoBus;
use crate::readback::{RedisClient, Subscriber};
use crate::servers::{moto, redis};
use crate::stores::{Client, Sqlite, Store};
use crate::support::unique;

#[tokio::test]
async fn every_event_reaches_a_stream_a_channel_a_bus_and_standard_output() {
    const EVENTS: i64 = 60;
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    let name = unique("sqlite-arrival");
    let bus = MotoBus::create(moto(), &name);
    let mut subscriber = Subscriber::new(redis(), &name);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    write!(
        file,
        "[destinations.stream]\ntype = \"redis-stream\"\nurl = \"{redis}\"\nstream = \"{name}\"\n\
         [destinations.channel]\ntype = \"redis-pubsub\"\nurl = \"{redis}\"\nchannel = \"{name}:{{event_type}}\"\n\
         [destinations.bus]\ntype = \"eventbridge\"\nbus = \"{name}\"\nendpoint_url = \"{moto}\"\nregion = \"eu-west-1\"\n\
         [destinations.out]\ntype = \"stdout\"\n",
        redis = redis().url(),
        moto = moto().url(),
    )
    .unwrap();
    let variables = [
        ("DATABASE_URL", store.url()),
        ("RELAY_CONFIG", file.path().to_str().unwrap()),
        ("AWS_ACCESS_KEY_ID", "id"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("EVENT_HISTORY_ENABLED", "true"),
    ];
    let running = Running::start(relay(&["run"], &variables));
    for n in 1..=EVENTS {
        let event = NewEvent::new("order.changed", &serde_json::json!({ "n": n })).unwrap();
        connection.emit(event.key("order", (n % 7).to_string()).source("shop").header("tenant", "acme")).await.unwrap();
    }
    eventually("all is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    running.signal("TERM");
    let printed = running.finish().exited(0).stdout;

    let in_order: Vec<i64> = (1..=EVENTS).collect();
    let numbers =
        |events: Vec<Value>| -> Vec<i64> { events.iter().map(|event| event["data"]["n"].as_i64().unwrap()).collect() };
    let parsed = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    assert_eq!(RedisClient::connect(redis()).sequences(&name), in_order);
    let messages = subscriber.messages();
    assert!(messages.iter().all(|(channel, _)| *channel == format!("{name}:order.changed")));
    assert_eq!(numbers(messages.iter().map(|(_, message)| parsed(message)).collect()), in_order);
    let lines: Vec<Value> = printed.lines().map(parsed).collect();
    assert!(lines.iter().all(|line| line["tenant"] == "acme" && line["source"] == "shop"));
    assert_eq!(numbers(lines), in_order);
    let events = bus.events();
    assert!(events.iter().all(|event| event["source"] == "shop" && event["detail-type"] == "order.changed"));
    let details: HashSet<i64> =
        numbers(events.iter().map(|event| event["detail"].clone()).collect()).into_iter().collect();
    assert_eq!((events.len(), details.len()), (60, 60));

    let log =
        "select concat_ws(' ', destination, status, attempt, count(*), count(distinct outbox_id), count(message_id))
               from event_processing_log group by destination, status, attempt order by destination";
    let expected = [
        "bus published 1 60 60 60",
        "channel published 1 60 60 0",
        "out published 1 60 60 0",
        "stream published 1 60 60 60",
    ];
    assert_eq!(column(&mut connection, log).await, expected);
    assert_eq!(count(&mut connection, "event_history").await, 4 * EVENTS);
}
