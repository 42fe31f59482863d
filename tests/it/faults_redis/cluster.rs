//! F36: a Redis Cluster whose slots move and whose masters fail.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use outbox_relay::event::{Event, Fault, Outcome};
use outbox_relay::secret::Secret;
use outbox_relay::sink::redis::RedisAddress;
use outbox_relay::sink::redis_pubsub::{RedisPubSub, RedisPubSubConfig};
use outbox_relay::sink::{Format, Sink};
use redis::cluster::ClusterConnection;

use super::failover::hold_until_replicated;
use crate::faults_redis::{Load, TIMEOUT, TYPES, assert_once_and_in_order, at, numbers, relay, sink};
use crate::harness::eventually;
use crate::readback::RedisClient;
use crate::servers::{Server, database, redis};
use crate::stream::{self, Entry};
use crate::support::{
    assert_all_delivered, assert_all_failed, error, event, is_uncharged, keyed, publish, publish_until,
    publish_until_delivered,
};

/// Nodes 0 to 2 own the slots at first.
const MASTERS: usize = 3;

fn connect(server: &Server) -> ClusterConnection {
    let nodes = server.ports().iter().map(|port| format!("redis://127.0.0.1:{port}"));
    redis::cluster::ClusterClient::new(nodes).unwrap().get_connection().unwrap()
}

/// All entries of a load's streams; those of each stream are in order.
fn load_entries(cluster: &mut ClusterConnection) -> Vec<Entry> {
    (0..TYPES).flat_map(|number| stream::entries(cluster, &format!("events:type{number}"))).collect()
}

fn arrived(cluster: &mut ClusterConnection) -> usize {
    (0..TYPES).map(|number| stream::length(cluster, &format!("events:type{number}"))).sum()
}

/// Moves a slot with its keys in the same way as `redis-cli --cluster reshard`.
fn move_slot(server: &Server, slot: u16, from: usize, to: usize) {
    let mut nodes: Vec<RedisClient> = server.ports()[..MASTERS].iter().map(|port| RedisClient::at(*port)).collect();
    let (source, target): (String, String) = (nodes[from].ask("CLUSTER MYID"), nodes[to].ask("CLUSTER MYID"));
    nodes[to].tell(&format!("CLUSTER SETSLOT {slot} IMPORTING {source}"));
    nodes[from].tell(&format!("CLUSTER SETSLOT {slot} MIGRATING {target}"));
    let mut connection = stream::connect(&format!("redis://127.0.0.1:{}", server.ports()[from]));
    loop {
        let keys: Vec<String> = nodes[from].ask(&format!("CLUSTER GETKEYSINSLOT {slot} 1"));
        if keys.is_empty() {
            break;
        }
        let mut migrate = redis::cmd("MIGRATE");
        migrate.arg("127.0.0.1").arg(server.ports()[to]).arg("").arg(0).arg(10_000).arg("KEYS").arg(&keys);
        migrate.exec(&mut connection).unwrap();
    }
    for node in [to, from, 3 - from - to] {
        nodes[node].tell(&format!("CLUSTER SETSLOT {slot} NODE {target}"));
    }
}

/// The port of a slot's master according to the node at `port`.
fn master_heard_of(port: u16, slot: u16) -> Option<u16> {
    let rows: Vec<Vec<redis::Value>> = RedisClient::at(port).ask("CLUSTER SLOTS");
    let number = |value: &redis::Value| -> u16 { redis::from_redis_value(value.clone()).unwrap() };
    let row = rows.iter().find(|row| (number(&row[0])..=number(&row[1])).contains(&slot))?;
    let redis::Value::Array(master) = &row[2] else { panic!("no node: {:?}", row[2]) };
    Some(number(&master[1]))
}

