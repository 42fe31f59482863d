//! Several relays with different destinations or routes on one database.

use std::sync::Arc;
use std::time::Duration;

use outbox_relay::sink::Sink;

use crate::binary::{Running as Process, finished, relay};
use crate::harness::{Running, Setup, column, count, emit, eventually, sql};
use crate::scripted::{Act, Gate, ScriptedSink};
use crate::stores::{Postgres, Sqlite, Store};

/// Starts a relay with these destinations, and waits until it is ready.
async fn ready<S: Store>(store: &S, worker: &str, sinks: &[(&str, &Arc<ScriptedSink>)], pooled: bool) -> Running {
    let sinks = sinks.iter().map(|(name, sink)| (*name, Arc::clone(sink) as Arc<dyn Sink>)).collect();
    let mut setup = Setup::new(store, sinks);
    setup.outbox.worker = worker.to_owned();
    setup.outbox.pooled = pooled;
    setup.outbox.publish_timeout = Duration::from_secs(1);
    let mut running = setup.run();
    running.until_ready().await;
    running
}

async fn emit_named(connection: &mut impl crate::stores::Client, prefix: &str, count: i64) {
    for index in 0..count {
        emit(connection, &format!("{prefix}{index}"), &format!("k{}", index % 7)).await;
    }
}

fn with_prefix(sink: &ScriptedSink, prefix: &str) -> usize {
    sink.names().iter().filter(|name| name.starts_with(prefix)).count()
}

