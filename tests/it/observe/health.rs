//! `/livez`, `/readyz`, `/statusz` and the messages to systemd, for each condition of a relay.

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use super::{STDOUT, Served};
use crate::harness::{emit, sql};
use crate::servers::{Server, database, database_on};
use crate::stores::{Sqlite, Store};

/// No Redis listens there.
const NO_REDIS: (&str, &str) = ("REDIS_URL", "redis://127.0.0.1:1");

/// Destinations fail soon, and are probed soon.
const IMPATIENT: [(&str, &str); 2] =
    [("EVENT_CIRCUIT_BREAKER_THRESHOLD", "1"), ("EVENT_CIRCUIT_BREAKER_RECOVERY_TIMEOUT", "200")];

#[tokio::test]
async fn a_relay_whose_database_comes_and_goes_says_so() {
    let mut server = Server::start("postgres", &["--fast"]);
    let database = database_on(&server).await;
    server.stop();
    let relay = Served::start(&[("DATABASE_URL", database.url()), STDOUT]);
    let down = relay.until("/readyz", 503, "not ready: cannot connect to the database");
    assert!(!down.body.contains("password"), "{down:?}");
    assert_eq!(relay.get("/livez").body, "live\n");
    let json = relay.get("/readyz?format=json");
    assert_eq!(json.status, 503);
    let json = json.json();
    assert_eq!((&json["ready"], &json["state"]), (&false.into(), &"not_ready".into()), "{json}");
    let status = relay.get("/statusz");
    assert_eq!(status.status, 200, "/statusz reports the state and always answers 200");
    assert_eq!(status.json()["database"]["state"], "down");

    server.start_again();
    let ready = relay.until("/readyz", 200, "ready");
    assert_eq!(ready.body, "ready\n");
    let accept = "GET /readyz HTTP/1.1\r\nHost: localhost\r\nAccept: text/plain;q=0.5, application/json\r\n\r\n";
    assert_eq!(relay.ask(accept).json()["state"], "ready");
    assert!(relay.get("/metrics").body.contains("\noutbox_relay_ready 1\n"));
    let status = relay.get("/statusz").json();
    assert_eq!((&status["live"], &status["database"]["state"]), (&true.into(), &"up".into()), "{status}");
    assert_eq!(status["destinations"][0]["name"], "stdout");
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    assert!(status["worker"].as_str().unwrap().ends_with(&format!(":{}", relay.running.id())), "{status}");
}

#[tokio::test]
async fn a_relay_is_degraded_while_some_destinations_are_down_and_not_ready_once_all_are() {
    let database = database().await;
    let mut connection = database.connect().await;
    let url = ("DATABASE_URL", database.url());
    let some = Served::start(&[&[url, STDOUT, NO_REDIS], &IMPATIENT[..]].concat());
    sql(&mut connection, "select emit_event('a')").await;
    let degraded = some.until("/readyz", 200, "ready, degraded: destination redis is down since ");
    assert!(!degraded.body.contains("stdout"), "{degraded:?}");
    let json = some.get("/readyz?format=json").json();
    assert_eq!((&json["ready"], &json["state"]), (&true.into(), &"degraded".into()), "{json}");
    let status = some.get("/statusz").json();
    let redis = status["destinations"].as_array().unwrap().iter().find(|there| there["name"] == "redis").unwrap();
    assert!(redis["state"] == "down" && redis["reason"].is_string() && redis["breaker"] != "closed", "{status}");
    drop(some);

    let all = Served::start(&[&[url, NO_REDIS], &IMPATIENT[..]].concat());
    sql(&mut connection, "select emit_event('a')").await;
    all.until("/readyz", 503, "not ready: no destination takes events: destination redis is down since ");
    assert!(all.get("/metrics").body.contains("\noutbox_relay_ready 0\n"));
    assert_eq!(all.get("/livez").status, 200, "a restart would not help");
}

