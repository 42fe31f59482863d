//! Events that are owed to a destination which is no longer configured.

use std::time::Duration;

use crate::binary::{Running as Process, finished, relay, works};
use crate::contract::assert_in_order_per_key;
use crate::harness::{Setup, column, count, emit, eventually, sql};
use crate::scripted::{Act, ScriptedSink};
use crate::stores::{Postgres, Sqlite, SqliteRollbackJournal, Store};

/// Leaves 30 events that are owed to `old` and were delivered to `new`.
async fn owed_to_the_old<S: Store>(store: &S, connection: &mut S::Connection) {
    let (old, new) = (ScriptedSink::new(|_| Act::Unreachable), ScriptedSink::accepting());
    let running = Setup::new(store, vec![("old", old), ("new", new.clone())]).run();
    for index in 0..30 {
        emit(connection, &format!("owed{index}"), &format!("k{}", index % 4)).await;
    }
    let parked = "event_outbox where status = 'scheduled' and destination = 'old'";
    eventually("all are parked", async || count(connection, parked).await == 30).await;
    running.stop().await;
    // A retry that was in progress at the stop leaves some rows pending.
    sql(connection, "update event_outbox set status = 'scheduled' where destination = 'old'").await;
    assert_eq!(new.names().len(), 30);
}

/// The statements that the report prints: to move the events, and to give them up.
fn printed(text: &str) -> (String, String) {
    let part = |begin: &str, end: &str| {
        let from = text.find(begin).unwrap_or_else(|| panic!("{begin:?} is missing in {text}")) + begin.len();
        let to = text[from..].find(end).unwrap_or_else(|| panic!("{end:?} is missing in {text}"));
        text[from..from + to].to_owned()
    };
    let ends = "; or make dead letters of them: ";
    (part("to another destination: ", ends), part(ends, ";\n"))
}

fn checked(url: &str, file: &str) -> String {
    let variables = [("DATABASE_URL", url), ("RELAY_CONFIG", file)];
    let check = finished(&["check"], &variables).exited(1);
    check.stdout.lines().find(|line| line.contains("destination_unconfigured")).unwrap().to_owned() + "\n"
}

fn only_new(folder: &tempfile::TempDir) -> String {
    let path = folder.path().join("relay.toml");
    std::fs::write(&path, "[destinations.new]\ntype = \"stdout\"\n").unwrap();
    path.display().to_string()
}

async fn are_moved_in_order<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    owed_to_the_old(&store, &mut connection).await;
    let folder = tempfile::tempdir().unwrap();
    let (move_them, _) = printed(&checked(store.url(), &only_new(&folder)));

    // Later events of the same keys wait behind them, although their own destination is configured.
    let new = ScriptedSink::new(|_| Act::Unreachable);
    let running = Setup::new(&store, vec![("new", new.clone())]).run();
    for index in 0..30 {
        emit(&mut connection, &format!("later{index}"), &format!("k{}", index % 4)).await;
    }
    eventually("it is tried", async || new.calls() > 0).await;
    sql(&mut connection, &move_them).await;
    new.then(|_| Act::Accept);
    eventually("all arrive", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
    assert_eq!(new.names().iter().filter(|name| name.starts_with("owed")).count(), 30);
    assert_in_order_per_key(&new.accepted());
}

async fn owed_to_both_are_owed_once<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let down = ScriptedSink::new(|_| Act::Unreachable);
    let third = ScriptedSink::accepting();
    let sinks: Vec<(&str, std::sync::Arc<dyn outbox_relay::sink::Sink>)> =
        vec![("old", down.clone()), ("new", down.clone()), ("third", third.clone())];
    let running = Setup::new(&store, sinks).run();
    emit(&mut connection, "e", "k").await;
    let parked = "event_outbox where status = 'scheduled'";
    eventually("it is parked for both", async || count(&mut connection, parked).await == 2).await;
    running.stop().await;
    // A retry that was in progress at the stop leaves rows pending.
    sql(&mut connection, "update event_outbox set status = 'scheduled'").await;
    let folder = tempfile::tempdir().unwrap();
    let (move_them, _) = printed(&checked(store.url(), &only_new(&folder)));
    sql(&mut connection, &move_them).await;
    let left = "select destination from event_outbox";
    assert_eq!(column(&mut connection, left).await, ["new"]);
}

async fn are_given_up<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    owed_to_the_old(&store, &mut connection).await;
    let folder = tempfile::tempdir().unwrap();
    let (_, give_up) = printed(&checked(store.url(), &only_new(&folder)));
    sql(&mut connection, &give_up).await;
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
    let letters = "event_dead_letter where destination = 'old' and error_code = 'given_up' and redriven_at is null";
    assert_eq!(count(&mut connection, letters).await, 30);
    let log = "event_processing_log where destination = 'old' and status = 'dead_lettered'";
    assert_eq!(count(&mut connection, log).await, 30);
    works(store.url());
}

/// A daemon reports the events. It neither moves them nor claims them again and again, even if one is pending.
async fn are_told<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    owed_to_the_old(&store, &mut connection).await;
    sql(&mut connection, "update event_outbox set status = 'pending' where event_type in ('owed3', 'owed4')").await;
    let mut daemon = Process::start(relay(&["run"], &[("DATABASE_URL", store.url()), ("RELAY_STDOUT", "true")]));
    daemon.until_log("events wait for the destination");
    let parked = "event_outbox where status = 'scheduled' and destination = 'old'";
    eventually("all are parked", async || count(&mut connection, parked).await == 30).await;
    let rows = "select cast(available_at as text) from event_outbox order by id";
    let before = column(&mut connection, rows).await;
    emit(&mut connection, "another", "").await;
    eventually("it works", async || daemon.output().contains("another")).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(column(&mut connection, rows).await, before);
    assert_eq!(daemon.output().lines().count(), 1);
    let told = daemon.log().matches("events wait for the destination").count();
    assert_eq!(told, 1, "{}", daemon.log());
}

macro_rules! on_each_store {
    ($($test:ident: $what:ident)*) => {
        $(
            mod $what {
                use super::*;

                #[tokio::test(flavor = "multi_thread")]
                async fn $test() {
                    super::$what::<Postgres>().await;
                }

                mod sqlite {
                    use super::*;

                    #[tokio::test(flavor = "multi_thread")]
                    async fn $test() {
                        super::super::$what::<Sqlite>().await;
                    }
                }

                mod rollback_journal {
                    use super::*;

                    #[tokio::test(flavor = "multi_thread")]
                    async fn $test() {
                        super::super::$what::<SqliteRollbackJournal>().await;
                    }
                }
            }
        )*
    };
}

on_each_store! {
    f84_the_statement_that_check_prints_moves_them_in_the_order_of_their_keys: are_moved_in_order
    f84_what_is_owed_to_both_destinations_is_owed_once_after_a_move: owed_to_both_are_owed_once
    f84_the_statement_that_check_prints_makes_dead_letters_of_them: are_given_up
    f84_a_daemon_tells_of_them_and_leaves_them_alone: are_told
}
