//! F39, F40: answers that are cut off, and late answers.

use std::time::{Duration, Instant};

use outbox_relay::event::{Event, Fault, Outcome};

use crate::faults_redis::{Load, assert_once_and_in_order, numbers, relay};
use crate::harness::eventually;
use crate::proxy::Proxy;
use crate::readback::RedisClient;
use crate::redis::{TIMEOUT, ids, of_key, sink};
use crate::servers::{Server, database};
use crate::stream;
use crate::support::{
    assert_all_delivered, assert_all_failed, event, is_delivered, is_uncharged, keyed, publish, publish_until,
    publish_until_delivered,
};

/// Each key has two events: two rounds of five chunks that are in flight together.
const EVENTS: i64 = 1000;

#[tokio::test(flavor = "multi_thread")]
async fn f39_of_a_batch_whose_replies_are_cut_off_exactly_those_that_came_are_settled() {
    let server = Server::start("redis", &[]);
    let mut client = RedisClient::connect(&server);
    let batch: Vec<Event> = (1..=EVENTS).map(|id| keyed(id, &(id % (EVENTS / 2)).to_string())).collect();
    let mut counts = Vec::new();
    for replies in 0..=11 {
        let (proxy, stream) = (Proxy::to(server.port()), format!("cut-after-{replies}"));
        let sink = sink(&proxy.url(server.url(), server.port()), &stream);
        assert_all_delivered(&publish(&sink, &[event(EVENTS + 1)]).await);
        proxy.cut_after_replies(replies);
        let outcomes = publish(&sink, &batch).await;
        proxy.heal();
        assert!(outcomes.iter().all(|outcome| is_delivered(outcome) || is_uncharged(outcome)));
        let mut there = client.sequences(&stream);
        for (event, outcome) in batch.iter().zip(&outcomes) {
            assert!(!is_delivered(outcome) || there.contains(&event.row.id), "{outcome:?}");
        }
        // Chunks have a hundred events and are answered in the order in which they were sent.
        counts.push(outcomes.iter().filter(|outcome| is_delivered(outcome)).count());
        let unsettled = |(event, outcome): (&Event, &Outcome)| (!is_delivered(outcome)).then(|| event.clone());
        let left: Vec<Event> = batch.iter().zip(&outcomes).filter_map(unsettled).collect();
        publish_until_delivered(&sink, &left).await;
        there = client.sequences(&stream);
        for key in 0..EVENTS / 2 {
            let mut of_key: Vec<i64> = there.iter().copied().filter(|id| id % (EVENTS / 2) == key).collect();
            of_key.retain(|id| *id <= EVENTS);
            let mut firsts = Vec::new();
            of_key.into_iter().for_each(|id| {
                if !firsts.contains(&id) {
                    firsts.push(id)
                }
            });
            let wanted: Vec<i64> = (1..=EVENTS).filter(|id| id % (EVENTS / 2) == key).collect();
            assert_eq!(firsts, wanted, "after {replies} replies");
        }
    }
    let all: Vec<usize> = (0..=11).map(|replies| (replies * 100).min(1000)).collect();
    assert_eq!(counts, all);
}

#[tokio::test(flavor = "multi_thread")]
async fn f39_connections_cut_at_any_reply_under_load_lose_and_repeat_nothing() {
    let server = Server::start("redis", &[]);
    let database = database().await;
    let proxy = Proxy::to(server.port());
    let running = relay(&database, crate::faults_redis::sink(&proxy.url(server.url(), server.port()), "events"));
    let load = Load::start(&database).await;
    let mut stream = stream::connect(server.url());
    for replies in 1..=40 {
        let (before, cuts) = (stream::length(&mut stream, "events"), proxy.count());
        eventually("some more arrived", async || stream::length(&mut stream, "events") > before + 50).await;
        proxy.cut_after_replies(replies % 13);
        eventually("a connection is cut", async || proxy.count() > cuts).await;
    }
    proxy.heal();
    let events = load.drained(&database).await;
    running.stop().await;
    assert_once_and_in_order(numbers(&stream::entries(&mut stream, "events")), events);
}

#[tokio::test]
async fn f39_a_dropped_connection_comes_back_by_itself() {
    let server = Server::start("redis", &[]);
    let mut client = RedisClient::connect(&server);
    let sink = sink(server.url(), "events");
    for id in 1..=20 {
        publish_until_delivered(&sink, &[event(id)]).await;
        client.tell("CLIENT KILL TYPE normal SKIPME yes");
    }
    let mut arrived = client.sequences("events");
    arrived.dedup();
    assert_eq!(arrived, (1..=20).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn f40_a_slow_answer_is_waited_for_until_the_deadline_and_then_its_connection_is_left() {
    let server = Server::start("redis", &[]);
    let proxy = Proxy::to(server.port());
    let mut client = RedisClient::connect(&server);
    let sink = sink(&proxy.url(server.url(), server.port()), "events");
    assert_all_delivered(&publish(&sink, &[event(1)]).await);
    let connected = client.info("total_connections_received");
    // It is longer than the client library waits by default.
    proxy.delay(Duration::from_millis(700));
    assert_all_delivered(&publish(&sink, &[event(2)]).await);
    assert_eq!(client.info("total_connections_received"), connected, "on the same connection");
    let outcomes = publish_until(&sink, &[event(3)], Instant::now() + Duration::from_millis(200)).await;
    assert_all_failed(&outcomes, Fault::Unknown, "timeout");
    proxy.heal();
    assert_all_delivered(&publish(&sink, &[event(3)]).await);
    assert_eq!(client.info("total_connections_received"), connected + 1);
}

#[tokio::test]
async fn f40_no_answer_by_the_deadline_is_an_unknown_outcome() {
    let server = Server::start("redis", &[]);
    let mut client = RedisClient::connect(&server);
    let sink = sink(server.url(), "events");
    let batch = of_key("a", 1..=1000);
    assert_all_delivered(&publish(&sink, &batch[..10]).await);
    client.tell("CLIENT PAUSE 60000 WRITE");
    let outcomes = publish_until(&sink, &batch[10..], Instant::now() + Duration::from_millis(200)).await;
    assert_all_failed(&outcomes[..100], Fault::Unknown, "timeout");
    assert!(outcomes[100..].iter().all(|outcome| *outcome == Outcome::Held), "later chunks of the key were not sent");
    client.tell("CLIENT UNPAUSE");
    assert_all_delivered(&publish(&sink, &batch[10..]).await);
    let mut arrived = Vec::new();
    for id in client.sequences("events") {
        if !arrived.contains(&id) {
            arrived.push(id);
        }
    }
    assert_eq!(arrived, ids(&batch), "the first copies arrived in order");
}

#[tokio::test]
async fn f40_a_frozen_server_holds_nobody_past_the_deadline() {
    let mut server = Server::start("redis", &[]);
    let sink = sink(server.url(), "events");
    server.pause();
    // If lanes connected one after the other, each would wait for the connection timeout.
    let lanes = (1..=64).map(|id| {
        let sink = &sink;
        async move { publish_until(sink, &[event(id)], Instant::now() + Duration::from_millis(200)).await }
    });
    let outcomes = tokio::time::timeout(TIMEOUT, futures_util::future::join_all(lanes)).await.unwrap();
    assert!(outcomes.iter().flatten().all(is_uncharged));
    server.resume();
    publish_until_delivered(&sink, &[event(65)]).await;
    assert_eq!(RedisClient::connect(&server).sequences("events"), [65], "failed calls sent nothing");
}
