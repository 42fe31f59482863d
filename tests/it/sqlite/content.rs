//! Events as the application writes them and as consumers get them: SQLite stores any bytes and has few types.

use std::process::Command;

use serde_json::value::RawValue;

use crate::binary::{drain, finished};
use crate::harness::{column, count, emit, refused, sql};
use crate::servers::redis;
use crate::stores::{Client, Sqlite, Store};
use crate::stream;
use crate::support::unique;

/// Payloads that parsing and printing again would change.
const PAYLOADS: [&str; 8] = [
    "{}",
    "  { \"b\" :1.50,\t\"a\": 1e400 , \"b\": 2}  ",
    "{\n  \"lines\": [\r\n    1\n  ]\n}\n",
    "\"é ü ☃ 😀 \u{2028} \u{7f}\"",
    r#""\u00e9 \ud83d\ude00 \/ \n""#,
    "123456789012345678901234567890.000",
    "null",
    "[ ]",
];

#[derive(serde::Deserialize)]
struct Line<'a> {
    #[serde(borrow)]
    data: &'a RawValue,
}

#[tokio::test]
async fn consumers_get_the_bytes_of_the_payload() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    for payload in PAYLOADS {
        let insert = format!("insert into event_outbox (event_type, payload) values ('a', '{payload}')");
        sql(&mut connection, insert).await;
    }
    let name = unique("sqlite:bytes");
    let variables = [
        ("DATABASE_URL", store.url()),
        ("REDIS_URL", redis().url()),
        ("RELAY_REDIS_STREAM", &name),
        ("RELAY_STDOUT", "true"),
        ("EVENT_HISTORY_ENABLED", "true"),
    ];
    let drained = finished(&["--once"], &variables).exited(0);
    let entries = stream::entries(&mut stream::connect(redis().url()), &name);
    let in_stream: Vec<&str> = entries.iter().map(|entry| entry.fields["data"].as_str()).collect();
    assert_eq!(in_stream, PAYLOADS);
    let history = "select payload from event_history where destination = 'redis' order by outbox_id";
    assert_eq!(column(&mut connection, history).await, PAYLOADS);

    // Each event is one line. On standard output, and nowhere else, line ends between tokens become blanks.
    let lines: Vec<Line<'_>> = drained.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let printed: Vec<&str> = lines.iter().map(|line| line.data.get()).collect();
    assert_eq!(printed, PAYLOADS.map(|payload| payload.trim().replace(['\n', '\r'], " ")));
}

#[tokio::test]
async fn what_is_not_utf_8_is_dead_lettered_whole_and_holds_up_nobody() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    let columns = ["source", "aggregate_id", "aggregate_type", "correlation_id", "causation_id", "destination"];
    for column in columns {
        let insert = |bytes: &str| format!("insert into event_outbox (event_type, {column}) values ('bad', {bytes})");
        sql(&mut connection, insert("cast(x'61ff' as text)")).await;
        let refused = connection.execute(&insert("x'6162'")).await.unwrap_err().to_string();
        assert!(refused.contains("text_is_no_blob"), "{column}: {refused}");
    }
    for (column, bytes) in [("payload", "22ff22"), ("headers", "7b2261223a2262ff227d")] {
        let insert =
            format!("insert into event_outbox (event_type, {column}) values ('bad', cast(x'{bytes}' as text))");
        sql(&mut connection, insert).await;
    }
    sql(&mut connection, "insert into event_outbox (event_type) values (cast(x'62ff' as text))").await;
    emit(&mut connection, "healthy", "").await;
    let variables = [("DATABASE_URL", store.url()), ("RELAY_STDOUT", "true")];
    let drained = finished(&["--once"], &variables).exited(3);
    assert_eq!(drained.stdout.lines().count(), 1);
    assert!(drained.stdout.contains(r#""type":"healthy""#), "{}", drained.stdout);
    let why =
        "select concat_ws(' ', error_code, attempts, count(*)) from event_dead_letter group by error_code, attempts";
    assert_eq!(column(&mut connection, why).await, ["not_utf8 1 9"]);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
    let kept = "select hex(payload) from event_dead_letter where payload <> '{}'";
    assert_eq!(column(&mut connection, kept).await, ["22FF22"]);
}

#[tokio::test]
async fn times_are_written_in_the_one_way_that_can_be_compared() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    for column in ["available_at", "created_at"] {
        let insert = |value: &str| format!("insert into event_outbox (event_type, {column}) values ('a', {value})");
        for value in [
            "'2026-01-01T00:00:00Z'",
            "'2026-01-01T00:00:00'",
            "'2026-01-01 00:00:00+02:00'",
            "'2026-01-01 00:00'",
            "'2026-01-01'",
            "'2026-02-30 00:00:00'",
            "'2026-01-01 24:00:00'",
            "'2026-01-01 24:59:59.999'",
            "'-0001-01-01 00:00:00'",
            "'2026-01-01 00:00:00.1'",
            "' 2026-01-01 00:00:00'",
            "''",
            "1767225600",
            "2461041.5",
            "x'323032362d30312d30312030303a30303a3030'",
        ] {
            let words = refused(&mut connection, insert(value)).await;
            assert!(words.contains(&format!("{column}_is_utc_as_datetime_gives_it")), "{value}: {words}");
        }
        for value in ["null", "'now'"] {
            refused(&mut connection, insert(value)).await;
        }
        for value in
            ["'2026-01-01 00:00:00'", "'2026-01-01 00:00:00.123'", "datetime('now')", "datetime('now', '-15 minutes')"]
        {
            sql(&mut connection, insert(value)).await;
        }
    }
    let published = drain(store.url());
    let times: Vec<&str> = published.iter().map(|event| event["time"].as_str().unwrap()).collect();
    assert_eq!(times[4..6], ["2026-01-01T00:00:00Z", "2026-01-01T00:00:00.123Z"]);
    assert_eq!(times.len(), 8);
}

