//! F37: errors of a server that is in trouble. No event is charged, and when the trouble is over everything is published.

use std::time::Instant;

use outbox_relay::event::Fault;

use crate::readback::RedisClient;
use crate::redis::{TIMEOUT, sink};
use crate::servers::Server;
use crate::support::{
    assert_all_delivered, assert_all_failed, error, event, is_delivered, publish, publish_until_delivered,
};

#[tokio::test]
async fn f37_troubles_of_the_server_are_the_destinations_fault_and_pass() {
    let server = Server::start("redis", &["--set", "cluster-enabled=yes"]);
    let mut client = RedisClient::connect(&server);
    let sink = sink(server.url(), "events");
    assert_all_failed(&publish(&sink, &[event(1)]).await, Fault::Destination, "CLUSTERDOWN");
    client.tell("CLUSTER ADDSLOTSRANGE 0 16383");
    publish_until_delivered(&sink, &[event(1)]).await; // the cluster takes a moment to notice that it is complete

    client.tell("CONFIG SET min-replicas-to-write 1");
    assert_all_failed(&publish(&sink, &[event(2)]).await, Fault::Destination, "NOREPLICAS");
    client.tell("CONFIG SET min-replicas-to-write 0");
    assert_all_delivered(&publish(&sink, &[event(2)]).await);

    client.tell("CONFIG SET busy-reply-threshold 1");
    let url = server.url().to_owned();
    let endless = std::thread::spawn(move || {
        let mut connection = ::redis::Client::open(url).unwrap().get_connection().unwrap();
        ::redis::cmd("EVAL").arg("while true do end").arg(0).query::<()>(&mut connection).unwrap_err()
    });
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let outcomes = publish(&sink, &[event(3)]).await;
        if !is_delivered(&outcomes[0]) {
            assert_all_failed(&outcomes, Fault::Destination, "BUSY");
            break;
        }
        assert!(Instant::now() < deadline, "Redis never answered BUSY");
    }
    client.tell("SCRIPT KILL");
    endless.join().unwrap();
    assert_all_delivered(&publish(&sink, &[event(3)]).await);
}

#[tokio::test]
async fn f37_a_server_that_cannot_save_its_data_or_reach_its_master_is_waited_for() {
    let server = Server::start("redis", &["--set", "save=3600 1", "--set", "enable-protected-configs=yes"]);
    let mut client = RedisClient::connect(&server);
    let sink = sink(server.url(), "events");
    assert_all_delivered(&publish(&sink, &[event(1)]).await);
    let folder = tempfile::tempdir().unwrap();
    let usual: (String, String) = client.ask("CONFIG GET dir");
    client.tell(&format!("CONFIG SET dir {}", folder.path().display()));
    drop(folder);
    client.tell("BGSAVE");
    let deadline = Instant::now() + TIMEOUT;
    while !client.ask::<String>("INFO persistence").contains("rdb_last_bgsave_status:err") {
        assert!(Instant::now() < deadline, "saving never failed");
    }
    assert_all_failed(&publish(&sink, &[event(2)]).await, Fault::Destination, "MISCONF");
    client.tell(&format!("CONFIG SET dir {}", usual.1));
    client.tell("SAVE");
    assert_all_delivered(&publish(&sink, &[event(2)]).await);

    client.tell("CONFIG SET replica-serve-stale-data no");
    client.tell("REPLICAOF 127.0.0.1 1");
    assert_all_failed(&publish(&sink, &[event(3)]).await, Fault::Destination, "MASTERDOWN");
    client.tell("REPLICAOF NO ONE");
    assert_all_delivered(&publish(&sink, &[event(3)]).await);
    assert_eq!(client.sequences("events"), [1, 2, 3]);
}

#[tokio::test]
async fn f37_too_many_clients_are_the_destinations_fault_with_a_password_too() {
    let server = Server::start("redis", &["--set", "requirepass=s3cret"]);
    let mut client = RedisClient::connect(&server);
    client.tell("CONFIG SET maxclients 1");
    for address in [server.url().to_owned(), server.url().replace(":s3cret@", "")] {
        let sink = sink(&address, "events");
        let outcomes = publish(&sink, &[event(1)]).await;
        assert_eq!(error(&outcomes[0]).fault, Fault::Destination, "{}", error(&outcomes[0]));
    }
}
