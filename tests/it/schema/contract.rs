//! What applications and people may rely on in SQL.

use super::{DEAD_LETTER, drain, try_execute, value, values};
use crate::binary::finished;
use crate::harness::{eventually, sql};
use crate::servers::database;

#[tokio::test]
async fn every_table_column_view_and_function_has_a_comment() {
    let database = database().await;
    let mut connection = database.connect().await;
    let silent: Vec<String> = values(
        &mut connection,
        "select format('%s %s', c.relname, a.attname)
         from pg_class c left join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
         where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p')
           and col_description(c.oid, a.attnum) is null
         union all
         select c.relname from pg_class c
         where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p', 'v') and not c.relispartition
           and obj_description(c.oid, 'pg_class') is null
         union all
         select p.proname from pg_proc p
         where p.pronamespace = 'public'::regnamespace and obj_description(p.oid, 'pg_proc') is null",
    )
    .await;
    assert_eq!(silent, [""; 0]);
}

#[tokio::test]
async fn every_check_has_a_name_that_says_what_holds() {
    let database = database().await;
    let mut connection = database.connect().await;
    let named: Vec<String> = values(
        &mut connection,
        "select conname from pg_constraint c join pg_class r on r.oid = c.conrelid
         where c.contype = 'c' and c.connamespace = 'public'::regnamespace and not r.relispartition order by 1",
    )
    .await;
    assert_eq!(
        named,
        [
            "attempts_start_at_0",
            "attempts_start_at_1",
            "error_iff_not_delivered",
            "event_type_has_1_to_128_characters",
            "first_failure_is_not_after_last",
            "headers_are_a_flat_string_map",
            "headers_take_no_reserved_name",
            "payload_can_be_printed",
            "priority_is_0_to_9",
            "schema_version_starts_at_1",
            "status_is_known",
            "status_is_pending_or_scheduled",
        ]
    );
    // The days have those of their table, so that no row is refused under a name nobody chose.
    let of_days: Vec<String> = values(
        &mut connection,
        "select distinct conname from pg_constraint c join pg_class r on r.oid = c.conrelid
         where c.contype = 'c' and r.relispartition order by 1",
    )
    .await;
    assert_eq!(of_days, ["error_iff_not_delivered", "status_is_known"]);
}

#[tokio::test]
async fn what_breaks_a_rule_is_refused_under_the_rules_name() {
    let database = database().await;
    let mut connection = database.connect().await;
    for (columns, values, rule) in [
        ("event_type", "''", "event_type_has_1_to_128_characters"),
        ("event_type", "repeat('é', 129)", "event_type_has_1_to_128_characters"),
        ("event_type, headers", "'a', '[]'", "headers_are_a_flat_string_map"),
        ("event_type, headers", "'a', '\"text\"'", "headers_are_a_flat_string_map"),
        ("event_type, headers", "'a', '{\"n\": 1}'", "headers_are_a_flat_string_map"),
        ("event_type, headers", "'a', '{\"n\": {\"m\": \"x\"}}'", "headers_are_a_flat_string_map"),
        ("event_type, headers", "'a', '{\"n\": [\"x\"]}'", "headers_are_a_flat_string_map"),
        ("event_type, headers", "'a', '{\"n\": []}'", "headers_are_a_flat_string_map"),
        ("event_type, headers", "'a', '{\"n\": null}'", "headers_are_a_flat_string_map"),
        ("event_type, headers", "'a', '{\"type\": \"x\"}'", "headers_take_no_reserved_name"),
        ("event_type, schema_version", "'a', 0", "schema_version_starts_at_1"),
        ("event_type, priority", "'a', 10", "priority_is_0_to_9"),
        ("event_type, priority", "'a', -1", "priority_is_0_to_9"),
        ("event_type, status", "'a', 'published'", "status_is_pending_or_scheduled"),
        ("event_type, attempts", "'a', -1", "attempts_start_at_0"),
    ] {
        let insert = format!("insert into event_outbox ({columns}) values ({values})");
        let refused = try_execute(&mut connection, &insert).await.expect_err(values);
        assert!(refused.contains(&format!("\"{rule}\"")), "{values}: {refused}");
    }
    sql(&mut connection, "insert into event_outbox (event_type) values (repeat('é', 128))").await;
    let taken = try_execute(&mut connection, "insert into event_outbox (id, event_type) values (1, 'a')").await;
    assert!(taken.expect_err("an id of its own").starts_with("428C9"));
}

