//! `relay --once`.

use std::process::Stdio;

use serde_json::Value;

use super::STDOUT;
use crate::binary::{Running, finished, relay};
use crate::harness::{column, count, sql};
use crate::servers::{database, redis};
use crate::stream;

/// No server listens there.
const REFUSED: (&str, &str) = ("REDIS_URL", "redis://127.0.0.1:1");

/// Emits events without a key.
fn emit(count: usize) -> String {
    format!("select emit_event('a') from generate_series(1, {count})")
}

#[tokio::test]
async fn standard_output_has_one_cloudevent_a_line_and_nothing_else() {
    let database = database().await;
    sql(
        &mut database.connect().await,
        r#"select emit_event('order.created', jsonb_build_object('n', n, 'text', E'two\nlines'), 'order', '42',
                             headers => '{"tenant": "acme"}') from generate_series(1, 250) n"#,
    )
    .await;
    let drained = finished(&["--once"], &[("DATABASE_URL", database.url()), STDOUT, ("RELAY_LOG", "trace")]).exited(0);
    let events: Vec<Value> = drained.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(events.len(), 250);
    for (event, n) in events.iter().zip(1..) {
        assert_eq!(event["specversion"], "1.0");
        assert_eq!(event["data"]["n"], n, "the events of a key arrived in order");
        assert_eq!(event["subject"], "42");
        assert_eq!(event["partitionkey"], "order:42");
        assert_eq!(event["tenant"], "acme");
    }
    assert!(!drained.stderr.contains("specversion"), "{}", drained.stderr);
}

#[tokio::test]
async fn with_nothing_due_it_ends_with_0() {
    let database = database().await;
    let variables = [("DATABASE_URL", database.url()), STDOUT];
    assert_eq!(finished(&["--once"], &variables).exited(0).stdout, "");
    sql(&mut database.connect().await, "select emit_event('later', delay => '1 hour')").await;
    assert_eq!(finished(&["run", "--once"], &variables).exited(0).stdout, "");
    // When nothing is due, it does not matter that a destination is down.
    finished(&["--once"], &[("DATABASE_URL", database.url()), REFUSED])
        .exited(0)
        .says(&["destination not reached yet"]);
    assert_eq!(count(&mut database.connect().await, "event_outbox").await, 1);
}

#[tokio::test]
async fn with_its_destination_down_it_ends_with_3_and_charges_nobody() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(&mut connection, emit(100)).await;
    let ended = finished(&["--once"], &[("DATABASE_URL", database.url()), REFUSED]).exited(3);
    ended.says(&["destination down, breaker open", "Connection refused"]);
    assert_eq!(count(&mut connection, "event_outbox where attempts = 0 and status = 'pending'").await, 100);
    assert_eq!(count(&mut connection, "event_dead_letter").await, 0);
}

#[tokio::test]
async fn one_destination_down_of_two_ends_with_3_and_holds_up_only_itself() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(&mut connection, emit(100)).await;
    let drained = finished(&["--once"], &[("DATABASE_URL", database.url()), STDOUT, REFUSED]).exited(3);
    assert_eq!(drained.stdout.lines().count(), 100);
    let name = "cli:once:two";
    let up = [("DATABASE_URL", database.url()), STDOUT, ("REDIS_URL", redis().url()), ("RELAY_REDIS_STREAM", name)];
    let drained = finished(&["--once"], &up).exited(0);
    assert_eq!(drained.stdout, "", "they had been delivered there before");
    assert_eq!(stream::length(&mut stream::connect(redis().url()), name), 100);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
}

#[tokio::test]
async fn a_dead_letter_or_a_retry_to_come_ends_it_with_3() {
    let database = database().await;
    let mut connection = database.connect().await;
    let mut redis_connection = stream::connect(redis().url());
    redis::cmd("SET").arg("cli:once:bad").arg("x").exec(&mut redis_connection).unwrap();
    sql(&mut connection, "select emit_event('bad'), emit_event('good')").await;
    let variables = [
        ("DATABASE_URL", database.url()),
        ("REDIS_URL", redis().url()),
        ("RELAY_REDIS_STREAM", "cli:once:{event_type}"),
        ("EVENT_DEFAULT_MAX_RETRIES", "1"),
        ("EVENT_DEFAULT_BACKOFF_MS", "3600000"),
    ];
    finished(&["--once"], &variables).exited(3).says(&["it will be tried again", "WRONGTYPE"]);
    finished(&["--once"], &variables).exited(3); // it still waits
    assert_eq!(count(&mut connection, "event_dead_letter").await, 0);
    sql(&mut connection, "update event_outbox set available_at = now()").await;
    finished(&["--once"], &variables).exited(3).says(&["event dead-lettered", "WRONGTYPE"]);
    finished(&["--once"], &variables).exited(0); // the run before reported the dead letter
    assert_eq!(stream::length(&mut redis_connection, "cli:once:good"), 1);
    let log = "select concat_ws(' ', event_type, attempt, status) from event_processing_log order by 1";
    assert_eq!(column(&mut connection, log).await, ["bad 1 failed", "bad 2 dead_lettered", "good 1 published"]);
}

#[tokio::test]
async fn a_destination_that_is_set_up_wrongly_ends_it_with_3() {
    let database = database().await;
    let mut connection = database.connect().await;
    let name = "cli:once:text";
    redis::cmd("SET").arg(name).arg("x").exec(&mut stream::connect(redis().url())).unwrap();
    sql(&mut connection, emit(1)).await;
    let variables = [("DATABASE_URL", database.url()), ("REDIS_URL", redis().url()), ("RELAY_REDIS_STREAM", name)];
    finished(&["--once"], &variables).exited(3).says(&["destination misconfigured", "holds a string, not a stream"]);
    assert_eq!(count(&mut connection, "event_outbox where attempts = 0").await, 1);
}

#[tokio::test]
async fn f12_two_drains_at_a_time_share_the_work() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(&mut connection, emit(5000)).await;
    let name = "cli:once:both";
    let variables = [
        ("DATABASE_URL", database.url()),
        ("REDIS_URL", redis().url()),
        ("RELAY_REDIS_STREAM", name),
        ("EVENT_OUTBOX_BATCH_SIZE", "100"),
    ];
    let both = [(); 2].map(|()| Running::start(relay(&["--once"], &variables)));
    for one in both {
        one.finish().exited(0);
    }
    let entries = stream::entries(&mut stream::connect(redis().url()), name);
    let mut sequences: Vec<i64> = entries.iter().map(stream::Entry::sequence).collect();
    sequences.sort_unstable();
    assert_eq!(sequences, (1..=5000).collect::<Vec<_>>());
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
}

#[tokio::test]
async fn a_reader_that_goes_away_loses_nothing() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(&mut connection, emit(1000)).await;
    let mut child = relay(&["--once"], &[("DATABASE_URL", database.url()), STDOUT])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(3));
    assert_eq!(count(&mut connection, "event_outbox").await, 1000);
}
