//! The page for people, and what it shows. `make test-observe` shows it in a browser.

use super::{STDOUT, Served};
use crate::harness::sql;
use crate::schema::roles::{apply, login};
use crate::servers::database;
use crate::stores::{Sqlite, Store};

/// Nobody listens there.
const AWAY: (&str, &str) = ("RELAY_DESTINATION_AWAY", "redis+stream://:hunter2@127.0.0.1:1?stream=away");

const SOON: (&str, &str) = ("EVENT_CIRCUIT_BREAKER_THRESHOLD", "1");

#[tokio::test]
async fn the_page_shows_what_status_shows_and_no_payload_and_no_password() {
    let database = database().await;
    let mut connection = database.connect().await;
    let too_large = format!("select emit_event('order.large', to_jsonb('4711-secret{}'::text))", "x".repeat(2000));
    sql(&mut connection, &too_large).await;
    let limit = ("EVENT_MAX_PAYLOAD_SIZE", "1000");
    let relay = Served::start(&[("DATABASE_URL", database.url()), STDOUT, AWAY, SOON, limit]);
    sql(&mut connection, "select emit_event('order.created', '{\"card\": \"4711-secret\"}')").await;
    relay.until("/readyz", 200, "destination away is down");
    let shown = relay.until("/status.json", 200, "\"state\": \"down\"");
    let json = shown.json();
    let destinations = json["status"]["destinations"].as_array().unwrap();
    let names: Vec<&str> = destinations.iter().map(|destination| destination["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["away", "stdout"], "{json}");
    assert_eq!((&json["relay"]["state"], &json["error"]), (&"degraded".into(), &serde_json::Value::Null), "{json}");
    let dead_letter = &json["dead_letters"][0];
    assert_eq!(
        (&dead_letter["event_type"], &dead_letter["error_code"]),
        (&"order.large".into(), &"payload_too_large".into())
    );
    let page = relay.get("/");
    assert!(page.status == 200 && page.head.contains("\r\ncontent-type: text/html; charset=utf-8\r\n"), "{page:?}");
    for answer in [page, shown] {
        assert!(!answer.body.contains("hunter2") && !answer.body.contains("4711-secret"), "{answer:?}");
    }
}

#[tokio::test]
async fn many_who_look_at_the_page_ask_the_database_once_in_two_seconds() {
    let store = Sqlite::new().await;
    let relay = Served::start(&[("DATABASE_URL", store.url()), STDOUT]);
    relay.until("/readyz", 200, "ready");
    let moments: Vec<String> = (0..20).map(|_| relay.get("/status.json").json()["status"]["at"].to_string()).collect();
    let different: std::collections::BTreeSet<&String> = moments.iter().collect();
    assert!(different.len() < moments.len() / 2 && !different.contains(&"null".to_owned()), "{moments:?}");
}

#[test]
fn without_its_database_the_page_says_so() {
    let relay = Served::start(&[("DATABASE_URL", "postgres://nobody:hunter2@127.0.0.1:1/none"), STDOUT]);
    let json = relay.get("/status.json").json();
    assert!(json["error"].as_str().unwrap().contains("cannot connect to the database"), "{json}");
    assert_eq!((&json["status"], &json["relay"]["ready"]), (&serde_json::Value::Null, &false.into()), "{json}");
    assert!(!json.to_string().contains("hunter2"), "{json}");
}

#[tokio::test]
async fn a_relay_that_may_not_read_dead_letters_shows_the_rest() {
    let database = database().await;
    let mut owner = database.connect().await;
    apply(&mut owner).await;
    let worker = login(&database, &mut owner, "relay_worker").await;
    let relay = Served::start(&[("DATABASE_URL", &worker), STDOUT]);
    relay.until("/readyz", 200, "ready");
    let json = relay.get("/status.json").json();
    assert_eq!((&json["error"], &json["dead_letters"]), (&serde_json::Value::Null, &serde_json::Value::Null), "{json}");
    assert_eq!(json["status"]["destinations"][0]["name"], "stdout", "{json}");
    assert!(json["dead_letters_error"].as_str().unwrap().contains("event_dead_letter"), "{json}");
    let lags = json["relay"]["destinations"][0]["lag_by_minute"].as_array().unwrap();
    assert_eq!(lags.len(), 14, "{json}");
}
