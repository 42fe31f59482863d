//! A PostgreSQL that restarts, crashes, ends connections, is locked, or cannot be reached.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{CLAIMED, Line, TERMINATE, assert_first_in_order, assert_logged_once, load, stop, until_empty};
use outbox_relay::secret::Secret;
use sqlx::{Connection, PgConnection};

use crate::binary::until;
use crate::harness::{Setup, count, emit, eventually, sql};
use crate::proxy::Proxy;
use crate::scripted::{Gate, ScriptedSink};
use crate::servers::{Database, Server, database, database_on, postgres};
use crate::stores::Client;

#[tokio::test]
async fn f13_restarts_fast_and_immediate_under_load_cost_time_and_nothing_else() {
    const EVENTS: i64 = 2000; // in one insert
    const BATCH: usize = 50;
    const LANES: usize = 3;
    let mut server = Server::start("postgres", &[]);
    let line = Line::from(database_on(&server).await);
    let batch = BATCH.to_string();
    let relays = [(); 3].map(|()| line.start(&[("EVENT_OUTBOX_BATCH_SIZE", &batch)]));
    let ways = ["fast", "immediate", "killed", "fast", "immediate", "fast"];
    let mut slowest = Duration::ZERO;
    for way in ways {
        load(&mut line.connect().await, EVENTS, 50).await;
        let before = line.length();
        until("it publishes", || line.length() > before);
        match way {
            "fast" => server.restart(),
            "killed" => {
                server.kill();
                server.start_again();
            }
            _ => {
                let quit = Command::new("kill").args(["-QUIT", &server.pid().to_string()]).status().unwrap();
                assert!(quit.success());
                let status = format!("/proc/{}/stat", server.pid());
                until("it has ended", || std::fs::read_to_string(&status).is_ok_and(|stat| stat.contains(") Z ")));
                server.start_again();
            }
        }
        let (up, before) = (Instant::now(), line.length());
        let mut connection = line.connect().await;
        if count(&mut connection, "event_outbox").await > 0 {
            until("it publishes again", || line.length() > before);
            slowest = slowest.max(up.elapsed());
        }
    }
    println!("F13: the first event was published at most {slowest:?} after the server was back");
    assert!(slowest > Duration::ZERO, "everything was published before each restart, so this test proves nothing");
    until_empty(&mut line.connect().await).await;
    relays.into_iter().for_each(stop);
    let repeats = line.assert_delivered(EVENTS * ways.len() as i64).await;
    assert!(
        repeats <= ways.len() * 3 * LANES * BATCH,
        "{repeats} repeats: more than a batch for each lane and restart"
    );
}

#[tokio::test]
async fn f15_a_claim_lost_before_its_settle_repeats_its_batch_in_order_and_nothing_else() {
    let database = database().await;
    let mut connection = database.connect().await;
    load(&mut connection, 20, 1).await;
    let (sink, gate) = (ScriptedSink::accepting(), Gate::new());
    sink.hold_at(&gate);
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.relay.batch_events = 5;
    let running = setup.run();
    gate.entered().await;
    sql(&mut connection, TERMINATE).await;
    gate.open(1000);
    until_empty(&mut connection).await;
    running.stop().await;
    let (distinct, repeats) = assert_first_in_order(arrivals(&sink));
    assert_eq!(distinct, 20);
    assert!(repeats <= 5, "{repeats} repeats: more than the batch in flight");
    assert_logged_once(&mut connection, 20).await;
}

