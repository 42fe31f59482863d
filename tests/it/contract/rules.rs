//! What applications and operators may rely on in SQL.

use std::time::Duration;

use outbox_relay::NewEvent;

use crate::binary::{drain, finished};
use crate::harness::{column, count, emit, refused, sql};
use crate::stores::{Client, Store};

/// The statement that inserts a dead letter; `n` makes its ids unique.
fn dead_letter<S: Store>(n: u8, failed_at: &str, redriven_at: &str) -> String {
    format!(
        "insert into event_dead_letter (outbox_id, event_id, event_type, source, payload, headers, schema_version, priority,
             created_at, destination, attempts, error_code, error, first_failed_at, failed_at, redriven_at)
         values ({n}, '00000000-0000-4000-8000-00000000000{n}', 'dead', '', '{{}}', '{{}}', 1, 0, {now}, 'redis', 1, 'X',
             'x', {long_ago}, {failed_at}, {redriven_at})",
        now = S::in_ms(0),
        long_ago = S::in_ms(-30 * 86_400_000)
    )
}

pub(super) async fn what_breaks_a_rule_is_refused_under_the_rules_name<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let long = format!("'{}'", "é".repeat(129));
    for (columns, values, rule) in [
        ("event_type", "''", "event_type_has_1_to_128_characters"),
        ("event_type", &long, "event_type_has_1_to_128_characters"),
        ("event_type, headers", "'a', '[]'", "headers_are_a_"),
        ("event_type, headers", "'a', '\"text\"'", "headers_are_a_"),
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
        let words = refused(&mut connection, insert).await;
        assert!(words.contains(rule), "{values}: {words}");
    }
    for (columns, values) in [
        ("id, event_type", "1, 'a'"),
        ("event_type, payload", "'a', '{'"),
        ("event_type, headers", "'a', '{'"),
        ("event_type, event_id", "'a', 'x'"),
        ("event_type, event_id", "'a', null"),
        ("event_type, payload", "'a', null"),
        ("event_type, schema_version", "'a', 2147483648"),
        ("event_type, attempts", "'a', 2147483648"),
        ("event_type, available_at", "'a', 'soon'"),
    ] {
        refused(&mut connection, format!("insert into event_outbox ({columns}) values ({values})")).await;
    }
    sql(&mut connection, format!("insert into event_outbox (event_type) values ('{}')", "é".repeat(128))).await;
    assert_eq!(count(&mut connection, "event_outbox").await, 1);
}

pub(super) async fn a_plain_insert_is_enough<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    sql(&mut connection, "insert into event_outbox (event_type, payload) values ('order.created', '{}')").await;
    assert_eq!(column(&mut connection, "select status from event_outbox").await, ["pending"]);
    let event_id = column(&mut connection, "select cast(event_id as text) from event_outbox").await;
    uuid::Uuid::parse_str(&event_id[0]).unwrap();
    let published = drain(store.url());
    assert_eq!(published.len(), 1);
    assert_eq!(published[0]["id"], event_id[0]);
    assert_eq!(published[0]["type"], "order.created");
    assert_eq!(published[0]["data"], serde_json::json!({}));
}

pub(super) async fn an_event_is_part_of_its_transaction<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    sql(&mut connection, "begin").await;
    emit(&mut connection, "undone", "").await;
    sql(&mut connection, "rollback; begin").await;
    emit(&mut connection, "done", "").await;
    sql(&mut connection, "savepoint s").await;
    emit(&mut connection, "undone", "").await;
    sql(&mut connection, "rollback to s; commit").await;
    let published: Vec<_> = drain(store.url()).iter().map(|event| event["type"].clone()).collect();
    assert_eq!(published, ["done"]);
}

