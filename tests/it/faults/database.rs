//! A database that is the wrong one, is altered under the relay, or revokes rights; and one without work.

use std::sync::Arc;
use std::time::{Duration, Instant};

use outbox_relay::secret::Secret;
use sqlx::Connection;

use super::{Line, TERMINATE, assert_first_in_order, assert_logged_once, load, stop, until_empty};
use crate::binary::{Running, cannot_work, finished, relay};
use crate::harness::{Setup, count, eventually, sql};
use crate::scripted::ScriptedSink;
use crate::servers::{Database, Server, database, database_on, empty_database};
use crate::stores::Client;

#[tokio::test]
async fn f19_a_hot_standby_is_refused_until_it_is_promoted() {
    let primary = Server::start("postgres", &["--fast"]);
    let database = database_on(&primary).await;
    load(&mut database.connect().await, 100, 10).await;
    let standby = Server::start("postgres", &["--fast", "--standby-of", primary.url()]);
    let place = |server: &Server| format!("@127.0.0.1:{}/", server.port());
    let url = database.url().replace(&place(&primary), &place(&standby));
    let mut reader = sqlx::PgConnection::connect(&url).await.unwrap();
    eventually("all rows have come", async || count(&mut reader, "event_outbox").await == 100).await;
    cannot_work(&url, &["the database is read-only", "point DATABASE_URL at the primary"]);

    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.outbox.url = Secret::inline(&url);
    let mut running = setup.run();
    running.until_not_ready("the database is read-only").await;
    assert_eq!(sink.calls(), 0);
    drop(primary);
    sql(&mut reader, "select pg_promote()").await;
    until_empty(&mut reader).await;
    running.stop().await;
    assert_eq!(assert_first_in_order(by_key(&sink)), (100, 0));
    assert_logged_once(&mut reader, 100).await;
}

fn by_key(sink: &ScriptedSink) -> Vec<(String, i64)> {
    sink.accepted().into_iter().map(|event| (event.aggregate_id.unwrap_or_default(), event.row.id)).collect()
}

#[tokio::test]
async fn f19_a_server_that_turns_read_only_is_waited_for() {
    let database = database().await;
    let mut connection = database.connect().await;
    let (_, name) = database.url().rsplit_once('/').unwrap();
    let sink = ScriptedSink::accepting();
    let mut running = Setup::new(&database, vec![("a", sink.clone())]).run();
    load(&mut connection, 10, 2).await;
    until_empty(&mut connection).await;
    sql(&mut connection, format!("alter database {name} set default_transaction_read_only = on")).await;
    sql(&mut connection, TERMINATE).await;
    running.until_not_ready("the database is read-only").await;
    load(&mut connection, 10, 2).await;
    assert_eq!(sink.accepted().len(), 10);
    sql(&mut connection, format!("alter database {name} reset default_transaction_read_only")).await;
    until_empty(&mut connection).await;
    running.stop().await;
    assert_eq!(sink.accepted().len(), 20);
    assert_logged_once(&mut connection, 20).await;
}

#[tokio::test]
async fn f22_a_table_that_is_changed_under_relays_at_work_costs_time_and_nothing_else() {
    let line = Line::new().await;
    let mut connection = line.connect().await;
    let relays = [(); 2].map(|()| line.start(&[("EVENT_OUTBOX_BATCH_SIZE", "50")]));
    let changes = [
        "alter table event_outbox add column note text",
        "alter table event_outbox add column more integer not null default 7",
        // It changes the types that prepared statements return: 0A000, "cached plan must not change result type".
        "alter table event_outbox alter column source type varchar(100)",
        "reindex table concurrently event_outbox",
        "create index concurrently event_outbox_note on event_outbox (note)",
        "drop index event_outbox_note",
        "vacuum full event_outbox",
        "alter table event_processing_log add column note text",
        "alter table event_outbox drop column note",
        "alter table event_outbox alter column source type text",
    ];
    for change in changes {
        load(&mut connection, 1000, 20).await;
        let before = line.length();
        crate::binary::until("they publish", || line.length() > before);
        sql(&mut connection, change).await;
        // A session whose trigger function has a plan for the old column type fails, so it connects again, as an application
        // does.
        connection = line.connect().await;
    }
    until_empty(&mut connection).await;
    let told: String = relays.iter().map(Running::log).collect();
    assert!(told.contains("cached plan must not change result type"), "the fault never happened");
    relays.into_iter().for_each(stop);
    let repeats = line.assert_delivered(1000 * changes.len() as i64).await;
    println!("F22: {repeats} repeats");
}

#[tokio::test]
async fn f22_a_migration_killed_half_way_leaves_whole_steps_and_goes_on_there() {
    let database = empty_database().await;
    let variables = [("DATABASE_URL", database.url()), ("FAILPOINTS", "migrate_step=2*off->1*return(abort)")];
    assert_eq!(finished(&["migrate"], &variables).code, None, "SIGABRT");
    let mut connection = database.connect().await;
    assert_eq!(connection.number("select relay_schema_version()::bigint").await, 2);
    let rest = finished(&["migrate"], &variables[..1]).exited(0).stdout;
    assert!(rest.starts_with("applied 0003_"), "{rest}");
    finished(&["check"], &[variables[0], ("RELAY_STDOUT", "true")]).exited(0);
}

