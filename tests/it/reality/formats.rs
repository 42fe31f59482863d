//! Events of a format that this relay does not know, as a later relay may write them.

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
    // They are inserted while the relay runs, and in one transaction.
    sql(&mut connection, format!("begin; {}; {}; commit", insert("new 4", "4", 1), insert("behind 4", "4", 0))).await;
    sql(&mut connection, insert("behind 1 too", "1", 0)).await;
    sql(&mut connection, insert("last", "2", 0)).await;
    eventually("what can be published is", async || sink.accepted().len() == 4).await;
    running.stop().await;
    let mut names = sink.names();
    names.sort_unstable();
    assert_eq!(names, ["before", "keyless", "last", "other key"]);
    assert_eq!(count(&mut connection, "event_outbox").await, 8);
    assert!(
        Setup::new(&store, vec![("a", sink.clone())]).drain().await.undelivered,
        "--once reports undelivered events"
    );
    let check = finished(&["check"], &[("DATABASE_URL", store.url()), ("RELAY_STDOUT", "true")]).exited(1);
    let failed: Vec<&str> = check.stdout.lines().filter(|line| line.starts_with("FAIL")).collect();
    assert_eq!(failed.len(), 1, "{}", check.stdout);
    assert!(failed[0].contains("4 events of format 1") && failed[0].contains("4 behind them"), "{}", failed[0]);

    // Setting format 0 stands for a relay that knows format 1.
    sql(&mut connection, "update event_outbox set format = 0 where format = 1").await;
    let later = ScriptedSink::accepting();
    Setup::new(&store, vec![("a", later.clone())]).drain().await;
    let of = |key: &str| -> Vec<String> {
        later.accepted().into_iter().filter(|e| e.aggregate_id.as_deref() == Some(key)).map(|e| e.event_type).collect()
    };
    assert_eq!(of("1"), ["new 1", "behind 1", "behind 1 too"]);
    assert_eq!(of("4"), ["new 4", "behind 4"]);
    assert_eq!(later.accepted().len(), 6);
    // An operator deletes the event of the other format.
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

/// Dead letters of another format, as a later relay may write them, and such events that are given up or moved.
async fn f101_no_way_back_into_the_outbox_loses_a_format<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let dead = "insert into event_dead_letter (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload,
        headers, schema_version, priority, format, created_at, destination, attempts, error_code, error, first_failed_at)";
    let values = |id: i64| {
        let (time, json) = (S::in_ms(-60_000), S::json("'{}'"));
        let event_id = format!("00000000-0000-4000-8000-00000000000{id}");
        format!(
            "({id}, '{event_id}', 'dead{id}', '', 'order', '{id}', {json}, '{{}}', 1, 0, 3, {time}, 'a', 1, 'X', 'x', {time})"
        )
    };
    sql(&mut connection, format!("{dead} values {}, {}", values(1), values(2))).await;
    // Two ids are used up, so that later events have later ids.
    for _ in 0..2 {
        sql(&mut connection, insert("before", "", 0)).await;
    }
    sql(&mut connection, "delete from event_outbox").await;
    sql(&mut connection, S::redrive("outbox_id = 1")).await;
    sql(&mut connection, insert("behind", "1", 0)).await;
    let sink = ScriptedSink::accepting();
    assert!(Setup::new(&store, vec![("a", sink.clone())]).drain().await.undelivered);
    let format = "select concat_ws(' ', event_type, format) from event_outbox where event_type like 'dead%' order by 1";
    assert_eq!(column(&mut connection, format).await, ["dead1 3"]);
    assert_eq!(sink.accepted().len(), 0, "what is behind it waits");
    // The event is owed to a destination that is gone. The printed statements move it, or give it up so that it can be
    // redriven.
    let printed = |words: &str| {
        let check = finished(&["check"], &[("DATABASE_URL", store.url()), ("RELAY_STDOUT", "true")]).exited(1);
        let line = check.stdout.lines().find(|line| line.contains("the destination \"b\"")).unwrap().to_owned() + "\n";
        let from = line.find(words).unwrap() + words.len();
        let to = line[from..].find("; or make dead").or(line[from..].find(";\n")).unwrap();
        line[from..from + to].to_owned()
    };
    sql(&mut connection, S::redrive("outbox_id = 2")).await;
    sql(&mut connection, "update event_outbox set status = 'scheduled', destination = 'b' where event_type = 'dead2'")
        .await;
    sql(&mut connection, printed("make dead letters of them: ")).await;
    let given_up =
        "select concat_ws(' ', event_type, format) from event_dead_letter where error_code = 'given_up' order by 1";
    let dead = column(&mut connection, given_up).await;
    assert!(dead.contains(&"dead2 3".to_owned()), "{dead:?}");
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
    f101_no_way_back_into_the_outbox_loses_a_format
}
