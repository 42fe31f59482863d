//! F41: events that Redis refuses, and keys that are not streams.

use std::sync::Arc;

use outbox_relay::event::{Event, Fault, Outcome};
use outbox_relay::secret::Secret;
use outbox_relay::sink::redis::RedisAddress;
use outbox_relay::sink::redis_pubsub::{RedisPubSub, RedisPubSubConfig};
use outbox_relay::sink::{Format, Sink};

use crate::harness::{Setup, column, count, eventually, sql};
use crate::proxy::Proxy;
use crate::readback::RedisClient;
use crate::redis::{TIMEOUT, sink};
use crate::servers::{Database, Server, database, redis};
use crate::support::{assert_all_delivered, assert_all_failed, event, is_uncharged, keyed, publish, unique};

/// Fifty small events of each of four keys. Event 41, in the middle of a key's, is larger than the server accepts.
async fn events_with_one_too_large(database: &Database) {
    let payload = "jsonb_build_object('n', i, 'pad', repeat('x', case i when 41 then 1500000 else 10 end))";
    let values = format!("select 'a', 'k' || i % 4, {payload} from generate_series(1, 200) i");
    let insert = format!("insert into event_outbox (event_type, aggregate_id, payload) {values}");
    sql(&mut database.connect().await, insert).await;
}

/// Publishes them to `sink`. Only the large one becomes a dead letter.
async fn the_large_one_alone_is_dead_lettered(database: &Database, sink: Arc<dyn Sink>) {
    events_with_one_too_large(database).await;
    let mut setup = Setup::new(database, vec![("redis", sink)]);
    setup.relay.max_payload = 4 << 20;
    let running = setup.run();
    let mut connection = database.connect().await;
    eventually("everything is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
    let dead = "select concat_ws(' ', payload ->> 'n', attempts, error_code) from event_dead_letter";
    assert_eq!(column(&mut connection, dead).await, ["41 4 connection_closed"]);
    let published = "event_processing_log where status = 'published' and attempt = 1";
    assert_eq!(count(&mut connection, published).await, 199);
}

#[tokio::test(flavor = "multi_thread")]
async fn f41_an_event_on_which_redis_closes_the_connection_is_found_and_dead_lettered() {
    let server = Server::start("redis", &["--set", "proto-max-bulk-len=1048576"]);
    let database = database().await;
    the_large_one_alone_is_dead_lettered(&database, crate::faults_redis::sink(server.url(), "events")).await;
    let mut client = RedisClient::connect(&server);
    let sequences = client.sequences("events");
    let mut all = sequences.clone();
    all.sort_unstable();
    assert_eq!(all, (1..=200).filter(|id| *id != 41).collect::<Vec<_>>(), "each of the others arrived once");
    for key in 0..4 {
        assert!(sequences.iter().filter(|&id| id % 4 == key).is_sorted(), "key {key}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn f41_so_it_is_on_a_channel() {
    let server = Server::start("redis", &["--set", "proto-max-bulk-len=1048576"]);
    let database = database().await;
    let address = RedisAddress::Url(Secret::inline(server.url()));
    let channel = "events".parse().unwrap();
    let sink = RedisPubSub::new(RedisPubSubConfig {
        address,
        channel,
        format: Format::CloudEvents,
        source: "outbox".into(),
        timeout: TIMEOUT,
        exactly_once: true,
    });
    the_large_one_alone_is_dead_lettered(&database, Arc::new(sink)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f41_connections_that_are_lost_with_whatever_is_published_charge_nobody() {
    // If a server answers nothing at all, the server is at fault, not the event.
    let mut server = Server::start("redis", &[]);
    let sink = sink(server.url(), "events");
    let batch = [keyed(1, "a"), keyed(2, "a"), event(3)];
    for _ in 0..12 {
        assert_all_delivered(&publish(&sink, &[event(4)]).await);
        server.kill();
        let outcomes = publish(&sink, &batch).await;
        assert!(outcomes.iter().all(is_uncharged), "{outcomes:?}");
        server.start_again();
        crate::support::publish_until_delivered(&sink, &[event(4)]).await;
    }
    assert_all_delivered(&publish(&sink, &batch).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn f41_a_network_that_loses_every_answer_about_an_event_does_not_charge_it() {
    // The events arrive, but their answers are lost. Commands without an event are answered.
    let proxy = Proxy::to(redis().port());
    let sink = sink(&proxy.url(redis().url(), redis().port()), &unique("deaf"));
    let batch = [keyed(1, "a"), keyed(2, "b")];
    for _ in 0..12 {
        proxy.drop_answers(1, &batch[0].event_type);
        let outcomes = publish(&sink, &batch).await;
        assert!(outcomes.iter().all(is_uncharged), "{outcomes:?}");
    }
    proxy.heal();
    assert!(proxy.count() >= 12);
    assert_all_delivered(&publish(&sink, &batch).await);
}

#[tokio::test]
async fn f41_one_stream_that_is_no_stream_is_a_misconfiguration_for_all() {
    let (stream, mut client) = (unique("text"), RedisClient::connect(redis()));
    client.tell(&format!("SET {stream} x"));
    let sink = sink(redis().url(), &stream);
    let batch: Vec<Event> = (1..=500).map(event).collect();
    let outcomes = publish(&sink, &batch).await;
    assert!(outcomes.iter().all(is_uncharged));
    assert_all_failed(&outcomes[..1], Fault::Misconfigured, "WRONGTYPE");
    let error = sink.check().await.unwrap_err();
    assert_eq!(error.fault, Fault::Misconfigured);
    assert!(error.message.contains("holds a string") && error.message.contains("RELAY_REDIS_STREAM"), "{error}");
    client.tell(&format!("DEL {stream}"));
    assert_all_delivered(&publish(&sink, &batch).await);
}

#[tokio::test]
async fn f41_an_event_that_names_no_stream_is_charged_alone_and_stops_only_its_key() {
    let (prefix, mut client) = (unique("named"), RedisClient::connect(redis()));
    client.tell(&format!("SET {prefix}:bad x"));
    let bad = |event: Event| Event { event_type: "bad".into(), ..event };
    let batch = [keyed(1, "a"), bad(keyed(2, "a")), keyed(3, "a"), keyed(4, "b"), bad(event(5)), event(6)];
    let outcomes = publish(&sink(redis().url(), &format!("{prefix}:{{event_type}}")), &batch).await;
    assert_all_delivered(&[outcomes[0].clone(), outcomes[3].clone(), outcomes[5].clone()]);
    assert_all_failed(&[outcomes[1].clone(), outcomes[4].clone()], Fault::Event, "WRONGTYPE");
    assert_eq!(outcomes[2], Outcome::Held);
    assert_eq!(client.sequences(&format!("{prefix}:order.created")), [1, 4, 6]);
}
