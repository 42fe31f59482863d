//! `relay emit`.

use std::fs::File;

use super::file;
use crate::binary::{Running, finished, relay};
use crate::harness::{column, count};
use crate::servers::database;

const ROWS: &str = "
select concat_ws('|', event_id, event_type, payload, source, aggregate_type, aggregate_id, headers, correlation_id,
                 causation_id, schema_version, priority, status, available_at - created_at)
from event_outbox order by id";

#[tokio::test]
async fn an_event_is_inserted_and_its_id_printed() {
    let database = database().await;
    let variables = [("DATABASE_URL", database.url())];
    let bare = finished(&["emit", "order.created"], &variables).exited(0);
    assert_eq!(bare.stderr, "");
    let all = [
        "emit",
        "order.created",
        r#"{"total": 1e2, "name": "é"}"#,
        "--aggregate-type=order",
        "--aggregate-id=42",
        "--source=shop",
        "--header=traceparent=00-ab=cd",
        "--header",
        "tenant=acme",
        "--correlation-id=req-1",
        "--causation-id=cmd-1",
        "--schema-version=3",
        "--priority=9",
        "--delay=2h",
    ];
    let whole = finished(&all, &variables).exited(0);
    let headers = r#"{"tenant": "acme", "traceparent": "00-ab=cd"}"#;
    let expected = [
        format!("{}|order.created|{{}}||{{}}|1|0|pending|00:00:00", bare.stdout.trim_end()),
        format!(
            r#"{}|order.created|{{"name": "é", "total": 100}}|shop|order|42|{headers}|req-1|cmd-1|3|9|scheduled|02:00:00"#,
            whole.stdout.trim_end()
        ),
    ];
    assert_eq!(column(&mut database.connect().await, ROWS).await, expected);
}

#[tokio::test]
async fn a_dash_reads_the_payload_from_standard_input() {
    let database = database().await;
    let large = format!("{{\"text\": \"{}\"}}\n", "x".repeat(300_000)); // more than an argument may have
    for payload in ["[1, 2]\n", &large] {
        let input = file(payload);
        let mut command = relay(&["emit", "order.created", "-"], &[("DATABASE_URL", database.url())]);
        command.stdin(File::open(input.path()).unwrap());
        Running::start(command).finish().exited(0);
    }
    let stored = column(&mut database.connect().await, "select payload::text from event_outbox order by id").await;
    assert_eq!(stored, ["[1, 2]", large.trim_end()]);
}

#[tokio::test]
async fn what_is_no_event_is_refused_with_2_and_one_clear_line() {
    let database = database().await;
    let variables = [("DATABASE_URL", database.url())];
    let cases: [(&[&str], &[&str]); 10] = [
        (&["a", "{"], &["payload is not JSON", "line 1 column 1"]),
        (&["a", "{\"n\": 1} {\"n\": 2}"], &["payload is not JSON"]),
        (&["a", ""], &["payload is not JSON"]),
        (&["a", "{'n': 1}"], &["payload is not JSON", "line 1 column 2"]),
        (&["a", "-"], &["payload is not JSON"]), // standard input is empty
        (&["a", r#"{"n": "\ud800"}"#], &["payload", "surrogate"]),
        (&["a", r#"{"n": "\u0000"}"#], &["payload", "NUL"]),
        (&["", "{}"], &["1 to 128 characters"]),
        (&["a", "--header=type=x"], &["\"type\""]),
        (&["a", "--schema-version=0"], &["schema version"]),
    ];
    for (args, parts) in cases {
        let refused = finished(&[&["emit"], args].concat(), &variables).exited(2);
        refused.complaint();
        assert_eq!(refused.stdout, "");
        refused.says(parts);
    }
    for option in [
        "--header=novalue",
        "--priority=10",
        "--priority=high",
        "--delay=1 fortnight",
        "--aggregate-type=order",
        "--schema-version=x",
    ] {
        finished(&["emit", "a", option], &variables).exited(2).says(&["error: "]);
    }
    assert_eq!(count(&mut database.connect().await, "event_outbox").await, 0);
}

#[tokio::test]
async fn json_that_only_postgres_refuses_is_refused_in_its_words() {
    let database = database().await;
    let variables = [("DATABASE_URL", database.url())];
    let number = "1e999999"; // JSON with more digits than the type numeric allows
    let refused = finished(&["emit", "a", number], &variables).exited(2);
    assert!(refused.complaint().contains("overflow"), "{}", refused.stderr);
    let refused = finished(&["emit", "a", "--delay", "1000000years"], &variables).exited(2);
    assert!(refused.complaint().contains("out of range"), "{}", refused.stderr);
}