/// The next transaction id and the end of the WAL of a server of the test's own. Reading them changes neither.
async fn footprint(connection: &mut sqlx::PgConnection) -> (i64, i64) {
    let xid = "select pg_snapshot_xmax(pg_current_snapshot())::text::bigint";
    (connection.number(xid).await, connection.number("select (pg_current_wal_insert_lsn() - '0/0')::bigint").await)
}

#[tokio::test]
async fn f27_idle_relays_take_no_transaction_id_and_write_no_wal_and_busy_ones_one_for_each_batch() {
    let server = Server::start(
        "postgres",
        &["--fast", "--set", "autovacuum=off", "--set", "wal_level=minimal", "--set", "max_wal_senders=0"],
    );
    let database = database_on(&server).await;
    let mut connection = database.connect().await;
    let sink = ScriptedSink::accepting();
    let running = || {
        let mut setup = Setup::new(&database, vec![("a", sink.clone() as Arc<_>)]);
        setup.relay.polling_interval = Duration::from_millis(100);
        setup.run()
    };
    let relays = [running(), running(), running()];
    load(&mut connection, 1, 1).await;
    until_empty(&mut connection).await;
    // Within 5 s of its work a relay adds to the tallies.
    eventually("the event is counted", async || count(&mut connection, "event_tally").await > 0).await;
    // The writes of the start are over, and so are hint bits and the list of running transactions.
    sql(&mut connection, "vacuum").await;
    sql(&mut connection, "checkpoint").await;
    let before = footprint(&mut connection).await;
    let asked = "select xact_commit from pg_stat_database where datname = current_database()";
    let commits = connection.number(asked).await;
    tokio::time::sleep(Duration::from_secs(5)).await; // the idle time that is measured
    let after = footprint(&mut connection).await;
    assert_eq!(after, before, "idle relays used transaction ids or wrote WAL");
    eventually("they polled the whole time", async || connection.number(asked).await > commits + 20).await;

    for id in 2..=21 {
        load(&mut connection, 10, 3).await;
        until_empty(&mut connection).await;
        assert_eq!(sink.accepted().len(), (id - 1) * 10 + 1);
    }
    let taken = footprint(&mut connection).await.0 - after.0;
    println!("F27: 20 inserts of 10 events: {taken} transaction ids, {} publish calls", sink.calls());
    // Relays that start together are careful for their first minute: they write a note before each batch, and one after it.
    assert!(
        taken <= 20 + 3 * i64::try_from(sink.calls()).unwrap(),
        "{taken} for 20 inserts and {} batches",
        sink.calls()
    );
    for relay in relays {
        relay.stop().await;
    }
}

/// Creates a login with the rights of `relay_worker` and no others.
async fn worker_of(database: &Database, connection: &mut sqlx::PgConnection) -> String {
    crate::schema::roles::apply(connection).await;
    sql(connection, "create role worker login password 'known' in role relay_worker").await;
    let (_, place) = database.url().rsplit_once('@').unwrap();
    format!("postgres://worker:known@{place}")
}

#[tokio::test]
async fn f28_a_right_taken_away_at_run_time_stops_the_relay_with_words_and_charges_nobody() {
    // The test has its own server, because roles belong to the server.
    let server = Server::start("postgres", &["--fast"]);
    let database = database_on(&server).await;
    let mut connection = database.connect().await;
    let url = worker_of(&database, &mut connection).await;
    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.outbox.url = Secret::inline(&url);
    setup.relay.lanes = 1;
    let mut running = setup.run();
    let mut expected = 0;
    for (right, repeated) in
        [("select on event_outbox", false), ("delete on event_outbox", true), ("insert on event_processing_log", true)]
    {
        load(&mut connection, 10, 2).await;
        until_empty(&mut connection).await;
        sql(&mut connection, format!("revoke {right} from relay_worker")).await;
        load(&mut connection, 10, 2).await;
        running.until_not_ready("deploy/sql/roles.sql has all the relay needs").await;
        let (since, calls) = (Instant::now(), sink.calls());
        while since.elapsed() < Duration::from_secs(1) {
            tokio::time::sleep(Duration::from_millis(50)).await; // the duration of the fault
        }
        println!("F28: without {right}: {} more publish calls", sink.calls() - calls);
        assert_eq!(count(&mut connection, "event_outbox where attempts = 0").await, 10);
        assert_eq!(count(&mut connection, "event_dead_letter").await, 0);
        sql(&mut connection, format!("grant {right} to relay_worker")).await;
        until_empty(&mut connection).await;
        expected += 20 + if repeated { 10 } else { 0 };
        assert_eq!(sink.accepted().len(), expected, "without {right}");
    }
    running.stop().await;
    assert_logged_once(&mut connection, 60).await;
}

#[tokio::test]
async fn f28_without_rights_from_the_start_the_program_says_which_are_missing() {
    let server = Server::start("postgres", &["--fast"]);
    let database = database_on(&server).await;
    let mut connection = database.connect().await;
    let url = worker_of(&database, &mut connection).await;
    sql(&mut connection, "revoke execute on function relay_add_days from relay_worker, public").await;
    let mut running = Running::start(relay(&["run"], &[("DATABASE_URL", &url), ("RELAY_STDOUT", "true")]));
    running.until_log("deploy/sql/roles.sql has all the relay needs");
    sql(&mut connection, "grant execute on function relay_add_days to relay_worker").await;
    running.until_log("\"message\":\"ready\"");
    stop(running);
}
