//! `relay pause` and `relay resume`: what is paused waits, uncharged and in order; everything else goes on.

use std::time::Duration;

use super::{WITHIN, of, on_each_store, until_status};
use crate::binary::{Running, finished, relay};
use crate::contract::assert_in_order_per_key;
use crate::harness::{Setup, column, count, emit, eventually, sql};
use crate::schema::roles;
use crate::scripted::{Act, Gate, ScriptedSink};
use crate::stores::{Postgres, Sqlite, Store};

/// Runs `relay pause` or `relay resume` without holding up the relays of this process.
fn command(url: &str, args: &[&str]) -> String {
    tokio::task::block_in_place(|| finished(args, &[("DATABASE_URL", url)]).exited(0).stdout)
}

async fn several_destinations<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let (a, b) = (ScriptedSink::accepting(), ScriptedSink::accepting());
    let mut running = Setup::new(&store, vec![("a", a.clone()), ("b", b.clone())]).run();
    running.until_ready().await;
    let said = command(store.url(), &["pause", "a"]);
    assert!(said.contains("a is paused") && said.contains("relay resume a"), "{said}");
    for index in 0..20 {
        emit(&mut connection, &format!("e{index}"), &(index % 3).to_string()).await;
    }
    eventually("b takes all", async || b.names().len() == 20).await;
    let status = until_status(store.url(), "a is paused", |status| {
        of(status, "a")["state"] == "paused" && of(status, "a")["pending"]["count"] == 20
    })
    .await;
    assert_eq!(of(&status, "b")["state"], "up");
    let check = tokio::task::block_in_place(|| {
        finished(&["check"], &[("DATABASE_URL", store.url()), ("RELAY_STDOUT", "true")]).stdout
    });
    assert!(check.contains("ok    pauses: destination a is paused by "), "{check}");
    assert_eq!(a.calls(), 0);
    assert_eq!(count(&mut connection, "event_outbox where attempts > 0 or last_error is not null").await, 0);
    store.until_asleep().await;
    command(store.url(), &["resume", "a"]);
    let resumed = std::time::Instant::now();
    eventually("a takes all", async || a.names().len() == 20).await;
    assert!(resumed.elapsed() < WITHIN, "{:?}", resumed.elapsed());
    assert_in_order_per_key(&a.accepted());
    eventually("nothing is left", async || count(&mut connection, "event_outbox").await == 0).await;
    let actions = "select action from event_operator_action order by id";
    assert_eq!(column(&mut connection, actions).await, ["pause", "resume"]);
    running.stop().await;
}

/// The events of the only destination stay where they are, and the relay learns of the end of the pause.
async fn only_destination<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let a = ScriptedSink::accepting();
    let mut running = Setup::new(&store, vec![("a", a.clone())]).run();
    running.until_ready().await;
    emit(&mut connection, "before", "k").await;
    eventually("it works", async || a.names().len() == 1).await;
    command(store.url(), &["pause", "a"]);
    for index in 0..20 {
        emit(&mut connection, &format!("e{index}"), &(index % 3).to_string()).await;
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(a.names().len(), 1);
    assert_eq!(count(&mut connection, "event_outbox where status = 'pending' and destination = ''").await, 20);
    command(store.url(), &["resume", "a"]);
    let resumed = std::time::Instant::now();
    eventually("a takes all", async || a.names().len() == 21).await;
    assert!(resumed.elapsed() < WITHIN, "{:?}", resumed.elapsed());
    assert_in_order_per_key(&a.accepted());
    running.stop().await;
}

/// A pause by type holds back later events of the same keys, and no others.
async fn by_type<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let (a, b) = (ScriptedSink::accepting(), ScriptedSink::accepting());
    let mut running = Setup::new(&store, vec![("a", a.clone()), ("b", b.clone())]).run();
    running.until_ready().await;
    command(store.url(), &["pause", "a", "--type", "order.*"]);
    // In one batch, and in a later one.
    sql(
        &mut connection,
        "insert into event_outbox (event_type, aggregate_type, aggregate_id)
         values ('order.created', 'test', 'k'), ('invoice', 'test', 'k'), ('invoice', 'test', 'l')",
    )
    .await;
    eventually("the others go on", async || a.names() == ["invoice"] && b.names().len() == 3).await;
    emit(&mut connection, "later", "k").await;
    emit(&mut connection, "other", "m").await;
    eventually("another key goes on", async || a.names().contains(&"other".to_owned())).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(a.names(), ["invoice", "other"]);
    assert_eq!(count(&mut connection, "event_outbox where destination = 'a' and status = 'scheduled'").await, 3);
    let status =
        until_status(store.url(), "it says so", |status| of(status, "a")["pauses"][0]["event_type"] == "order.*").await;
    assert_eq!(of(&status, "a")["state"], "up");
    command(store.url(), &["resume", "a", "--type", "order.*"]);
    eventually("a takes the rest", async || a.names().len() == 5).await;
    assert_eq!(a.names()[2..], ["order.created", "invoice", "later"]);
    eventually("nothing is left", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
}

