//! The bounds with which claims skip the dead rows at the low ids of a partition. While an old snapshot is open, they spare
//! claims most of these rows. A row that appears with an old id is nevertheless delivered in its order.

use std::sync::Arc;
use std::time::Duration;

use sqlx::PgConnection;

use crate::harness::{Running, Setup, count, emit, eventually, sql};
use crate::scripted::ScriptedSink;
use crate::servers::{Database, Server, database, database_on};
use crate::stores::Client;

/// So many events that the relay asks for the horizon several times, counted over all partitions.
const EVENTS: i64 = 6000;

/// So many dead rows that scanning them takes a while.
const DEAD: i64 = 30_000;

/// A relay that has computed bounds, because events of all partitions were inserted and delivered.
struct Warm {
    connection: PgConnection,
    sink: Arc<ScriptedSink>,
    running: Running,
}

impl Warm {
    async fn start(database: &Database) -> Self {
        let sink = ScriptedSink::accepting();
        let running = Setup::new(database, vec![("a", sink.clone())]).run();
        let mut warm = Self { connection: database.connect().await, sink, running };
        warm.pass_events().await;
        warm
    }

    async fn pass_events(&mut self) {
        for _ in 0..6 {
            let insert =
                format!("insert into event_outbox (event_type) select 'other' from generate_series(1, {})", EVENTS / 6);
            sql(&mut self.connection, insert).await;
            self.until_empty().await;
        }
    }

    async fn until_empty(&mut self) {
        let pending = "event_outbox where status = 'pending'";
        eventually("all is delivered", async || count(&mut self.connection, pending).await == 0).await;
    }

    /// Stops the relay. Returns the names of the delivered events in order, without those of [`Self::pass_events`].
    async fn stop(mut self) -> Vec<String> {
        self.until_empty().await;
        self.running.stop().await;
        self.sink.names().into_iter().filter(|name| name != "other").collect()
    }
}

/// Returns how many entries of the primary key's index the relay's scans have read.
async fn index_entries(database: &Database, pooled: bool) -> i64 {
    let mut connection = database.connect().await;
    sql(&mut connection, "set enable_indexscan = off; set enable_indexonlyscan = off; set enable_bitmapscan = off")
        .await;
    let mut snapshot = database.connect().await;
    sql(&mut snapshot, "begin isolation level repeatable read; select from event_outbox").await;
    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(database, vec![("a", sink.clone())]);
    setup.outbox.pooled = pooled;
    let running = setup.run();
    for events in [DEAD].into_iter().chain([1; 100]) {
        let insert = format!("insert into event_outbox (event_type) select 'e' from generate_series(1, {events})");
        sql(&mut connection, insert).await;
        eventually("all is delivered", async || count(&mut connection, "event_outbox").await == 0).await;
    }
    assert_eq!(running.stop().await.published, DEAD as u64 + 100);
    // A session reports its last counts when it ends.
    let scans = "select coalesce(sum(idx_tup_read), 0)::bigint from pg_stat_user_indexes where indexrelname = 'event_outbox_pkey'";
    let mut counted = 0;
    eventually("the counts no longer change", async || {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let before = std::mem::replace(&mut counted, database.connect().await.number(scans).await);
        counted > 0 && counted == before
    })
    .await;
    counted
}

#[tokio::test]
async fn beside_an_old_snapshot_claims_do_not_walk_over_what_is_dead() {
    let (with, without) = (database().await, database().await);
    let (with, without) = tokio::join!(index_entries(&with, false), index_entries(&without, true));
    println!("{with} entries of the index met with bounds, {without} without");
    assert!(without > 100 * DEAD, "only {without} entries without bounds, so this test proves nothing");
    assert!(with < without / 5, "{with} with bounds, {without} without");
}

#[tokio::test]
async fn what_commits_late_comes_before_what_follows_it() {
    let server = Server::start("postgres", &["--fast", "--set", "max_prepared_transactions=2"]);
    let database = database_on(&server).await;
    let mut warm = Warm::start(&database).await;
    let mut expected = Vec::new();
    for (round, commit) in ["commit", "prepare transaction 'late'; commit prepared 'late'"].into_iter().enumerate() {
        let (late, next) = (format!("late {round}"), format!("next {round}"));
        let mut application = database.connect().await;
        // Triggers are off, because a transaction that notifies cannot be prepared.
        sql(&mut application, "begin; set local session_replication_role = replica").await;
        emit(&mut application, &late, "k").await;
        warm.pass_events().await;
        for statement in commit.split("; ") {
            sql(&mut application, statement).await;
            if statement.starts_with("prepare") {
                warm.pass_events().await;
            }
        }
        emit(&mut application, &next, "k").await;
        expected.extend([late, next]);
    }
    assert_eq!(warm.stop().await, expected);
}

#[tokio::test]
async fn what_is_put_back_with_its_old_id_comes_before_what_follows_it() {
    let database = database().await;
    let mut connection = database.connect().await;
    let ways = [
        ("becomes due", "update event_outbox set available_at = now() where event_type = 'becomes due'"),
        (
            "is made pending",
            "update event_outbox set status = 'pending', available_at = now() where event_type = 'is made pending'",
        ),
        ("is redriven", "select redrive_dead_letter(id) from event_dead_letter"),
    ];
    for (name, _) in ways {
        let insert = format!(
            "insert into event_outbox (event_type, aggregate_type, aggregate_id, status, available_at)
             values ('{name}', 'test', '{name}', 'scheduled', now() + interval '1 hour')"
        );
        sql(&mut connection, insert).await;
    }
    sql(
        &mut connection,
        "with dead as (delete from event_outbox where event_type = 'is redriven' returning *)
         insert into event_dead_letter (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
             schema_version, priority, created_at, destination, attempts, error_code, error, first_failed_at)
         select id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
             schema_version, priority, created_at, 'a', 1, 'test', 'test', now() from dead",
    )
    .await;
    let mut warm = Warm::start(&database).await;
    let mut expected = Vec::new();
    for (name, put_back) in ways {
        sql(&mut connection, put_back).await;
        if name == "becomes due" {
            let scheduled = "event_outbox where event_type = 'becomes due' and status = 'scheduled'";
            eventually("it is promoted", async || count(&mut connection, scheduled).await == 0).await;
        }
        emit(&mut connection, "next", name).await;
        expected.extend([name, "next"]);
        warm.pass_events().await;
    }
    assert_eq!(warm.stop().await, expected);
}

#[tokio::test]
async fn an_id_of_somebodys_own_is_found_within_a_minute() {
    let database = database().await;
    let mut warm = Warm::start(&database).await;
    // The relay searches for such ids once a minute.
    tokio::time::sleep(Duration::from_secs(20)).await;
    let insert = "insert into event_outbox (id, event_type) overriding system value values (1, 'own id')";
    sql(&mut warm.connection, insert).await;
    assert_eq!(warm.stop().await, ["own id"]);
}
