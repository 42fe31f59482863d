//! F38: wrong, missing and rotated passwords and permissions.

use outbox_relay::event::Fault;
use outbox_relay::secret::Secret;
use outbox_relay::sink::redis::RedisAddress;

use crate::binary::{Running, finished, relay};
use crate::harness::{count, eventually, sql};
use crate::readback::RedisClient;
use crate::redis::{at, sink, url_as};
use crate::servers::{Server, database};
use crate::support::{assert_all_delivered, assert_all_failed, error, event, is_uncharged, publish};

#[tokio::test]
async fn f38_a_missing_or_wrong_password_is_a_misconfiguration() {
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
async fn f38_a_rotated_password_is_read_at_the_next_connection() {
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
async fn f38_a_password_that_changes_under_way_is_no_events_fault() {
    let (database, server) = (database().await, Server::start("redis", &[]));
    let mut connection = database.connect().await;
    let mut client = RedisClient::connect(&server);
    let variables = [
        ("DATABASE_URL", database.url()),
        ("REDIS_URL", server.url()),
        ("EVENT_CIRCUIT_BREAKER_RECOVERY_TIMEOUT", "500"),
    ];
    let mut daemon = Running::start(relay(&["run"], &variables));
    daemon.until_log("\"message\":\"ready\"");
    let emit = "select emit_event('e', aggregate_id => i::text) from generate_series(1, 20) i";
    sql(&mut connection, emit).await;
    eventually("the destination accepts events", async || count(&mut connection, "event_outbox").await == 0).await;
    client.tell("ACL SETUSER default resetpass >changed");
    client.tell("CLIENT KILL TYPE normal");
    // Soon after deliveries, one after the other.
    for _ in 0..5 {
        sql(&mut connection, emit).await;
    }
    daemon.until_log("destination misconfigured");
    let checked = finished(&["check"], &variables).exited(1).stdout;
    assert!(checked.contains("FAIL  destination redis: NOAUTH") && !checked.contains("keys_blocked"), "{checked}");
    assert_eq!(count(&mut connection, "event_outbox where status = 'pending' and last_error is null").await, 100);
    client.tell("ACL SETUSER default nopass");
    eventually("all is published", async || count(&mut connection, "event_outbox").await == 0).await;
    daemon.signal("TERM");
    let log = daemon.finish().exited(0).stderr;
    assert!(!log.contains("keys_blocked"), "{log}");
}

/// A key that is blocked while its destination accepts nothing is not reported as one that other keys overtake.
#[tokio::test]
async fn f38_no_event_is_to_be_deleted_while_the_password_is_wrong() {
    let (database, server) = (database().await, Server::start("redis", &["--set", "requirepass=s3cret"]));
    let mut connection = database.connect().await;
    sql(&mut connection, "select emit_event('e', aggregate_id => '1')").await;
    let block =
        "update event_outbox set status = 'scheduled', destination = 'redis', available_at = now() + interval '1 hour',
                 first_failed_at = now() - interval '5 minutes', last_error = 'NOPERM: no'";
    sql(&mut connection, block).await;
    let wrong = url_as(&server, "", "hunter2");
    let check =
        |url: &str| finished(&["check"], &[("DATABASE_URL", database.url()), ("REDIS_URL", url)]).exited(1).stdout;
    assert!(check(server.url()).contains("FAIL  standstill keys_blocked: destination redis takes other events"));
    let checked = check(&wrong);
    assert!(checked.contains("WRONGPASS") && !checked.contains("keys_blocked"), "{checked}");
}

#[tokio::test]
async fn f38_a_user_without_permission_is_a_misconfiguration_until_it_is_granted() {
    let server = Server::start("redis", &[]);
    let mut client = RedisClient::connect(&server);
    client.tell("ACL SETUSER relay on >pw ~events &* +@all");
    let (own, other) =
        (sink(&url_as(&server, "relay", "pw"), "events"), sink(&url_as(&server, "relay", "pw"), "other"));
    assert_all_delivered(&publish(&own, &[event(1)]).await);
    assert_all_failed(&publish(&other, &[event(1)]).await, Fault::Misconfigured, "NOPERM");
    for command in ["xadd", "evalsha", "script"] {
        client.tell(&format!("ACL SETUSER relay -{command}"));
        // It opens a new connection, so that it also needs the permission to load the script.
        let new = sink(&url_as(&server, "relay", "pw"), "events");
        let outcomes = publish(&new, &[event(2)]).await;
        assert_eq!(error(&outcomes[0]).fault, Fault::Misconfigured, "{command}: {}", error(&outcomes[0]));
        client.tell(&format!("ACL SETUSER relay +{command}"));
        assert_all_delivered(&publish(&new, &[event(2)]).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn f38_sentinels_have_a_user_and_a_password_of_their_own() {
    let server = Server::start("redis-sentinel", &["--set", "requirepass=s3cret"]);
    for port in &server.ports()[3..] {
        let mut sentinel = RedisClient::at(*port);
        sentinel.tell("ACL SETUSER watcher on >hunter2 ~* &* +@all");
        sentinel.tell("ACL SETUSER default off");
        sentinel.tell("CLIENT KILL TYPE normal");
    }
    let refused = publish(&sink(server.url(), "events"), &[event(1)]).await;
    assert_all_failed(&refused, Fault::Misconfigured, "NOAUTH");
    let with = |user: &str, password: &str| {
        sink(&format!("{}&sentinel_username={user}&sentinel_password={password}", server.url()), "events")
    };
    assert_all_failed(&publish(&with("watcher", "wrong"), &[event(1)]).await, Fault::Misconfigured, "WRONGPASS");
    assert_all_delivered(&publish(&with("watcher", "hunter2"), &[event(1)]).await);
}

#[tokio::test]
async fn f38_no_password_of_a_cluster_or_of_sentinels_is_shown() {
    let database = database().await;
    let shown = |url: &str, code: i32| {
        let variables = [("DATABASE_URL", database.url()), ("REDIS_URL", url)];
        let checked = finished(&["check"], &variables).exited(code);
        let said = checked.stdout + &checked.stderr;
        assert!(!said.contains("s3cret") && !said.contains("hunter2"), "{said}");
        said
    };
    let cluster = shown("redis-cluster://app:s3cret@127.0.0.1:1,127.0.0.1:2", 1);
    assert!(cluster.contains("  redis-cluster://app:***@127.0.0.1:1,127.0.0.1:2  ("), "{cluster}");
    let url = "redis-sentinel://app:s3cret@127.0.0.1:1,127.0.0.1:2/0?master=main&sentinel_password=hunter2";
    let sentinels = shown(url, 1);
    assert!(sentinels.contains("  redis-sentinel://app:***@127.0.0.1:1,127.0.0.1:2/0  ("), "{sentinels}");
    let wrong = shown("redis-cluster://app:s3cret@127.0.0.1:1,127.0.0.1:2/1", 2);
    assert!(wrong.contains("REDIS_URL") && wrong.contains("a cluster has database 0 only"), "{wrong}");
}