#[tokio::test]
async fn f15_another_relay_takes_over_at_once_and_the_zombie_settles_nothing() {
    let database = database().await;
    let mut connection = database.connect().await;
    emit(&mut connection, "e1", "k").await;
    emit(&mut connection, "e2", "k").await;
    let (zombie, gate) = (ScriptedSink::accepting(), Gate::new());
    zombie.hold_at(&gate);
    let mut setup = Setup::new(&database, vec![("a", zombie.clone())]);
    setup.outbox.worker = "zombie".to_owned();
    setup.relay.lanes = 1;
    // The drain below waits as long as its timeout. The zombie's call must not end before that.
    setup.policy.timeout = Duration::from_secs(300);
    let running = setup.run();
    gate.entered().await;

    let heir = ScriptedSink::accepting();
    let held = Setup::new(&database, vec![("a", heir.clone())]).drain().await;
    assert_eq!(held.tally.published, 0, "what another relay holds is not taken");
    sql(&mut connection, TERMINATE).await;
    eventually("the server has noticed", async || count(&mut connection, CLAIMED).await == 0).await;
    assert_eq!(Setup::new(&database, vec![("a", heir.clone())]).drain().await.tally.published, 2);
    gate.open(1000);
    eventually("the zombie has noticed", async || zombie.accepted().len() == 2).await;
    running.stop().await;
    assert_eq!(heir.names(), ["e1", "e2"]);
    assert_eq!(count(&mut connection, "event_processing_log where worker = 'zombie'").await, 0);
    assert_eq!(count(&mut connection, "event_processing_log").await, 2);
}

#[tokio::test]
async fn f15_backends_terminated_over_and_over_lose_nothing_and_keep_order() {
    let database = database().await;
    let mut connection = database.connect().await;
    load(&mut connection, 3000, 50).await;
    let sink = ScriptedSink::accepting();
    let setup = || {
        let mut setup = Setup::new(&database, vec![("a", sink.clone() as Arc<_>)]);
        setup.relay.batch_events = 20;
        setup.run()
    };
    let relays = [setup(), setup()];
    let mut terminated = 0;
    while count(&mut connection, "event_outbox").await > 0 {
        sql(&mut connection, TERMINATE).await;
        terminated += 1;
        tokio::time::sleep(Duration::from_millis(100)).await; // the interval between two faults, not a wait for a condition
    }
    for relay in relays {
        relay.stop().await;
    }
    assert!(terminated > 1, "the fault never happened");
    assert_eq!(assert_first_in_order(arrivals(&sink)).0, 3000);
    assert_logged_once(&mut connection, 3000).await;
}

/// The keys and ids of the events that a sink accepted.
pub(super) fn arrivals(sink: &ScriptedSink) -> Vec<(String, i64)> {
    sink.accepted().into_iter().map(|event| (event.aggregate_id.unwrap_or_default(), event.row.id)).collect()
}

/// Starts a relay with one lane whose first call is blocked by the gate.
pub(super) async fn publishing(
    database: &Database,
    change: impl FnOnce(&mut Setup<Database>),
) -> (Arc<ScriptedSink>, Arc<Gate>, crate::harness::Running) {
    let (sink, gate) = (ScriptedSink::accepting(), Gate::new());
    sink.hold_at(&gate);
    let mut setup = Setup::new(database, vec![("a", sink.clone())]);
    setup.relay.lanes = 1;
    change(&mut setup);
    let running = setup.run();
    gate.entered().await;
    (sink, gate, running)
}

#[tokio::test]
async fn f16_the_victim_of_a_deadlock_repeats_its_batch_whole() {
    let database = database().await;
    let mut connection = database.connect().await;
    load(&mut connection, 10, 1).await;
    // A session that has waited this long checks for a deadlock and is the victim. The administrator never checks.
    let mut admin = database.connect().await;
    sql(&mut admin, "set deadlock_timeout = '1 h'; begin; update event_outbox set last_error = 'x' where id = 10")
        .await;
    let (sink, gate, mut running) = publishing(&database, |_| {}).await;
    gate.open(1000);
    let waits = "pg_stat_activity where application_name = 'relay' and datname = current_database() and wait_event_type = 'Lock'";
    eventually("the settle waits for the administrator", async || count(&mut connection, waits).await == 1).await;
    let rest = tokio::spawn(async move {
        sql(&mut admin, "update event_outbox set last_error = 'x' where id < 10").await;
        sql(&mut admin, "commit").await;
    });
    running.until_not_ready("deadlock detected").await;
    rest.await.unwrap();
    until_empty(&mut connection).await;
    running.stop().await;
    assert_eq!(assert_first_in_order(arrivals(&sink)), (10, 10));
    assert_logged_once(&mut connection, 10).await;
}