#[tokio::test]
async fn a_misconfigured_destination_is_not_ready_only_where_none_works() {
    let database = database().await;
    let mut connection = database.connect().await;
    let redis = Server::start("redis", &["--set", "requirepass=s3cret"]);
    let wrong = format!("redis://:hunter2@127.0.0.1:{}", redis.port());
    for (destinations, status, part) in [
        (&[STDOUT, ("REDIS_URL", wrong.as_str())][..], 200, "degraded: destination redis is misconfigured since "),
        (&[("REDIS_URL", &wrong)], 503, "no destination takes events: destination redis is misconfigured since "),
    ] {
        let relay = Served::start(&[&[("DATABASE_URL", database.url())], destinations].concat());
        sql(&mut connection, "select emit_event('a')").await;
        let told = relay.until("/readyz", status, part);
        assert!(told.body.contains("WRONGPASS") && !told.body.contains("hunter2"), "{told:?}");
        let alarm = "\noutbox_relay_destination_misconfigured{destination=\"redis\"} 1\n";
        assert!(relay.get("/metrics").body.contains(alarm));
    }
}

#[tokio::test]
async fn a_relay_that_stands_by_or_is_superseded_is_ready_and_says_so() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    let first = Served::start(&[("DATABASE_URL", store.url()), STDOUT]);
    emit(&mut connection, "a", "").await;
    first.until("/readyz", 200, "ready\n");
    let second = Served::start(&[("DATABASE_URL", store.url()), STDOUT]);
    let told = second.until("/readyz", 200, "ready, standing by: ");
    assert!(told.body.contains(&first.running.id().to_string()), "{told:?}");
    assert_eq!(second.get("/statusz").json()["standing"]["state"], "stands_by");

    let database = database().await;
    let url = ("DATABASE_URL", database.url());
    let before = Served::start(&[url, STDOUT]);
    before.until("/readyz", 200, "ready\n");
    let after = Served::start(&[url, STDOUT, ("RELAY_DESTINATION_MORE", "stdout://")]);
    after.until("/readyz", 200, "ready");
    before.until("/readyz", 200, "ready, superseded: another configuration routes new events");
    assert_eq!(before.get("/statusz").json()["standing"]["state"], "superseded");
}

/// The socket on which systemd would listen.
fn systemd() -> (UnixDatagram, tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(4))).unwrap();
    (socket, folder, path.to_str().unwrap().to_owned())
}

/// The next message, if one comes within a few seconds.
fn told(socket: &UnixDatagram) -> Option<String> {
    let mut buffer = [0; 8192];
    let length = socket.recv(&mut buffer).ok()?;
    Some(String::from_utf8(buffer[..length].to_vec()).unwrap())
}

#[tokio::test]
async fn a_lane_that_hangs_is_not_live_and_feeds_no_watchdog() {
    let database = database().await;
    let mut connection = database.connect().await;
    let (socket, _folder, path) = systemd();
    let relay = Served::start(&[
        ("DATABASE_URL", database.url()),
        STDOUT,
        ("EVENT_DEFAULT_TIMEOUT", "100"),
        ("FAILPOINTS", "before_publish=1*sleep(3600000)"),
        ("NOTIFY_SOCKET", &path),
        ("WATCHDOG_USEC", "3000000"),
    ]);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(4) {
        let told = told(&socket).expect("the watchdog is fed every second");
        assert!(!told.contains("not live"), "{told}");
    }
    assert_eq!(relay.get("/livez").status, 200);
    sql(&mut connection, "select emit_event('a')").await;
    let hung = relay.until("/livez", 503, "not live: lane ");
    assert!(hung.body.contains("has published a batch since"), "{hung:?}");
    assert_eq!(relay.get("/livez?format=json").json()["live"], false);
    assert!(relay.get("/readyz").body.contains("not live: lane "));
    // Messages from before it hung, and the status that reports the hang. No message follows.
    let mut status = String::new();
    let begun = Instant::now();
    while let Some(told) = told(&socket) {
        status = told;
        assert!(begun.elapsed() < Duration::from_secs(60), "it still sends messages: {status}");
    }
    assert!(status.contains("STATUS=not live: lane ") && !status.contains("WATCHDOG"), "the last message: {status:?}");
}
