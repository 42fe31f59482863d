//! F42, F43: a Redis that loses its scripts, and messages without subscribers.

use outbox_relay::event::Outcome;
use outbox_relay::sink::Format;

use crate::faults_redis::{Load, assert_once_and_in_order, numbers, relay};
use crate::harness::eventually;
use crate::pubsub;
use crate::readback::RedisClient;
use crate::redis::{ids, of_key, sink};
use crate::servers::{Server, database, redis};
use crate::stream;
use crate::support::{assert_all_delivered, event, publish, unique};

#[tokio::test(flavor = "multi_thread")]
async fn f42_scripts_flushed_under_load_cost_nothing() {
    let server = Server::start("redis", &[]);
    let (mut client, mut stream) = (RedisClient::connect(&server), stream::connect(server.url()));
    let database = database().await;
    let running = relay(&database, crate::faults_redis::sink(server.url(), "events"));
    let load = Load::start(&database).await;
    for _ in 0..20 {
        let before = stream::length(&mut stream, "events");
        eventually("some more arrived", async || stream::length(&mut stream, "events") > before + 100).await;
        client.tell("SCRIPT FLUSH");
    }
    let events = load.drained(&database).await;
    running.stop().await;
    assert_once_and_in_order(numbers(&stream::entries(&mut stream, "events")), events);
}

#[tokio::test]
async fn f42_a_flushed_script_is_loaded_again() {
    let server = Server::start("redis", &[]);
    let mut client = RedisClient::connect(&server);
    let sink = sink(server.url(), "events");
    let batch = of_key("a", 1..=1000);
    for part in batch.chunks(250) {
        assert_all_delivered(&publish(&sink, part).await);
        client.tell("SCRIPT FLUSH");
    }
    assert_eq!(client.sequences("events"), ids(&batch));
}

#[tokio::test]
async fn f43_that_nobody_listens_is_success() {
    let sink = pubsub::sink(redis().url(), &unique("silence"), Format::CloudEvents);
    let outcomes = publish(&sink, &(1..=250).map(event).collect::<Vec<_>>()).await;
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Delivered { message_id: None }));
}
