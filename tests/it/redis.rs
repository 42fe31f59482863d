//! What is particular to Redis Streams: the server's own troubles, credentials, and what an entry looks like.

use std::time::{Duration, Instant};

use outbox_relay::event::{Event, Fault, Outcome};
use outbox_relay::secret::Secret;
use outbox_relay::sink::Sink;
use outbox_relay::sink::redis::RedisAddress;
use outbox_relay::sink::redis_stream::RedisStream;

use crate::readback::RedisClient;
use crate::servers::{Server, redis};
use crate::support::{
    assert_all_delivered, assert_all_failed, error, event, is_delivered, is_uncharged, keyed, publish, publish_until,
    publish_until_delivered, unique,
};

/// Longer than any answer takes, shorter than a test's patience.
const TIMEOUT: Duration = Duration::from_secs(30);

fn sink(url: &str, stream: &str) -> RedisStream {
    at(RedisAddress::Url(Secret::inline(url)), stream)
}

fn at(address: RedisAddress, stream: &str) -> RedisStream {
    RedisStream::new(address, stream.parse().unwrap(), None, "outbox".into(), TIMEOUT, true)
}

/// `redis://` with a user and a password.
fn url_as(server: &Server, user: &str, password: &str) -> String {
    format!("redis://{user}:{password}@127.0.0.1:{}/0", server.port())
}

fn of_key(key: &str, ids: std::ops::RangeInclusive<i64>) -> Vec<Event> {
    ids.map(|id| keyed(id, key)).collect()
}

fn ids(events: &[Event]) -> Vec<i64> {
    events.iter().map(|event| event.row.id).collect()
}