async fn a_new_destination_misses_nothing(pooled: bool) {
    let database = Postgres::new().await;
    let mut connection = database.connect().await;
    let (one, two) = (ScriptedSink::accepting(), ScriptedSink::accepting());
    let mut old = Vec::new();
    for worker in ["old:1", "old:2"] {
        old.push(ready(&database, worker, &[("one", &one)], pooled).await);
    }
    emit_named(&mut connection, "before", 50).await;
    eventually("the old relays work", async || with_prefix(&one, "before") == 50).await;

    let new = ready(&database, "new:1", &[("one", &one), ("two", &two)], pooled).await;
    emit_named(&mut connection, "during", 300).await;
    eventually("all of it is delivered", async || count(&mut connection, "event_outbox").await == 0).await;
    assert_eq!(with_prefix(&one, "during"), 300);
    assert_eq!(with_prefix(&two, "during"), 300);
    for running in old {
        running.stop().await;
    }
    emit_named(&mut connection, "after", 20).await;
    eventually("the new one goes on", async || with_prefix(&two, "after") == 20).await;
    new.stop().await;
    assert_eq!(count(&mut connection, "event_relay").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn f83_no_event_emitted_after_a_relay_is_ready_misses_its_new_destination() {
    a_new_destination_misses_nothing(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f83_nor_behind_a_pooler() {
    a_new_destination_misses_nothing(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f83_a_superseded_relay_delivers_in_order_what_is_owed_to_a_destination_that_the_newest_lacks() {
    let database = Postgres::new().await;
    let mut connection = database.connect().await;
    let (old, new) = (ScriptedSink::new(|_| Act::Unreachable), ScriptedSink::accepting());
    let first = ready(&database, "first:1", &[("old", &old), ("new", &new)], false).await;
    emit_named(&mut connection, "owed", 40).await;
    eventually("all is parked", async || {
        count(&mut connection, "event_outbox where status = 'scheduled' and destination = 'old'").await == 40
    })
    .await;
    let second = ready(&database, "second:1", &[("new", &new)], false).await;
    emit_named(&mut connection, "later", 40).await;
    eventually("the second routes", async || with_prefix(&new, "later") == 40).await;
    old.then(|_| Act::Accept);
    eventually("the first delivers the rest", async || count(&mut connection, "event_outbox").await == 0).await;
    assert_eq!(with_prefix(&old, "owed"), 40);
    assert_eq!(with_prefix(&old, "later"), 0);
    crate::contract::assert_in_order_per_key(&old.accepted());
    first.stop().await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f83_an_older_configuration_that_is_started_again_is_the_newest() {
    let database = Postgres::new().await;
    let mut connection = database.connect().await;
    let (one, two) = (ScriptedSink::accepting(), ScriptedSink::accepting());
    let new = ready(&database, "new:1", &[("one", &one), ("two", &two)], false).await;
    let back = ready(&database, "old:1", &[("one", &one)], false).await;
    emit_named(&mut connection, "back", 50).await;
    eventually("it routes", async || with_prefix(&one, "back") == 50).await;
    assert_eq!(with_prefix(&two, "back"), 0);
    // No other relay is left, so this one routes again.
    back.stop().await;
    emit_named(&mut connection, "alone", 20).await;
    eventually("the other one routes", async || with_prefix(&two, "alone") == 20).await;
    new.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f83_a_lost_session_supersedes_nobody() {
    let database = Postgres::new().await;
    let mut connection = database.connect().await;
    let (one, two) = (ScriptedSink::accepting(), ScriptedSink::accepting());
    let old = ready(&database, "old:1", &[("one", &one)], false).await;
    let new = ready(&database, "new:1", &[("one", &one), ("two", &two)], false).await;
    for worker in ["old:1", "new:1"] {
        let session = format!("select cast(pid as text) from event_relay where worker = '{worker}'");
        let before = column(&mut connection, &session).await;
        sql(&mut connection, format!("select pg_terminate_backend({})", before[0])).await;
        emit_named(&mut connection, worker, 50).await;
        eventually("all is delivered", async || count(&mut connection, "event_outbox").await == 0).await;
        eventually("it has a session again", async || {
            let now = column(&mut connection, &format!("{session} and pid is not null")).await;
            !now.is_empty() && now != before
        })
        .await;
        emit_named(&mut connection, worker, 50).await;
        eventually("all is delivered", async || count(&mut connection, "event_outbox").await == 0).await;
        assert_eq!(with_prefix(&two, worker), 100, "after {worker} lost its session");
    }
    old.stop().await;
    new.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f83_a_registration_that_was_deleted_by_mistake_is_written_anew() {
    let database = Postgres::new().await;
    let mut connection = database.connect().await;
    let (one, two) = (ScriptedSink::accepting(), ScriptedSink::accepting());
    let old = ready(&database, "old:1", &[("one", &one)], false).await;
    let new = ready(&database, "new:1", &[("one", &one), ("two", &two)], false).await;
    sql(&mut connection, "delete from event_relay; select nextval('event_relay_changes')").await;
    emit_named(&mut connection, "first", 30).await;
    eventually("both are registered", async || count(&mut connection, "event_relay").await == 2).await;
    eventually("all is delivered", async || count(&mut connection, "event_outbox").await == 0).await;
    emit_named(&mut connection, "then", 50).await;
    eventually("all is delivered", async || count(&mut connection, "event_outbox").await == 0).await;
    assert_eq!(with_prefix(&two, "then"), 50);
    old.stop().await;
    new.stop().await;
}

/// Starts a relay process that publishes to standard output and, with the file, to `destinations` of the same kind.
fn process(url: &str, folder: &tempfile::TempDir, destinations: &[&str]) -> Process {
    Process::start(relay(&["run"], &variables(url, &configuration(folder, destinations))))
}

fn configuration(folder: &tempfile::TempDir, destinations: &[&str]) -> String {
    let path = folder.path().join(format!("{}.toml", destinations.join("-")));
    let text: String = destinations.iter().map(|name| format!("[destinations.{name}]\ntype = \"stdout\"\n")).collect();
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

fn variables<'a>(url: &'a str, file: &'a str) -> [(&'a str, &'a str); 5] {
    // Two relays on one port would log "already in use", which is no "ready".
    [
        ("RELAY_HTTP_ADDR", "off"),
        ("DATABASE_URL", url),
        ("RELAY_CONFIG", file),
        ("EVENT_DEFAULT_TIMEOUT", "1000"),
        ("RELAY_LOG_FORMAT", "text"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn f83_when_the_newest_is_killed_or_stopped_the_others_take_over_and_give_the_role_back() {
    let database = Postgres::new().await;
    let mut connection = database.connect().await;
    let folder = tempfile::tempdir().unwrap();
    let mut old = process(database.url(), &folder, &["a"]);
    old.until_log("ready");
    let mut new = process(database.url(), &folder, &["a", "b"]);
    new.until_log("ready");
    emit(&mut connection, "both", "").await;
    eventually("the new one routes", async || new.output().lines().count() == 2).await;

    new.signal("STOP");
    emit(&mut connection, "hung", "").await;
    eventually("the old one takes over", async || old.output().contains("hung")).await;
    new.signal("CONT");
    eventually("the new one routes again", async || {
        column(&mut connection, "select worker from event_relay where hung").await.is_empty()
    })
    .await;
    old.until_log("another configuration routes");
    emit(&mut connection, "again", "").await;
    eventually("the new one routes", async || new.output().matches(r#""type":"again""#).count() == 2).await;

    new.signal("KILL");
    new.finish();
    emit(&mut connection, "dead", "").await;
    eventually("the old one takes over", async || old.output().contains("dead")).await;
    assert_eq!(count(&mut connection, "event_relay").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn f83_a_difference_is_told_in_log_and_check() {
    let database = Postgres::new().await;
    let folder = tempfile::tempdir().unwrap();
    let file = configuration(&folder, &["a", "b"]);
    let check = || finished(&["check"], &variables(database.url(), &file));
    check().exited(0);
    let mut old = process(database.url(), &folder, &["a"]);
    old.until_log("ready");
    // A run of --once with this configuration would leave its events to the other relay.
    let told = check().exited(1).stdout;
    assert!(told.contains("FAIL") && told.contains("destinations only here: b"), "{told}");

    let mut new = process(database.url(), &folder, &["a", "b"]);
    new.until_log("ready");
    old.until_log("destinations only there: b");
    for running in [&mut old, &mut new] {
        running.until_log("two configurations are at work");
    }
    let told = check().exited(1).stdout;
    assert!(told.contains("destinations only here: b"), "{told}");
    old.signal("TERM");
    old.finish().exited(0);
    new.until_log("over: two configurations are at work");
    check().exited(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn f83_once_supersedes_no_daemon_and_names_the_difference() {
    let database = Postgres::new().await;
    let mut connection = database.connect().await;
    let folder = tempfile::tempdir().unwrap();
    let file = configuration(&folder, &["a", "b"]);
    let (one, gate) = (ScriptedSink::accepting(), Gate::new());
    let daemon = ready(&database, "daemon:1", &[("a", &one)], false).await;
    one.hold_at(&gate);
    emit_named(&mut connection, "held", 5).await;
    gate.entered().await;
    let once = finished(&["--once"], &variables(database.url(), &file)).exited(3);
    assert_eq!(once.stdout, "");
    assert!(once.stderr.contains("destinations only here: b"), "{}", once.stderr);
    gate.open(1000);
    eventually("the daemon goes on", async || with_prefix(&one, "held") == 5).await;
    daemon.stop().await;
    // The remaining relay does everything.
    emit_named(&mut connection, "alone", 3).await;
    let once = finished(&["--once"], &variables(database.url(), &file)).exited(0);
    assert_eq!(once.stdout.lines().count(), 6, "{}", once.stderr);
    assert_eq!(count(&mut connection, "event_relay").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn f83_relays_of_one_configuration_share_the_work_and_write_nothing_more() {
    let database = Postgres::new().await;
    let mut connection = database.connect().await;
    let one = ScriptedSink::accepting();
    let relays = [
        ready(&database, "a:1", &[("one", &one)], false).await,
        ready(&database, "a:2", &[("one", &one)], false).await,
        ready(&database, "a:3", &[("one", &one)], false).await,
    ];
    emit_named(&mut connection, "e", 100).await;
    eventually("all is delivered", async || count(&mut connection, "event_outbox").await == 0).await;
    // Both columns default to the current time, and the second is a moment later.
    let untouched = "event_relay where seen_at < since + interval '1 second' and not hung";
    assert_eq!(count(&mut connection, untouched).await, 3);
    for relay in relays {
        relay.stop().await;
    }
    assert_eq!(one.names().len(), 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn f83_on_sqlite_a_relay_that_stands_by_with_another_configuration_is_told_and_takes_over() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    let folder = tempfile::tempdir().unwrap();
    let mut first = process(store.url(), &folder, &["a"]);
    first.until_log("ready");
    emit(&mut connection, "one", "").await;
    eventually("the first works", async || first.output().contains("one")).await;
    let mut second = process(store.url(), &folder, &["a", "b"]);
    second.until_log("standing by");
    first.until_log("destinations only there: b");
    second.until_log("destinations only here: b");
    let file = configuration(&folder, &["a"]);
    let told = finished(&["check"], &variables(store.url(), &file)).exited(1).stdout;
    assert!(told.contains("destinations only there: b"), "{told}");
    first.signal("TERM");
    first.finish().exited(0);
    second.until_log("this one works now");
    emit(&mut connection, "two", "").await;
    eventually("the second works", async || second.output().matches(r#""type":"two""#).count() == 2).await;
    second.signal("TERM");
    second.finish().exited(0);
    assert_eq!(count(&mut connection, "event_relay").await, 0);
}
