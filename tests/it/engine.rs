//! What only PostgreSQL has: transactions that commit late, and a pooler before the database.

use crate::harness::{Setup, emit, eventually, sql};
use crate::scripted::ScriptedSink;
use crate::servers::database;

#[tokio::test]
async fn a_late_commit_with_a_low_id_is_not_skipped() {
    let database = database().await;
    let (mut early, mut late) = (database.connect().await, database.connect().await);
    sql(&mut late, "begin").await;
    emit(&mut late, "low", "k").await;
    let sink = ScriptedSink::accepting();
    let running = Setup::new(&database, vec![("a", sink.clone())]).run();
    for index in 0..100 {
        emit(&mut early, &format!("e{index}"), "k").await;
    }
    eventually("the later ones arrived", async || sink.accepted().len() == 100).await;
    sql(&mut late, "commit").await;
    eventually("the late one arrived", async || sink.accepted().len() == 101).await;
    running.stop().await;
    assert_eq!(sink.names().last().map(String::as_str), Some("low"));
}

#[tokio::test]
async fn a_pooled_database_is_polled_with_unnamed_statements() {
    let database = database().await;
    let mut connection = database.connect().await;
    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.outbox.pooled = true;
    let running = setup.run();
    for index in 0..3 {
        emit(&mut connection, &format!("e{index}"), "k").await;
        eventually("it arrived", async || sink.accepted().len() == index + 1).await;
    }
    running.stop().await;
}