#[tokio::test]
async fn a_plain_insert_is_enough() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(&mut connection, "insert into event_outbox (event_type, payload) values ('order.created', '{}')").await;
    let status: String = value(&mut connection, "select status from event_outbox").await;
    let event_id: uuid::Uuid = value(&mut connection, "select event_id from event_outbox").await;
    assert_eq!(status, "pending");
    let published = drain(database.url());
    assert_eq!(published.len(), 1);
    assert_eq!(published[0]["id"], event_id.to_string());
    assert_eq!(published[0]["type"], "order.created");
    assert_eq!(published[0]["data"], serde_json::json!({}));
}

#[tokio::test]
async fn the_two_queries_of_the_documentation_work_as_written() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "select emit_event('pending'), emit_event('later', delay => '1 day');
         insert into event_dead_letter (outbox_id, event_id, event_type, source, payload, headers, schema_version, priority,
             created_at, destination, attempts, error_code, error, first_failed_at, failed_at)
         select n, gen_random_uuid(), 'dead', '', '{}', '{}', 1, 0, now(), 'redis', 1, 'X', 'x',
             now() - interval '3 days', now() - n * interval '20 hours'
         from generate_series(0, 2) n",
    )
    .await;
    let pending: Vec<String> =
        values(&mut connection, "select event_type from (SELECT * FROM event_outbox WHERE status = 'pending') q").await;
    assert_eq!(pending, ["pending"]);
    let rows = sqlx::query(
        "SELECT * FROM event_dead_letter WHERE failed_at > NOW() - INTERVAL '1 day' ORDER BY failed_at DESC",
    )
    .fetch_all(&mut connection)
    .await
    .unwrap();
    let newest_first: Vec<i64> = rows.iter().map(|row| sqlx::Row::get(row, "outbox_id")).collect();
    assert_eq!(newest_first, [0, 1]);
    sqlx::query("SELECT * FROM event_outbox WHERE status = 'pending'").fetch_one(&mut connection).await.unwrap();
}

#[tokio::test]
async fn emit_event_takes_its_arguments_by_position_and_by_name() {
    let database = database().await;
    let mut connection = database.connect().await;
    let returned: String = value(&mut connection, r#"select emit_event('bare')::text"#).await;
    let all = r#"'{"n": 1}', 'order', '42', 'shop', '{"tenant": "acme"}', 'req-1', 'cmd-1', 3, 7, interval '0',
                 '11111111-2222-3333-4444-555555555555'"#;
    sql(&mut connection, &format!("select emit_event('positional', {all})")).await;
    sql(
        &mut connection,
        r#"select emit_event('named', delay => '2 hours', priority => 9, headers => '{"traceparent": "00-ab"}',
               aggregate_id => '42', aggregate_type => 'order')"#,
    )
    .await;
    let rows: Vec<String> = values(
        &mut connection,
        "select concat_ws('|', event_type, payload, aggregate_type, aggregate_id, source, headers, correlation_id,
                          causation_id, schema_version, priority, available_at - created_at, status)
         from event_outbox order by id",
    )
    .await;
    assert_eq!(
        rows,
        [
            "bare|{}||{}|1|0|00:00:00|pending",
            r#"positional|{"n": 1}|order|42|shop|{"tenant": "acme"}|req-1|cmd-1|3|7|00:00:00|pending"#,
            r#"named|{}|order|42||{"traceparent": "00-ab"}|1|9|02:00:00|scheduled"#,
        ]
    );
    let ids: Vec<String> = values(&mut connection, "select event_id::text from event_outbox order by id limit 2").await;
    assert_eq!(ids, [returned.as_str(), "11111111-2222-3333-4444-555555555555"]);
    let types: Vec<_> = drain(database.url()).iter().map(|event| event["type"].clone()).collect();
    assert_eq!(types, ["positional", "bare"], "the delayed one is not due");
}

#[tokio::test]
async fn emit_event_is_part_of_the_callers_transaction() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(&mut connection, "begin; select emit_event('undone'); rollback").await;
    sql(&mut connection, "begin; select emit_event('done'); savepoint s; select emit_event('undone'); rollback to s")
        .await;
    assert_eq!(drain(database.url()).len(), 0, "not committed yet");
    sql(&mut connection, "commit").await;
    assert_eq!(drain(database.url())[0]["type"], "done");
}

