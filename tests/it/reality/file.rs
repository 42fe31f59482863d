//! A SQLite file that is replaced, or that has two names.

use std::path::{Path, PathBuf};
use std::time::Duration;

use outbox_relay::outbox::sqlite;
use outbox_relay::secret::Secret;

use crate::binary::{Running, finished, relay};
use crate::harness::{Setup, column, count, emit, eventually, sql};
use crate::scripted::{Gate, ScriptedSink};
use crate::stores::{Sqlite, SqliteFile, SqliteRollbackJournal, Store};

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// Deletes the database and the files that SQLite and the relay keep beside it, as `rm app.db*` does.
fn delete(path: &Path) {
    for ending in ["", "-wal", "-shm", "-journal", "-relay"] {
        std::fs::remove_file(with_ending(path, ending)).ok();
    }
}

/// Replaces the database at `path` with that of `other`, which nobody has open.
fn replace(path: &Path, other: &Path) {
    for ending in ["-wal", "-shm", "-journal"] {
        std::fs::remove_file(with_ending(path, ending)).ok();
    }
    std::fs::rename(other, path).unwrap();
}

async fn replaced_by_rename<const WAL: bool>() {
    let store = SqliteFile::<WAL>::new().await;
    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(&store, vec![("a", sink.clone())]);
    // Only a change of the file itself may wake it.
    setup.relay.polling_interval = Duration::from_secs(3600);
    let running = setup.run();
    let mut connection = store.connect().await;
    emit(&mut connection, "before", "k").await;
    eventually("it works", async || sink.names() == ["before"]).await;
    drop(connection);
    store.until_asleep().await;

    let backup = SqliteFile::<WAL>::new().await;
    let mut connection = backup.connect().await;
    emit(&mut connection, "restored", "k").await;
    sqlx::Connection::close(connection).await.unwrap();
    replace(&store.path(), &backup.path());
    eventually("it works on the new file", async || sink.names() == ["before", "restored"]).await;

    let mut connection = store.connect().await;
    emit(&mut connection, "after", "k").await;
    eventually("it is woken by the new file", async || sink.names().len() == 3).await;
    eventually("all is settled there", async || count(&mut connection, "event_outbox").await == 0).await;
    assert_eq!(count(&mut connection, "event_processing_log").await, 2);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f86_a_file_that_is_replaced_by_rename_is_noticed_and_worked_on() {
    replaced_by_rename::<true>().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f86_a_file_that_is_replaced_by_rename_is_noticed_with_a_rollback_journal_too() {
    replaced_by_rename::<false>().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f86_a_file_that_is_deleted_and_made_anew_is_told_until_it_is_there() {
    let store = Sqlite::new().await;
    let sink = ScriptedSink::accepting();
    let mut running = Setup::new(&store, vec![("a", sink.clone())]).run();
    let mut connection = store.connect().await;
    emit(&mut connection, "before", "").await;
    eventually("it works", async || sink.names() == ["before"]).await;
    drop(connection);
    delete(&store.path());
    running.until_not_ready("there is no database file").await;

    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(store.path()).create_if_missing(true);
    let mut application = <sqlx::SqliteConnection as sqlx::Connection>::connect_with(&options).await.unwrap();
    sql(&mut application, "create table app_order (id)").await;
    running.until_not_ready("run `relay migrate`").await;
    sqlite::migrate::migrate(&Secret::inline(store.url())).await.unwrap();
    emit(&mut application, "after", "").await;
    eventually("it works again", async || sink.names() == ["before", "after"]).await;
    eventually("and settles", async || count(&mut application, "event_outbox").await == 0).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f86_what_was_published_of_a_file_is_not_recorded_in_the_one_that_replaced_it() {
    let store = SqliteRollbackJournal::new().await;
    let sink = ScriptedSink::accepting();
    let gate = Gate::new();
    sink.hold_at(&gate);
    let mut connection = store.connect().await;
    emit(&mut connection, "old", "").await;
    drop(connection);
    let running = Setup::new(&store, vec![("a", sink.clone())]).run();
    gate.entered().await;

    // The row of the other file has the same number.
    let backup = SqliteRollbackJournal::new().await;
    let mut connection = backup.connect().await;
    emit(&mut connection, "new", "").await;
    let rows = column(&mut connection, "select cast(row_id as text) from event_outbox").await;
    assert_eq!(rows, ["1"]);
    sqlx::Connection::close(connection).await.unwrap();
    replace(&store.path(), &backup.path());
    gate.open(10);
    eventually("the new file's event is published", async || sink.names() == ["old", "new"]).await;
    let mut connection = store.connect().await;
    eventually("and settled", async || count(&mut connection, "event_outbox").await == 0).await;
    let log = column(&mut connection, "select event_type from event_processing_log").await;
    assert_eq!(log, ["new"]);
    running.stop().await;
}

/// A relay uses the file by one name. Another relay, which uses a second name, stands by until the first one is gone.
async fn second_name_stands_by(store: &impl Store, other: &str) {
    let start = |url: &str| Running::start(relay(&["run"], &[("DATABASE_URL", url), ("RELAY_STDOUT", "true")]));
    let mut connection = store.connect().await;
    let first = start(store.url());
    emit(&mut connection, "one", "").await;
    eventually("the first works", async || count(&mut connection, "event_outbox").await == 0).await;
    let mut second = start(other);
    second.until_log("standing by");
    emit(&mut connection, "two", "").await;
    eventually("the first works on", async || count(&mut connection, "event_outbox").await == 0).await;
    assert_eq!(first.output().lines().count(), 2);
    first.signal("KILL");
    first.finish();
    second.until_log("the other relay on this file is gone; this one works now");
    assert_eq!(second.output(), "");
}

#[tokio::test]
async fn f86_a_hard_link_lets_no_second_relay_in_and_check_refuses_it() {
    let store = SqliteRollbackJournal::new().await;
    let elsewhere = tempfile::tempdir().unwrap();
    let link = elsewhere.path().join("link.db");
    std::fs::hard_link(store.path(), &link).unwrap();
    let url = format!("sqlite:{}", link.display());
    let check = finished(&["check"], &[("DATABASE_URL", &url), ("RELAY_STDOUT", "true")]).exited(1);
    assert!(check.stdout.contains("FAIL  names") && check.stdout.contains("has 2 names"), "{}", check.stdout);
    second_name_stands_by(&store, &url).await;
}

#[tokio::test]
async fn f86_a_deleted_lock_file_lets_no_second_relay_in() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    let variables = [("DATABASE_URL", store.url()), ("RELAY_STDOUT", "true")];
    let first = Running::start(relay(&["run"], &variables));
    emit(&mut connection, "one", "").await;
    eventually("the first works", async || count(&mut connection, "event_outbox").await == 0).await;
    std::fs::remove_file(with_ending(&store.path(), "-relay")).unwrap();
    let mut second = Running::start(relay(&["run"], &variables));
    second.until_log("standing by");
    emit(&mut connection, "two", "").await;
    eventually("the first works on", async || count(&mut connection, "event_outbox").await == 0).await;
    assert_eq!(first.output().lines().count(), 2);
    assert_eq!(second.output(), "");
}