/// A pause outlasts relays that are killed, and holds for those that start.
async fn restarts<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let variables = [("DATABASE_URL", store.url()), ("RELAY_STDOUT", "true")];
    let mut daemon = Running::start(relay(&[], &variables));
    daemon.until_log("ready");
    command(store.url(), &["pause", "stdout"]);
    emit(&mut connection, "e", "k").await;
    daemon.until_log("is paused by");
    daemon.signal("KILL");
    assert_eq!(tokio::task::block_in_place(|| daemon.finish()).stdout, "");
    let once = tokio::task::block_in_place(|| finished(&["--once"], &variables).exited(3));
    assert_eq!(once.stdout, "");
    let daemon = Running::start(relay(&[], &variables));
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(daemon.output(), "");
    command(store.url(), &["resume", "stdout"]);
    eventually("it is published", async || daemon.output().contains("\"e\"")).await;
}

/// Bad input changes nothing and says why.
async fn refusals<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let mut running = Setup::new(&store, vec![("a", ScriptedSink::new(|_| Act::Accept))]).run();
    running.until_ready().await;
    let refused = |args: &[&str]| {
        let refused = tokio::task::block_in_place(|| finished(args, &[("DATABASE_URL", store.url())]).exited(1));
        refused.complaint().to_owned()
    };
    assert!(refused(&["pause", "typo"]).contains("no relay has a destination typo; they have a"));
    assert!(refused(&["pause", ""]).contains("the name of a destination"));
    assert!(refused(&["resume", "a"]).contains("a is not paused"));
    command(store.url(), &["pause", "a"]);
    assert!(command(store.url(), &["pause", "a"]).contains("already"));
    assert!(refused(&["resume", "a", "--type", "x"]).contains("a is not paused for the types x"));
    assert_eq!(count(&mut connection, "event_pause").await, 1);
    for args in [&["pause"][..], &["resume"], &["pause", "a", "b"], &["pause", "a", "--type"]] {
        tokio::task::block_in_place(|| finished(args, &[("DATABASE_URL", store.url())]).exited(2));
    }
    running.stop().await;
}

on_each_store! {
    events_wait_uncharged_and_in_order_while_other_destinations_go_on: several_destinations
    the_only_destination_can_be_paused_too: only_destination
    by_type_later_events_of_the_same_keys_wait_too: by_type
    a_pause_outlasts_a_kill_and_a_restart: restarts
    bad_input_is_refused_in_one_line: refusals
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_returns_when_what_was_claimed_before_has_ended_and_nothing_follows() {
    let store = Postgres::new().await;
    let mut connection = store.connect().await;
    let (sink, gate) = (ScriptedSink::accepting(), Gate::new());
    let relays: Vec<_> = (0..3).map(|_| Setup::new(&store, vec![("a", sink.clone())]).run()).collect();
    sink.hold_at(&gate);
    emit(&mut connection, "held", "").await;
    gate.entered().await;
    let mut pause = Running::start(relay(&["pause", "a"], &[("DATABASE_URL", store.url())]));
    eventually("it is paused", async || count(&mut connection, "event_pause").await == 1).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(pause.is_running(), "a batch is still being published");
    gate.open(1_000_000);
    tokio::task::block_in_place(|| pause.finish()).exited(0);
    for index in 0..100 {
        emit(&mut connection, "after", &index.to_string()).await;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(sink.names(), ["held"]);
    command(store.url(), &["resume", "a"]);
    eventually("all arrive", async || sink.names().len() == 101).await;
    for relay in relays {
        relay.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn relay_operator_may_pause_and_resume_also_in_sql_and_others_may_not() {
    let store = Postgres::new().await;
    let mut owner = store.connect().await;
    roles::apply(&mut owner).await;
    let url = roles::login(&store, &mut owner, "relay_operator").await;
    command(&url, &["pause", "a"]);
    let mut operator = <sqlx::PgConnection as sqlx::Connection>::connect(&url).await.unwrap();
    sql(&mut operator, "select pause_destination('b', 'order.*'); select resume_destination('b')").await;
    let done = "select distinct done_by from event_operator_action";
    let who = column(&mut owner, done).await;
    assert!(who.len() == 1 && who[0].ends_with("relay_operator"), "{who:?}");
    command(&url, &["resume", "a"]);
    for role in ["relay_app", "relay_worker"] {
        let url = roles::login(&store, &mut owner, role).await;
        let refused = tokio::task::block_in_place(|| finished(&["pause", "a"], &[("DATABASE_URL", &url)]).exited(1));
        assert!(refused.complaint().contains("permission denied"), "{}", refused.stderr);
    }
    assert_eq!(count(&mut owner, "event_pause").await, 0);
}
