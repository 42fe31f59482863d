//! Errors that a real destination returns for one event while it accepts others: the key waits, the destination goes on.

use std::sync::Arc;
use std::time::Duration;

use outbox_relay::event::{Event, Outcome};
use outbox_relay::secret::Secret;
use outbox_relay::sink::eventbridge::EventBridge;
use outbox_relay::sink::redis::RedisAddress;
use outbox_relay::sink::redis_pubsub::{RedisPubSub, RedisPubSubConfig};
use outbox_relay::sink::redis_stream::{RedisStream, RedisStreamConfig};
use outbox_relay::sink::{Format, Sink};

use crate::binary::{Running, relay};
use crate::harness::{Setup, column, count, eventually, sql};
use crate::readback::RedisClient;
use crate::redis::{TIMEOUT, sink, url_as};
use crate::servers::{Server, database};
use crate::stores::Postgres;
use crate::stub::EventBridgeStub;
use crate::support::{error, event, eventbridge_config, publish, sdk};

const BLOCKED: &str = "event_outbox where status = 'scheduled' and attempts = 0 and last_error is not null";

/// Events named `bad` fail at `sink` with an error that begins with `code` until `mend` is called. All others are accepted.
/// They fail first in a call with others, then alone, and again while other events are published.
async fn blocks_one_key(database: &Postgres, sink: Arc<dyn Sink>, code: &str, mend: impl FnOnce()) {
    let mut connection = database.connect().await;
    let mut setup = Setup::new(database, vec![("a", sink)]);
    setup.policy.breaker.recovery = Duration::from_secs(3600);
    setup.relay.lanes = 1;
    sql(
        &mut connection,
        "insert into event_outbox (event_type, source, aggregate_id)
         select case when i in (4, 5) then 'bad' else 'good' end, case when i in (4, 5) then 'bad' else 'good' end,
             case when i in (4, 5) then 'bad' else i::text end
         from generate_series(1, 8) i",
    )
    .await;
    let running = setup.run();
    let good = "event_outbox where event_type = 'good'";
    let emit = "insert into event_outbox (event_type, source) values ('good', 'good')";
    eventually("the key is blocked", async || {
        sql(&mut connection, emit).await;
        count(&mut connection, BLOCKED).await > 0
    })
    .await;
    for _ in 0..20 {
        sql(&mut connection, "insert into event_outbox (event_type, source) values ('bad', 'bad')").await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        sql(&mut connection, emit).await;
        eventually("others arrive", async || count(&mut connection, good).await == 0).await;
    }
    let waiting = column(&mut connection, "select distinct destination || ' ' || split_part(last_error, ':', 1) from event_outbox where last_error is not null").await;
    assert_eq!(waiting, [format!("a {code}")]);
    assert_eq!(count(&mut connection, "event_outbox").await, 22);
    mend();
    eventually("all arrived", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
    assert_eq!(count(&mut connection, "event_dead_letter").await, 0);
    let attempts = "select distinct concat_ws(' ', status, attempt) from event_processing_log";
    assert_eq!(column(&mut connection, attempts).await, ["published 1"]);
    let in_order =
        "select outbox_id::text from event_processing_log where outbox_id in (4, 5) order by processed_at, outbox_id";
    assert_eq!(column(&mut connection, in_order).await, ["4", "5"]);
}

async fn blocks_an_eventbridge_source(code: &'static str) {
    let (database, stub) = (database().await, EventBridgeStub::start().await);
    stub.refuse_source(Some(("bad", code)));
    let sink = EventBridge::with_sdk_config(&sdk(), eventbridge_config(stub.url()));
    blocks_one_key(&database, Arc::new(sink), code, || stub.refuse_source(None)).await;
}

#[tokio::test]
async fn f64_a_source_that_eventbridge_does_not_allow_waits_and_the_bus_goes_on() {
    blocks_an_eventbridge_source("NotAuthorizedForSourceException").await;
}

#[tokio::test]
async fn f64_a_source_that_eventbridge_throttles_or_fails_waits_and_the_bus_goes_on() {
    blocks_an_eventbridge_source("ThrottlingException").await;
    blocks_an_eventbridge_source("SomethingThatAwsAddsNextYear").await;
}

#[tokio::test]
async fn f64_streams_that_redis_does_not_allow_wait_and_the_others_go_on() {
    let database = database().await;
    let server = Server::start("redis", &[]);
    let mut client = RedisClient::connect(&server);
    client.tell("ACL SETUSER relay on >pw ~*good* &* +@all");
    let address = RedisAddress::Url(Secret::inline(url_as(&server, "relay", "pw")));
    let stream = "{event_type}".parse().unwrap();
    let sink = RedisStream::new(RedisStreamConfig {
        address,
        stream,
        max_length: None,
        source: "outbox".into(),
        timeout: TIMEOUT,
        exactly_once: true,
    });
    blocks_one_key(&database, Arc::new(sink), "NOPERM", || client.tell("ACL SETUSER relay ~*")).await;
    assert_eq!(RedisClient::connect(&server).sequences("bad").len(), 22);
}

#[tokio::test]
async fn f64_a_stream_that_redis_does_not_allow_leaves_the_other_streams_of_many_calls_alone() {
    for kind in ["redis", "redis-cluster"] {
        let server = Server::start(kind, &[]);
        for &port in server.ports() {
            RedisClient::at(port).tell("ACL SETUSER relay on >pw ~*good* &* +@all");
        }
        let url = server.url().replace("://", "://relay:pw@");
        // All streams have the same slot.
        let sink = sink(&url, "{{s}}:{event_type}");
        let named = |id: i64| Event { event_type: if id % 7 == 0 { "bad" } else { "good" }.into(), ..event(id) };
        let batch: Vec<Event> = (1..=600).map(named).collect();
        for (event, outcome) in batch.iter().zip(publish(&sink, &batch).await) {
            if event.event_type == "good" {
                assert!(matches!(outcome, Outcome::Delivered { .. }), "{kind}: {outcome:?}");
            } else {
                assert_eq!(error(&outcome).code, "NOPERM", "{kind}");
            }
        }
    }
}

#[tokio::test]
async fn f64_channels_that_redis_does_not_allow_wait_and_the_others_go_on() {
    let database = database().await;
    let server = Server::start("redis", &[]);
    let mut client = RedisClient::connect(&server);
    client.tell("ACL SETUSER relay on >pw ~* resetchannels &good +@all");
    let address = RedisAddress::Url(Secret::inline(url_as(&server, "relay", "pw")));
    let channel = "{event_type}".parse().unwrap();
    let sink = RedisPubSub::new(RedisPubSubConfig {
        address,
        channel,
        format: Format::CloudEvents,
        source: "outbox".into(),
        timeout: TIMEOUT,
        exactly_once: false,
    });
    let code = {
        let probe: String = client.ask("INFO server");
        if probe.contains("redis_version:7.0") { "ERR" } else { "NOPERM" }
    };
    blocks_one_key(&database, Arc::new(sink), code, || client.tell("ACL SETUSER relay &*")).await;
}

#[tokio::test]
async fn f64_a_blocked_key_is_named_in_the_log_once_and_many_are_summed_up() {
    let (database, stub) = (database().await, EventBridgeStub::start().await);
    let mut connection = database.connect().await;
    stub.refuse_source(Some(("bad", "NotAuthorizedForSourceException")));
    sql(
        &mut connection,
        "insert into event_outbox (event_type, source, aggregate_type, aggregate_id) values ('ok', 'good', null, null);
         insert into event_outbox (event_type, source, aggregate_type, aggregate_id)
         select 'order.placed', 'bad', 'order', (i % 100)::text from generate_series(0, 999) i",
    )
    .await;
    let mut running = Running::start(relay(
        &["run"],
        &[
            ("DATABASE_URL", database.url()),
            ("AWS_EVENTBRIDGE_BUS_NAME", "orders"),
            ("AWS_ENDPOINT_URL", stub.url()),
            ("AWS_REGION", "eu-west-1"),
            ("AWS_ACCESS_KEY_ID", "id"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
        ],
    ));
    running.until_log("event blocked");
    eventually("all keys wait", async || {
        sql(&mut connection, "insert into event_outbox (event_type, source) values ('ok', 'good')").await;
        count(&mut connection, "event_outbox where status = 'pending' and last_error is null and event_type <> 'ok'")
            .await
            == 0
    })
    .await;
    sql(&mut connection, "insert into event_outbox (event_type, source) values ('ok', 'good')").await;
    eventually("others go on", async || count(&mut connection, "event_outbox").await == 1000).await;
    running.signal("TERM");
    let log = running.finish().exited(0).stderr;
    let named: Vec<&str> = log.lines().filter(|line| line.contains("event blocked")).collect();
    assert_eq!(named.len(), 5, "{log}");
    assert!(log.contains("more events failed while others were taken"), "{log}");
    for part in ["order.placed", "order:", "eventbridge", "NotAuthorizedForSourceException"] {
        assert!(named[0].contains(part), "{part:?} is missing in {}", named[0]);
    }
    assert!(!log.contains("misconfigured"), "{log}");
}
