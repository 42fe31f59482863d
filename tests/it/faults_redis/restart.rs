//! F32, F33: a Redis that is killed, and one that is still loading.

use crate::faults_redis::{
    Load, assert_at_most_one_gap_in_each_key, assert_in_order, assert_once_and_in_order, numbers, relay, sink,
};
use crate::harness::eventually;
use crate::readback::RedisClient;
use crate::servers::{Server, database};
use crate::stream;
use crate::support::{assert_all_delivered, event, is_uncharged, publish};

/// Kills it several times, each time after some more events have arrived.
async fn kill_again_and_again(server: &mut Server, stream: &str) {
    for _ in 0..8 {
        let mut client = stream::connect(server.url());
        let before = stream::length(&mut client, stream);
        eventually("some more arrived", async || stream::length(&mut client, stream) > before + 500).await;
        server.kill();
        server.start_again();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn f32_a_redis_with_an_append_only_file_that_is_killed_loses_and_repeats_nothing() {
    let mut server = Server::start("redis", &["--set", "appendonly=yes"]);
    let database = database().await;
    let running = relay(&database, sink(server.url(), "events"));
    let load = Load::start(&database).await;
    kill_again_and_again(&mut server, "events").await;
    let events = load.drained(&database).await;
    running.stop().await;
    assert_once_and_in_order(numbers(&stream::entries(&mut stream::connect(server.url()), "events")), events);
}

#[tokio::test(flavor = "multi_thread")]
async fn f32_what_a_redis_that_keeps_nothing_has_forgotten_is_all_that_is_missing() {
    let mut server = Server::start("redis", &[]);
    let database = database().await;
    let running = relay(&database, sink(server.url(), "events"));
    let load = Load::start(&database).await;
    kill_again_and_again(&mut server, "events").await;
    let events = load.drained(&database).await;
    running.stop().await;
    let arrived = numbers(&stream::entries(&mut stream::connect(server.url()), "events"));
    assert_in_order(&arrived);
    // It lost everything at its last kill, and has everything since then.
    assert_at_most_one_gap_in_each_key(&arrived, events);
    assert!(arrived.len() < usize::try_from(events).unwrap(), "Redis lost nothing, so this test proves nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn f33_a_redis_that_is_loading_its_data_is_waited_for() {
    // Loading takes a millisecond for each key, and clients are answered meanwhile.
    let slow = ["--set", "key-load-delay=1000", "--set", "loading-process-events-interval-bytes=1024"];
    let mut server = Server::start("redis", &slow);
    let mut client = RedisClient::connect(&server);
    let script = "for i = 1, 4000 do redis.call('SET', 'k' .. i, string.rep('x', 100)) end";
    redis::cmd("EVAL").arg(script).arg(0).exec(&mut stream::connect(server.url())).unwrap();
    client.tell("SAVE");
    let sink = sink(server.url(), "events");
    server.kill();
    let started = tokio::task::spawn_blocking(move || {
        server.start_again();
        server
    });
    let mut loading = 0;
    let server = loop {
        let outcomes = publish(&*sink, &[event(1)]).await;
        match &outcomes[0] {
            outcome if is_uncharged(outcome) => loading += usize::from(format!("{outcome:?}").contains("LOADING")),
            _ => {
                assert_all_delivered(&outcomes);
                break started.await.unwrap();
            }
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    };
    assert!(loading > 0, "Redis was never loading, so this test proves nothing");
    assert_eq!(RedisClient::connect(&server).sequences("events"), [1]);
}
