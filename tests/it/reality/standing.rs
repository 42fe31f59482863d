//! A standstill is reported by `relay check`, in the log and in systemd's status. The printed cure works.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use tempfile::TempDir;

use crate::binary::{Running, finished, relay, until, works};
use crate::harness::{Setup, count, emit, eventually, sql};
use crate::scripted::{Act, ScriptedSink};
use crate::servers::{Server, database_on};
use crate::stores::{Postgres, Sqlite, Store};

const STDOUT: (&str, &str) = ("RELAY_STDOUT", "true");

/// Receives what a service sends to systemd.
pub(super) struct Systemd {
    socket: UnixDatagram,
    folder: TempDir,
    status: String,
}

impl Systemd {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(folder.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
        Self { socket, folder, status: String::new() }
    }

    pub(super) fn address(&self) -> String {
        self.folder.path().join("notify").display().to_string()
    }

    /// Waits until this holds for the status.
    pub(super) fn until_status(&mut self, what: &str, holds: impl Fn(&str) -> bool) {
        until(what, || {
            let mut message = [0; 65536];
            while let Ok(length) = self.socket.recv(&mut message) {
                let message = String::from_utf8_lossy(&message[..length]).into_owned();
                if let Some(status) = message.lines().find_map(|line| line.strip_prefix("STATUS=")) {
                    status.clone_into(&mut self.status);
                }
            }
            holds(&self.status)
        });
    }
}

/// The one line of `relay check` that fails.
fn failed_line(url: &str) -> String {
    let check = finished(&["check"], &[("DATABASE_URL", url), STDOUT]).exited(1);
    let failed: Vec<&str> = check.stdout.lines().filter(|line| line.starts_with("FAIL")).collect();
    assert_eq!(failed.len(), 1, "{}", check.stdout);
    failed[0].to_owned()
}

/// The statement that a line prints after these words.
fn printed(line: &str, words: &str) -> String {
    let from = line.find(words).unwrap_or_else(|| panic!("{words:?} is missing in {line}")) + words.len();
    line[from..].split_once(';').unwrap_or_else(|| panic!("no statement ends in {line}")).0.to_owned()
}

/// `relay check`, a daemon's log and its status name `cause` with each of `parts`. After the statement that is printed after
/// `cure` has run, the daemon reports the end of the standstill and publishes everything. Then a check is ok.
async fn is_told_and_cured<S: Store>(
    store: &S,
    connection: &mut S::Connection,
    cause: &str,
    parts: &[&str],
    cure: &str,
) {
    let line = failed_line(store.url());
    assert!(line.starts_with(&format!("FAIL  standstill {cause}: ")), "{line}");
    let mut systemd = Systemd::new();
    let (address, url) = (systemd.address(), store.url());
    let mut daemon = Running::start(relay(&[], &[("DATABASE_URL", url), STDOUT, ("NOTIFY_SOCKET", &address)]));
    daemon.until_log(&format!("\"cause\":\"{cause}\""));
    let log = daemon.log().replace("\\\"", "\"");
    for part in parts {
        assert!(line.contains(part) && log.contains(part), "{part:?} is missing in\n{line}\nor in\n{log}");
    }
    systemd.until_status(cause, |status| parts.iter().all(|part| status.contains(part)));
    sql(connection, printed(&line, cure)).await;
    daemon.until_log("over: ");
    systemd.until_status("the status is that of a relay at work", |status| status == "ready");
    // Parked events behind it are tried again within ten minutes, which is too long for a test.
    sql(connection, format!("update event_outbox set available_at = {} where status = 'scheduled'", S::in_ms(0))).await;
    eventually("all is published", async || count(connection, "event_outbox").await == 0).await;
    daemon.signal("TERM");
    daemon.finish().exited(0);
    works(url);
}

/// Parks the first of three events of a key. The others wait behind it.
async fn parked<S: Store>(forever: &str) -> (S, S::Connection) {
    let store = S::new().await;
    let mut connection = store.connect().await;
    emit(&mut connection, "parked", "k").await;
    let park = format!(
        "update event_outbox set status = 'scheduled', destination = 'stdout', available_at = '{forever}', last_error =
         'settle_failed: retry, which cannot be recorded: not today'"
    );
    sql(&mut connection, park).await;
    emit(&mut connection, "behind", "k").await;
    emit(&mut connection, "other key", "l").await;
    finished(&["--once"], &[("DATABASE_URL", store.url()), STDOUT]).exited(3);
    assert_eq!(count(&mut connection, "event_outbox").await, 2);
    (store, connection)
}

