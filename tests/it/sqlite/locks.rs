//! The application's write lock and settings, with which the relay does not interfere.

use std::time::Duration;

use outbox_relay::outbox::Operate;

use crate::harness::{Setup, column, count, emit, eventually, sql};
use crate::scripted::{Gate, ScriptedSink};
use crate::stores::{Sqlite, SqliteFile, Store};

async fn the_write_lock_is_free<const WAL: bool>() {
    let store = SqliteFile::<WAL>::new().await;
    let mut connection = store.connect().await;
    emit(&mut connection, "held", "k").await;
    let (sink, gate) = (ScriptedSink::accepting(), Gate::new());
    sink.hold_at(&gate);
    let running = Setup::new(&store, vec![("a", sink.clone())]).run();
    gate.entered().await;
    // With the rollback journal, a writer also waits for readers, as long as their statements run.
    let patience = if WAL { Duration::ZERO } else { Duration::from_secs(5) };
    let mut application = store.connect_patiently(patience).await;
    for index in 0..20 {
        sql(&mut application, "begin immediate").await;
        emit(&mut application, &format!("e{index}"), "k").await;
        sql(&mut application, "commit").await;
    }
    assert_eq!(sink.names(), [""; 0], "it was held all the time");
    gate.open(1000);
    eventually("everything is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
    assert_eq!(sink.names().len(), 21);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_write_lock_is_free_while_events_are_published() {
    the_write_lock_is_free::<true>().await;
    the_write_lock_is_free::<false>().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_settle_that_waits_in_vain_for_the_write_lock_is_repeated_and_nothing_is_published_twice() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    for index in 0..10 {
        emit(&mut connection, &format!("e{index}"), "k").await;
    }
    let (sink, gate) = (ScriptedSink::accepting(), Gate::new());
    sink.hold_at(&gate);
    let mut running = Setup::new(&store, vec![("a", sink.clone())]).run();
    gate.entered().await;
    sql(&mut connection, "begin immediate").await;
    emit(&mut connection, "next", "k").await;
    gate.open(1000);
    running.until_not_ready("another program holds the file's write lock").await;
    sql(&mut connection, "commit").await;
    eventually("everything is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
    assert_eq!(sink.calls(), 2, "ten events, then the next");
    assert_eq!(sink.names().len(), 11);
    assert_eq!(count(&mut connection, "event_processing_log where status = 'published' and attempt = 1").await, 11);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_takes_no_records_is_not_published_from_again() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    for index in 0..10 {
        emit(&mut connection, &format!("e{index}"), "k").await;
    }
    let (sink, gate) = (ScriptedSink::accepting(), Gate::new());
    sink.hold_at(&gate);
    let mut running = Setup::new(&store, vec![("a", sink.clone())]).run();
    gate.entered().await;
    sql(&mut connection, Sqlite::refuse("insert on event_processing_log")).await;
    gate.open(1000);
    running.until_not_ready("refused").await;
    emit(&mut connection, "next", "k").await;
    assert_eq!(sink.calls(), 1);
    sql(&mut connection, Sqlite::allow("event_processing_log")).await;
    eventually("everything is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
    assert_eq!(sink.calls(), 2, "ten events, then the next");
    assert_eq!(sink.names().len(), 11);
}

#[tokio::test]
async fn only_what_is_past_its_retention_goes_and_a_little_at_a_time() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    let insert = |days: i64, ids: &str| {
        format!(
            "insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, duration_ms,
                 worker, processed_at)
             select 'e', i, 'a', 'a', 'published', 1, 1, 'w', {at} from {ids};
             insert into event_history (outbox_id, event_id, event_type, source, payload, headers, schema_version, priority,
                 created_at, destination, published_at)
             select i, 'e', 'a', '', '{{}}', '{{}}', 1, 0, {at}, 'a', {at} from {ids}",
            at = Sqlite::in_ms(-days * 86_400_000)
        )
    };
    // The log is kept for 7 days, the history for 30.
    for days in [31, 8, 6, 0] {
        sql(&mut connection, insert(days, &Sqlite::numbers(300))).await;
    }
    let left =
        "select concat_ws(' ', (select count(*) from event_processing_log), (select count(*) from event_history))";
    let outbox = Sqlite::outbox(Setup::new(&store, vec![]).outbox);

    // Rows deleted before this one stay deleted, because each transaction deletes few rows.
    let stubborn = "delete on event_processing_log when old.outbox_id = 250";
    sql(&mut connection, Sqlite::refuse(stubborn)).await;
    outbox.maintain().await.unwrap_err();
    assert_eq!(column(&mut connection, left).await, ["1000 1200"]);
    sql(&mut connection, Sqlite::allow("event_processing_log")).await;
    outbox.maintain().await.unwrap();
    assert_eq!(column(&mut connection, left).await, ["600 900"]);
    outbox.maintain().await.unwrap();
    assert_eq!(column(&mut connection, left).await, ["600 900"]);
}

async fn journal_mode_stays<const WAL: bool>(mode: &str) {
    let store = SqliteFile::<WAL>::new().await;
    emit(&mut store.connect().await, "e", "").await;
    let sink = ScriptedSink::accepting();
    Setup::new(&store, vec![("a", sink.clone())]).drain().await;
    let running = Setup::new(&store, vec![("a", sink.clone())]).run();
    emit(&mut store.connect().await, "e", "").await;
    eventually("it arrived", async || sink.names().len() == 2).await;
    running.stop().await;
    for pragma in ["journal_mode", "user_version", "application_id", "auto_vacuum", "page_size", "encoding"] {
        let query = format!("select cast({pragma} as text) from pragma_{pragma}");
        let value = column(&mut store.connect().await, &query).await;
        let before = match pragma {
            "journal_mode" => mode,
            "page_size" => "4096",
            "encoding" => "UTF-8",
            _ => "0",
        };
        assert_eq!(value, [before], "{pragma}");
    }
}

#[tokio::test]
async fn the_settings_of_the_file_stay_the_applications() {
    journal_mode_stays::<true>("wal").await;
    journal_mode_stays::<false>("delete").await;
}
