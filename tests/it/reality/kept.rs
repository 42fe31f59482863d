//! Events that can be neither settled nor parked are skipped, and the others go on. The report has a cure that works.

use tokio_util::sync::CancellationToken;

use super::settle::failures;
use crate::harness::{Setup, column, count, emit, eventually, sql};
use crate::scripted::ScriptedSink;
use crate::servers::{Server, database_on};
use crate::stores::{Postgres, Store};

use outbox_relay::outbox::Usage;

const USAGE: Usage = Usage { several_destinations: false, history: false };

/// The application's table refers to one event by the whole primary key, of which parking changes a column.
fn child(deferred: bool) -> String {
    format!(
        "create table child (e smallint, i bigint, d text, foreign key (e, i, d)
             references event_outbox (partition, id, destination) {});
         insert into child select partition, id, destination from event_outbox where event_type = 'bad'",
        if deferred { "deferrable initially deferred" } else { "" }
    )
}

/// The statement in a text that begins with these words.
fn statement(text: &str, begins: &str) -> String {
    let from = text.find(begins).unwrap_or_else(|| panic!("no {begins:?} in {text}"));
    // A statement in parentheses ends with them, unless it calls a function.
    let text = &text[from..];
    let end =
        text.match_indices([';', ')']).find(|(at, _)| !text[..*at].ends_with('(')).map_or(text.len(), |(at, _)| at);
    text[..end].to_owned()
}

