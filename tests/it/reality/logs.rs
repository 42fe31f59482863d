//! Logs: of a run, of single events, of many errors at once, and of text from outside.

use serde_json::{Value, json};

use crate::binary::{Finished, Running, finished, relay};
use crate::harness::{column, count, eventually, sql};
use crate::servers::{Server, database, redis};
use crate::stub::{EventBridgeStub, Reply};

const PASSWORD: &str = "cAnary-pAssword";

/// The log's lines with this message.
fn lines(log: &str, message: &str) -> Vec<Value> {
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["message"].as_str().unwrap().contains(message)).collect()
}

#[tokio::test]
async fn f91_a_storm_of_failures_is_summed_up() {
    let database = database().await;
    let mut connection = database.connect().await;
    redis::cmd("SET").arg("storm:a").arg("x").exec(&mut crate::stream::connect(redis().url())).unwrap();
    sql(&mut connection, "select emit_event('a', '{}', 'order', n::text) from generate_series(1, 10000) n").await;
    let variables = [
        ("DATABASE_URL", database.url()),
        ("REDIS_URL", redis().url()),
        ("RELAY_REDIS_STREAM", "storm:{event_type}"),
        ("EVENT_DEFAULT_MAX_RETRIES", "1"),
        ("EVENT_DEFAULT_BACKOFF_MS", "10"),
    ];
    let stormed = finished(&["--once"], &variables).exited(3);
    assert_eq!(count(&mut connection, "event_dead_letter").await, 10_000);
    assert!(stormed.stderr.lines().count() < 200, "{} lines", stormed.stderr.lines().count());
    for (single, sum) in [
        ("event failed; it will be tried again", "more events failed; they will be tried again"),
        ("event dead-lettered", "more events were dead-lettered"),
    ] {
        let singles = lines(&stormed.stderr, single).len();
        let summed: u64 = lines(&stormed.stderr, sum).iter().map(|line| line["count"].as_u64().unwrap()).sum();
        assert_eq!(singles as u64 + summed, 10_000, "{}", stormed.stderr);
        let first = &lines(&stormed.stderr, sum)[0];
        assert_eq!((&first["destination"], &first["code"]), (&json!("redis"), &json!("WRONGTYPE")));
    }
}

