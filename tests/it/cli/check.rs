//! `relay check`.

use outbox_relay::outbox::postgres::migrate::SCHEMA_VERSION;
use serde_json::Value;

use super::{STDOUT, file};
use crate::binary::finished;
use crate::harness::{count, sql};
use crate::servers::{database, redis};
use crate::stream;

#[tokio::test]
async fn a_check_of_what_is_well_says_what_it_found() {
    let database = database().await;
    let stream = ("RELAY_REDIS_STREAM", "cli:check");
    let variables = [("DATABASE_URL", database.url()), ("REDIS_URL", redis().url()), stream, STDOUT];
    let text = finished(&["check"], &variables).exited(0);
    assert_eq!(text.stderr, "");
    for part in [
        "\nok    database: test_",
        " on PostgreSQL ",
        " as postgres, not encrypted\n",
        &format!("\nok    schema: version {SCHEMA_VERSION}\n"),
        "\nok    privileges: all granted\n",
        "\nok    recording: all that a relay writes, tried and taken back\n",
        "\nok    destination redis: 127.0.0.1:",
        ", database 0, not encrypted, stream \"cli:check\"\n",
        "\nok    destination stdout: ",
    ] {
        assert!(text.stdout.contains(part), "{part:?} is missing in:\n{}", text.stdout);
    }

    let json: Value = serde_json::from_str(&finished(&["check", "--json"], &variables).exited(0).stdout).unwrap();
    let checks: Vec<(&str, bool)> = json["checks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|check| (check["subject"].as_str().unwrap(), check["ok"].as_bool().unwrap()))
        .collect();
    let subjects = [
        "database",
        "schema",
        "privileges",
        "triggers",
        "recording",
        "ids",
        "configuration",
        "destination redis",
        "destination stdout",
    ];
    assert_eq!(checks, subjects.map(|subject| (subject, true)));
    assert_eq!(json["settings"]["RELAY_REDIS_STREAM"]["value"], "cli:check");
    let shown = json["settings"]["DATABASE_URL"]["value"].as_str().unwrap();
    assert!(shown.starts_with("postgres://postgres:***@127.0.0.1:"), "{shown}");
}

#[tokio::test]
async fn each_thing_that_is_not_well_is_told_and_the_others_are_tried_all_the_same() {
    let database = database().await;
    redis::cmd("SET").arg("cli:check:text").arg("x").exec(&mut stream::connect(redis().url())).unwrap();
    let file = file(&format!(
        "[destinations.down]\ntype = \"redis-stream\"\nurl = \"redis://127.0.0.1:1\"\n\
         [destinations.text]\ntype = \"redis-stream\"\nurl = \"{}\"\nstream = \"cli:check:text\"\n",
        redis().url()
    ));
    let variables = [("DATABASE_URL", database.url()), STDOUT, ("RELAY_CONFIG", file.path().to_str().unwrap())];
    let text = finished(&["check"], &variables).exited(1).stdout;
    for part in [
        "\nok    privileges: ",
        "\nok    destination stdout: ",
        "\nFAIL  destination down: connect: 127.0.0.1:1, database 0: Connection refused",
        "\nFAIL  destination text: WRONGTYPE: the key \"cli:check:text\" holds a string, not a stream",
    ] {
        assert!(text.contains(part), "{part:?} is missing in:\n{text}");
    }
    let json: Value = serde_json::from_str(&finished(&["check", "--json"], &variables).exited(1).stdout).unwrap();
    let failed: Vec<&Value> = json["checks"].as_array().unwrap().iter().filter(|check| check["ok"] == false).collect();
    assert_eq!(failed.len(), 2);
    assert_eq!(failed[0]["subject"], "destination down");
    assert!(failed[0]["problem"].as_str().unwrap().contains("refused"));
}

#[tokio::test]
async fn a_check_changes_nothing() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(&mut connection, "select emit_event('order.created')").await;
    let name = "cli:check:nothing";
    let variables = [("DATABASE_URL", database.url()), ("REDIS_URL", redis().url()), ("RELAY_REDIS_STREAM", name)];
    finished(&["check"], &variables).exited(0);
    assert_eq!(count(&mut connection, "event_outbox").await, 1);
    assert_eq!(count(&mut connection, "event_processing_log").await, 0);
    assert_eq!(stream::length(&mut stream::connect(redis().url()), name), 0);
}