async fn a_referenced_event_is_left_out(deferred: bool) {
    let store = Postgres::new().await;
    let mut connection = store.connect().await;
    for index in 0..101 {
        let name = if index == 50 { "bad".to_owned() } else { format!("e{index}") };
        emit(&mut connection, &name, &format!("k{}", index % 10)).await;
    }
    sql(&mut connection, child(deferred)).await;
    assert_eq!(failures(&store, USAGE).await, "");
    let sink = ScriptedSink::accepting();
    let running = Setup::new(&store, vec![("a", sink.clone())]).run();
    eventually("all but one is settled", async || count(&mut connection, "event_outbox").await == 1).await;
    for round in 0..3 {
        // Other events of its key go on too.
        for key in ["k0", "k1"] {
            emit(&mut connection, &format!("after{round}"), key).await;
        }
        eventually("the others go on", async || count(&mut connection, "event_outbox").await == 1).await;
    }
    running.stop().await;
    assert_eq!(sink.accepted().len(), 107, "nothing is published again");

    // Each run reports it, and none publishes it again.
    for _ in 0..2 {
        emit(&mut connection, "once", "k0").await;
        assert!(Setup::new(&store, vec![("a", sink.clone())]).drain().await.undelivered);
    }
    assert_eq!(sink.accepted().len(), 109);
    assert_eq!(sink.names().iter().filter(|name| *name == "bad").count(), 1);
    let told = failures(&store, USAGE).await;
    assert!(told.contains("on table \"child\"") && told.contains("child_e_i_d_fkey"), "{told}");

    // Runs the printed cure.
    let running = Setup::new(&store, vec![("a", sink.clone())]).run();
    sql(&mut connection, statement(&told, "alter table public.child drop constraint")).await;
    if deferred {
        sql(&mut connection, statement(&told, "delete from event_outbox")).await;
    } else {
        sql(&mut connection, statement(&told, "update event_outbox set")).await;
        eventually("it is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    }
    emit(&mut connection, "last", "k0").await;
    eventually("all is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
    let bad = sink.names().iter().filter(|name| *name == "bad").count();
    assert_eq!(bad, if deferred { 1 } else { 2 });
    assert_eq!(failures(&store, USAGE).await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn f67_an_event_that_a_foreign_key_refers_to_is_left_out_and_the_others_go_on() {
    a_referenced_event_is_left_out(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f67_an_event_that_a_deferred_foreign_key_refers_to_is_left_out_and_the_others_go_on() {
    a_referenced_event_is_left_out(true).await;
}

/// The row is scheduled and cannot become pending.
#[tokio::test(flavor = "multi_thread")]
async fn f67_a_delayed_event_that_a_foreign_key_refers_to_is_parked_and_the_others_go_on() {
    for deferred in [false, true] {
        let store = Postgres::new().await;
        let mut connection = store.connect().await;
        for name in ["e1", "bad", "e2"] {
            emit(&mut connection, name, "k").await;
        }
        sql(&mut connection, "update event_outbox set status = 'scheduled'").await;
        sql(&mut connection, child(deferred)).await;
        let sink = ScriptedSink::accepting();
        let running = Setup::new(&store, vec![("a", sink.clone())]).run();
        emit(&mut connection, "after", "k").await;
        eventually("the others go on", async || count(&mut connection, "event_outbox").await == 1).await;
        running.stop().await;
        assert_eq!(sink.accepted().len(), 3);
        let told = failures(&store, USAGE).await;
        sql(&mut connection, statement(&told, "alter table public.child drop constraint")).await;
        sql(&mut connection, statement(&told, "update event_outbox set")).await;
        eventually("it is due", async || count(&mut connection, "event_outbox where available_at <= now()").await == 1)
            .await;
    }
}

/// Nothing at all can be written into its row.
#[tokio::test(flavor = "multi_thread")]
async fn f67_an_event_of_which_nothing_can_be_noted_is_left_out_until_it_can_be_settled() {
    let store = Postgres::new().await;
    let mut connection = store.connect().await;
    sql(
        &mut connection,
        "create function no_bad() returns trigger language plpgsql as $$
         begin if old.event_type = 'bad' then raise exception 'bad is bad'; end if; return coalesce(new, old); end $$;
         create trigger aa before update or delete on event_outbox for each row execute function no_bad()",
    )
    .await;
    for name in ["e1", "bad", "e2"] {
        emit(&mut connection, name, "k").await;
    }
    let sink = ScriptedSink::accepting();
    let drained = Setup::new(&store, vec![("a", sink.clone())]).drain().await;
    assert!(drained.undelivered);
    assert_eq!(sink.accepted().len(), 3);
    let relay = Setup::new(&store, vec![("a", sink.clone())]).relay();
    let standstills = relay.standstills();
    let stop = CancellationToken::new();
    let running = tokio::spawn({
        let (relay, stop) = (relay.clone(), stop.clone());
        async move { relay.run(stop).await }
    });
    eventually("it was published again", async || sink.accepted().len() == 4).await;
    for round in 0..3 {
        emit(&mut connection, &format!("after{round}"), "k").await;
        eventually("the others go on", async || count(&mut connection, "event_outbox").await == 1).await;
    }
    eventually("it is told", async || {
        standstills
            .borrow()
            .iter()
            .any(|standstill| standstill.cause == "events_remembered" && standstill.text.contains("bad is bad"))
    })
    .await;
    assert_eq!(sink.accepted().len(), 7);
    sql(&mut connection, "drop trigger aa on event_outbox").await;
    eventually("all is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    stop.cancel();
    running.await.unwrap().unwrap();
    assert_eq!(sink.accepted().len(), 8);
}

/// Breaks a database, expects a drain and a check to print this cure, and applies it.
async fn told_with_a_cure(store: &Postgres, breaks: &str, said: &str, cures: &[&str]) {
    let mut connection = store.connect().await;
    sql(&mut connection, breaks).await;
    emit(&mut connection, "e", "k").await;
    let sink = ScriptedSink::accepting();
    let error = Setup::new(store, vec![("a", sink.clone())]).relay().drain(CancellationToken::new()).await;
    let told = failures(store, USAGE).await;
    for text in [error.unwrap_err().explain(), told.clone()] {
        assert!(text.contains(said), "{breaks}: {text}");
        assert!(cures.iter().all(|cure| text.contains(cure)), "{breaks}: {text}");
    }
    assert_eq!(sink.accepted().len(), 0);
    for cure in cures {
        sql(&mut connection, *cure).await;
    }
    assert_eq!(failures(store, USAGE).await, "");
    assert!(!Setup::new(store, vec![("a", sink.clone())]).drain().await.undelivered);
    assert_eq!(sink.accepted().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn f66_a_column_that_settles_do_not_fill_is_told_with_its_cure() {
    for table in ["event_dead_letter", "event_processing_log"] {
        let store = Postgres::new().await;
        let breaks = format!("alter table {table} add column tenant text not null");
        let cure = format!("alter table public.{table} alter column tenant drop not null");
        told_with_a_cure(&store, &breaks, "drop or correct the column tenant", &[&cure]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn f66_a_publication_that_keeps_settles_from_deleting_is_told_with_its_cure() {
    let server = Server::start("postgres", &["--fast"]);
    let store = database_on(&server).await;
    let mut connection = store.connect().await;
    let version = column(&mut connection, "select current_setting('server_version_num')").await.join("");
    let identity = "alter table event_outbox replica identity default";
    let breaks = "create publication everything for all tables; alter table event_outbox replica identity nothing";
    told_with_a_cure(&store, breaks, "replica identity", &[identity]).await;
    sql(&mut connection, "drop publication everything").await;
    if version.parse::<i32>().unwrap() < 150_000 {
        return; // it supports none of what follows
    }
    for what in ["event_outbox where (event_type <> 'secret')", "event_outbox (event_type, id)"] {
        let breaks = format!("create publication narrowed for table {what}");
        let cures =
            ["alter publication narrowed drop table event_outbox", "alter publication narrowed add table event_outbox"];
        told_with_a_cure(&store, &breaks, "replica identity", &cures).await;
        sql(&mut connection, "drop publication narrowed").await;
    }
}
