//! Tables by day that lack today's day: it is created at once, and nothing is published twice.

use std::time::{Duration, Instant};

use outbox_relay::outbox::Usage;

use super::settle::failures;
use crate::harness::{Setup, count, emit, eventually, sql};
use crate::scripted::ScriptedSink;
use crate::servers::{Server, database, database_on};

/// Drops the days of both tables.
const DROP_DAYS: &str = "
do $$
declare day regclass;
begin
    for day in select inhrelid from pg_inherits
               where inhparent in ('event_processing_log'::regclass, 'event_history'::regclass) loop
        execute format('drop table %s', day);
    end loop;
end
$$";

const USAGE: Usage = Usage { several_destinations: false, history: true };

#[tokio::test(flavor = "multi_thread")]
async fn f68_days_that_were_dropped_are_made_within_the_settle_that_misses_them() {
    let database = database().await;
    let mut connection = database.connect().await;
    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.outbox.usage = USAGE;
    let running = setup.run();
    for round in 1..=5 {
        sql(&mut connection, DROP_DAYS).await;
        sql(&mut connection, "insert into event_outbox (event_type) select 'e' from generate_series(1, 200)").await;
        eventually("all is settled", async || count(&mut connection, "event_outbox").await == 0).await;
        assert_eq!(count(&mut connection, "event_processing_log").await, 200);
        assert_eq!(count(&mut connection, "event_history").await, 200);
        assert!(sink.accepted().len() <= 200 * round + 200, "more than one batch was repeated");
        assert_eq!(failures(&database, USAGE).await, "");
    }
    running.stop().await;
    assert_eq!(sink.accepted().len(), 1000, "nothing arrived twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn f68_a_default_partition_that_has_rows_of_today_is_no_reason_to_stop() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(&mut connection, DROP_DAYS).await;
    sql(
        &mut connection,
        "create table log_default partition of event_processing_log default;
         create table history_default partition of event_history default;
         insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, duration_ms, worker)
         values (gen_random_uuid(), 1, 'e', 'a', 'published', 1, 0, 'w');
         insert into event_history (outbox_id, event_id, event_type, source, payload, headers, schema_version, priority,
             created_at, destination, published_at)
         values (1, gen_random_uuid(), 'e', '', '{}', '{}', 1, 0, now(), 'a', now())",
    )
    .await;
    assert_eq!(failures(&database, USAGE).await, "");
    for index in 0..10 {
        emit(&mut connection, &format!("e{index}"), "k").await;
    }
    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.outbox.usage = USAGE;
    assert!(!setup.drain().await.undelivered);
    assert_eq!(sink.accepted().len(), 10);
    assert_eq!(count(&mut connection, "log_default").await, 11);
    assert_eq!(count(&mut connection, "history_default").await, 11);
    // The missing days ahead are created.
    let days = "pg_inherits where inhparent = 'event_processing_log'::regclass";
    assert!(count(&mut connection, days).await > 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn f68_where_the_relay_may_not_make_a_day_it_says_so_and_publishes_nothing_twice() {
    let server = Server::start("postgres", &["--fast"]);
    let database = database_on(&server).await;
    let mut connection = database.connect().await;
    crate::schema::roles::apply(&mut connection).await;
    sql(&mut connection, "create role worker login password 'known' in role relay_worker").await;
    let (_, place) = database.url().rsplit_once('@').unwrap();
    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.outbox.url = outbox_relay::secret::Secret::inline(format!("postgres://worker:known@{place}"));
    setup.relay.lanes = 1;
    let mut running = setup.run();
    emit(&mut connection, "e", "").await;
    eventually("it is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    sql(&mut connection, "revoke execute on function relay_add_days from relay_worker, public").await;
    sql(&mut connection, DROP_DAYS).await;
    emit(&mut connection, "e", "").await;
    running.until_not_ready("select relay_add_days('event_processing_log', 7)").await;
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(1) {
        tokio::time::sleep(Duration::from_millis(20)).await; // the duration of the fault
    }
    assert_eq!(sink.accepted().len(), 2);
    sql(&mut connection, "select relay_add_days('event_processing_log', 7)").await;
    eventually("it is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
    assert!(sink.accepted().len() <= 3);
}
