//! The command itself: roles, stores, terminals and bad input.

use std::time::{Duration, Instant};

use super::{of, status, until_status};
use crate::binary::{Running, finished, relay};
use crate::harness::{emit, sql};
use crate::schema::roles;
use crate::servers::{Server, database_on, empty_database};
use crate::stores::{Postgres, Sqlite, Store};

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_on_the_table_is_shown_at_once_with_its_cure() {
    let store = Postgres::new().await;
    let (mut locker, mut connection) = (store.connect().await, store.connect().await);
    emit(&mut connection, "e", "").await;
    sql(&mut locker, "set application_name = 'nightly'; begin; lock table event_outbox").await;
    let begun = Instant::now();
    let shown = tokio::task::block_in_place(|| status(store.url()));
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    let obstacle = &shown["obstacles"][0];
    assert_eq!(obstacle["cause"], "table_locked");
    let text = obstacle["text"].as_str().unwrap();
    assert!(text.contains("nightly") && text.contains("pg_terminate_backend"), "{text}");
    assert!(shown["unread"][0].as_str().unwrap().contains("locked"), "{shown}");
    sql(&mut locker, "commit").await;
    until_status(store.url(), "nothing is in the way", |status| {
        status["obstacles"].as_array().unwrap().is_empty() && status["unrouted"]["pending"]["count"] == 1
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prepared_transaction_is_shown_at_once() {
    let server = Server::start("postgres", &["--fast", "--set", "max_prepared_transactions=2"]);
    let store = database_on(&server).await;
    let mut connection = store.connect().await;
    sql(&mut connection, "begin; insert into event_outbox (event_type) values ('e'); prepare transaction 'forgotten'")
        .await;
    let shown = tokio::task::block_in_place(|| status(store.url()));
    assert_eq!(shown["obstacles"][0]["cause"], "undecided", "{shown}");
    assert!(shown["obstacles"][0]["text"].as_str().unwrap().contains("rollback prepared 'forgotten'"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn relay_operator_may_ask_and_a_role_without_rights_is_told_what_it_lacks() {
    let store = Postgres::new().await;
    let mut owner = store.connect().await;
    roles::apply(&mut owner).await;
    sql(
        &mut owner,
        "insert into event_outbox (event_type, status, destination, last_error, first_failed_at)
         values ('e', 'scheduled', 'a', 'bad', now())",
    )
    .await;
    let url = roles::login(&store, &mut owner, "relay_operator").await;
    let shown = tokio::task::block_in_place(|| status(&url));
    assert_eq!(shown["unread"].as_array().unwrap().len(), 0, "{shown}");
    assert_eq!(of(&shown, "a")["retrying"]["count"], 1);
    assert_eq!(shown["blocked_keys"][0]["error"], "bad");
    let url = roles::login(&store, &mut owner, "relay_app").await;
    let refused = finished(&["status"], &[("DATABASE_URL", &url)]);
    let said = refused.stdout.clone() + &refused.stderr;
    assert!(said.contains("permission denied"), "{said}");
}

fn is_narrow(text: &str) {
    for line in text.lines() {
        assert!(line.chars().count() <= 40, "{line:?} is wider than 40 columns in\n{text}");
    }
}

async fn forty_columns<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let rows = "insert into event_outbox (event_type, aggregate_id, status, destination, last_error, first_failed_at)";
    let long = "x".repeat(300);
    sql(&mut connection, format!("{rows} values ('e', 'k', 'scheduled', 'redis', 'BAD {long}', {})", S::in_ms(0)))
        .await;
    for columns in ["40", "80", "200"] {
        let shown = finished(&["status", "--keys"], &[("DATABASE_URL", store.url()), ("COLUMNS", columns)]).exited(0);
        assert!(shown.stdout.contains("redis") && shown.stdout.contains("BAD"), "{}", shown.stdout);
        if columns == "40" {
            is_narrow(&shown.stdout);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn on_forty_columns_no_line_is_wider() {
    forty_columns::<Postgres>().await;
    forty_columns::<Sqlite>().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn into_a_closed_pipe_it_ends_in_silence_also_while_it_watches() {
    let store = Postgres::new().await;
    for args in [&["status"][..], &["status", "--watch"], &["status", "--json"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let running = Running::start_writing_to(relay(args, &[("DATABASE_URL", store.url())]), writer);
        let finished = tokio::task::block_in_place(|| running.finish()).exited(0);
        assert_eq!(finished.stderr, "", "{args:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_shows_changes_until_it_is_stopped() {
    let store = Postgres::new().await;
    let mut connection = store.connect().await;
    let mut watch = Running::start(relay(&["status", "--watch"], &[("DATABASE_URL", store.url())]));
    crate::binary::until("it shows no event", || watch.output().contains("not yet claimed: 0 pending"));
    emit(&mut connection, "e", "").await;
    crate::binary::until("it shows the event", || watch.output().contains("not yet claimed: 1 pending"));
    assert!(watch.is_running());
    watch.signal("INT");
    tokio::task::block_in_place(|| watch.finish()).exited(130);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_said_in_one_line_with_the_right_exit_code() {
    let empty = empty_database().await;
    let refused = finished(&["status"], &[("DATABASE_URL", empty.url())]).exited(1);
    assert!(refused.complaint().contains("relay migrate"), "{}", refused.stderr);
    let refused = finished(&["status"], &[("DATABASE_URL", "postgres://127.0.0.1:1/x")]).exited(1);
    assert!(refused.complaint().contains("connect"), "{}", refused.stderr);
    let refused = finished(&["status"], &[("DATABASE_URL", "sqlite:/nowhere/app.db")]).exited(1);
    assert!(refused.complaint().contains("/nowhere/app.db"), "{}", refused.stderr);
    finished(&["status"], &[]).exited(2);
    for args in [&["status", "--json", "--watch"][..], &["status", "redis"], &["--once", "status"]] {
        assert_eq!(finished(args, &[("DATABASE_URL", empty.url())]).exited(2).stdout, "");
    }
}
