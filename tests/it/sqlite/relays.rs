//! Several relays on one file: one of them works.

use std::fs::File;
use std::time::Duration;

use outbox_relay::secret::Secret;
use tempfile::TempDir;

use crate::binary::{Running, finished, relay};
use crate::harness::{Setup, count, emit, eventually};
use crate::scripted::ScriptedSink;
use crate::stores::{Sqlite, Store, until_watched};

/// The URL of a symbolic link to the store's file.
fn link_to(store: &Sqlite, folder: &TempDir) -> String {
    let link = folder.path().join("link.db");
    std::os::unix::fs::symlink(store.path(), &link).unwrap();
    format!("sqlite:{}", link.display())
}

#[tokio::test]
async fn one_works_and_the_other_stands_by_until_that_one_is_gone() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    // The file is the same under another name.
    let elsewhere = tempfile::tempdir().unwrap();
    let linked = link_to(&store, &elsewhere);

    let start = |url: &str| Running::start(relay(&["run"], &[("DATABASE_URL", url), ("RELAY_STDOUT", "true")]));
    let first = start(store.url());
    emit(&mut connection, "before", "k").await;
    eventually("the first works", async || count(&mut connection, "event_outbox").await == 0).await;
    let mut second = start(&linked);
    second.until_log("another relay works on this file; standing by");
    for index in 0..10 {
        emit(&mut connection, &format!("e{index}"), "k").await;
    }
    eventually("the first works on", async || count(&mut connection, "event_outbox").await == 0).await;
    let drained = finished(&["--once"], &[("DATABASE_URL", store.url()), ("RELAY_STDOUT", "true")]).exited(0);
    assert_eq!(drained.stdout, "");

    first.signal("KILL");
    assert_eq!(first.finish().stdout.lines().count(), 11);
    second.until_log("the other relay on this file is gone; this one works now");
    emit(&mut connection, "after", "k").await;
    eventually("the second works", async || count(&mut connection, "event_outbox").await == 0).await;
    second.signal("TERM");
    let second = second.finish().exited(0);
    assert_eq!(second.stdout.lines().count(), 1, "{}", second.stdout);
    assert!(second.stdout.contains(r#""type":"after""#), "{}", second.stdout);
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_symbolic_link_it_is_the_files_own_log_that_is_watched() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    let elsewhere = tempfile::tempdir().unwrap();
    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(&store, vec![("a", sink.clone())]);
    setup.outbox.url = Secret::inline(link_to(&store, &elsewhere));
    setup.relay.polling_interval = Duration::from_secs(3600);
    let running = setup.run();
    let mut log = store.path().into_os_string();
    log.push("-wal");
    until_watched(log.as_ref()).await;
    emit(&mut connection, "e", "").await;
    eventually("it is woken", async || sink.accepted().len() == 1).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_has_ended_has_let_go_of_the_file() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    let sink = ScriptedSink::accepting();
    let mut lock = store.path().into_os_string();
    lock.push("-relay");
    for index in 0..50 {
        emit(&mut connection, "e", "").await;
        let running = Setup::new(&store, vec![("a", sink.clone())]).run();
        eventually("it works", async || sink.accepted().len() == index + 1).await;
        running.stop().await;
        File::open(&lock).unwrap().try_lock().unwrap();
    }
}
