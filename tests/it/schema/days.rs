//! Tables by day: they are created ahead and dropped whole.

use super::{try_execute, value, values};
use crate::harness::sql;
use crate::servers::database;

const PARENTS: [&str; 2] = ["event_processing_log", "event_history"];

/// Selects the days of a table, relative to today.
fn days_of(parent: &str) -> String {
    format!(
        "select to_date(right(inhrelid::regclass::text, 8), 'YYYYMMDD') - (now() at time zone 'UTC')::date
         from pg_inherits where inhparent = '{parent}'::regclass order by 1"
    )
}

/// Creates the table of a day in the past, with a row in it.
fn old_day(ended_days_ago: u32) -> String {
    format!(
        "do $$ declare
             day date := (now() at time zone 'UTC')::date - {ended_days_ago} - 1;
             name text := 'event_processing_log' || to_char(day, '_YYYYMMDD');
         begin
             execute format('create table %I partition of event_processing_log for values from (%L) to (%L)',
                            name, day::text || ' 00:00:00+00', (day + 1)::text || ' 00:00:00+00');
             insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, duration_ms,
                                               worker, processed_at)
             values (gen_random_uuid(), 1, 'old', 'redis', 'published', 1, 1, 'w', (day::text || ' 12:00+00')::timestamptz);
         end $$"
    )
}

#[tokio::test]
async fn days_are_made_ahead_once() {
    let database = database().await;
    let mut connection = database.connect().await;
    // A day is a day in UTC, whatever the session's time zone is.
    sql(&mut connection, "set timezone = 'Pacific/Kiritimati'").await;
    for parent in PARENTS {
        let before: Vec<i32> = values(&mut connection, &days_of(parent)).await;
        assert_eq!(before, (0..=7).collect::<Vec<_>>(), "{parent}, by the migration");
        let added: i32 = value(&mut connection, &format!("select relay_add_days('{parent}', 10)")).await;
        assert_eq!(added, 3);
        let added: i32 = value(&mut connection, &format!("select relay_add_days('{parent}', 10)")).await;
        assert_eq!(added, 0);
        let after: Vec<i32> = values(&mut connection, &days_of(parent)).await;
        assert_eq!(after, (0..=10).collect::<Vec<_>>());
    }
    let bounds: Vec<String> = values(
        &mut connection,
        "select distinct substring(pg_get_expr(relpartbound, oid) from '\\d\\d:\\d\\d:\\d\\d[^'']+') from pg_class
         where relispartition and relkind = 'r'",
    )
    .await;
    assert_eq!(bounds, ["14:00:00+14"], "midnight of UTC");
    // Its last day accepts rows and has the table's indexes.
    sql(
        &mut connection,
        "insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, duration_ms,
                                           worker, processed_at)
         values (gen_random_uuid(), 1, 'a', 'redis', 'published', 1, 1, 'w', clock_timestamp() + interval '10 days')",
    )
    .await;
    let unindexed: i64 = value(
        &mut connection,
        "select count(*) from pg_inherits i join pg_class c on c.oid = i.inhrelid
         where c.relkind = 'r' and not exists (select from pg_index x where x.indrelid = c.oid)",
    )
    .await;
    assert_eq!(unindexed, 0);
}

#[tokio::test]
async fn days_past_their_retention_are_dropped_whole() {
    let database = database().await;
    let mut connection = database.connect().await;
    for ended_days_ago in [0, 6, 7, 30] {
        sql(&mut connection, &old_day(ended_days_ago)).await;
    }
    sql(
        &mut connection,
        "create table event_processing_log_archive partition of event_processing_log for values from ('2001-01-01') to ('2002-01-01')",
    )
    .await;
    // The day that ended seven midnights ago is dropped. The day after it is kept whole.
    let dropped: i32 = value(&mut connection, "select relay_drop_days('event_processing_log', '7 days')").await;
    assert_eq!(dropped, 2);
    let left: Vec<i32> = values(
        &mut connection,
        "select (processed_at at time zone 'UTC')::date - (now() at time zone 'UTC')::date from event_processing_log order by 1",
    )
    .await;
    assert_eq!(left, [-7, -1]);
    assert!(value(&mut connection, "select to_regclass('event_processing_log_archive') is not null").await);
    let dropped: i32 = value(&mut connection, "select relay_drop_days('event_processing_log', '7 days')").await;
    assert_eq!(dropped, 0);
    let dropped: i32 = value(&mut connection, "select relay_drop_days('event_history', '1 hour')").await;
    assert_eq!(dropped, 0, "today and the days ahead have not ended");
    let refused = try_execute(&mut connection, "select relay_drop_days('event_history', '59 minutes')").await;
    assert!(refused.expect_err("too short").contains("a retention of 00:59:00 would drop what was just written"));
}