pub(super) async fn the_queries_of_the_documentation_work_as_written<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    emit(&mut connection, "pending", "").await;
    connection.emit(NewEvent::from_json("later", "{}").delay(Duration::from_secs(86_400))).await.unwrap();
    for n in 0..3 {
        sql(&mut connection, dead_letter::<S>(n, &S::in_ms(-i64::from(n) * 20 * 3_600_000), "null")).await;
    }
    let pending = "select event_type from (SELECT * FROM event_outbox WHERE status = 'pending') q";
    assert_eq!(column(&mut connection, pending).await, ["pending"]);
    let newest_first = format!(
        "select cast(outbox_id as text) from event_dead_letter where failed_at > {} order by failed_at desc",
        S::in_ms(-86_400_000)
    );
    assert_eq!(column(&mut connection, &newest_first).await, ["0", "1"]);
}

pub(super) async fn f60_a_redriven_dead_letter_is_the_same_event_owed_to_its_destination_only<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let event = NewEvent::from_json("order.created", r#"{"n": 1}"#).key("order", "42").source("shop");
    let event = event.header("tenant", "acme").correlation_id("req-1").causation_id("cmd-1");
    let event_id = connection.emit(event.schema_version(3).priority(7)).await.unwrap();
    let whole =
        "select concat_ws('|', id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                     correlation_id, causation_id, schema_version, priority, created_at) from event_outbox";
    let before = column(&mut connection, whole).await;
    // A payload limit that the event exceeds is the quickest way to a dead letter.
    let small = [("DATABASE_URL", store.url()), ("RELAY_STDOUT", "true"), ("EVENT_MAX_PAYLOAD_SIZE", "1")];
    finished(&["--once"], &small).exited(3).says(&["payload_too_large"]);
    sql(&mut connection, "update event_dead_letter set destination = 'stdout'").await;

    sql(&mut connection, S::redrive("destination = 'stdout'")).await;
    assert_eq!(column(&mut connection, whole).await, before);
    let delivery = format!(
        "select concat_ws('|', destination, attempts, status, last_error, first_failed_at) from event_outbox
         where available_at <= {}",
        S::in_ms(0)
    );
    assert_eq!(column(&mut connection, &delivery).await, ["stdout|0|pending"]);
    assert_eq!(count(&mut connection, "event_dead_letter where redriven_at is not null").await, 1);

    let twice = refused(&mut connection, S::redrive("destination = 'stdout'")).await;
    assert!(twice.contains("has been redriven already"), "{twice}");
    assert_eq!(count(&mut connection, "event_outbox").await, 1);

    let published = drain(store.url());
    assert_eq!(published.len(), 1);
    assert_eq!(published[0]["id"], event_id.to_string());
}

pub(super) async fn the_views_count_and_show_no_payload<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    for name in ["a", "b"] {
        emit(&mut connection, name, "").await;
    }
    connection.emit(NewEvent::from_json("c", "{}").delay(Duration::from_secs(3600))).await.unwrap();
    connection.emit(NewEvent::from_json("d", "{}").priority(9)).await.unwrap();
    let earlier = S::in_ms(-100_000);
    sql(&mut connection, format!("update event_outbox set available_at = {earlier} where event_type = 'b'")).await;
    for (n, redriven_at) in [(1, "null"), (2, "null"), (3, &S::in_ms(0))] {
        // One that is inserted as redriven was never put back, but it counts as redriven.
        sql(&mut connection, dead_letter::<S>(n, &S::in_ms(0), redriven_at)).await;
    }
    let lag = "select concat_ws('|', status, priority, event_count, due_count, cast(lag_seconds / 90 as integer))
               from event_outbox_lag order by status, priority";
    assert_eq!(column(&mut connection, lag).await, ["pending|0|2|2|1", "pending|9|1|1|0", "scheduled|0|1|0"]);
    let dead = "select concat_ws('|', destination, event_type, error_code, event_count, sample_error)
                from event_dead_letter_summary";
    assert_eq!(column(&mut connection, dead).await, ["redis|dead|X|2|x"]);
    for view in ["event_outbox_lag", "event_dead_letter_summary"] {
        for content in ["payload", "headers"] {
            refused(&mut connection, format!("select {view}.{content} from {view}")).await;
        }
    }
}
