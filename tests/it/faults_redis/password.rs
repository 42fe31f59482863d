//! F38: passwords and permissions, wrong, missing and rotated.

use outbox_relay::event::Fault;
use outbox_relay::secret::Secret;
use outbox_relay::sink::redis::RedisAddress;

use crate::readback::RedisClient;
use crate::redis::{at, sink, url_as};
use crate::servers::Server;
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
        // A connection of its own, so that it needs the permission to load the script as well.
        let new = sink(&url_as(&server, "relay", "pw"), "events");
        let outcomes = publish(&new, &[event(2)]).await;
        assert_eq!(error(&outcomes[0]).fault, Fault::Misconfigured, "{command}: {}", error(&outcomes[0]));
        client.tell(&format!("ACL SETUSER relay +{command}"));
        assert_all_delivered(&publish(&new, &[event(2)]).await);
    }
}
