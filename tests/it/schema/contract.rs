//! What applications and operators may rely on in PostgreSQL's SQL, besides what every store has.

use super::{DEAD_LETTER, try_execute, value, values};
use crate::binary::drain;
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
        ["attempts_start_at_1", "error_iff_not_delivered", "first_failure_is_not_after_last", "status_is_known",]
    );
    // Tables of days have the same named constraints, so that an error names a rule.
    let of_days: Vec<String> = values(
        &mut connection,
        "select distinct conname from pg_constraint c join pg_class r on r.oid = c.conrelid
         where c.contype = 'c' and r.relispartition order by 1",
    )
    .await;
    assert_eq!(of_days, ["error_iff_not_delivered", "status_is_known"]);
}

#[tokio::test]
async fn a_broken_rule_has_the_fields_of_a_check() {
    let database = database().await;
    let mut connection = database.connect().await;
    let refused =
        sqlx::query("insert into event_outbox (event_type, priority) values ('a', 10)").execute(&mut connection);
    let error = refused.await.unwrap_err().into_database_error().unwrap();
    assert_eq!(error.code().as_deref(), Some("23514"));
    assert_eq!((error.table(), error.constraint()), (Some("event_outbox"), Some("priority_is_0_to_9")));
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
async fn a_redrive_returns_the_events_identity_and_refuses_what_is_not_there() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(&mut connection, DEAD_LETTER).await;
    let dead: uuid::Uuid = value(&mut connection, "select event_id from event_dead_letter").await;
    let returned: uuid::Uuid = value(&mut connection, "select redrive_dead_letter(1)").await;
    assert_eq!(returned, dead);
    let twice = try_execute(&mut connection, "select redrive_dead_letter(1)").await.expect_err("twice");
    assert!(twice.contains("dead letter 1 has been redriven already"), "{twice}");
    let unknown = try_execute(&mut connection, "select redrive_dead_letter(4711)").await.expect_err("unknown");
    assert!(unknown.contains("there is no dead letter 4711"), "{unknown}");
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
