//! `relay --once` while another relay holds the events.

use std::fs::File;
use std::io::Write;
use std::time::Duration;

use crate::binary::{Running, finished, relay, until};
use crate::harness::{count, emit, eventually, sql};
use crate::servers::{Database, database};
use crate::stores::{Client, Sqlite, Store};

const STDOUT: (&str, &str) = ("RELAY_STDOUT", "true");

/// Freezes a relay's process.
fn freeze(relay: &Running) {
    relay.signal("STOP");
}

#[tokio::test]
async fn f82_once_ends_with_3_and_names_a_hung_relay_that_holds_what_is_due() {
    let database = database().await;
    let mut connection = database.connect().await;
    emit(&mut connection, "held", "k").await;
    let named = format!("{}?application_name=hung", database.url());
    let variables = [("DATABASE_URL", named.as_str()), STDOUT, ("FAILPOINTS", "before_publish=sleep(600000)")];
    let hung = Running::start(relay(&[], &variables));
    let claims = "pg_locks where locktype = 'advisory' and objid < 640 and objsubid = 2
                  and database = (select oid from pg_database where datname = current_database())";
    eventually("it has claimed", async || count(&mut connection, claims).await > 0).await;
    freeze(&hung);
    let variables = [("DATABASE_URL", database.url()), STDOUT, ("EVENT_DEFAULT_TIMEOUT", "2000")];
    let once = finished(&["--once"], &variables).exited(3);
    assert_eq!(once.stdout, "");
    let last = once.stderr.lines().last().unwrap();
    for part in ["held_by", "pid ", "hung", "since "] {
        assert!(last.contains(part), "{part:?} is missing in: {last}");
    }
    hung.signal("CONT");
}

#[tokio::test]
async fn f82_once_beside_a_relay_that_settles_what_is_due_ends_with_0() {
    let database = database().await;
    let mut connection = database.connect().await;
    emit(&mut connection, "held", "k").await;
    let variables = [("DATABASE_URL", database.url()), STDOUT, ("FAILPOINTS", "before_publish=1*sleep(3000)")];
    let slow = Running::start(relay(&[], &variables));
    let claims = "pg_locks where locktype = 'advisory' and objid < 640 and objsubid = 2
                  and database = (select oid from pg_database where datname = current_database())";
    eventually("it has claimed", async || count(&mut connection, claims).await > 0).await;
    let once = finished(&["--once"], &[("DATABASE_URL", database.url()), STDOUT]).exited(0);
    assert_eq!(once.stdout, "");
    assert_eq!(count(&mut connection, "event_outbox").await, 0, "it waited for the other relay");
    // If all goes well and a producer goes on, the run does not wait for later events.
    drop(slow);
    sql(&mut connection, "insert into event_outbox (event_type) select 'a' from generate_series(1, 10)").await;
    finished(&["--once"], &[("DATABASE_URL", database.url()), STDOUT]).exited(0);
}

#[tokio::test]
async fn f82_once_on_a_file_that_a_hung_relay_owns_ends_with_3_and_names_it() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    emit(&mut connection, "held", "k").await;
    let variables = [("DATABASE_URL", store.url()), STDOUT, ("FAILPOINTS", "before_publish=sleep(600000)")];
    let hung = Running::start(relay(&[], &variables));
    let mut lock = store.path().into_os_string();
    lock.push("-relay");
    until("it owns the file", || std::fs::read_to_string(&lock).is_ok_and(|noted| noted.contains("since")));
    // It must not be frozen in the middle of a write, which would block every writer.
    let mut writer = store.connect_patiently(Duration::ZERO).await;
    loop {
        freeze(&hung);
        if writer.execute("begin immediate; rollback").await.is_ok() {
            break;
        }
        hung.signal("CONT");
    }
    let variables = [("DATABASE_URL", store.url()), STDOUT, ("EVENT_DEFAULT_TIMEOUT", "2000")];
    let once = finished(&["--once"], &variables).exited(3);
    let last = once.stderr.lines().last().unwrap();
    assert!(last.contains(&format!(":{}, since", hung.id())), "{last}");
    // A relay that stands by and a check report it as soon as the hung relay's time is over.
    let mut standing_by = Running::start(relay(&[], &variables));
    standing_by.until_log("\"cause\":\"not_taken\"");
    let who = format!(":{}, since", hung.id());
    let check = finished(&["check"], &variables).exited(1);
    let failed: Vec<&str> = check.stdout.lines().filter(|line| line.starts_with("FAIL")).collect();
    assert_eq!(failed.len(), 1, "{}", check.stdout);
    for said in [failed[0], &standing_by.log()] {
        assert!(said.contains("nobody takes it") && said.contains(&who), "{said}");
    }
    standing_by.signal("KILL");
    drop(standing_by);
    hung.signal("KILL");
    drop(hung);
    assert_eq!(finished(&["--once"], &variables).exited(0).stdout.lines().count(), 1);
    // The lock may be held by a program that wrote no name, such as a relay of an earlier version.
    emit(&mut connection, "held", "k").await;
    let mut file = File::options().write(true).truncate(true).open(&lock).unwrap();
    file.flush().unwrap();
    file.lock().unwrap();
    finished(&["--once"], &variables).exited(3).says(&["one that did not note its name"]);
}

#[tokio::test]
async fn f82_nothing_due_beside_an_owner_is_no_alarm() {
    let store = Sqlite::new().await;
    let mut owner = Running::start(relay(&[], &[("DATABASE_URL", store.url()), STDOUT]));
    owner.until_log("ready");
    finished(&["--once"], &[("DATABASE_URL", store.url()), STDOUT]).exited(0);
    drop(owner);
    let database: Database = database().await;
    finished(&["--once"], &[("DATABASE_URL", database.url()), STDOUT]).exited(0);
}