#[tokio::test]
async fn types_that_sqlite_lets_pass_elsewhere_are_refused() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    for (columns, values, rule) in [
        ("event_type", "x'61'", "event_type_has_1_to_128_characters"),
        ("event_type, payload", "'a', x'7b7d'", "payload_is_json"),
        ("event_type, payload", "'a', '{'", "payload_is_json"),
        ("event_type, payload", "'a', ''", "payload_is_json"),
        ("event_type, payload", "'a', '{a: 1}'", "payload_is_json"),
        ("event_type, payload", "'a', '{}' || char(0)", "payload_is_json"),
        ("event_type, headers", "'a', x'7b7d'", "headers_are_a_json_object"),
        ("event_type, headers", "'a', '[]'", "headers_are_a_json_object"),
        ("event_type, priority", "'a', 1.5", "priority_is_0_to_9"),
        ("event_type, priority", "'a', 'high'", "priority_is_0_to_9"),
        ("event_type, schema_version", "'a', 'one'", "schema_version_starts_at_1"),
        ("event_type, event_id", "'a', 'x'", "event_id_is_a_uuid"),
        ("event_type, event_id", "'a', '00000000-0000-4000-8000-00000000000g'", "event_id_is_a_uuid"),
        ("event_type, event_id", "'a', '{0000000-0000-4000-8000-000000000000'", "event_id_is_a_uuid"),
        ("event_type, event_id", "'a', '000000000000-4000-8000-0000-00000000'", "event_id_is_a_uuid"),
    ] {
        let words = refused(&mut connection, format!("insert into event_outbox ({columns}) values ({values})")).await;
        assert!(words.contains(rule), "{values}: {words}");
    }
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
}

#[tokio::test]
async fn the_ids_that_sqlite_makes_are_random_uuids() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    let insert = format!("insert into event_outbox (event_type) select 'a' from {}", Sqlite::numbers(1000));
    assert_eq!(connection.execute(&insert).await.unwrap(), 1000);
    let ids = column(&mut connection, "select distinct event_id from event_outbox").await;
    assert_eq!(ids.len(), 1000);
    for id in ids {
        let id = uuid::Uuid::parse_str(&id).unwrap();
        assert_eq!((id.get_version_num(), id.get_variant()), (4, uuid::Variant::RFC4122), "{id}");
    }
}

#[tokio::test]
async fn an_application_with_another_sqlite_emits_by_itself() {
    let store = Sqlite::new().await;
    let program = "
import sqlite3, sys
database = sqlite3.connect(sys.argv[1])
with database:
    database.execute('insert into app_order values (1)')
    database.execute(
        'insert into event_outbox (event_type, aggregate_type, aggregate_id, payload, headers) values (?, ?, ?, ?, ?)',
        ('order.created', 'order', 1, '{\"total\": 12.50}', '{\"tenant\": \"acme\"}'))
for column, value in [('headers', '{\"n\": 1}'), ('created_at', '2026-02-30 00:00:00'), ('available_at', '2026-01-01 24:00:00')]:
    try:
        with database:
            database.execute('insert into event_outbox (event_type) values (?)', ('undone',))
            database.execute(f'insert into event_outbox (event_type, {column}) values (?, ?)', ('a', value))
    except sqlite3.IntegrityError as refused:
        print(refused)
";
    let output = Command::new("python3").args(["-c", program]).arg(store.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let printed = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        printed,
        "CHECK constraint failed: headers_are_a_flat_string_map\n\
         CHECK constraint failed: created_at_is_utc_as_datetime_gives_it\n\
         CHECK constraint failed: available_at_is_utc_as_datetime_gives_it\n"
    );
    let published = drain(store.url());
    assert_eq!(published.len(), 1);
    assert_eq!(published[0]["type"], "order.created");
    assert_eq!(published[0]["partitionkey"], "order:1");
    assert_eq!(published[0]["tenant"], "acme");
    assert_eq!(published[0]["data"]["total"], 12.5);
}
