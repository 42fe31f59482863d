//! `relay run`: signals, systemd, and a database that stops and starts.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use super::{NOWHERE, STDOUT};
use crate::binary::{Running, relay, until};
use crate::harness::{column, count, eventually, sql};
use crate::servers::{Server, database, database_on};

/// The socket on which systemd would listen.
struct Systemd {
    socket: UnixDatagram,
    folder: tempfile::TempDir,
}

impl Systemd {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(folder.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        Self { socket, folder }
    }

    fn path(&self) -> String {
        self.folder.path().join("notify").to_str().unwrap().to_owned()
    }

    /// Returns the messages up to the first that contains this part.
    #[track_caller]
    fn told_until(&self, part: &str) -> Vec<String> {
        let mut all: Vec<String> = Vec::new();
        while !all.last().is_some_and(|told| told.contains(part)) {
            let mut buffer = [0; 4096];
            let length = self.socket.recv(&mut buffer).unwrap_or_else(|_| panic!("{part:?} is missing in {all:?}"));
            all.push(String::from_utf8(buffer[..length].to_vec()).unwrap());
        }
        all
    }
}

#[tokio::test]
async fn without_its_database_it_waits_and_says_so_and_goes_on_when_it_is_back() {
    let mut server = Server::start("postgres", &["--fast"]);
    let database = database_on(&server).await;
    server.stop();
    let systemd = Systemd::new();
    let socket = systemd.path();
    let variables = [("DATABASE_URL", database.url()), STDOUT, ("NOTIFY_SOCKET", &socket)];
    let mut running = Running::start(relay(&["run"], &variables));
    let before = systemd.told_until("STATUS=not ready: cannot connect to the database");
    running.until_log("not ready; trying again");
    assert!(before.iter().all(|told| !told.contains("READY=1")), "{before:?}");

    server.start_again();
    let ready = systemd.told_until("STATUS=ready").pop().unwrap();
    assert!(ready.contains("READY=1"), "{ready}");
    for time in ["first", "second"] {
        server.stop();
        systemd.told_until("STATUS=not ready: ");
        assert!(running.is_running());
        server.start_again();
        systemd.told_until("STATUS=ready");
        let mut connection = database.connect().await;
        sql(&mut connection, format!("select emit_event('{time}')")).await;
        eventually("it is published", async || count(&mut connection, "event_outbox").await == 0).await;
    }
    running.signal("TERM");
    let stopped = running.finish().exited(0);
    let events: Vec<serde_json::Value> =
        stopped.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(events.iter().map(|event| event["type"].as_str().unwrap()).collect::<Vec<_>>(), ["first", "second"]);
}

#[test]
fn a_relay_that_waits_for_its_database_stops_at_once() {
    for signal in ["TERM", "INT"] {
        let mut running = Running::start(relay(&["run"], &[NOWHERE, STDOUT]));
        running.until_log("not ready; trying again");
        running.signal(signal);
        running.finish().exited(0).says(&["stopping"]);
    }
}

#[tokio::test]
async fn a_secret_that_rotates_is_read_again_and_waited_for() {
    let database = database().await;
    let mut connection = database.connect().await;
    let secret = super::file(database.url());
    let path = secret.path().to_str().unwrap();
    let mut running = Running::start(relay(&["run"], &[("DATABASE_URL_FILE", path), STDOUT]));
    running.until_log("\"message\":\"ready\"");
    std::fs::remove_file(path).unwrap();
    let terminate = "select pg_terminate_backend(pid) from pg_stat_activity
                     where datname = current_database() and application_name = 'relay'";
    sql(&mut connection, terminate).await;
    running.until_log("DATABASE_URL cannot be read");
    std::fs::write(path, format!("{}?application_name=rotated\n", database.url())).unwrap();
    eventually("it is back", async || {
        count(&mut connection, "pg_stat_activity where application_name = 'rotated'").await > 0
    })
    .await;
    sql(&mut connection, "select emit_event('a')").await;
    eventually("it is published", async || count(&mut connection, "event_outbox").await == 0).await;
    running.signal("TERM");
    running.finish().exited(0);
}