#[tokio::test]
async fn f16_a_server_that_is_serializable_by_default_and_its_administrators_disturb_nothing() {
    let database = database().await;
    let mut connection = database.connect().await;
    let (_, name) = database.url().rsplit_once('/').unwrap();
    sql(&mut connection, format!("alter database {name} set default_transaction_isolation = 'serializable'")).await;
    load(&mut connection, 2000, 20).await;
    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.relay.batch_events = 20;
    let running = setup.run();
    let mut admin = database.connect().await; // it is serializable too
    while count(&mut connection, "event_outbox").await > 0 {
        // The rows may be gone or be settled at the same time. This transaction may fail.
        let touch = "begin; select count(*) from event_outbox; update event_outbox set last_error = 'x' where id % 7 = 0; commit";
        if admin.execute(touch).await.is_err() {
            sql(&mut admin, "rollback").await;
        }
        tokio::time::sleep(Duration::from_millis(5)).await; // the interval between two transactions
    }
    running.stop().await;
    assert_eq!(assert_first_in_order(arrivals(&sink)).0, 2000);
    assert_eq!(count(&mut connection, "event_outbox where attempts > 0").await, 0);
    assert_logged_once(&mut connection, 2000).await;
}

#[tokio::test]
async fn f16_whatever_a_settle_fails_with_it_is_repeated_whole_or_written_again_and_nobody_pays() {
    // The batch is published again, unless the error is about what the settle wrote: then the relay keeps the claim.
    let repeated = ["40001", "40P01", "55P03", "57014", "53100", "53200", "58030", "25P02", "42501", "XX000"];
    let kept = ["0A000", "22001", "23514", "P0001"];
    for (sqlstate, calls) in repeated.map(|state| (state, 2)).into_iter().chain(kept.map(|state| (state, 1))) {
        let database = database().await;
        let mut connection = database.connect().await;
        load(&mut connection, 10, 2).await;
        // A sequence is not rolled back, so the failure happens once. The proof before the first claim is not refused.
        let refuse = format!(
            "create sequence failures;
             create function refuse() returns trigger language plpgsql as
             $$ begin if new.event_type <> 'relay.proof' and nextval('failures') = 7 then raise exception 'refused' using errcode = '{sqlstate}'; end if; return new; end $$;
             create trigger refuse before insert on event_processing_log for each row execute function refuse()"
        );
        sql(&mut connection, refuse).await;
        let sink = ScriptedSink::accepting();
        let running = Setup::new(&database, vec![("a", sink.clone())]).run();
        until_empty(&mut connection).await;
        running.stop().await;
        assert!(connection.number("select last_value from failures").await > 7, "{sqlstate} never happened");
        let (distinct, repeats) = assert_first_in_order(arrivals(&sink));
        assert_eq!((distinct, sink.calls()), (10, calls), "{sqlstate}");
        assert_eq!(repeats, 10 * (calls - 1), "{sqlstate}");
        assert_logged_once(&mut connection, 10).await;
    }
}