#[tokio::test]
async fn a_redriven_dead_letter_is_the_same_event_owed_to_its_destination_only() {
    let database = database().await;
    let mut connection = database.connect().await;
    let event_id: uuid::Uuid = value(
        &mut connection,
        r#"select emit_event('order.created', '{"n": 1}', 'order', '42', 'shop', '{"tenant": "acme"}', 'req-1', 'cmd-1', 3, 7)"#,
    )
    .await;
    let whole =
        "event_id, event_type, source, aggregate_type, aggregate_id, payload, headers, correlation_id, causation_id,
                 schema_version, priority, created_at";
    let before: String = value(&mut connection, &format!("select row(id, {whole})::text from event_outbox")).await;
    // A limit that it breaks is the quickest way into the dead letters.
    let stdout = [("DATABASE_URL", database.url()), ("RELAY_STDOUT", "true")];
    let small = [stdout[0], stdout[1], ("EVENT_MAX_PAYLOAD_SIZE", "1")];
    finished(&["--once"], &small).exited(3).says(&["payload_too_large"]);
    sql(&mut connection, "update event_dead_letter set destination = 'stdout'").await;

    let id: i64 = value(&mut connection, "select id from event_dead_letter").await;
    let returned: uuid::Uuid = value(&mut connection, &format!("select redrive_dead_letter({id})")).await;
    assert_eq!(returned, event_id);
    let after: String = value(&mut connection, &format!("select row(id, {whole})::text from event_outbox")).await;
    assert_eq!(after, before);
    let delivery: String = value(
        &mut connection,
        "select concat_ws('|', destination, attempts, status, last_error, first_failed_at, available_at <= clock_timestamp())
         from event_outbox",
    )
    .await;
    assert_eq!(delivery, "stdout|0|pending|t");
    assert!(value::<bool>(&mut connection, "select redriven_at >= failed_at from event_dead_letter").await);

    let twice = try_execute(&mut connection, &format!("select redrive_dead_letter({id})")).await.expect_err("twice");
    assert!(twice.contains(&format!("dead letter {id} has been redriven already")), "{twice}");
    let unknown = try_execute(&mut connection, "select redrive_dead_letter(4711)").await.expect_err("unknown");
    assert!(unknown.contains("there is no dead letter 4711"), "{unknown}");
    assert_eq!(value::<i64>(&mut connection, "select count(*) from event_outbox").await, 1);

    let published = drain(database.url());
    assert_eq!(published.len(), 1);
    assert_eq!(published[0]["id"], event_id.to_string());
}

#[tokio::test]
async fn of_two_redrives_at_once_one_is_refused() {
    let database = database().await;
    let (mut one, mut other) = (database.connect().await, database.connect().await);
    sql(&mut one, DEAD_LETTER).await;
    sql(&mut one, "begin; select redrive_dead_letter(1)").await;
    let waiting = tokio::spawn(async move { try_execute(&mut other, "select redrive_dead_letter(1)").await });
    let mut third = database.connect().await;
    eventually("the second waits for the first", async || {
        value(&mut third, "select exists (select from pg_locks where not granted)").await
    })
    .await;
    sql(&mut one, "commit").await;
    let refused = waiting.await.unwrap().expect_err("redriven by the first");
    assert!(refused.contains("has been redriven already"), "{refused}");
    assert_eq!(value::<i64>(&mut one, "select count(*) from event_outbox").await, 1);
}

#[tokio::test]
async fn the_views_count_and_show_no_payload() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "select emit_event('a'), emit_event('b'), emit_event('c', delay => '1 hour'), emit_event('d', priority => 9);
         update event_outbox set available_at = now() - interval '90 seconds' where event_type = 'b';
         insert into event_dead_letter (outbox_id, event_id, event_type, source, payload, headers, schema_version, priority,
             created_at, destination, attempts, error_code, error, first_failed_at, redriven_at)
         select n, gen_random_uuid(), 'dead', '', '{}', '{}', 1, 0, now(), 'redis', 1, 'X', 'x', now(),
             case when n = 3 then now() end
         from generate_series(1, 3) n",
    )
    .await;
    let lag: Vec<String> = values(
        &mut connection,
        "select concat_ws('|', status, priority, event_count, due_count, round(lag_seconds / 90)) from event_outbox_lag
         order by status, priority",
    )
    .await;
    assert_eq!(lag, ["pending|0|2|2|1", "pending|9|1|1|0", "scheduled|0|1|0"]);
    let dead: Vec<String> = values(
        &mut connection,
        "select concat_ws('|', destination, event_type, error_code, event_count, sample_error) from event_dead_letter_summary",
    )
    .await;
    assert_eq!(dead, ["redis|dead|X|2|x"]);
    let shown: Vec<String> = values(
        &mut connection,
        "select attname::text from pg_attribute where attnum > 0
         and attrelid in ('event_outbox_lag'::regclass, 'event_dead_letter_summary'::regclass)",
    )
    .await;
    assert!(shown.iter().all(|column| !["payload", "headers"].contains(&column.as_str())), "{shown:?}");
}
