//! F34: a master that becomes a replica, or that a replica replaces.

use std::time::Duration;

use outbox_relay::event::Fault;
use outbox_relay::sink::Sink;

use crate::faults_redis::{
    Load, assert_at_most_one_gap_in_each_key, assert_in_order, assert_once_and_in_order, numbers, relay, sink,
};
use crate::harness::eventually;
use crate::readback::RedisClient;
use crate::servers::{Server, database};
use crate::stream;
use crate::support::{assert_all_delivered, assert_all_failed, event, publish, unique};

/// The node of a `redis-sentinel` that is the master now, according to the Sentinels.
fn master(server: &Server) -> usize {
    let (_, port): (String, u16) = RedisClient::at(server.ports()[3]).ask("SENTINEL GET-MASTER-ADDR-BY-NAME main");
    server.ports().iter().position(|known| *known == port).unwrap()
}

fn connect(server: &Server, node: usize) -> redis::Connection {
    stream::connect(&format!("redis://127.0.0.1:{}", server.ports()[node]))
}

/// Blocks writes on this node and waits until its replicas have everything.
pub(super) async fn hold_until_replicated(port: u16) {
    let mut client = RedisClient::at(port);
    client.tell("CLIENT PAUSE 60000 WRITE");
    let offset = client.info("master_repl_offset");
    let replicas = client.info("connected_slaves");
    assert!(replicas > 0);
    eventually("the replicas have everything", async || {
        let info: String = client.ask("INFO replication");
        let offset_of = |line: &str| line.split("offset=").nth(1)?.split(',').next()?.parse::<u64>().ok();
        let behind = info.lines().filter(|line| line.contains("state=online")).filter_map(offset_of);
        u64::try_from(behind.filter(|at| *at >= offset).count()).unwrap() == replicas
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f34_a_sentinels_new_master_goes_on_where_the_killed_one_stopped() {
    let mut server = Server::start("redis-sentinel", &[]);
    let database = database().await;
    let sink = sink(server.url(), "events");
    let [one, two, three] = [3, 4, 5].map(|node| server.ports()[node]);
    let told = format!(
        "master \"main\" of the Sentinels 127.0.0.1:{one}, 127.0.0.1:{two}, 127.0.0.1:{three}, database 0, \
         not encrypted, stream \"events\""
    );
    assert_eq!(sink.check().await.unwrap(), told);
    let running = relay(&database, sink);
    let load = Load::start(&database).await;
    let mut old = connect(&server, 0);
    eventually("a part has arrived", async || stream::length(&mut old, "events") > 1000).await;
    // Some answers are outstanding. The replicas have everything that was answered, so no event may be missing later.
    hold_until_replicated(server.ports()[0]).await;
    server.kill_node(0);
    eventually("there is a new master", async || master(&server) != 0).await;
    let mut new = connect(&server, master(&server));
    let before = stream::length(&mut new, "events");
    eventually("events are published to it", async || stream::length(&mut new, "events") > before + 500).await;
    // The old master returns as a replica.
    server.start_node(0);
    let events = load.drained(&database).await;
    running.stop().await;
    assert_once_and_in_order(numbers(&stream::entries(&mut new, "events")), events);
}

#[tokio::test(flavor = "multi_thread")]
async fn f34_a_failover_loses_only_what_redis_had_taken_and_not_passed_on() {
    let mut server = Server::start("redis-sentinel", &[]);
    let database = database().await;
    let running = relay(&database, sink(server.url(), "events"));
    let load = Load::start(&database).await;
    let mut old = connect(&server, 0);
    eventually("a part has arrived", async || stream::length(&mut old, "events") > 1000).await;
    server.kill_node(0);
    eventually("there is a new master", async || master(&server) != 0).await;
    let mut new = connect(&server, master(&server));
    let before = stream::length(&mut new, "events");
    eventually("events are published to it", async || stream::length(&mut new, "events") > before + 500).await;
    let events = load.drained(&database).await;
    running.stop().await;
    let mut arrived = numbers(&stream::entries(&mut new, "events"));
    assert_in_order(&arrived);
    let count = arrived.len();
    arrived.sort_unstable();
    arrived.dedup();
    assert_eq!(arrived.len(), count, "some events arrived twice");
    assert_at_most_one_gap_in_each_key(&arrived, events);
    // Redis had acknowledged all events, as `drained` found. A few chunks had not reached the replicas yet.
    let missing = usize::try_from(events).unwrap() - count;
    assert!(missing <= 1000, "{missing} are missing");
}

#[tokio::test(flavor = "multi_thread")]
async fn f34_a_master_that_is_a_replica_now_and_then_gets_everything_in_order() {
    let server = Server::start("redis", &[]);
    let database = database().await;
    let running = relay(&database, sink(server.url(), "events"));
    let load = Load::start(&database).await;
    let mut client = RedisClient::connect(&server);
    let mut stream = stream::connect(server.url());
    for _ in 0..6 {
        let before = stream::length(&mut stream, "events");
        eventually("some more arrived", async || stream::length(&mut stream, "events") > before + 300).await;
        client.tell("REPLICAOF 127.0.0.1 1");
        tokio::time::sleep(Duration::from_millis(300)).await;
        client.tell("REPLICAOF NO ONE");
    }
    let events = load.drained(&database).await;
    running.stop().await;
    assert_once_and_in_order(numbers(&stream::entries(&mut stream, "events")), events);
}

#[tokio::test]
async fn f34_a_replica_is_the_destinations_fault_and_the_next_call_connects_anew() {
    let server = Server::start("redis", &[]);
    let mut client = RedisClient::connect(&server);
    let sink = sink(server.url(), "events");
    assert_all_delivered(&publish(&*sink, &[event(1)]).await);
    let connected = client.info("total_connections_received");
    client.tell("REPLICAOF 127.0.0.1 1");
    assert_all_failed(&publish(&*sink, &[event(2), event(3)]).await, Fault::Destination, "READONLY");
    client.tell("REPLICAOF NO ONE");
    assert_all_delivered(&publish(&*sink, &[event(2), event(3)]).await);
    assert_eq!(client.info("total_connections_received"), connected + 1);
    assert_eq!(client.sequences("events"), [1, 2, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn f34_sentinels_that_know_no_such_master_or_are_gone_are_the_destinations_fault() {
    let stream = unique("no-master");
    let mut server = Server::start("redis-sentinel", &["--set", "requirepass=s3cret"]);
    assert_all_delivered(&publish(&*sink(server.url(), &stream), &[event(1)]).await);
    let other = server.url().replace("master=main", "master=other");
    let outcomes = publish(&*sink(&other, &stream), &[event(2)]).await;
    assert_all_failed(&outcomes, Fault::Destination, "connect");
    let wrong = server.url().replace("s3cret", "hunter2");
    let outcomes = publish(&*sink(&wrong, &stream), &[event(2)]).await;
    assert_all_failed(&outcomes, Fault::Misconfigured, "WRONGPASS");
    // One Sentinel is enough to find the master.
    server.kill_node(3);
    server.kill_node(4);
    assert_all_delivered(&publish(&*sink(server.url(), &stream), &[event(2)]).await);
    server.kill_node(5);
    let outcomes = publish(&*sink(server.url(), &stream), &[event(3)]).await;
    assert_all_failed(&outcomes, Fault::Destination, "connect");
}