#[tokio::test]
async fn f17_a_locked_table_and_the_roles_timeouts_cost_time_and_nobody_pays() {
    for (table, setting, calls) in [
        ("event_outbox", "lock_timeout", 0),
        ("event_outbox", "statement_timeout", 0),
        ("event_processing_log", "lock_timeout", 1),
        ("event_processing_log", "statement_timeout", 1),
    ] {
        let database = database().await;
        let mut connection = database.connect().await;
        let (_, name) = database.url().rsplit_once('/').unwrap();
        // The relay overrides these settings: a claim gives up after seconds, and a settle waits.
        sql(&mut connection, format!("alter database {name} set {setting} = '200 ms'")).await;
        load(&mut connection, 20, 3).await;
        let sink = ScriptedSink::accepting();
        let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
        setup.relay.lanes = 1;
        let mut admin = database.connect().await;
        sql(&mut admin, "set statement_timeout = 0").await;
        let gate = Gate::new();
        sink.hold_at(&gate);
        if calls == 0 {
            sql(&mut admin, format!("begin; lock table {table} in access exclusive mode")).await;
        }
        let mut running = setup.run();
        if calls == 0 {
            running.until_not_ready("lock timeout").await;
        } else {
            gate.entered().await;
            sql(&mut admin, format!("begin; lock table {table} in access exclusive mode")).await;
        }
        gate.open(100);
        let failed = Instant::now();
        while failed.elapsed() < Duration::from_secs(2) {
            assert_eq!(sink.calls(), calls, "{table}: events were published again although nothing could be recorded");
            tokio::time::sleep(Duration::from_millis(50)).await; // the duration of the fault
        }
        sql(&mut admin, "rollback").await;
        until_empty(&mut connection).await;
        running.stop().await;
        assert_eq!(assert_first_in_order(arrivals(&sink)), (20, 0), "{table}, {setting}");
        assert_logged_once(&mut connection, 20).await;
    }
}

#[tokio::test]
async fn f17_a_lock_that_waits_for_a_publish_comes_right_after_its_settle() {
    let database = database().await;
    let mut connection = database.connect().await;
    load(&mut connection, 20, 3).await;
    let (sink, gate, running) = publishing(&database, |_| {}).await;
    let mut admin = database.connect().await;
    let locked = tokio::spawn(async move {
        sql(&mut admin, "alter table event_outbox add column note text").await;
    });
    let waits = "pg_locks where mode = 'AccessExclusiveLock' and relation = 'event_outbox'::regclass and not granted";
    eventually("the change waits for the claim", async || count(&mut connection, waits).await == 1).await;
    gate.open(1000);
    locked.await.unwrap();
    until_empty(&mut connection).await;
    running.stop().await;
    assert_eq!(assert_first_in_order(arrivals(&sink)), (20, 0));
    assert_logged_once(&mut connection, 20).await;
}

#[tokio::test]
async fn f21_too_many_connections_and_a_changed_password_are_waited_out_and_charge_nobody() {
    let settings = ["--fast", "--set", "max_connections=10", "--set", "superuser_reserved_connections=4"];
    let server = Server::start("postgres", &settings);
    let database = database_on(&server).await;
    let mut connection = database.connect().await;
    crate::schema::roles::apply(&mut connection).await;
    sql(
        &mut connection,
        "create role worker login password 'old' in role relay_worker; create role others login password 'x'",
    )
    .await;
    let as_user = |user: &str, password: &str| {
        let (_, place) = database.url().rsplit_once('@').unwrap();
        format!("postgres://{user}:{password}@{place}")
    };
    let mut crowd = Vec::new();
    while let Ok(one) = PgConnection::connect(&as_user("others", "x")).await {
        crowd.push(one);
    }
    assert!(!crowd.is_empty());
    load(&mut connection, 50, 5).await;
    let url = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(url.path(), as_user("worker", "old")).unwrap();
    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.outbox.url = Secret::File(url.path().to_owned());
    setup.relay.lanes = 1; // another lane might just be connecting when the password changes
    let mut running = setup.run();
    running.until_not_ready("raise max_connections, or lower RELAY_LANES").await;
    assert_eq!(sink.calls(), 0);
    drop(crowd);
    until_empty(&mut connection).await;

    sql(&mut connection, "alter role worker password 'new'").await;
    sql(&mut connection, TERMINATE).await;
    running.until_not_ready("password authentication failed").await;
    load(&mut connection, 50, 5).await;
    assert_eq!(count(&mut connection, "event_outbox where attempts = 0 and status = 'pending'").await, 50);
    std::fs::write(url.path(), as_user("worker", "new")).unwrap();
    until_empty(&mut connection).await;
    running.stop().await;
    assert_eq!(assert_first_in_order(arrivals(&sink)).0, 100);
    assert_logged_once(&mut connection, 100).await;
}

