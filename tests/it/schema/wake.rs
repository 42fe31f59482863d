//! The trigger that wakes sleeping relays.

use sqlx::postgres::PgListener;

use super::value;
use crate::harness::sql;
use crate::servers::database;

const SLEEPERS_LOCK: &str = "'event_outbox'::regclass::oid::int, -1";

/// Counts the notifications before the producer's marker, which the second connection sends last.
async fn heard(listener: &mut PgListener, producer: &mut sqlx::PgConnection) -> usize {
    sql(producer, "notify event_outbox, 'marker'").await;
    let mut wake_ups = 0;
    while listener.recv().await.unwrap().payload() != "marker" {
        wake_ups += 1;
    }
    wake_ups
}

#[tokio::test]
async fn producers_notify_only_while_a_relay_holds_the_sleepers_lock() {
    let database = database().await;
    let (mut relay, mut producer) = (database.connect().await, database.connect().await);
    let mut listener = PgListener::connect(database.url()).await.unwrap();
    listener.listen("event_outbox").await.unwrap();
    let insert = "insert into event_outbox (event_type) select 'a' from generate_series(1, 3)";

    sql(&mut producer, insert).await;
    assert_eq!(heard(&mut listener, &mut producer).await, 0, "no relay sleeps");

    sql(&mut relay, &format!("select pg_advisory_lock({SLEEPERS_LOCK})")).await;
    sql(&mut producer, insert).await;
    assert_eq!(heard(&mut listener, &mut producer).await, 1, "once per statement");
    sql(&mut producer, &format!("begin; {insert}; {insert}; commit")).await;
    assert_eq!(heard(&mut listener, &mut producer).await, 1, "and equal ones once per transaction");
    sql(&mut producer, &format!("begin; {insert}; rollback")).await;
    assert_eq!(heard(&mut listener, &mut producer).await, 0, "a rolled back insert sends no notification");
    sql(&mut producer, "select emit_event('a'); select emit_event('b')").await;
    assert_eq!(heard(&mut listener, &mut producer).await, 1);
    sql(&mut producer, "delete from event_outbox; update event_outbox set attempts = 1").await;
    assert_eq!(heard(&mut listener, &mut producer).await, 0, "only inserts send notifications");

    sql(&mut relay, &format!("select pg_advisory_unlock({SLEEPERS_LOCK})")).await;
    sql(&mut producer, insert).await;
    assert_eq!(heard(&mut listener, &mut producer).await, 0, "no relay sleeps any more");
}

#[tokio::test]
async fn f24_a_relay_cannot_fall_asleep_between_an_insert_and_its_commit() {
    let database = database().await;
    let (mut relay, mut producer) = (database.connect().await, database.connect().await);
    let fall_asleep = format!("select pg_try_advisory_lock({SLEEPERS_LOCK})");
    sql(&mut producer, "begin; select emit_event('a')").await;
    assert!(
        !value::<bool>(&mut relay, &fall_asleep).await,
        "a relay must not sleep while a producer that will not notify is uncommitted"
    );
    let other_producer = database.connect().await;
    sql(&mut { other_producer }, "select emit_event('b')").await; // producers do not block each other
    sql(&mut producer, "commit").await;
    assert!(value::<bool>(&mut relay, &fall_asleep).await);
}
