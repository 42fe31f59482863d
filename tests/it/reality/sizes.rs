//! Events that are larger than intended, in whole or in one column.

use std::time::Instant;

use outbox_relay::event::{MAX_HEADERS_BYTES, MAX_TEXT_BYTES};

use crate::binary::{PATIENCE, Running, relay};
use crate::harness::{Setup, column, count, sql};
use crate::scripted::ScriptedSink;
use crate::servers::redis;
use crate::stores::{Postgres, Sqlite, Store};
use crate::stub::EventBridgeStub;

const MB: u64 = 1 << 20;

/// A store into which a test can insert rows that are older than the size limits.
trait Old: Store {
    /// Runs statements while the triggers that check the rules are off.
    async fn insert_old(connection: &mut Self::Connection, statements: &str);
}

impl Old for Postgres {
    async fn insert_old(connection: &mut Self::Connection, statements: &str) {
        // The trigger is always enabled, but it skips its checks in this mode.
        sql(
            connection,
            format!("set session_replication_role = replica; {statements}; reset session_replication_role"),
        )
        .await;
    }
}

impl Old for Sqlite {
    async fn insert_old(connection: &mut Self::Connection, statements: &str) {
        let triggers = "from sqlite_schema where type = 'trigger' and tbl_name = 'event_outbox'";
        let names = column(connection, &format!("select name {triggers}")).await;
        let made = column(connection, &format!("select sql {triggers}")).await;
        let drop = names.iter().map(|name| format!("drop trigger {name};"));
        let make = made.iter().map(|sql| format!("{sql};"));
        sql(connection, drop.chain([format!("{statements};")]).chain(make).collect::<String>()).await;
    }
}