/// The number of this machine's connections to a port.
fn connections_to(port: u16) -> usize {
    let (remote, established) = (format!("0100007F:{port:04X}"), "01");
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let rows = table.lines().map(|line| line.split_whitespace().skip(2).take(2).collect::<Vec<_>>());
    rows.filter(|row| *row == [remote.as_str(), established]).count()
}

#[tokio::test]
async fn a_relay_whose_destination_hangs_from_the_start_stops_at_once() {
    let database = database().await;
    let mut hangs = Server::start("redis", &[]);
    hangs.pause();
    let variables = [("DATABASE_URL", database.url()), ("REDIS_URL", hangs.url()), ("EVENT_DEFAULT_TIMEOUT", "600000")];
    for args in [&["run"][..], &["--once"]] {
        let running = Running::start(relay(args, &variables));
        until("it waits for an answer of Redis", || connections_to(hangs.port()) > 0);
        running.signal("TERM");
        running.finish().says(&["stopping"]); // long before the timeout of 10 minutes
        until("its connection is gone", || connections_to(hangs.port()) == 0);
    }
}

#[tokio::test]
async fn a_relay_whose_output_nobody_reads_stops_all_the_same() {
    let database = database().await;
    let mut connection = database.connect().await;
    let insert = "insert into event_outbox (event_type, payload) select 'a', to_jsonb(repeat('x', 1000)) from generate_series(1, 200)";
    sql(&mut connection, insert).await; // more than a pipe holds
    let variables = [
        ("DATABASE_URL", database.url()),
        STDOUT,
        ("EVENT_DEFAULT_TIMEOUT", "200"),
        ("EVENT_CIRCUIT_BREAKER_THRESHOLD", "1"),
    ];
    let (_unread, writer) = std::io::pipe().unwrap();
    let mut running = Running::start_writing_to(relay(&["run"], &variables), writer.try_clone().unwrap());
    running.until_log("the reader of standard output did not take the lines in time");
    running.signal("TERM");
    running.finish().exited(0);
    Running::start_writing_to(relay(&["--once"], &variables), writer).finish().exited(3);
    assert_eq!(count(&mut connection, "event_outbox").await, 200);
}

/// Counts the partitions that are claimed by a lane.
const CLAIMED: &str = "pg_locks where locktype = 'advisory' and classid = 'event_outbox'::regclass and objid < 640
                       and objsubid = 2 and database = (select oid from pg_database where datname = current_database())";

#[tokio::test]
async fn f06_a_second_signal_ends_it_at_once() {
    let database = database().await;
    let mut connection = database.connect().await;
    let mut hangs = Server::start("redis", &[]);
    let url = hangs.url().to_owned();
    let variables = [("DATABASE_URL", database.url()), ("REDIS_URL", &url), ("EVENT_DEFAULT_TIMEOUT", "600000")];
    for (first, second) in [("TERM", "TERM"), ("INT", "TERM")] {
        let mut running = Running::start(relay(&["run"], &variables));
        sql(&mut connection, "select emit_event('before')").await;
        eventually("it is published", async || count(&mut connection, "event_outbox").await == 0).await;
        hangs.pause();
        sql(&mut connection, "select emit_event('held')").await;
        eventually("it is being published", async || count(&mut connection, CLAIMED).await > 0).await;
        running.signal(first);
        running.until_log("stopping: settling what is in flight; a second signal ends it at once");
        assert!(running.is_running(), "it waits for the answer");
        running.signal(second);
        running.finish().exited(1).says(&["ended at once; what was in flight is still pending"]);
        assert_eq!(column(&mut connection, "select event_type from event_outbox").await, ["held"]);
        hangs.resume();
        sql(&mut connection, "delete from event_outbox").await;
    }
}