#[tokio::test]
async fn other_tables_are_refused() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(&mut connection, "create table orders (id bigint) partition by list (id)").await;
    for parent in ["orders", "event_outbox", "event_dead_letter", "event_processing_log; drop table orders", ""] {
        for call in [format!("relay_add_days('{parent}', 1)"), format!("relay_drop_days('{parent}', '0')")] {
            let refused = try_execute(&mut connection, &format!("select {call}")).await.expect_err(&call);
            assert!(refused.contains("is not a table that relay keeps by day"), "{refused}");
        }
    }
}

#[tokio::test]
async fn readers_and_writers_of_other_days_do_not_block_adding_one() {
    let database = database().await;
    let (mut reader, mut writer) = (database.connect().await, database.connect().await);
    let mut connection = database.connect().await;
    sql(&mut reader, "begin; select count(*) from event_processing_log").await;
    sql(
        &mut writer,
        "begin; insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, duration_ms, worker)
         values (gen_random_uuid(), 1, 'a', 'redis', 'published', 1, 1, 'w')",
    )
    .await;
    sql(&mut connection, "set lock_timeout = '100ms'; begin").await;
    let added: i32 = value(&mut connection, "select relay_add_days('event_processing_log', 8)").await;
    assert!(added >= 1);
    // Adding a day that is not committed yet does not block readers and writers either.
    sql(&mut reader, "set local lock_timeout = '100ms'; select count(*) from event_processing_log").await;
    sql(
        &mut writer,
        "set local lock_timeout = '100ms';
         insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, duration_ms, worker)
         values (gen_random_uuid(), 2, 'a', 'redis', 'published', 1, 1, 'w')",
    )
    .await;
    for one in [&mut connection, &mut reader, &mut writer] {
        sql(one, "commit").await;
    }
}

#[tokio::test]
async fn a_day_that_somebody_reads_is_dropped_the_next_time() {
    let database = database().await;
    let (mut reader, mut connection) = (database.connect().await, database.connect().await);
    sql(&mut connection, &old_day(30)).await;
    sql(&mut reader, "begin; select count(*) from event_processing_log").await;
    let drop_days = "select relay_drop_days('event_processing_log', '7 days')";
    let gave_up = try_execute(&mut connection, drop_days).await.expect_err("it is read");
    assert!(gave_up.starts_with("55P03"), "{gave_up}");
    sql(&mut reader, "commit").await;
    assert_eq!(value::<i32>(&mut connection, drop_days).await, 1);
}

#[tokio::test]
async fn of_two_relays_that_add_the_same_day_both_go_on() {
    let database = database().await;
    let (mut one, mut other) = (database.connect().await, database.connect().await);
    sql(&mut one, "begin").await;
    let added: i32 = value(&mut one, "select relay_add_days('event_processing_log', 9)").await;
    assert!(added >= 2);
    let waiting =
        tokio::spawn(async move { value::<i32>(&mut other, "select relay_add_days('event_processing_log', 9)").await });
    let mut third = database.connect().await;
    crate::harness::eventually("the second waits for the first", async || {
        value(&mut third, "select exists (select from pg_locks where not granted)").await
    })
    .await;
    sql(&mut one, "commit").await;
    assert_eq!(waiting.await.unwrap(), 0);
}

#[tokio::test]
async fn new_days_have_an_index_on_time_and_days_with_rows_stay_as_they_are() {
    let database = database().await;
    let mut connection = database.connect().await;
    let by_time = |parent: &str| {
        format!(
            "select count(*) from pg_inherits i join pg_index x on x.indrelid = i.inhrelid
             where i.inhparent = '{parent}'::regclass
               and pg_get_indexdef(x.indexrelid) ~ 'USING brin \\((processed_at|published_at)\\)'"
        )
    };
    for parent in PARENTS {
        assert_eq!(value::<i64>(&mut connection, &by_time(parent)).await, 8, "{parent}: of an empty table, all");
    }
    // As in a database of before: today has rows.
    sql(
        &mut connection,
        "drop index event_processing_log_processed_at_idx, event_history_published_at_idx;
         insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, duration_ms, worker)
         values (gen_random_uuid(), 1, 'a', 'redis', 'published', 1, 1, 'w')",
    )
    .await;
    sql(&mut connection, include_str!("../../../migrations/postgres/0027_time_indexes.sql")).await;
    assert_eq!(value::<i64>(&mut connection, &by_time(PARENTS[0])).await, 7);
    assert_eq!(value::<i64>(&mut connection, &by_time(PARENTS[1])).await, 8);
    sql(&mut connection, "select relay_add_days('event_processing_log', 9)").await;
    assert_eq!(value::<i64>(&mut connection, &by_time(PARENTS[0])).await, 9, "a day that is added gets it");
}