#[tokio::test]
async fn f24_what_is_committed_late_with_a_low_id_is_picked_up() {
    let database = database().await;
    let mut connection = database.connect().await;
    let mut late = database.connect().await;
    sql(
        &mut late,
        "begin; insert into event_outbox (event_type, aggregate_id) values ('late', 'k'), ('late', 'other')",
    )
    .await;
    let sink = ScriptedSink::accepting();
    let running = Setup::new(&database, vec![("a", sink.clone())]).run();
    for index in 0..200 {
        emit(&mut connection, "early", &format!("{}", index % 10)).await;
    }
    let (stopping, writers) = (Arc::new(AtomicBool::new(false)), 3);
    let others: Vec<_> = (0..writers)
        .map(|_| {
            let (url, stopping) = (database.url().to_owned(), Arc::clone(&stopping));
            tokio::spawn(async move {
                let mut connection = PgConnection::connect(&url).await.unwrap();
                let mut committed = 0;
                while !stopping.load(Ordering::Relaxed) {
                    // Each transaction commits after others that began later.
                    sql(&mut connection, "begin; insert into event_outbox (event_type) values ('a'), ('a')").await;
                    tokio::time::sleep(Duration::from_millis(fastrand::u64(0..30))).await;
                    sql(&mut connection, "commit").await;
                    committed += 2;
                }
                committed
            })
        })
        .collect();
    eventually("what came later was published", async || sink.accepted().len() > 400).await;
    assert!(!sink.names().contains(&"late".to_owned()));
    sql(&mut late, "commit").await;
    stopping.store(true, Ordering::Relaxed);
    let mut events = 202;
    for other in others {
        events += other.await.unwrap();
    }
    until_empty(&mut connection).await;
    running.stop().await;
    assert_eq!(sink.names().iter().filter(|name| *name == "late").count(), 2);
    assert_eq!(sink.accepted().len(), usize::try_from(events).unwrap(), "every event arrived exactly once");
    assert_logged_once(&mut connection, events).await;
}

#[tokio::test]
async fn f31_a_host_that_vanished_without_a_word_is_replaced_after_the_servers_timeout() {
    let line = Line::new().await;
    let mut connection = line.connect().await;
    let proxy = Proxy::to(postgres().port());
    let through = proxy.url(line.database.url(), postgres().port());
    let settings = [("EVENT_DEFAULT_TIMEOUT", "1000"), ("RELAY_LANES", "1")];
    let mut vanished = line.start(&[
        settings[0],
        settings[1],
        ("DATABASE_URL", &through),
        ("FAILPOINTS", "before_publish=1*sleep(1500)"),
    ]);
    vanished.until_log("\"message\":\"ready\"");
    load(&mut connection, 50, 5).await;
    eventually("it holds a claim", async || count(&mut connection, CLAIMED).await > 0).await;
    proxy.stall(true);
    let (since, heir) = (Instant::now(), line.start(&settings));
    until_empty(&mut connection).await;
    println!("F31: taken over {:?} after the host vanished, by the server's timeout of 16 s", since.elapsed());
    let worker = format!("event_processing_log where worker like '%:{}'", vanished.id());
    assert_eq!(count(&mut connection, &worker).await, 0, "a relay that cannot be reached settled");
    // The server is back, and the relay finds its connections closed.
    proxy.heal();
    load(&mut connection, 50, 5).await;
    until_empty(&mut connection).await;
    stop(vanished);
    stop(heir);
    let repeats = line.assert_delivered(100).await;
    assert!(repeats <= 50, "{repeats} repeats");
}
