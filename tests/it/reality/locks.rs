//! Locks of other sessions: on relay's tables, and on the relay's advisory locks.

use crate::binary::{PATIENCE, Running, finished, relay};
use crate::harness::{count, emit, eventually, sql};
use crate::servers::{Database, database};

const STDOUT: (&str, &str) = ("RELAY_STDOUT", "true");

fn daemon(database: &Database) -> Running {
    Running::start(relay(&[], &[("DATABASE_URL", database.url()), STDOUT]))
}

/// `relay check` fails with a line that contains each of these parts.
fn check_fails(database: &Database, parts: &[&str]) {
    let check = finished(&["check"], &[("DATABASE_URL", database.url()), STDOUT]).exited(1);
    let failed: Vec<&str> = check.stdout.lines().filter(|line| line.starts_with("FAIL")).collect();
    assert_eq!(failed.len(), 1, "{}", check.stdout);
    for part in parts {
        assert!(failed[0].contains(part), "{part:?} is missing in: {}", failed[0]);
    }
}

#[tokio::test]
async fn f75_who_locks_a_table_is_named_in_log_and_check_until_it_ends() {
    let database = database().await;
    for table in ["event_outbox", "event_processing_log", "event_dead_letter"] {
        let mut blocker = database.connect().await;
        sql(&mut blocker, "set application_name = 'a migration'").await;
        let pid = sqlx::query_scalar::<_, i32>("select pg_backend_pid()").fetch_one(&mut blocker).await.unwrap();
        sql(&mut database.connect().await, "truncate event_outbox").await;
        emit(&mut database.connect().await, "waits", "").await;
        sql(&mut blocker, format!("begin; lock table {table} in access exclusive mode")).await;
        let mut relay = daemon(&database);
        let parts =
            [&format!("{table} is locked (AccessExclusiveLock)"), &format!("pid {pid}"), "application \"a migration\""];
        relay.until_log("\"cause\":\"table_locked\"");
        for part in parts {
            assert!(relay.log().replace("\\\"", "\"").contains(part), "{part:?} is missing in:\n{}", relay.log());
        }
        check_fails(&database, &parts);
        sql(&mut blocker, "commit").await;
        relay.until_log("over: ");
        let mut look = database.connect().await;
        eventually("the event is published", async || count(&mut look, "event_outbox").await == 0).await;
    }
}

#[tokio::test]
async fn f75_a_strangers_hold_of_the_relays_advisory_locks_is_named() {
    let database = database().await;
    let hold = "pg_advisory{}_lock('event_outbox'::regclass::oid::int, p) from generate_series(0, 639) p";
    for (begin, lock) in [("", ""), ("begin; ", ""), ("begin; ", "_xact")] {
        let mut stranger = database.connect().await;
        sql(&mut stranger, "set application_name = 'a stranger'").await;
        sql(&mut stranger, format!("{begin}select {}", hold.replace("{}", lock))).await;
        emit(&mut database.connect().await, "waits", "").await;
        let mut relay = daemon(&database);
        relay.until_log("\"cause\":\"partitions_held\"");
        assert!(relay.log().contains("a stranger"), "{}", relay.log());
        check_fails(&database, &["640 of 640 partitions of event_outbox are held by", "a stranger"]);
        drop(stranger);
        relay.until_log("over: ");
        let mut look = database.connect().await;
        eventually("the event is published", async || count(&mut look, "event_outbox").await == 0).await;
    }
}

