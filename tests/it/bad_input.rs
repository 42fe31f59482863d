//! Input that PostgreSQL handles differently from other stores, or refuses.

use outbox_relay::{EmitError, NewEvent, NewEventError, emit};

use crate::contract::bad_input::{Scene, deep, healthy};
use crate::harness::{column, sql};
use crate::stores::{Client, Postgres};

/// Returns the error with which PostgreSQL refuses a payload.
async fn sqlstate(scene: &mut Scene<Postgres>, payload: &str) -> String {
    let insert = format!("insert into event_outbox (event_type, payload) values ('sick', {payload})");
    let error = scene.connection.execute(&insert).await.unwrap_err();
    error.as_database_error().unwrap().code().unwrap().into_owned()
}

#[tokio::test]
async fn f29_a_payload_is_as_large_as_its_text_however_small_it_is_stored() {
    let mut scene = Scene::<Postgres>::with(|config| config.max_payload = 100_000, vec![]).await;
    // Such numbers take little space except when they are printed as text.
    let numbers = format!(r#"{{"a": [{}]}}"#, ["1e100000"; 10].join(", "));
    scene.emit_among_healthy(NewEvent::from_json("sick", numbers)).await;
    let printed =
        column(&mut scene.connection, "select payload::text from event_outbox where event_type = 'sick'").await;
    assert_eq!(scene.drain().await.tally.dead_lettered, 1);
    scene.assert_arrived("sick", false, false);
    assert_eq!(scene.dead_letters().await, [format!(" payload_too_large 1 {}", printed[0])]);
}

#[tokio::test]
async fn f49_nesting_has_the_limits_of_eventbridge_and_of_postgres() {
    for levels in [1001, 6000] {
        let mut scene = Scene::<Postgres>::start().await;
        scene.emit_among_healthy(NewEvent::from_json("sick", deep(levels))).await;
        assert!(scene.drain().await.undelivered);
        scene.assert_arrived("sick", true, false);
        assert_eq!(scene.dead_letters().await, [format!("bus payload_too_deep 1 {}", deep(levels))]);
        assert_eq!(scene.count("event_outbox").await, 0);
    }
    let mut scene = Scene::<Postgres>::start().await;
    let too_deep = "(repeat('[', 50000) || repeat(']', 50000))::jsonb";
    assert_eq!(sqlstate(&mut scene, too_deep).await, "54001", "PostgreSQL's stack limit");
}

#[tokio::test]
async fn f29_a_payload_that_postgres_could_not_print_is_refused_at_insert() {
    let mut scene = Scene::<Postgres>::start().await;
    // The text would be 1.2 GB; PostgreSQL makes no text longer than 1 GB.
    let numbers = format!("'[{}]'", ["1e131071"; 9000].join(","));
    assert_eq!(sqlstate(&mut scene, &numbers).await, "54000", "PostgreSQL's limit of 1 GB");
    scene.emit(healthy("healthy")).await;
    assert!(!scene.drain().await.undelivered);
}

#[tokio::test]
async fn numbers_arrive_with_every_digit() {
    let mut scene = Scene::<Postgres>::start().await;
    let digits = "1234567890".repeat(300);
    let payload = format!(r#"{{"huge": 1e400, "long": {digits}, "small": 1e-400, "zero": -0.00}}"#);
    scene.emit_among_healthy(NewEvent::from_json("sick", payload)).await;
    assert!(!scene.drain().await.undelivered);
    scene.assert_arrived("sick", true, true);
    let expected =
        format!(r#"{{"huge": 1{}, "long": {digits}, "zero": 0.00, "small": 0.{}1}}"#, "0".repeat(400), "0".repeat(399));
    let entries = scene.entries();
    let sick = entries.iter().find(|entry| entry.field("type") == "sick").unwrap();
    assert_eq!(sick.field("data"), expected);
    assert!(scene.at_bus().contains(&("sick".into(), expected)));
}

#[tokio::test]
async fn f29_what_jsonb_cannot_store_is_refused_before_it_ends_a_transaction() {
    let mut scene = Scene::<Postgres>::start().await;
    sql(&mut scene.connection, "begin").await;
    for payload in [r#""\u0000""#, r#"{"\u0000": 1}"#, r#""\ud83d""#, r#""\ude80 \ud83e""#] {
        let refused = emit(&mut scene.connection, NewEvent::from_json("sick", payload)).await.unwrap_err();
        let expected = if payload.contains("u0000") { "NUL" } else { "surrogate" };
        assert!(matches!(&refused, EmitError::Event(error) if error.to_string().contains(expected)), "{refused:?}");
    }
    for nul in [healthy("sick").key("order", "\0"), healthy("sick").header("a", "\0"), healthy("\0")] {
        let refused = emit(&mut scene.connection, nul).await.unwrap_err();
        assert!(matches!(refused, EmitError::Event(NewEventError::Nul { .. })), "{refused}");
    }
    scene.emit(NewEvent::from_json("pair", r#"{"a": "\ud83e\udd80 \\u0000"}"#)).await;
    sql(&mut scene.connection, "commit").await;
    for (payload, code) in [(r#""\u0000""#, "22P05"), (r#""\ud83d""#, "22P02")] {
        assert_eq!(sqlstate(&mut scene, &format!("'{payload}'")).await, code);
    }
    assert!(!scene.drain().await.undelivered);
    assert_eq!(scene.at_bus(), [("pair".into(), r#"{"a": "🦀 \\u0000"}"#.into())]);
}
