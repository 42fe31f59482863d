//! Rows that a relay cannot read, and bytes that must arrive unchanged.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use outbox_relay::outbox::postgres::migrate::migrate;
use outbox_relay::secret::Secret;
use outbox_relay::sink::eventbridge::{EventBridge, EventBridgeConfig};
use outbox_relay::sink::redis::RedisAddress;
use outbox_relay::sink::redis_stream::{RedisStream, RedisStreamConfig};
use outbox_relay::sink::{Format, Sink};
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::assert_first_in_order;
use crate::binary::finished;
use crate::harness::{Setup, column, count, sql};
use crate::scripted::ScriptedSink;
use crate::servers::{Database, Server, database, database_on, redis};
use crate::stores::{Client, Postgres, Sqlite, Store};
use crate::stub::EventBridgeStub;
use crate::support::{eventbridge_config, sdk, unique};

/// Emits healthy events of the same keys before and after the rows that `sick` inserts, and drains. Only the sick rows are
/// dead-lettered. Returns them as `event_type error_code`.
async fn drained_around(database: &Database, sick: &[&str]) -> Vec<String> {
    let mut connection = database.connect().await;
    let healthy = "insert into event_outbox (event_type, aggregate_id) select 'healthy', (i % 3)::text from generate_series(1, 10) i";
    sql(&mut connection, healthy).await;
    for statement in sick {
        sql(&mut connection, statement).await;
    }
    sql(&mut connection, healthy).await;
    let sink = ScriptedSink::accepting();
    let drain = Setup::new(database, vec![("a", sink.clone())]).drain();
    tokio::time::timeout(Duration::from_secs(120), drain).await.expect("the relay does not finish the drain");
    let arrived = sink.accepted().into_iter().filter(|event| event.event_type == "healthy");
    let arrived = arrived.map(|event| (event.aggregate_id.unwrap_or_default(), event.row.id));
    assert_eq!(assert_first_in_order(arrived), (20, 0), "each healthy event arrived once");
    let dead = "select concat_ws(' ', event_type, error_code) from event_dead_letter order by id";
    column(&mut connection, dead).await
}

#[tokio::test]
async fn f29_a_row_with_a_time_that_no_calendar_has_is_dead_lettered_alone() {
    let database = database().await;
    let insert = |created_at: &str| {
        format!("insert into event_outbox (event_type, aggregate_id, created_at) values ('sick', '1', '{created_at}')")
    };
    let sick = ["infinity", "-infinity", "294276-12-31", "10000-01-01", "4713-01-01 BC"].map(insert);
    let dead = drained_around(&database, &sick.each_ref().map(String::as_str)).await;
    assert_eq!(dead, ["sick created_at_invalid"; 5]);
    assert_eq!(count(&mut database.connect().await, "event_outbox").await, 0);
}

#[tokio::test]
async fn f29_an_event_that_is_never_due_waits_and_holds_up_nobody() {
    let database = database().await;
    let mut connection = database.connect().await;
    let never = "insert into event_outbox (event_type, aggregate_id, available_at, status)
                 values ('never', '1', 'infinity', 'scheduled'), ('never', '1', 'infinity', 'pending'),
                        ('never', '1', '294276-01-01', 'scheduled')";
    assert!(drained_around(&database, &[never]).await.is_empty());
    sql(&mut connection, "select emit_event('retried', aggregate_id => '1')").await;
    let sink = ScriptedSink::accepting();
    Setup::new(&database, vec![("a", sink.clone())]).drain().await;
    assert_eq!(sink.names(), ["retried"]);
    // As a retry for a destination that somebody postponed for ever. The later events of its key wait behind it.
    sql(&mut connection, "update event_outbox set destination = 'a', status = 'scheduled'").await;
    sql(&mut connection, "select emit_event('behind', aggregate_id => '1'), emit_event('free', aggregate_id => '2')")
        .await;
    Setup::new(&database, vec![("a", sink.clone())]).drain().await;
    assert_eq!(sink.names(), ["retried", "free"]);
    sql(&mut connection, "update event_outbox set available_at = now()").await;
    Setup::new(&database, vec![("a", sink.clone())]).drain().await;
    assert_eq!(sink.names()[2..], ["never", "never", "never", "behind"]);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
}