async fn parked_events_are_told<S: Store>(forever: &str) {
    let parts = [
        "parked until somebody acts: 1 events, and behind them by their keys 1; the first has id 1 (settle_failed: retry",
        "not today",
    ];
    for cure in ["publish it again: ", "be done with it: "] {
        let (store, mut connection) = parked::<S>(forever).await;
        is_told_and_cured(&store, &mut connection, "events_parked", &parts, cure).await;
    }
}

#[tokio::test]
async fn f67_parked_events_are_told_with_what_waits_behind_them_and_their_cure() {
    parked_events_are_told::<Postgres>("infinity").await;
    parked_events_are_told::<Sqlite>("9999-12-31 23:59:59").await;
}

async fn a_key_that_nobody_charges_is_told<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    emit(&mut connection, "blocking", "k").await;
    let block = format!(
        "update event_outbox set status = 'scheduled', destination = 'stdout', available_at = {}, first_failed_at = {},
         last_error = 'relay_died: relays crashed some time after they began to publish this event'",
        S::in_ms(3_600_000),
        S::in_ms(-300_000)
    );
    sql(&mut connection, block).await;
    emit(&mut connection, "behind", "k").await;
    let parts = ["destination stdout takes other events", "1, the first with id 1, failing for 5m", "relay_died"];
    is_told_and_cured(&store, &mut connection, "keys_blocked", &parts, "be done with it: ").await;
}

#[tokio::test]
async fn f85_a_key_that_waits_uncharged_is_told_with_its_cure() {
    a_key_that_nobody_charges_is_told::<Postgres>().await;
    a_key_that_nobody_charges_is_told::<Sqlite>().await;
}

/// An ordinary retry is not a standstill, and an outage of a destination is not reported a second time.
async fn an_ordinary_retry_is_no_standstill<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    emit(&mut connection, "refused", "k").await;
    let sink = ScriptedSink::new(|_| Act::Refuse);
    let mut setup = Setup::new(&store, vec![("stdout", sink.clone())]);
    setup.policy.retry.base = Duration::from_secs(3600);
    let running = setup.run();
    let retried = "event_outbox where status = 'scheduled' and attempts = 1 and last_error is not null";
    eventually("it waits for its next attempt", async || count(&mut connection, retried).await == 1).await;
    running.stop().await;
    finished(&["check"], &[("DATABASE_URL", store.url()), STDOUT]).exited(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn f85_an_ordinary_retry_is_no_standstill() {
    an_ordinary_retry_is_no_standstill::<Postgres>().await;
    an_ordinary_retry_is_no_standstill::<Sqlite>().await;
}

async fn an_unknown_format_is_told<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let new = "insert into event_outbox (event_type, aggregate_type, aggregate_id, format) values";
    sql(&mut connection, format!("{new} ('new', 'test', 'k', 1), ('other', 'test', 'o', 7)")).await;
    emit(&mut connection, "behind", "k").await;
    finished(&["--once"], &[("DATABASE_URL", store.url()), STDOUT]).exited(3);
    let parts = ["2 events of format 1, 7 wait, which this relay does not know, and 1 behind them by their keys"];
    is_told_and_cured(&store, &mut connection, "format_unknown", &parts, "delete them: ").await;
}

#[tokio::test]
async fn f101_events_of_an_unknown_format_are_told_with_their_cure() {
    an_unknown_format_is_told::<Postgres>().await;
    an_unknown_format_is_told::<Sqlite>().await;
}

#[tokio::test]
async fn f76_an_undecided_prepared_transaction_is_told_with_its_cure() {
    let server = Server::start("postgres", &["--fast", "--set", "max_prepared_transactions=2"]);
    let database = database_on(&server).await;
    let mut connection = database.connect().await;
    for cure in ["until it is decided: ", "or: "] {
        sql(
            &mut connection,
            "begin; insert into event_outbox (event_type) values ('undecided'); prepare transaction 'o''clock'",
        )
        .await;
        // A transaction that only reads blocks nobody.
        sql(&mut connection, "begin; select from event_outbox; prepare transaction 'reads'").await;
        let checked = || finished(&["check"], &[("DATABASE_URL", database.url()), STDOUT]).code;
        eventually("it has been undecided for ten seconds", async || checked() == Some(1)).await;
        let parts = ["the prepared transaction \"o'clock\"", "is undecided since "];
        is_told_and_cured(&database, &mut connection, "undecided", &parts, cure).await;
        sql(&mut connection, "rollback prepared 'reads'").await;
    }
}
