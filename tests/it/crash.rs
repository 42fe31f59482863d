//! Crash windows on PostgreSQL, where the connection that holds a claim can be lost.

use std::collections::HashMap;
use std::time::Duration;

use crate::harness::{Setup, count, emit, eventually, sql};
use crate::scripted::{Gate, ScriptedSink};
use crate::servers::database;

/// Ends the connections of relays, as a crash of the database's side or an impatient operator does.
const TERMINATE: &str = "select pg_terminate_backend(pid) from pg_stat_activity
                         where application_name = 'relay' and datname = current_database()";

#[tokio::test]
async fn a_claim_lost_before_its_settle_repeats_its_batch_in_order_and_nothing_else() {
    let database = database().await;
    let mut connection = database.connect().await;
    for index in 0..20 {
        emit(&mut connection, &format!("e{index:02}"), "k").await;
    }
    let (sink, gate) = (ScriptedSink::accepting(), Gate::new());
    sink.hold_at(&gate);
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.relay.batch_events = 5;
    let running = setup.run();
    gate.entered().await;
    sql(&mut connection, TERMINATE).await;
    gate.open(1000);
    eventually("everything is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
    let names = sink.names();
    let mut first = names.clone();
    let mut seen = std::collections::HashSet::new();
    first.retain(|name| seen.insert(name.clone()));
    assert!(first.is_sorted() && first.len() == 20, "{first:?}");
    assert!(names.len() <= 25, "at most the batch in flight is repeated: {names:?}");
    assert_eq!(count(&mut connection, "event_processing_log").await, 20);
}

#[tokio::test]
async fn another_relay_takes_over_at_once_and_the_zombie_settles_nothing() {
    let database = database().await;
    let mut connection = database.connect().await;
    emit(&mut connection, "e1", "k").await;
    emit(&mut connection, "e2", "k").await;
    let (zombie, gate) = (ScriptedSink::accepting(), Gate::new());
    zombie.hold_at(&gate);
    let mut setup = Setup::new(&database, vec![("a", zombie.clone())]);
    setup.outbox.worker = "zombie".to_owned();
    setup.relay.lanes = 1;
    let running = setup.run();
    gate.entered().await;

    let heir = ScriptedSink::accepting();
    let held = Setup::new(&database, vec![("a", heir.clone())]).drain().await;
    assert_eq!(held.tally.published, 0, "what another relay holds is not taken");
    sql(&mut connection, TERMINATE).await;
    let claims = "pg_locks where locktype = 'advisory' and objid < 640
                  and database = (select oid from pg_database where datname = current_database())";
    eventually("the server has noticed", async || count(&mut connection, claims).await == 0).await;
    assert_eq!(Setup::new(&database, vec![("a", heir.clone())]).drain().await.tally.published, 2);
    gate.open(1000);
    eventually("the zombie has noticed", async || zombie.accepted().len() == 2).await;
    running.stop().await;
    assert_eq!(heir.names(), ["e1", "e2"]);
    assert_eq!(count(&mut connection, "event_processing_log where worker = 'zombie'").await, 0);
    assert_eq!(count(&mut connection, "event_processing_log").await, 2);
}

#[tokio::test]
async fn a_database_that_cannot_record_is_not_published_from_again_and_again() {
    let database = database().await;
    let mut connection = database.connect().await;
    // Every settle fails, every read works: as with a full disk.
    sql(
        &mut connection,
        "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'disk full' using errcode = '53100'; end $$;
         create trigger refuse before insert on event_processing_log for each row execute function refuse()",
    )
    .await;
    for index in 0..10 {
        emit(&mut connection, &format!("e{index}"), "k").await;
    }
    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.relay.lanes = 1;
    let running = setup.run();
    // The lane comes back several times, to be turned away by its own proof of writability.
    let attempts = "pg_stat_database where datname = current_database() and xact_rollback >= 5";
    eventually("the lane tried again", async || count(&mut connection, attempts).await == 1).await;
    assert_eq!(sink.calls(), 1, "published once, never again while nothing can be recorded");
    sql(&mut connection, "drop trigger refuse on event_processing_log").await;
    eventually("everything is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
    assert_eq!(sink.calls(), 2);
    assert_eq!(count(&mut connection, "event_processing_log").await, 10);
}

#[tokio::test]
async fn backends_terminated_over_and_over_lose_nothing_and_keep_order() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "insert into event_outbox (event_type, aggregate_id) select 'e', (i % 50)::text from generate_series(1, 3000) i",
    )
    .await;
    let sink = ScriptedSink::accepting();
    let setup = || {
        let mut setup = Setup::new(&database, vec![("a", sink.clone() as std::sync::Arc<_>)]);
        setup.relay.batch_events = 20;
        setup.run()
    };
    let relays = [setup(), setup()];
    let mut terminated = 0;
    while count(&mut connection, "event_outbox").await > 0 {
        sql(&mut connection, TERMINATE).await;
        terminated += 1;
        tokio::time::sleep(Duration::from_millis(100)).await; // the pace of the fault, not a wait for anything
    }
    for relay in relays {
        relay.stop().await;
    }
    assert!(terminated > 1, "the fault never struck");
    let mut first: HashMap<String, Vec<i64>> = HashMap::new();
    for event in sink.accepted() {
        let ids = first.entry(event.aggregate_id.unwrap()).or_default();
        if !ids.contains(&event.row.id) {
            ids.push(event.row.id);
        }
    }
    assert!(first.values().all(|ids| ids.is_sorted()));
    assert_eq!(first.values().map(Vec::len).sum::<usize>(), 3000);
    assert_eq!(count(&mut connection, "event_processing_log").await, 3000);
}
