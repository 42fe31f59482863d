//! Many events that waited for a destination become due while a session holds an old snapshot. So no dead row of a promoted
//! event can be removed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use sqlx::PgConnection;

use crate::harness::{Running, Setup, count, emit, eventually, sql};
use crate::scripted::ScriptedSink;
use crate::servers::{Database, Server, database, database_on};
use crate::stores::Client;

/// So many rows that scanning them takes many times as long as promoting a batch.
const PARKED: i64 = 15_000;

const BATCH: usize = 100;

/// Opens a snapshot that is older than everything that follows.
async fn old_snapshot(database: &Database) -> PgConnection {
    let mut session = database.connect().await;
    sql(&mut session, "begin isolation level repeatable read; select from event_outbox").await;
    session
}

/// Parks events for `b`, as an outage does, and starts a relay for which `b` works.
async fn with_parked(database: &Database, batch: usize) -> (Running, Arc<ScriptedSink>) {
    let mut connection = database.connect().await;
    let insert = format!(
        "insert into event_outbox (event_type, aggregate_type, aggregate_id, status, destination)
         select 'parked', 'order', (n % 5000)::text, 'scheduled', 'b' from generate_series(1, {PARKED}) n"
    );
    sql(&mut connection, insert).await;
    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(database, vec![("a", ScriptedSink::accepting()), ("b", sink.clone())]);
    setup.relay.batch_events = batch;
    (setup.run(), sink)
}

async fn until_empty(connection: &mut PgConnection) {
    eventually("all is delivered", async || count(connection, "event_outbox").await == 0).await;
}

/// How many entries of the indexes of waiting rows were read, after all ended sessions have reported their counts.
async fn entries_met(database: &Database) -> i64 {
    let scans = "select coalesce(sum(idx_tup_read), 0)::bigint from pg_stat_user_indexes
                 where indexrelname in ('event_outbox_scheduled_idx', 'event_outbox_waiting_idx')";
    let mut counted = -1;
    eventually("the counts no longer change", async || {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let before = std::mem::replace(&mut counted, database.connect().await.number(scans).await);
        counted == before
    })
    .await;
    counted
}

fn assert_in_order(sink: &ScriptedSink) {
    let mut last = HashMap::new();
    for event in sink.accepted() {
        if let Some(before) = last.insert(event.aggregate_id.clone(), event.row.id) {
            assert!(before < event.row.id, "{} came after {before}", event.row.id);
        }
    }
}

#[tokio::test]
async fn f102_beside_an_old_snapshot_neither_promotions_nor_claims_walk_again_and_again_over_what_waited() {
    let database = database().await;
    // The test's own queries must not be counted.
    let mut connection = database.connect().await;
    sql(&mut connection, "set enable_indexscan = off; set enable_indexonlyscan = off; set enable_bitmapscan = off")
        .await;
    let _snapshot = old_snapshot(&database).await;
    let (running, sink) = with_parked(&database, BATCH).await;
    until_empty(&mut connection).await;
    assert_eq!(running.stop().await.published, PARKED as u64);
    assert_in_order(&sink);
    let met = entries_met(&database).await;
    let by_batches = PARKED * PARKED / BATCH as i64 / 2;
    // This does not count claims.
    println!("{met} entries met; {by_batches} where each promotion is one batch");
    assert!(met < by_batches, "{met} entries met; {by_batches} where each promotion is one batch");

    // New events, some of them scheduled behind nothing: claims do not check every dead row.
    let mut setup = Setup::new(&database, vec![("a", ScriptedSink::accepting()), ("b", ScriptedSink::accepting())]);
    setup.relay.batch_events = BATCH;
    let running = setup.run();
    for events in [1, PARKED / 2] {
        let insert = format!(
            "insert into event_outbox (event_type, aggregate_type, aggregate_id)
             select 'new', 'order', (n % 5000)::text from generate_series(1, {events}) n"
        );
        sql(&mut connection, insert).await;
        until_empty(&mut connection).await;
    }
    running.stop().await;
    let met = entries_met(&database).await - met;
    let by_claims = PARKED / 2 / BATCH as i64 * PARKED;
    println!("{met} entries read with new events; {by_claims} if each claim read all");
    assert!(met < by_claims, "{met} entries read with new events; {by_claims} if each claim read all");
}

#[tokio::test]
async fn f102_whatever_comes_due_among_what_was_promoted_is_promoted_too() {
    let server = Server::start("postgres", &["--fast", "--set", "max_prepared_transactions=2"]);
    let database = database_on(&server).await;
    let mut connection = database.connect().await;
    let scheduled = |name: &str, at: &str| {
        format!(
            "insert into event_outbox (event_type, aggregate_type, aggregate_id, status, destination, available_at)
             values ('{name}', 'test', '{name}', 'scheduled', 'b', {at})"
        )
    };
    sql(&mut connection, scheduled("is set to the past", "now() + interval '1 hour'")).await;
    sql(&mut connection, scheduled("is blocked", "'infinity'")).await;
    sql(
        &mut connection,
        "insert into event_dead_letter (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
             schema_version, priority, created_at, destination, attempts, error_code, error, first_failed_at)
         select id - 1000000, gen_random_uuid(), 'is redriven', source, aggregate_type, 'is redriven', payload, headers,
             schema_version, priority, created_at, 'b', 1, 'test', 'test', now() from event_outbox limit 1",
    )
    .await;
    let _snapshot = old_snapshot(&database).await;
    // Triggers are off, because a transaction that notifies cannot be prepared.
    let mut late = database.connect().await;
    sql(&mut late, "begin; set local session_replication_role = replica").await;
    sql(&mut late, scheduled("is committed late", "now() - interval '1 minute'")).await;
    let mut prepared = database.connect().await;
    sql(&mut prepared, "begin; set local session_replication_role = replica").await;
    sql(&mut prepared, scheduled("is prepared", "now() - interval '1 day'")).await;
    sql(&mut prepared, "prepare transaction 'late'").await;
    let (running, sink) = with_parked(&database, 1000).await;
    eventually("all that waited is delivered", async || sink.accepted().len() as i64 >= PARKED).await;

    let mut expected = Vec::new();
    for (name, comes_due) in [
        (
            "is set to the past",
            "update event_outbox set available_at = now() - interval '2 days' where event_type = 'is set to the past'",
        ),
        ("is blocked", "update event_outbox set available_at = '-infinity' where event_type = 'is blocked'"),
        ("is committed late", "commit"),
        ("is prepared", "commit prepared 'late'"),
        ("is redriven", "select redrive_dead_letter(id) from event_dead_letter"),
    ] {
        let session = if name == "is committed late" { &mut late } else { &mut connection };
        sql(session, comes_due).await;
        emit(&mut connection, "next", name).await;
        expected.extend([name, "next"]);
        eventually(name, async || sink.accepted().len() as i64 >= PARKED + expected.len() as i64).await;
    }
    until_empty(&mut connection).await;
    running.stop().await;
    assert_in_order(&sink);
    let names: Vec<String> = sink.names().into_iter().filter(|name| name != "parked").collect();
    assert_eq!(names, expected);
}