#[tokio::test]
async fn f29_headers_that_a_rule_no_longer_guards_are_dead_lettered_alone() {
    let database = database().await;
    let sick = [
        r#"{"a": 1}"#,
        r#"[1]"#,
        r#""text""#,
        r#"{"a": {"b": "c"}}"#,
        r#"{"ID": "x"}"#,
        r#"{"a": "b", "data\t": "x"}"#,
        r#"{" ": "x"}"#,
    ]
    .map(|headers| {
        format!("insert into event_outbox (event_type, aggregate_id, headers) values ('sick', '1', '{headers}')")
    });
    // With triggers off, like rows that are older than the rules.
    let unruled = std::iter::once("set session_replication_role = replica").chain(sick.each_ref().map(String::as_str));
    let dead = drained_around(&database, &unruled.chain(["reset session_replication_role"]).collect::<Vec<_>>()).await;
    let expected = [
        "headers_invalid",
        "headers_invalid",
        "headers_invalid",
        "headers_invalid",
        "header_name_reserved",
        "header_name_reserved",
        "header_name_empty",
    ];
    assert_eq!(dead, expected.map(|code| format!("sick {code}")));
}

/// After `allow` permits NULLs, each of [`NULLABLE`] in turn is NULL in one row, between healthy events of the same key.
async fn a_column_that_is_null_is_the_rows_defect<S: Store>(allow: &str) {
    let store = S::new().await;
    let mut connection = store.connect().await;
    sql(&mut connection, allow).await;
    for name in NULLABLE {
        let healthy = "insert into event_outbox (event_type, aggregate_id) values ('healthy', '1')";
        sql(&mut connection, healthy).await;
        let sick = format!("insert into event_outbox (event_type, aggregate_id, {name}) values ('sick', '1', null)");
        let sick = sick.replace(
            "(event_type, aggregate_id, event_type) values ('sick', '1',",
            "(aggregate_id, event_type) values ('1',",
        );
        sql(&mut connection, sick).await;
        sql(&mut connection, healthy).await;
    }
    let sink = ScriptedSink::accepting();
    let drain = Setup::new(&store, vec![("a", sink.clone())]).drain();
    tokio::time::timeout(Duration::from_secs(120), drain).await.expect("the relay does not finish the drain");
    assert_eq!(sink.names(), vec!["healthy"; 2 * NULLABLE.len()]);
    let dead = column(&mut connection, "select error_code from event_dead_letter order by outbox_id").await;
    // From PostgreSQL, a NULL and a date that the relay cannot represent are read alike.
    let dead: Vec<String> = dead.iter().map(|code| code.replace("created_at_invalid", "created_at_missing")).collect();
    assert_eq!(dead, NULLABLE.map(|name| format!("{name}_missing")));
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
}

/// The columns that are `not null`, without those of the primary key.
const NULLABLE: [&str; 9] = [
    "payload",
    "headers",
    "event_id",
    "event_type",
    "source",
    "schema_version",
    "created_at",
    "attempts",
    "available_at",
];

#[tokio::test]
async fn f29_a_column_that_is_null_because_somebody_allows_it_is_dead_lettered_alone() {
    let drop = NULLABLE.map(|name| format!("alter column {name} drop not null")).join(", ");
    a_column_that_is_null_is_the_rows_defect::<Postgres>(&format!("alter table event_outbox {drop}")).await;
    // As if the table had been created without the constraints.
    let schema =
        "update sqlite_schema set sql = replace(sql, ' not null', '') where type = 'table' and name = 'event_outbox'";
    a_column_that_is_null_is_the_rows_defect::<Sqlite>(&format!(
        "pragma writable_schema = on; {schema}; pragma writable_schema = reset; pragma ignore_check_constraints = on"
    ))
    .await;
}

/// Without a priority a row has no partition, so no claim finds it. A check must find it.
#[tokio::test]
async fn f29_an_event_without_a_priority_on_sqlite_is_told_by_a_check_with_its_cure() {
    let store = Sqlite::new().await;
    let mut connection = store.connect().await;
    let schema =
        "update sqlite_schema set sql = replace(sql, ' not null', '') where type = 'table' and name = 'event_outbox'";
    sql(
        &mut connection,
        format!(
            "pragma writable_schema = on; {schema}; pragma writable_schema = reset; pragma ignore_check_constraints = on"
        ),
    )
    .await;
    sql(&mut connection, "insert into event_outbox (event_type, priority) values ('sick', null)").await;
    let environment = [("DATABASE_URL", store.url()), ("RELAY_STDOUT", "true")];
    let checked = finished(&["check"], &environment);
    let cure = "update event_outbox set priority = 0 where priority is null;";
    assert!(
        checked.stdout.contains("1 events have no priority (NULL)") && checked.stdout.contains(cure),
        "{}",
        checked.stdout
    );
    checked.exited(1);
    sql(&mut connection, cure).await;
    finished(&["check"], &environment).exited(0);
    let sink = ScriptedSink::accepting();
    Setup::new(&store, vec![("a", sink.clone())]).drain().await;
    assert_eq!(sink.names(), ["sick"]);
}