#[tokio::test]
async fn an_entry_has_exactly_the_documented_fields() {
    let (stream, mut client) = (unique("fields"), RedisClient::connect(redis()));
    let full = Event {
        source: String::new(),
        event_type: "inventory:product.created".into(),
        correlation_id: Some("req-7f3a".into()),
        causation_id: Some("cmd-1".into()),
        schema_version: 3,
        headers: vec![("tenant".into(), "Ærø \"1\"\n".into()), ("traceparent".into(), "00-ab-cd-01".into())],
        ..keyed(7, "42")
    };
    let outcomes = publish(&sink(redis().url(), &stream), &[full, event(8)]).await;
    let entries = client.entries(&stream);
    let own = |fields: &[(&str, &str)]| -> Vec<(String, String)> {
        fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    };
    assert_eq!(
        entries[0].fields,
        own(&[
            ("specversion", "1.0"),
            ("id", "00000000-0000-0000-0000-000000000007"),
            ("source", "outbox"),
            ("type", "inventory:product.created"),
            ("subject", "42"),
            ("time", "2026-01-01T00:00:00Z"),
            ("datacontenttype", "application/json"),
            ("sequence", "7"),
            ("partitionkey", "order:42"),
            ("correlationid", "req-7f3a"),
            ("causationid", "cmd-1"),
            ("schemaversion", "3"),
            ("tenant", "Ærø \"1\"\n"),
            ("traceparent", "00-ab-cd-01"),
            ("data", r#"{"n": 7}"#),
        ])
    );
    assert_eq!(
        entries[1].fields,
        own(&[
            ("specversion", "1.0"),
            ("id", "00000000-0000-0000-0000-000000000008"),
            ("source", "shop"),
            ("type", "order.created"),
            ("time", "2026-01-01T00:00:00Z"),
            ("datacontenttype", "application/json"),
            ("sequence", "8"),
            ("schemaversion", "1"),
            ("data", r#"{"n": 8}"#),
        ])
    );
    let answers: Vec<Outcome> =
        entries.iter().map(|entry| Outcome::Delivered { message_id: Some(entry.id.clone()) }).collect();
    assert_eq!(outcomes, answers, "the message id is the entry's");
}

#[tokio::test]
async fn a_stream_is_named_by_the_event() {
    let (prefix, mut client) = (unique("by"), RedisClient::connect(redis()));
    let sink = sink(redis().url(), &format!("{prefix}/{{source}}/{{aggregate_type}}/{{event_type}}"));
    let nameless = Event { source: String::new(), event_type: "a.b".into(), ..event(2) };
    assert_all_delivered(&publish(&sink, &[keyed(1, "42"), nameless, keyed(3, "42")]).await);
    assert_eq!(client.sequences(&format!("{prefix}/shop/order/order.created")), [1, 3]);
    assert_eq!(client.sequences(&format!("{prefix}/outbox//a.b")), [2]);
    assert_eq!(sink.check().await.unwrap(), format!("127.0.0.1:{}, database 0, streams by template", redis().port()));
}

#[tokio::test]
async fn a_stream_is_trimmed_about_to_its_maximum_length() {
    let (stream, mut client) = (unique("trimmed"), RedisClient::connect(redis()));
    let address = RedisAddress::Url(Secret::inline(redis().url()));
    let sink = RedisStream::new(address, stream.parse().unwrap(), Some(200), "outbox".into(), TIMEOUT, true);
    assert_all_delivered(&publish(&sink, &(1..=1000).map(event).collect::<Vec<_>>()).await);
    let left = client.sequences(&stream);
    // Redis drops whole nodes, of 100 entries by default.
    assert!((200..=300).contains(&left.len()), "{} entries are left", left.len());
    assert_eq!(left.last(), Some(&1000));
}

#[tokio::test]
async fn the_database_number_is_respected() {
    let (stream, mut client) = (unique("database"), RedisClient::connect(redis()));
    let parts = |database| RedisAddress::Parts {
        host: "127.0.0.1".into(),
        port: redis().port(),
        database,
        username: None,
        password: None,
    };
    let by_url = sink(&redis().url().replace("/0", "/3"), &stream);
    assert_all_delivered(&publish(&by_url, &[event(1)]).await);
    let by_parts = at(parts(4), &stream);
    assert_all_delivered(&publish(&by_parts, &[event(2)]).await);
    assert_eq!(by_parts.check().await.unwrap(), format!("127.0.0.1:{}, database 4, stream {stream:?}", redis().port()));
    assert_eq!(client.sequences(&stream), [0; 0]);
    for (database, sequence) in [(3, 1), (4, 2)] {
        client.tell(&format!("SELECT {database}"));
        assert_eq!(client.sequences(&stream), [sequence]);
    }
    assert_all_failed(&publish(&at(parts(99), &stream), &[event(3)]).await, Fault::Misconfigured, "ERR");
}

#[tokio::test]
async fn one_stream_that_is_no_stream_is_a_misconfiguration_for_all() {
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
async fn an_event_that_names_no_stream_is_charged_alone_and_stops_only_its_key() {
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

#[tokio::test]
async fn nothing_of_a_key_follows_its_first_failure_when_redis_is_out_of_memory() {
    let server = Server::start("redis", &[]);
    let mut client = RedisClient::connect(&server);
    let sink = sink(server.url(), "events");
    assert_all_delivered(&publish(&sink, &[event(1)]).await);
    let used = client.info("used_memory");
    client.tell(&format!("CONFIG SET maxmemory {}", used + 6_000_000));
    // Six keys in turn, in chunks that are in flight together: 16 MB in all.
    let large = |id: i64| Event { payload: format!("\"{}\"", "x".repeat(8000)).into(), ..keyed(id, &key_of(id)) };
    fn key_of(id: i64) -> String {
        (id % 6).to_string()
    }
    let batch: Vec<Event> = (2..=2001).map(large).collect();
    let outcomes = publish(&sink, &batch).await;
    let failure = outcomes.iter().find(|outcome| matches!(outcome, Outcome::Failed(_))).unwrap();
    assert_all_failed(std::slice::from_ref(failure), Fault::Destination, "OOM");
    assert!(outcomes.iter().all(|outcome| is_delivered(outcome) || is_uncharged(outcome)));

    let in_stream = client.sequences("events").split_off(1);
    let answered: Vec<i64> = batch
        .iter()
        .zip(&outcomes)
        .filter(|(_, outcome)| is_delivered(outcome))
        .map(|(event, _)| event.row.id)
        .collect();
    assert!(!answered.is_empty());
    let sorted = |mut ids: Vec<i64>| {
        ids.sort_unstable();
        ids
    };
    assert_eq!(sorted(in_stream), answered, "delivered is what is there");
    for key in 0..6 {
        let of_key = outcomes.iter().zip(&batch).filter(|(_, event)| event.row.id % 6 == key);
        assert!(of_key.map(|(outcome, _)| is_delivered(outcome)).is_sorted_by(|a, b| a >= b), "key {key}");
    }

    client.tell("CONFIG SET maxmemory 0");
    let left: Vec<Event> = batch
        .into_iter()
        .zip(&outcomes)
        .filter(|(_, outcome)| !is_delivered(outcome))
        .map(|(event, _)| event)
        .collect();
    assert_all_delivered(&publish(&sink, &left).await);
    let all = client.sequences("events").split_off(1);
    assert_eq!(all.len(), 2000);
    for key in 0..6 {
        assert!(all.iter().filter(|&id| id % 6 == key).is_sorted(), "key {key}");
    }
}

#[tokio::test]
async fn a_replica_is_the_destinations_fault_and_the_next_call_connects_anew() {
    let server = Server::start("redis", &[]);
    let mut client = RedisClient::connect(&server);
    let sink = sink(server.url(), "events");
    assert_all_delivered(&publish(&sink, &[event(1)]).await);
    let connected = client.info("total_connections_received");
    client.tell("REPLICAOF 127.0.0.1 1");
    assert_all_failed(&publish(&sink, &[event(2), event(3)]).await, Fault::Destination, "READONLY");
    client.tell("REPLICAOF NO ONE");
    assert_all_delivered(&publish(&sink, &[event(2), event(3)]).await);
    assert_eq!(client.info("total_connections_received"), connected + 1);
    assert_eq!(client.sequences("events"), [1, 2, 3]);
}

#[tokio::test]
async fn troubles_of_the_server_are_the_destinations_fault_and_pass() {
    let server = Server::start("redis", &["--set", "cluster-enabled=yes"]);
    let mut client = RedisClient::connect(&server);
    let sink = sink(server.url(), "events");
    assert_all_failed(&publish(&sink, &[event(1)]).await, Fault::Destination, "CLUSTERDOWN");
    client.tell("CLUSTER ADDSLOTSRANGE 0 16383");
    publish_until_delivered(&sink, &[event(1)]).await; // the cluster takes a moment to notice that it is whole

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
        assert!(Instant::now() < deadline, "the script never kept Redis busy");
    }
    client.tell("SCRIPT KILL");
    endless.join().unwrap();
    assert_all_delivered(&publish(&sink, &[event(3)]).await);
}

#[tokio::test]
async fn streams_in_several_slots_of_a_cluster_are_a_misconfiguration() {
    let server = Server::start("redis", &["--set", "cluster-enabled=yes"]);
    RedisClient::connect(&server).tell("CLUSTER ADDSLOTSRANGE 0 16383");
    publish_until_delivered(&sink(server.url(), "events"), &[event(1)]).await;
    let batch = [event(1), Event { event_type: "other".into(), ..event(2) }];
    let outcomes = publish(&sink(server.url(), "{event_type}"), &batch).await;
    assert_all_failed(&outcomes, Fault::Misconfigured, "CROSSSLOT");
}

#[tokio::test]
async fn a_server_without_the_command_is_a_misconfiguration() {
    let server = Server::start("redis", &["--set", "rename-command=XADD \"\""]);
    let outcomes = publish(&sink(server.url(), "events"), &of_key("a", 1..=3)).await;
    assert_all_failed(&outcomes[..1], Fault::Misconfigured, "ERR");
    assert!(outcomes[1..].iter().all(|outcome| *outcome == Outcome::Held));
}

#[tokio::test]
async fn too_many_clients_are_the_destinations_fault_with_a_password_too() {
    let server = Server::start("redis", &["--set", "requirepass=s3cret"]);
    let mut client = RedisClient::connect(&server);
    client.tell("CONFIG SET maxclients 1");
    for address in [server.url().to_owned(), server.url().replace(":s3cret@", "")] {
        let sink = sink(&address, "events");
        let outcomes = publish(&sink, &[event(1)]).await;
        assert_eq!(error(&outcomes[0]).fault, Fault::Destination, "{}", error(&outcomes[0]));
    }
}

#[tokio::test]
async fn a_missing_or_wrong_password_is_a_misconfiguration() {
    let server = Server::start("redis", &["--set", "requirepass=s3cret"]);
    let none = sink(&url_as(&server, "", "").replace(":@", ""), "events");
    assert_all_failed(&publish(&none, &[event(1)]).await, Fault::Misconfigured, "NOAUTH");
    for (user, password) in [("", "hunter2"), ("nobody", "hunter2")] {
        let sink = sink(&url_as(&server, user, password), "events");
        let outcomes = publish(&sink, &[event(1)]).await;
        assert_all_failed(&outcomes, Fault::Misconfigured, "WRONGPASS");
        assert!(!error(&outcomes[0]).message.contains(password), "{}", error(&outcomes[0]));
    }
    assert_all_delivered(&publish(&sink(server.url(), "events"), &[event(1)]).await);
}

#[tokio::test]
async fn a_rotated_password_is_read_at_the_next_connection() {
    let server = Server::start("redis", &[]);
    let mut client = RedisClient::connect(&server);
    client.tell("ACL SETUSER relay on >old ~* &* +@all");
    let (password, url) = (tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap());
    let rotate = |to: &str| {
        std::fs::write(&password, format!("{to}\n")).unwrap();
        std::fs::write(&url, format!("{}\n", url_as(&server, "relay", to))).unwrap();
    };
    rotate("old");
    let parts = RedisAddress::Parts {
        host: "127.0.0.1".into(),
        port: server.port(),
        database: 0,
        username: Some("relay".into()),
        password: Some(Secret::File(password.path().into())),
    };
    let sinks = [at(parts, "by-password"), at(RedisAddress::Url(Secret::File(url.path().into())), "by-url")];
    for sink in &sinks {
        assert_all_delivered(&publish(sink, &[event(1)]).await);
    }
    client.tell("ACL SETUSER relay resetpass >new");
    client.tell("CLIENT KILL USER relay");
    for sink in &sinks {
        let lost = publish(sink, &[event(2)]).await;
        assert!(is_uncharged(&lost[0]), "{lost:?}");
        assert_all_failed(&publish(sink, &[event(2)]).await, Fault::Misconfigured, "WRONGPASS");
    }
    rotate("new");
    for sink in &sinks {
        assert_all_delivered(&publish(sink, &[event(2)]).await);
    }
    for stream in ["by-password", "by-url"] {
        assert_eq!(client.sequences(stream), [1, 2]);
    }
}

#[tokio::test]
async fn a_user_without_permission_is_a_misconfiguration_until_it_is_granted() {
    let server = Server::start("redis", &[]);
    let mut client = RedisClient::connect(&server);
    client.tell("ACL SETUSER relay on >pw ~events &* +@all");
    let (own, other) =
        (sink(&url_as(&server, "relay", "pw"), "events"), sink(&url_as(&server, "relay", "pw"), "other"));
    assert_all_delivered(&publish(&own, &[event(1)]).await);
    assert_all_failed(&publish(&other, &[event(1)]).await, Fault::Misconfigured, "NOPERM");
    for command in ["xadd", "evalsha", "script"] {
        client.tell(&format!("ACL SETUSER relay -{command}"));
        // A connection of its own, so that it needs the permission to load the script as well.
        let new = sink(&url_as(&server, "relay", "pw"), "events");
        let outcomes = publish(&new, &[event(2)]).await;
        assert_eq!(error(&outcomes[0]).fault, Fault::Misconfigured, "{command}: {}", error(&outcomes[0]));
        client.tell(&format!("ACL SETUSER relay +{command}"));
        assert_all_delivered(&publish(&new, &[event(2)]).await);
    }
}

#[tokio::test]
async fn a_flushed_script_is_loaded_again() {
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
async fn a_dropped_connection_comes_back_by_itself() {
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

#[tokio::test]
async fn no_answer_by_the_deadline_is_an_unknown_outcome() {
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
    assert_eq!(arrived, ids(&batch), "what arrived twice first came in order");
}

#[tokio::test]
async fn a_frozen_server_holds_nobody_past_the_deadline() {
    let mut server = Server::start("redis", &[]);
    let sink = sink(server.url(), "events");
    server.pause();
    // Each lane would wait as long as connecting may take, one after the other.
    let lanes = (1..=64).map(|id| {
        let sink = &sink;
        async move { publish_until(sink, &[event(id)], Instant::now() + Duration::from_millis(200)).await }
    });
    let outcomes = tokio::time::timeout(TIMEOUT, futures_util::future::join_all(lanes)).await.unwrap();
    assert!(outcomes.iter().flatten().all(is_uncharged));
    server.resume();
    publish_until_delivered(&sink, &[event(65)]).await;
    assert_eq!(RedisClient::connect(&server).sequences("events"), [65], "nothing of the failed calls was sent");
}

#[tokio::test]
async fn no_such_host_and_a_refused_port_are_the_destinations_fault() {
    for url in ["redis://nowhere.invalid", "redis://127.0.0.1:1"] {
        let sink = sink(url, "events");
        let outcomes = publish(&sink, &[event(1), event(2)]).await;
        assert_all_failed(&outcomes, Fault::Destination, "connect");
        assert_eq!(sink.check().await.unwrap_err().fault, Fault::Destination);
    }
}

#[tokio::test]
async fn an_address_that_is_none_is_a_misconfiguration_and_shows_no_password() {
    for url in ["http://:s3cret@localhost", "redis://:s3cret@localhost:port", "s3cret"] {
        let outcomes = publish(&sink(url, "events"), &[event(1)]).await;
        assert_all_failed(&outcomes, Fault::Misconfigured, "redis_address");
        assert!(!error(&outcomes[0]).message.contains("s3cret"), "{}", error(&outcomes[0]));
    }
    let missing = at(RedisAddress::Url(Secret::File("/nowhere/redis-url".into())), "events");
    let outcomes = publish(&missing, &[event(1)]).await;
    assert_all_failed(&outcomes, Fault::Misconfigured, "redis_address");
    assert!(error(&outcomes[0]).message.contains("/nowhere/redis-url"), "{}", error(&outcomes[0]));
}
