//! Events of a format that this relay does not know, as a later one may write them.

use crate::binary::finished;
use crate::harness::{Setup, column, count, eventually, sql};
use crate::scripted::ScriptedSink;
use crate::stores::{Client, Postgres, Sqlite, Store};

fn insert(name: &str, key: &str, format: i16) -> String {
    format!(
        "insert into event_outbox (event_type, aggregate_type, aggregate_id, format)
         values ('{name}', 'order', nullif('{key}', ''), {format})"
    )
}

async fn f101_events_of_another_format_wait_with_what_is_behind_them_and_hold_up_nobody_else<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    for (name, key, format) in [
        ("before", "1", 0),
        ("new 1", "1", 1),
        ("behind 1", "1", 0),
        ("other key", "2", 0),
        ("new 2", "", 1),
        ("keyless", "", 0),
        ("new 3", "3", 7),
        ("behind 3", "3", 0),
    ] {
        sql(&mut connection, insert(name, key, format)).await;
    }
    let sink = ScriptedSink::accepting();
    let running = Setup::new(&store, vec![("a", sink.clone())]).run();
    eventually("what can be published is", async || sink.accepted().len() == 3).await;
    // While it runs, and in one transaction.
    sql(&mut connection, format!("begin; {}; {}; commit", insert("new 4", "4", 1), insert("behind 4", "4", 0))).await;
    sql(&mut connection, insert("behind 1 too", "1", 0)).await;
    sql(&mut connection, insert("last", "2", 0)).await;
    eventually("what can be published is", async || sink.accepted().len() == 4).await;
    running.stop().await;
    let mut names = sink.names();
    names.sort_unstable();
    assert_eq!(names, ["before", "keyless", "last", "other key"]);
    assert_eq!(count(&mut connection, "event_outbox").await, 8);
    assert!(Setup::new(&store, vec![("a", sink.clone())]).drain().await.undelivered, "--once says so");
    let check = finished(&["check"], &[("DATABASE_URL", store.url()), ("RELAY_STDOUT", "true")]).exited(1);
    let failed: Vec<&str> = check.stdout.lines().filter(|line| line.starts_with("FAIL")).collect();
    assert_eq!(failed.len(), 1, "{}", check.stdout);
    assert!(failed[0].contains("4 events of format 1") && failed[0].contains("4 behind them"), "{}", failed[0]);

    // A relay that knows format 1; in this one's words, they are of format 0.
    sql(&mut connection, "update event_outbox set format = 0 where format = 1").await;
    let later = ScriptedSink::accepting();
    Setup::new(&store, vec![("a", later.clone())]).drain().await;
    let of = |key: &str| -> Vec<String> {
        later.accepted().into_iter().filter(|e| e.aggregate_id.as_deref() == Some(key)).map(|e| e.event_type).collect()
    };
    assert_eq!(of("1"), ["new 1", "behind 1", "behind 1 too"]);
    assert_eq!(of("4"), ["new 4", "behind 4"]);
    assert_eq!(later.accepted().len(), 6);
    // Somebody deletes the other.
    sql(&mut connection, "delete from event_outbox where format = 7").await;
    Setup::new(&store, vec![("a", later.clone())]).drain().await;
    assert_eq!(later.names().last().map(String::as_str), Some("behind 3"));
    assert_eq!(column(&mut connection, "select event_type from event_outbox").await, [""; 0]);
}

async fn f101_what_waits_behind_another_format_is_not_read_again_and_again<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    sql(&mut connection, insert("new", "1", 1)).await;
    let many = format!(
        "insert into event_outbox (event_type, aggregate_type, aggregate_id) select 'behind', 'order', '1' from {}",
        S::numbers(3000)
    );
    sql(&mut connection, many).await;
    sql(&mut connection, insert("healthy", "2", 0)).await;
    let sink = ScriptedSink::accepting();
    Setup::new(&store, vec![("a", sink.clone())]).drain().await;
    assert_eq!(sink.names(), ["healthy"]);
    assert_eq!(connection.number("select count(*) from event_outbox where partition < 640").await, 0);
    assert_eq!(count(&mut connection, "event_outbox").await, 3001);
}

macro_rules! on_both_stores {
    ($($test:ident)*) => {
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread")] async fn $test() { super::$test::<super::Postgres>().await; })*
        }
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread")] async fn $test() { super::$test::<super::Sqlite>().await; })*
        }
    };
}

on_both_stores! {
    f101_events_of_another_format_wait_with_what_is_behind_them_and_hold_up_nobody_else
    f101_what_waits_behind_another_format_is_not_read_again_and_again
}