/// Which of the first three nodes owns a slot.
fn owner(server: &Server, slot: u16) -> usize {
    server.ports()[..MASTERS].iter().position(|port| master_heard_of(*port, slot) == Some(*port)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn f36_streams_whose_slots_move_under_load_get_everything_once_and_in_order() {
    let server = Server::start("redis-cluster", &[]);
    let database = database().await;
    let sink = sink(server.url(), "events:{event_type}");
    let nodes = server.ports().iter().map(|port| format!("127.0.0.1:{port}")).collect::<Vec<_>>().join(", ");
    assert_eq!(sink.check().await.unwrap(), format!("cluster of {nodes}, not encrypted, streams by template"));
    let running = relay(&database, sink);
    let load = Load::start(&database).await;
    let mut cluster = connect(&server);
    eventually("a part has arrived", async || arrived(&mut cluster) > 1000).await;
    for number in 0..TYPES {
        let slot: u16 = RedisClient::at(server.ports()[0]).ask(&format!("CLUSTER KEYSLOT events:type{number}"));
        let from = owner(&server, slot);
        let to = (from + 1) % MASTERS;
        tokio::task::block_in_place(|| move_slot(&server, slot, from, to));
        // The test's own client fails when nodes redirect it in a circle.
        eventually("all nodes know the new master", async || {
            server.ports().iter().all(|port| master_heard_of(*port, slot) == Some(server.ports()[to]))
        })
        .await;
    }
    let before = arrived(&mut cluster);
    eventually("it goes on", async || arrived(&mut cluster) > before + 500).await;
    let events = load.drained(&database).await;
    running.stop().await;
    assert_once_and_in_order(numbers(&load_entries(&mut connect(&server))), events);
}

#[tokio::test(flavor = "multi_thread")]
async fn f36_a_killed_master_is_replaced_and_what_its_replica_has_is_neither_lost_nor_repeated() {
    let mut server = Server::start("redis-cluster", &[]);
    let database = database().await;
    let running = relay(&database, sink(server.url(), "events:{event_type}"));
    let load = Load::start(&database).await;
    let mut cluster = connect(&server);
    eventually("a part has arrived", async || arrived(&mut cluster) > 1000).await;
    drop(cluster);
    hold_until_replicated(server.ports()[0]).await;
    server.kill_node(0);
    let promoted = format!("127.0.0.1:{}@", server.ports()[3]);
    eventually("all nodes know that its replica is the master", async || {
        server.ports()[1..].iter().all(|port| {
            let nodes: String = RedisClient::at(*port).ask("CLUSTER NODES");
            let state: String = RedisClient::at(*port).ask("CLUSTER INFO");
            let is_master = |line: &str| line.contains(&promoted) && line.contains("master");
            nodes.lines().any(is_master) && state.contains("cluster_state:ok")
        })
    })
    .await;
    let mut cluster = connect(&server);
    let before = arrived(&mut cluster);
    eventually("it goes on", async || arrived(&mut cluster) > before + 500).await;
    server.start_node(0);
    let events = load.drained(&database).await;
    running.stop().await;
    assert_once_and_in_order(numbers(&load_entries(&mut connect(&server))), events);
}

#[tokio::test(flavor = "multi_thread")]
async fn f36_a_key_whose_events_go_to_several_slots_keeps_its_order_in_time() {
    let server = Server::start("redis-cluster", &[]);
    let sink = sink(server.url(), "{event_type}");
    let batch: Vec<Event> = (1..=300)
        .map(|id| Event { event_type: format!("type{}", id % 7), ..keyed(id, if id % 2 == 0 { "a" } else { "b" }) })
        .collect();
    assert_all_delivered(&publish(&*sink, &batch).await);
    let mut cluster = connect(&server);
    let mut times: HashMap<i64, u64> = HashMap::new();
    for number in 0..7 {
        for entry in stream::entries(&mut cluster, &format!("type{number}")) {
            times.insert(entry.sequence(), entry.id.split('-').next().unwrap().parse().unwrap());
        }
    }
    assert_eq!(times.len(), 300);
    for first in 1..=298 {
        assert!(times[&first] <= times[&(first + 2)], "{} overtook {first} of its key", first + 2);
    }
    // The text in braces alone decides the slot. All streams have one slot, so there is one request.
    let tagged = at(RedisAddress::Url(Secret::inline(server.url())), "{{{source}}}:{event_type}");
    assert_all_delivered(&publish(&*tagged, &batch).await);
    let mut slots: Vec<u16> = (0..7)
        .map(|number| RedisClient::at(server.ports()[0]).ask(&format!("CLUSTER KEYSLOT {{shop}}:type{number}")))
        .collect();
    slots.dedup();
    assert_eq!(slots.len(), 1);
    assert_eq!(stream::length(&mut cluster, "{shop}:type3"), 43);
}

#[tokio::test(flavor = "multi_thread")]
async fn f36_a_message_reaches_subscribers_of_every_node_in_order() {
    let server = Server::start("redis-cluster", &[]);
    let address = RedisAddress::Url(Secret::inline(server.url()));
    let sink = RedisPubSub::new(RedisPubSubConfig {
        address,
        channel: "{event_type}".parse().unwrap(),
        format: Format::Payload,
        source: "o".into(),
        timeout: TIMEOUT,
        exactly_once: true,
    });
    let clients = [1, 4].map(|node| stream::connect(&format!("redis://127.0.0.1:{}", server.ports()[node])));
    let mut subscribers = clients.map(|mut client| {
        client.set_read_timeout(Some(TIMEOUT)).unwrap();
        redis::cmd("PSUBSCRIBE").arg("order.*").exec(&mut client).unwrap();
        client
    });
    // No node knows the subscribers of another one, so messages go to all nodes.
    for part in 0..4 {
        let events: Vec<Event> = (part * 50 + 1..=part * 50 + 50).map(|id| keyed(id, "a")).collect();
        assert_all_delivered(&publish(&sink, &events).await);
    }
    for subscriber in &mut subscribers {
        for number in 1..=200 {
            let message: (String, String, String, String) =
                redis::from_redis_value(subscriber.recv_response().unwrap()).unwrap();
            assert_eq!(message.3, format!("{{\"n\": {number}}}"));
        }
    }
    assert!(sink.check().await.unwrap().starts_with("cluster of "));
}

#[tokio::test(flavor = "multi_thread")]
async fn f36_a_rotated_password_of_a_cluster_is_read_at_the_next_connection() {
    let server = Server::start("redis-cluster", &["--set", "requirepass=s3cret"]);
    let url = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&url, format!("{}\n", server.url())).unwrap();
    let sink = at(RedisAddress::Url(Secret::File(url.path().into())), "events:{event_type}");
    let typed = |id| Event { event_type: format!("type{id}"), ..event(id) };
    assert_all_delivered(&publish(&*sink, &(1..=20).map(typed).collect::<Vec<_>>()).await);
    for port in server.ports() {
        let mut client = stream::connect(&format!("redis://:s3cret@127.0.0.1:{port}"));
        redis::cmd("CONFIG").arg(&["SET", "masterauth", "hunter2"]).exec(&mut client).unwrap();
        redis::cmd("CONFIG").arg(&["SET", "requirepass", "hunter2"]).exec(&mut client).unwrap();
        redis::cmd("CLIENT").arg(&["KILL", "TYPE", "normal", "SKIPME", "yes"]).exec(&mut client).unwrap();
    }
    eventually("the old password is refused", async || {
        let outcomes = publish(&*sink, &[event(21)]).await;
        assert!(outcomes.iter().all(is_uncharged), "{outcomes:?}");
        let told = format!("{outcomes:?}");
        assert!(!told.contains("s3cret"), "{told}");
        told.contains("Misconfigured") && told.contains("WRONGPASS")
    })
    .await;
    std::fs::write(&url, format!("{}\n", server.url().replace("s3cret", "hunter2"))).unwrap();
    assert_all_delivered(&publish(&*sink, &[event(21)]).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn f36_a_cluster_without_all_its_slots_is_waited_for() {
    let mut server = Server::start("redis-cluster", &[]);
    let sink = sink(server.url(), "events:{event_type}");
    let typed = |id| Event { event_type: format!("type{id}"), ..event(id) };
    let batch: Vec<Event> = (1..=20).map(typed).collect();
    assert_all_delivered(&publish(&*sink, &batch).await);
    // When a master and its replica are down, nobody can take over.
    server.kill_node(0);
    server.kill_node(3);
    let begun = Instant::now();
    for _ in 0..5 {
        let outcomes = publish(&*sink, &batch).await;
        assert!(outcomes.iter().any(is_uncharged), "{outcomes:?}");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert!(begun.elapsed() < TIMEOUT, "the call did not end before its deadline: {:?}", begun.elapsed());
    server.start_node(0);
    publish_until_delivered(&*sink, &batch).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f40_a_frozen_node_of_a_cluster_holds_nobody_past_the_deadline() {
    let mut server = Server::start("redis-cluster", &[]);
    let sink = sink(server.url(), "events:{event_type}");
    let typed = |id| Event { event_type: format!("type{id}"), ..event(id) };
    let batch: Vec<Event> = (1..=20).map(typed).collect();
    assert_all_delivered(&publish(&*sink, &batch).await);
    server.pause_node(1);
    let call = publish_until(&*sink, &batch, Instant::now() + Duration::from_millis(300));
    let outcomes = tokio::time::timeout(TIMEOUT / 2, call).await.expect("the call did not end at its deadline");
    assert!(outcomes.iter().any(is_uncharged) && !outcomes.iter().all(is_uncharged), "{outcomes:?}");
    // By then its replica may have taken over, or the cluster may lack some slots.
    publish_until_delivered(&*sink, &batch).await;
    server.resume_node(1);
    publish_until_delivered(&*sink, &batch).await;
}

#[tokio::test]
async fn f36_a_single_server_is_no_cluster() {
    let url = redis().url().replace("redis://", "redis-cluster://");
    let outcomes = publish(&*sink(&url, "events"), &[event(1)]).await;
    assert_all_failed(&outcomes, Fault::Misconfigured, "ERR");
    let gone = sink("redis-cluster://127.0.0.1:1,127.0.0.1:2", "events");
    assert_all_failed(&publish(&*gone, &[event(1)]).await, Fault::Destination, "connect");
}

#[tokio::test]
async fn f36_whoever_knows_of_no_cluster_publishes_to_a_node_that_has_all_slots_one_stream_a_call() {
    let server = Server::start("redis", &["--set", "cluster-enabled=yes"]);
    let mut client = RedisClient::connect(&server);
    client.tell("CLUSTER ADDSLOTSRANGE 0 16383");
    publish_until_delivered(&*sink(server.url(), "events"), &[event(1)]).await;
    // Several calls are refused with CROSSSLOT at the same time.
    let typed = |id: i64| Event { event_type: format!("type{}", id % 3), ..keyed(id, &(id % 7).to_string()) };
    let batch: Vec<Event> = (1..=500).map(typed).collect();
    assert_all_delivered(&publish(&*sink(server.url(), "{event_type}"), &batch).await);
    for number in 0..3 {
        let arrived = client.sequences(&format!("type{number}"));
        let expected: Vec<i64> = (1..=500).filter(|id| id % 3 == number).collect();
        // Each key's events are in order. Different keys have no order.
        for key in 0..7 {
            let of_key = |ids: &[i64]| ids.iter().copied().filter(|id| id % 7 == key).collect::<Vec<_>>();
            assert_eq!(of_key(&arrived), of_key(&expected), "key {key} of type{number}");
        }
    }
}

#[tokio::test]
async fn f36_streams_of_another_node_fail_in_order_for_whoever_knows_of_no_cluster_and_the_cure_is_named() {
    let server = Server::start("redis-cluster", &[]);
    let url = format!("redis://127.0.0.1:{}", server.ports()[0]);
    let is_here = |name: &String| {
        let slot: u16 = RedisClient::at(server.ports()[0]).ask(&format!("CLUSTER KEYSLOT {name}"));
        owner(&server, slot) == 0
    };
    let (here, there): (Vec<String>, Vec<String>) = (0..TYPES).map(|number| format!("type{number}")).partition(is_here);
    let sink = sink(&url, "{event_type}");
    let to = |name: &str, event: Event| Event { event_type: name.into(), ..event };
    let batch = [
        to(&here[0], keyed(1, "42")),
        to(&there[0], keyed(2, "42")),
        to(&here[0], keyed(3, "42")),
        to(&here[1], event(4)),
    ];
    let outcomes = publish(&*sink, &batch).await;
    assert!(matches!(outcomes[0], Outcome::Delivered { .. }), "{outcomes:?}");
    assert_all_failed(&outcomes[1..2], Fault::Destination, "MOVED");
    assert!(error(&outcomes[1]).message.contains("redis-cluster://"), "{outcomes:?}");
    assert_eq!(outcomes[2], Outcome::Held, "later events of the key are held back");
    assert!(matches!(outcomes[3], Outcome::Delivered { .. }), "{outcomes:?}");
    // When no event can be published, the destination is at fault.
    let elsewhere = [to(&there[0], keyed(2, "42")), to(&there[1], event(5))];
    let outcomes = publish(&*sink, &elsewhere).await;
    assert!(outcomes.iter().any(is_uncharged), "{outcomes:?}");
    assert!(outcomes.iter().all(|outcome| is_uncharged(outcome) || *outcome == Outcome::Held), "{outcomes:?}");
}