/// While a statement waits, the server does not check that its client still exists. The statement's timeout ends it.
#[tokio::test(flavor = "multi_thread")]
async fn f75_a_relay_that_is_killed_while_its_statement_waits_leaves_no_session_behind() {
    // A claim waits for the first table, a settle for the second.
    let killed = ["event_outbox", "event_processing_log"].map(|table| async move {
        let database = database().await;
        let (mut blocker, mut look) = (database.connect().await, database.connect().await);
        emit(&mut look, "waits", "").await;
        sql(&mut blocker, format!("begin; lock table {table} in exclusive mode")).await;
        let mut relay = daemon(&database);
        let sessions = "pg_stat_activity where application_name = 'relay' and datname = current_database()";
        let waiting = format!("{sessions} and wait_event_type = 'Lock'");
        eventually("its statement waits", async || count(&mut look, &waiting).await > 0).await;
        // The sessions that the relay opened meanwhile do not accumulate either.
        tokio::task::block_in_place(|| relay.until_log("\"cause\":\"table_locked\""));
        assert!(count(&mut look, &waiting).await <= 3);
        relay.signal("KILL");
        drop(relay);
        let deadline = std::time::Instant::now() + PATIENCE;
        while count(&mut look, sessions).await > 0 {
            assert!(std::time::Instant::now() < deadline, "a session is left that waits for {table}");
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        sql(&mut blocker, "rollback").await;
    });
    futures_util::future::join_all(killed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f75_who_locks_a_small_table_or_a_sequence_is_named_with_what_waits() {
    let database = database().await;
    let locks = [
        ("lock table event_relay in access exclusive mode", "event_relay", "no relay starts until it ends"),
        ("lock table event_relay_run in access exclusive mode", "event_relay_run", "no relay starts until it ends"),
        ("lock table event_crash_suspect in share mode", "event_crash_suspect", "no relay starts until it ends"),
        ("alter sequence event_relay_changes increment 1", "event_relay_changes", "no relay starts until it ends"),
        ("alter sequence event_outbox_epoch increment 1", "event_outbox_epoch", "events wait until it ends"),
        ("alter sequence event_outbox_moves increment 1", "event_outbox_moves", "what is delayed, tried again"),
        ("alter sequence event_outbox_id_seq increment 1", "event_outbox_id_seq", "nobody can insert an event"),
    ];
    emit(&mut database.connect().await, "waits", "").await;
    let mut blockers = Vec::new();
    for (lock, name, waits) in locks {
        let mut blocker = database.connect().await;
        sql(&mut blocker, format!("set application_name = 'who locks {name}'; begin; {lock}")).await;
        let pid = sqlx::query_scalar::<_, i32>("select pg_backend_pid()").fetch_one(&mut blocker).await.unwrap();
        blockers.push((blocker, name, waits, pid));
    }
    let once = finished(&["--once"], &[("DATABASE_URL", database.url()), STDOUT]).exited(1);
    assert!(once.stderr.contains("`relay check` names it"), "{}", once.stderr);
    let mut relay = daemon(&database);
    let check = finished(&["check"], &[("DATABASE_URL", database.url()), STDOUT]).exited(1).stdout;
    let failed = check.lines().filter(|line| line.starts_with("FAIL")).count();
    assert_eq!(failed, locks.len(), "{check}");
    for (_, name, waits, pid) in &blockers {
        let is_named = |text: &str| {
            text.lines().any(|line| {
                line.contains(&format!("{name} is locked ("))
                    && line.contains(&format!("pid {pid}, application "))
                    && line.contains(waits)
                    && line.contains(&format!("select pg_catalog.pg_terminate_backend({pid})"))
            })
        };
        assert!(is_named(&check), "{name} in {check}");
        tokio::task::block_in_place(|| relay.until_log(&format!("{name} is locked (")));
        assert!(is_named(&relay.log()), "{name} in {}", relay.log());
    }
    drop(blockers);
    let mut look = database.connect().await;
    eventually("the event is published", async || count(&mut look, "event_outbox").await == 0).await;
}

#[tokio::test]
async fn f75_a_lock_on_the_history_is_told_only_where_the_relay_keeps_one() {
    let database = database().await;
    emit(&mut database.connect().await, "goes", "").await;
    let mut blocker = database.connect().await;
    sql(&mut blocker, "begin; lock table event_history in access exclusive mode").await;
    let history = ("EVENT_HISTORY_ENABLED", "true");
    let told = finished(&["check"], &[("DATABASE_URL", database.url()), STDOUT, history]).exited(1).stdout;
    assert!(told.contains("event_history is locked (AccessExclusiveLock) by the session with pid"), "{told}");
    check_is_well_and_once_publishes(&database).await;
}

async fn check_is_well_and_once_publishes(database: &Database) {
    finished(&["check"], &[("DATABASE_URL", database.url()), STDOUT]).exited(0);
    finished(&["--once"], &[("DATABASE_URL", database.url()), STDOUT]).exited(0);
    assert_eq!(count(&mut database.connect().await, "event_outbox").await, 0);
}
