//! F08: an event that crashes the relay each time it is published.

use crate::binary::{Running, relay, until};
use crate::harness::{column, count, sql};
use crate::servers::{database, redis};
use crate::stores::{Sqlite, Store};
use crate::stream;

const POISON: &str = "kills.the.relay";

/// Starts relays one after the other, as a process manager does, until one exits by itself. Returns how many crashed.
fn restart_until_one_lives(variables: &[(&str, &str)]) -> usize {
    let failpoint = format!("crash_on_event=return({POISON})");
    let mut variables = variables.to_vec();
    variables.push(("FAILPOINTS", &failpoint));
    for crashes in 0..20 {
        let ended = Running::start(relay(&["--once"], &variables)).finish();
        if ended.code.is_some() {
            ended.exited(3).says(&["relay_crashed"]); // 3: something was dead-lettered
            return crashes;
        }
    }
    panic!("still crashing after 20 starts");
}

#[tokio::test]
async fn f08_an_event_that_kills_the_relay_is_isolated_and_dead_lettered_after_a_few_restarts() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        format!(
            "insert into event_outbox (event_type, aggregate_type, aggregate_id)
             select case i when 700 then '{POISON}' else 'ok' end, 't', (i % 7)::text from generate_series(1, 2000) i"
        ),
    )
    .await;
    let name = "crash:loop";
    let crashes = restart_until_one_lives(&[
        ("DATABASE_URL", database.url()),
        ("REDIS_URL", redis().url()),
        ("RELAY_REDIS_STREAM", name),
        ("RELAY_LOG", "warn"),
    ]);
    assert!((3..=6).contains(&crashes), "{crashes} crashes");
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
    let dead = column(&mut connection, "select event_type || ' ' || error_code from event_dead_letter").await;
    assert_eq!(dead, [format!("{POISON} relay_crashed")]);
    assert_eq!(stream::length(&mut stream::connect(redis().url()), name), 1999, "all others, each once");
    assert_eq!(
        count(&mut connection, "event_crash_suspect where event_id <> (select event_id from event_dead_letter)").await,
        0
    );
}

#[tokio::test]
async fn f08_the_same_from_a_sqlite_file() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    let numbers = Sqlite::numbers(300);
    sql(
        &mut connection,
        format!(
            "insert into event_outbox (event_type) select case i when 70 then '{POISON}' else 'ok' end from ({numbers})"
        ),
    )
    .await;
    let crashes =
        restart_until_one_lives(&[("DATABASE_URL", store.url()), ("RELAY_STDOUT", "true"), ("RELAY_LOG", "warn")]);
    assert!((3..=6).contains(&crashes), "{crashes} crashes");
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
    assert_eq!(count(&mut connection, "event_dead_letter").await, 1);
    assert_eq!(count(&mut connection, "event_processing_log where status = 'published'").await, 299);
}

#[tokio::test]
async fn f08_relays_that_end_in_good_order_note_nothing_of_their_events() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(&mut connection, "insert into event_outbox (event_type) select 'ok' from generate_series(1, 10)").await;
    // An insert into event_crash_suspect fails.
    sql(
        &mut connection,
        "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'noted'; end $$;
         create trigger refuse before insert on event_crash_suspect for each statement execute function refuse()",
    )
    .await;
    let variables = [("DATABASE_URL", database.url()), ("RELAY_STDOUT", "true"), ("RELAY_LOG", "info")];
    for _ in 0..2 {
        sql(&mut connection, "insert into event_outbox (event_type) values ('ok')").await;
        crate::binary::finished(&["--once"], &variables).exited(0);
    }
    let mut running = Running::start(relay(&[], &variables));
    sql(&mut connection, "select emit_event('ok')").await;
    until("published", || running.output().lines().count() == 1);
    assert!(running.is_running());
    running.signal("TERM");
    running.finish().exited(0);
    assert_eq!(count(&mut connection, "event_relay_run").await, 0);
}