/// The columns that have a size limit, the error code for a longer value, a value at the limit, and one a byte longer.
fn bounds() -> Vec<(&'static str, &'static str, String, String)> {
    let text = |bytes| format!("'{}'", "x".repeat(bytes));
    // As PostgreSQL prints it.
    let headers = |bytes: usize| format!("'{{\"a\": \"{}\"}}'", "x".repeat(bytes - r#"{"a": ""}"#.len()));
    let of = |column, code| (column, code, text(MAX_TEXT_BYTES), text(MAX_TEXT_BYTES + 1));
    vec![
        of("source", "source_too_large"),
        of("aggregate_type", "aggregate_type_too_large"),
        of("aggregate_id", "aggregate_id_too_large"),
        of("correlation_id", "correlation_id_too_large"),
        of("causation_id", "causation_id_too_large"),
        ("headers", "headers_too_large", headers(MAX_HEADERS_BYTES), headers(MAX_HEADERS_BYTES + 1)),
    ]
}

async fn an_old_row_over_a_bound_is_dead_lettered_alone_and_whole<S: Old>() {
    for (name, code, at, over) in bounds() {
        let store = S::new().await;
        let mut connection = store.connect().await;
        // All rows have one key, unless the key is the column that is too long.
        let columns = if name.starts_with("aggregate") { name.to_owned() } else { format!("aggregate_id, {name}") };
        let values = |value: &str| if columns == name { value.to_owned() } else { format!("'7', {value}") };
        let rows = [("before", &at), ("sick", &over), ("sick", &over), ("after", &at)];
        for (event_type, value) in rows {
            let row =
                format!("insert into event_outbox (event_type, {columns}) values ('{event_type}', {})", values(value));
            S::insert_old(&mut connection, &row).await;
        }
        sql(&mut connection, "insert into event_outbox (event_type, aggregate_id) values ('healthy', '7')").await;
        let sink = ScriptedSink::accepting();
        Setup::new(&store, vec![("a", sink.clone())]).drain().await;
        let mut names = sink.names();
        if name.starts_with("aggregate") {
            names.sort_unstable(); // this key is not that of the last event
        }
        let mut expected = vec!["before", "after", "healthy"];
        if name.starts_with("aggregate") {
            expected.sort_unstable();
        }
        assert_eq!(names, expected, "{name}");
        let dead = column(&mut connection, "select error_code from event_dead_letter order by id").await;
        assert_eq!(dead, [code; 2]);
        let whole = format!("event_dead_letter where {name} = {over}");
        assert_eq!(count(&mut connection, &whole).await, 2, "{name}");
        assert_eq!(count(&mut connection, "event_outbox").await, 0);
    }
}

#[tokio::test]
async fn f79_on_postgres_an_old_row_over_a_bound_is_dead_lettered_alone_and_whole() {
    an_old_row_over_a_bound_is_dead_lettered_alone_and_whole::<Postgres>().await;
}

#[tokio::test]
async fn f79_on_sqlite_an_old_row_over_a_bound_is_dead_lettered_alone_and_whole() {
    an_old_row_over_a_bound_is_dead_lettered_alone_and_whole::<Sqlite>().await;
}

/// Publishes what is due. Returns the exit code, and the relay's peak memory in bytes.
fn drained(url: &str, variables: &[(&str, &str)]) -> (Option<i32>, u64) {
    let mut variables = variables.to_vec();
    variables.push(("DATABASE_URL", url));
    let mut running = Running::start_writing_to(relay(&["--once"], &variables), std::process::Stdio::null());
    let status = format!("/proc/{}/status", running.id());
    let (begun, mut peak) = (Instant::now(), 0);
    while running.is_running() {
        assert!(begun.elapsed() < 2 * PATIENCE, "it did not end:\n{}", running.log());
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        peak = kib.map_or(peak, |kib| kib * 1024);
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    println!("{} MB for {variables:?}", peak / MB); // the password is a throwaway server's
    let finished = running.finish();
    if finished.code == Some(1) {
        println!("{}", finished.stderr);
    }
    (finished.code, peak)
}

/// Inserts so many events with large values in `column`. PostgreSQL stores a text of 1 MB in 12 KB.
async fn fill<S: Old>(store: &S, count: i64, column: &str, value: &str) {
    let mut connection = store.connect().await;
    let rows = format!(
        "insert into event_outbox (event_type, aggregate_id, {column})
         select 'large', cast(i % 50 as text), {value} from {}",
        S::numbers(count)
    );
    S::insert_old(&mut connection, &rows).await;
    let healthy = "insert into event_outbox (event_type, aggregate_id) select 'healthy', cast(i % 50 as text) from";
    sql(&mut connection, format!("{healthy} {}", S::numbers(50))).await;
}

async fn large_values_in_any_column_cost_no_memory<S: Old>(text: fn(u32) -> String, json: fn(&str) -> String) {
    let large = text(1_000_000);
    for (column, value) in [("headers", json(&large)), ("correlation_id", large.clone()), ("aggregate_type", large)] {
        let store = S::new().await;
        fill(&store, 300, column, &value).await;
        let (code, peak) = drained(store.url(), &[("RELAY_STDOUT", "true"), ("RELAY_LOG", "warn")]);
        let mut connection = store.connect().await;
        assert_eq!(code, Some(3), "standard error names the dead letter");
        assert_eq!(count(&mut connection, "event_dead_letter").await, 300);
        assert_eq!(count(&mut connection, "event_processing_log where status = 'published'").await, 50);
        assert!(peak < 128 * MB, "{column}: {} MB", peak / MB);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn f79_on_postgres_large_values_in_any_column_cost_no_memory() {
    large_values_in_any_column_cost_no_memory::<Postgres>(
        |bytes| format!("repeat('x', {bytes})"),
        |text| format!("jsonb_build_object('a', {text})"),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f79_on_sqlite_large_values_in_any_column_cost_no_memory() {
    large_values_in_any_column_cost_no_memory::<Sqlite>(
        |bytes| format!("replace(hex(zeroblob({bytes} / 2)), '0', 'x')"),
        |text| format!("json_object('a', {text})"),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f79_large_headers_within_the_bound_count_in_the_bytes_of_a_batch() {
    let store = Postgres::new().await;
    fill(&store, 600, "headers", "jsonb_build_object('a', repeat('x', 250000))").await;
    let (code, peak) = drained(store.url(), &[("RELAY_STDOUT", "true"), ("RELAY_LOG", "warn")]);
    assert_eq!(code, Some(0));
    assert_eq!(count(&mut store.connect().await, "event_outbox").await, 0);
    assert!(peak < 128 * MB, "{} MB", peak / MB);
}

#[tokio::test(flavor = "multi_thread")]
async fn f80_payloads_far_over_the_limit_beside_healthy_events_hold_up_nobody() {
    let store = Postgres::new().await;
    let mut connection = store.connect().await;
    // Payloads that compress to a hundredth, that do not compress, and short ones that print as millions of bytes.
    let numbers = |count: u32| {
        format!("(select jsonb_agg(n) from (select '1e131071'::jsonb n from generate_series(1, {count})) x)")
    };
    for (count, payload) in [(12, "to_jsonb(repeat('x', 60000000))".to_owned()), (20, numbers(100)), (4, numbers(600))]
    {
        let rows = format!(
            "insert into event_outbox (event_type, aggregate_id, payload)
             select 'huge', i::text, {payload} from generate_series(1, {count}) i"
        );
        sql(&mut connection, rows).await;
    }
    sql(&mut connection, "alter table event_outbox alter payload set storage external").await;
    let raw = "insert into event_outbox (event_type, aggregate_id, payload)
               select 'huge', i::text, to_jsonb(repeat('x', 30000000)) from generate_series(1, 4) i";
    sql(&mut connection, raw).await;
    let healthy =
        "insert into event_outbox (event_type, aggregate_id) select 'healthy', i::text from generate_series(1, 64) i";
    sql(&mut connection, healthy).await;
    let (code, peak) = drained(store.url(), &[("RELAY_STDOUT", "true"), ("RELAY_LOG", "warn")]);
    assert_eq!(code, Some(3));
    let dead = column(&mut connection, "select distinct error_code from event_dead_letter").await;
    assert_eq!(dead, ["payload_too_large"]);
    assert_eq!(count(&mut connection, "event_dead_letter").await, 40);
    assert_eq!(count(&mut connection, "event_processing_log where status = 'published'").await, 64);
    assert!(peak < 256 * MB, "{} MB", peak / MB);
}

/// Four payloads of 40 MB, which the limit allows, to each kind of destination. Three lanes with one payload each hold 120
/// MB. They may cost twice that, besides what the program needs anyway. glibc's allocator keeps some freed blocks if they are
/// below 32 MB.
async fn large_payloads_cost_about_twice_what_lanes_hold<S: Old>(payload: &str) {
    let redis = redis();
    let stream = crate::support::unique("large");
    for destination in [
        &[("RELAY_STDOUT", "true")][..],
        &[("REDIS_URL", redis.url()), ("RELAY_REDIS_STREAM", &stream)],
        &[("REDIS_URL", redis.url()), ("RELAY_REDIS_MODE", "pubsub")],
    ] {
        let store = S::new().await;
        fill(&store, 4, "payload", payload).await;
        let variables = [destination, &[("EVENT_MAX_PAYLOAD_SIZE", "50000000"), ("RELAY_LOG", "warn")]].concat();
        let (code, peak) = drained(store.url(), &variables);
        assert_eq!(code, Some(0), "{destination:?}");
        assert_eq!(count(&mut store.connect().await, "event_outbox").await, 0);
        assert!(peak < 2 * 120 * MB + 90 * MB, "{} MB", peak / MB);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn f81_on_postgres_large_payloads_cost_about_twice_what_lanes_hold() {
    large_payloads_cost_about_twice_what_lanes_hold::<Postgres>("to_jsonb(repeat('x', 40000000))").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f81_on_sqlite_large_payloads_cost_about_twice_what_lanes_hold() {
    let payload = r#"'"' || replace(hex(zeroblob(20000000)), '0', 'x') || '"'"#;
    large_payloads_cost_about_twice_what_lanes_hold::<Sqlite>(payload).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn f81_batches_of_large_events_to_eventbridge_cost_about_twice_what_lanes_hold() {
    let stub = EventBridgeStub::start().await;
    let url = stub.url().to_owned();
    let store = Postgres::new().await;
    fill(&store, 200, "payload", "to_jsonb(repeat('x', 500000))").await;
    let variables = [
        ("AWS_EVENTBRIDGE_BUS_NAME", "orders"),
        ("AWS_ENDPOINT_URL", url.as_str()),
        ("AWS_REGION", "eu-west-1"),
        ("AWS_ACCESS_KEY_ID", "id"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("RELAY_BATCH_BYTES", "16777216"),
        ("RELAY_LOG", "warn"),
    ];
    let (code, peak) = drained(store.url(), &variables);
    assert_eq!(code, Some(0));
    assert!(peak < 2 * 48 * MB + 100 * MB, "{} MB", peak / MB);
}