#[tokio::test]
async fn f29_a_payload_of_200_megabytes_is_dead_lettered_alone_and_unread() {
    let database = database().await;
    let large = "insert into event_outbox (event_type, aggregate_id, payload) values ('sick', '1', to_jsonb(repeat('x', 200000000)))";
    assert_eq!(drained_around(&database, &[large]).await, ["sick payload_too_large"]);
    let kept = "event_dead_letter where octet_length(payload::text) = 200000002";
    assert_eq!(count(&mut database.connect().await, kept).await, 1);
}

/// Unusual JSON texts.
const CORPUS: [&str; 14] = [
    r#"{"n": 1e400}"#,
    r#"{"n": -0.0, "m": 1.10, "l": 123456789012345678901234567890.000}"#,
    r#""\u0001\u001f\b\f\n\r\t\\\"\/""#,
    r#"{"": {"": [[], {}, "", null]}}"#,
    "\"\u{feff}a byte order mark\"",
    "\"\u{2028}\u{2029}\u{85}\u{a0}\u{200b}\u{202e}\"",
    "\"\u{1f980}\u{10ffff}\u{e000}e\u{301}\u{fffd}\u{fffe}\"",
    r#""\ud83e\udd80 and \u00e9""#,
    r#"{"a": 1, "b": 2, "a": 3}"#,
    r#"{"b": 2, "aa": 1, "a": "order of keys"}"#,
    r#""</script><![CDATA[{{event_type}}]]>%s%n$1""#,
    "true",
    "null",
    "0",
];

