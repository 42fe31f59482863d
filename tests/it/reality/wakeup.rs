//! Waking relays, when statements around it fail.

use crate::binary::{Running, relay, until};
use crate::harness::{count, emit, eventually};
use crate::servers::database;
use crate::stores::{Postgres, Sqlite, Store};

fn start(url: &str, failpoints: &str) -> Running {
    let variables = [
        ("DATABASE_URL", url),
        ("RELAY_STDOUT", "true"),
        ("EVENT_OUTBOX_POLLING_INTERVAL", "600000"),
        ("FAILPOINTS", failpoints),
    ];
    Running::start(relay(&[], &variables))
}

async fn is_armed_again<S: Store>() {
    let store = S::new().await;
    // The first promotion comes before the first poll.
    let mut relay = start(store.url(), "arm=1*return;promote=1*off->1*return");
    relay.until_log("producers cannot wake this relay");
    relay.until_log("not ready");
    let mut connection = store.connect().await;
    for _ in 0..5 {
        // A poll would find it only after ten minutes.
        emit(&mut connection, "woken", "").await;
        eventually("it is published", async || count(&mut connection, "event_outbox").await == 0).await;
    }
}

#[tokio::test]
async fn f87_a_wake_up_that_failed_to_arm_before_another_failure_is_armed_again() {
    is_armed_again::<Postgres>().await;
    is_armed_again::<Sqlite>().await;
}

#[tokio::test]
async fn f87_a_failure_after_arming_gives_the_sleepers_lock_back() {
    let database = database().await;
    let mut relay = start(database.url(), "promote=1*off->return");
    relay.until_log("not ready");
    let mut connection = database.connect().await;
    let sleepers = "pg_locks where locktype = 'advisory' and mode = 'ExclusiveLock' and objid = 4294967295
                    and database = (select oid from pg_database where datname = current_database())";
    eventually("producers no longer notify", async || count(&mut connection, sleepers).await == 0).await;
    assert!(relay.is_running());
}

#[tokio::test]
async fn f87_maintenance_that_panics_begins_anew() {
    let database = database().await;
    let mut relay = start(database.url(), "maintain=1*panic->1*return");
    relay.until_log("a background task panicked; it is restarted");
    until("it is tried again", || relay.log().contains("a background task failed; it is restarted"));
}