#[tokio::test]
async fn f92_a_run_begins_with_a_line_that_says_what_runs() {
    let database = database().await;
    let url = format!("{}?application_name={PASSWORD}", database.url());
    let variables = [("DATABASE_URL", url.as_str()), ("RELAY_STDOUT", "true"), ("RELAY_LANES", "2")];
    let log = finished(&["--once"], &variables).exited(0).stderr;
    let first: Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    assert!(first["message"].as_str().unwrap().starts_with("relay starts"), "{first}");
    assert_eq!(first["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!((&first["lanes"], &first["destinations"]), (&json!(2), &json!("stdout")));
    assert!(first["store"].as_str().unwrap().starts_with("postgres://"), "{first}");
    assert!(first["worker"].as_str().unwrap().contains(':'), "{first}");
    assert!(!log.contains(PASSWORD), "{log}");
}

#[tokio::test]
async fn f92_a_failed_event_is_named_with_its_key_its_place_and_its_next_try() {
    let database = database().await;
    redis::cmd("SET").arg("named:a").arg("x").exec(&mut crate::stream::connect(redis().url())).unwrap();
    let mut connection = database.connect().await;
    sql(&mut connection, r#"select emit_event('a', '{}', 'order', E'4\n2\x1b[31m')"#).await;
    let variables = [
        ("DATABASE_URL", database.url()),
        ("REDIS_URL", redis().url()),
        ("RELAY_REDIS_STREAM", "named:{event_type}"),
        ("EVENT_DEFAULT_MAX_RETRIES", "1"),
        ("EVENT_DEFAULT_BACKOFF_MS", "50"),
    ];
    // A run may end before or after the second attempt is due.
    let mut log = String::new();
    eventually("it is dead-lettered", async || {
        log += &finished(&["--once"], &variables).stderr;
        count(&mut connection, "event_dead_letter").await == 1
    })
    .await;
    let (failed, dead) = (&lines(&log, "event failed")[0], &lines(&log, "event dead-lettered")[0]);
    for line in [failed, dead] {
        let text = |name: &str| line[name].as_str().unwrap();
        assert_eq!((text("destination"), text("place"), text("event_type")), ("redis", "named:a", "a"));
        assert_eq!(text("key"), "order:4\\n2\\u{1b}[31m");
        assert!(text("error").contains("WRONGTYPE") && line["event_id"].is_string());
    }
    assert_eq!((&failed["attempt"], &dead["attempt"]), (&json!(1), &json!(2)));
    assert!(failed["next_try_s"].as_f64().unwrap() > 0.01, "{failed}");
}

#[tokio::test]
async fn f92_an_outage_is_told_with_its_length() {
    let database = database().await;
    let mut connection = database.connect().await;
    let mut server = Server::start("redis", &[]);
    let url = server.url().to_owned();
    let variables = [
        ("DATABASE_URL", database.url()),
        ("REDIS_URL", &url),
        ("EVENT_CIRCUIT_BREAKER_RECOVERY_TIMEOUT", "100"),
        ("EVENT_CIRCUIT_BREAKER_THRESHOLD", "2"),
    ];
    let mut running = Running::start(relay(&["run"], &variables));
    running.until_log("\"message\":\"ready\"");
    server.stop();
    sql(&mut connection, "select emit_event('a')").await;
    running.until_log("destination down, breaker open");
    server.start_again();
    running.until_log("destination back, breaker closed");
    eventually("it is published", async || count(&mut connection, "event_outbox").await == 0).await;
    running.signal("TERM");
    let log = running.finish().exited(0).stderr;
    let down = &lines(&log, "destination down, breaker open")[0];
    assert!(down["since_s"].as_f64().unwrap() > 0.0 && down["next_probe_s"] == json!(0.1), "{down}");
    let back = &lines(&log, "destination back, breaker closed")[0];
    assert!(back["away_s"].as_f64().unwrap() >= down["since_s"].as_f64().unwrap(), "{back}");
    assert!(back["failed_calls"].as_u64().unwrap() >= 2, "{back}");
}

/// Relays one event that EventBridge refuses. The message forges log lines and quotes the event.
async fn echoed(url: &str) -> Finished {
    let stub = EventBridgeStub::start().await;
    let message = "no\nlike \u{1b}[31m\u{202e}this: {\"card\": \"cAnary-pAyload\"}, cookie=cAnary-hEader";
    let entries =
        json!({ "FailedEntryCount": 1, "Entries": [{ "ErrorCode": "InvalidArgument", "ErrorMessage": message }] });
    stub.script([Reply::Body(entries.to_string())]);
    finished(
        &["--once"],
        &[
            ("DATABASE_URL", url),
            ("AWS_EVENTBRIDGE_BUS_NAME", "orders"),
            ("AWS_ENDPOINT_URL", stub.url()),
            ("AWS_REGION", "eu-west-1"),
            ("AWS_ACCESS_KEY_ID", "id"),
            ("AWS_SECRET_ACCESS_KEY", "key"),
            ("EVENT_DEFAULT_MAX_RETRIES", "0"),
        ],
    )
}

#[tokio::test]
async fn f93_what_a_destination_echoes_and_forges_reaches_neither_log_nor_tables() {
    let database = database().await;
    let mut connection = database.connect().await;
    let emit =
        r#"select emit_event('a', '{"card": "cAnary-pAyload"}', headers => '{"cookie": "cookie=cAnary-hEader"}')"#;
    sql(&mut connection, emit).await;
    let ended = echoed(database.url()).await.exited(3);
    let mut said = column(&mut connection, "select error from event_dead_letter").await;
    assert!(said[0].starts_with("no\\nlike \\u{1b}[31m\\u{202e}this: "), "{said:?}");
    said.extend(column(&mut connection, "select error from event_processing_log where error is not null").await);
    assert_eq!(said.len(), 2);
    said.push(ended.stderr.clone());
    for text in said {
        for part in ["cAnary-pAyload", "cAnary-hEader", "\u{1b}", "\u{202e}"] {
            assert!(!text.contains(part), "{part:?} in {text}");
        }
    }
    lines(&ended.stderr, ""); // each line is JSON
}

#[tokio::test]
async fn f93_a_message_of_the_database_forges_no_line() {
    let database = database().await;
    let mut connection = database.connect().await;
    let trigger = r#"create function forge() returns trigger language plpgsql as $$
                     begin raise exception E'no\nFAIL  forged: \x1b[31m%', repeat('x', 5000); end $$;
                     create trigger forge before insert on event_processing_log for each row execute function forge();
                     select emit_event('a')"#;
    sql(&mut connection, trigger).await;
    let variables = [("DATABASE_URL", database.url()), ("RELAY_STDOUT", "true"), ("RELAY_LOG", "off")];
    let ended = finished(&["--once"], &variables).exited(1);
    let complaint = ended.complaint();
    assert!(complaint.contains("no\\nFAIL") && !complaint.contains('\u{1b}'), "{complaint}");
    assert!(complaint.len() < 3000, "{complaint}");
}