/// Relays events to a stream and to a bus with bare payloads, and drains. Returns the payloads that arrived, by outbox id.
async fn arrived(database: &Database) -> (HashMap<i64, Vec<u8>>, HashMap<i64, Vec<u8>>) {
    let (stream, bus) = (unique("corpus"), EventBridgeStub::start().await);
    let address = RedisAddress::Url(Secret::inline(redis().url()));
    let to_redis = RedisStream::new(RedisStreamConfig {
        address,
        stream: stream.parse().unwrap(),
        max_length: None,
        source: "outbox".into(),
        timeout: Duration::from_secs(30),
        exactly_once: true,
    });
    let to_bus = EventBridgeConfig { format: Format::CloudEvents, ..eventbridge_config(bus.url()) };
    let sinks: Vec<(&str, Arc<dyn Sink>)> =
        vec![("redis", Arc::new(to_redis)), ("bus", Arc::new(EventBridge::with_sdk_config(&sdk(), to_bus)))];
    Setup::new(database, sinks).drain().await;
    let mut connection = redis::Client::open(redis().url()).unwrap().get_connection().unwrap();
    let entries: Vec<(String, HashMap<String, Vec<u8>>)> =
        redis::cmd("XRANGE").arg(&[&stream, "-", "+"]).query(&mut connection).unwrap();
    let number = |entry: &HashMap<String, Vec<u8>>| std::str::from_utf8(&entry["sequence"]).unwrap().parse().unwrap();
    let in_stream = entries.iter().map(|(_, entry)| (number(entry), entry["data"].clone())).collect();
    let at_bus = bus.requests().into_iter().flatten().map(|entry| {
        let detail = entry["Detail"].as_str().unwrap();
        let (head, data) = detail.split_once(r#","data":"#).unwrap();
        let head: serde_json::Value = serde_json::from_str(&format!("{head}}}")).unwrap();
        (head["sequence"].as_str().unwrap().parse().unwrap(), data.strip_suffix('}').unwrap().into())
    });
    (in_stream, at_bus.collect())
}

/// The payloads as the database prints them, by id.
async fn printed(connection: &mut PgConnection) -> HashMap<i64, Vec<u8>> {
    let rows = "select id, convert_to(payload::text, getdatabaseencoding()) from event_outbox";
    sqlx::query_as::<_, (i64, Vec<u8>)>(rows).fetch_all(connection).await.unwrap().into_iter().collect()
}

#[tokio::test]
async fn f55_awkward_payloads_arrive_byte_for_byte() {
    let database = database().await;
    let mut connection = database.connect().await;
    let deep = format!("{}1{}", r#"{"a":["#.repeat(400), "]}".repeat(400));
    let strings = (0..300).map(|_| {
        let any = std::iter::repeat_with(|| fastrand::char(..)).filter(|c| *c != '\0').take(40).collect::<String>();
        serde_json::to_string(&any).unwrap()
    });
    let corpus = CORPUS.into_iter().map(str::to_owned).chain([deep]).chain(strings);
    for payload in corpus {
        let insert = "insert into event_outbox (event_type, payload) values ('a', $1::text::jsonb)";
        sqlx::query(insert).bind(payload).execute(&mut connection).await.unwrap();
    }
    let printed = printed(&mut connection).await;
    let (in_stream, at_bus) = arrived(&database).await;
    assert_eq!(printed.len(), CORPUS.len() + 301);
    for (id, bytes) in &printed {
        assert_eq!(String::from_utf8_lossy(&in_stream[id]), String::from_utf8_lossy(bytes), "in the stream");
        assert_eq!(String::from_utf8_lossy(&at_bus[id]), String::from_utf8_lossy(bytes), "at the bus");
    }
    assert_eq!((in_stream.len(), at_bus.len()), (printed.len(), printed.len()));
}

#[tokio::test]
async fn f55_of_a_database_without_an_encoding_any_bytes_reach_redis_and_bad_names_are_dead_lettered_alone() {
    let server = Server::start("postgres", &["--fast"]);
    let model = database_on(&server).await;
    let mut owner = model.connect().await;
    sql(&mut owner, "create database ascii encoding 'SQL_ASCII' template template0 lc_collate 'C' lc_ctype 'C'").await;
    let (base, _) = model.url().rsplit_once('/').unwrap();
    let url = format!("{base}/ascii");
    migrate(&Secret::inline(&url)).await.unwrap();
    let mut connection = PgConnection::connect(&url).await.unwrap();
    sql(&mut connection, "set client_encoding = sql_ascii").await;
    let values = [
        // These are not UTF-8. Redis accepts any payload, but names and headers must be UTF-8.
        r#"('payload', '"\xff\xc3"', '1', '{}', '')"#,
        r#"('t\xff', '{}', '1', '{}', '')"#,
        r#"('key', '{}', 'k\xff', '{}', '')"#,
        r#"('header', '{}', '1', '{"a": "\xff"}', '')"#,
        r#"('source', '{}', '1', '{}', 's\xff')"#,
        r#"('healthy', '"\xc3\xa9"', '1', '{}', '')"#,
    ];
    for value in values {
        // Each \xff above stands for that byte.
        let literal =
            value.replace(r#"'""#, r#"E'""#).replace("'t\\", "E't\\").replace("'k\\", "E'k\\").replace("'s\\", "E's\\");
        let literal = literal.replace(r#"'{"a""#, r#"E'{"a""#);
        let insert =
            format!("insert into event_outbox (event_type, payload, aggregate_id, headers, source) values {literal}");
        sqlx::raw_sql(AssertSqlSafe(insert)).execute(&mut connection).await.unwrap();
    }
    let printed = printed(&mut connection).await;
    assert_eq!(printed[&1], b"\"\xff\xc3\"");
    let ascii = Database::at(&url);
    let (in_stream, at_bus) = arrived(&ascii).await;
    assert_eq!(in_stream.keys().copied().collect::<std::collections::BTreeSet<_>>(), [1, 6].into());
    assert_eq!((&in_stream[&1], &in_stream[&6]), (&printed[&1], &printed[&6]), "byte for byte");
    assert_eq!(at_bus.keys().collect::<Vec<_>>(), [&6]);
    let dead = "select concat_ws(' ', outbox_id, destination, error_code) from event_dead_letter order by outbox_id";
    let expected = ["1 bus payload_not_utf8", "2  not_utf8", "3  not_utf8", "4  headers_invalid", "5  not_utf8"];
    assert_eq!(column(&mut connection, dead).await, expected);
    assert_eq!(connection.number("select count(*) from event_outbox").await, 0);
    assert_eq!(
        connection.number("select count(*) from event_dead_letter where event_type = E't\\xff'").await,
        1,
        "as it was"
    );
}
