//! A destination whose code panics or never returns.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use crate::binary::{Running, relay};
use crate::contract::assert_in_order_per_key;
use crate::harness::{Setup, column, count, emit, eventually, sql};
use crate::scripted::{Act, ScriptedSink};
use crate::stores::Store;

pub(super) async fn f63_an_event_that_panics_its_destination_is_found_and_given_up_and_the_others_go_on<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    for index in 0..100 {
        let name = if index == 40 { "bad" } else { "ok" };
        emit(&mut connection, name, &format!("k{}", index % 10)).await;
    }
    let panicking = ScriptedSink::new(|event| if event.event_type == "bad" { Act::Panic } else { Act::Accept });
    let other = ScriptedSink::accepting();
    let mut setup = Setup::new(&store, vec![("a", panicking.clone() as Arc<_>), ("b", other.clone() as Arc<_>)]);
    setup.policy.breaker.recovery = Duration::from_secs(3600);
    let running = setup.run();
    eventually("all is settled", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
    let dead = "select concat_ws(' ', event_type, destination, error_code) from event_dead_letter";
    assert_eq!(column(&mut connection, dead).await, ["bad a sink_panicked"]);
    assert_eq!(other.names().len(), 100, "another destination is not affected");
    let mut accepted = panicking.accepted();
    let repeats = accepted.len() - 99;
    // Two calls may have arrived in part: the first batch up to the event, and a part of its group of three.
    assert!(repeats <= 101, "{repeats} repeats");
    let mut seen = HashSet::new();
    accepted.retain(|event| seen.insert(event.event_id));
    assert_in_order_per_key(&accepted);
    assert_eq!(accepted.len(), 99);
}

pub(super) async fn f63_a_destination_that_panics_on_everything_costs_no_event_anything<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    for index in 0..3 {
        emit(&mut connection, "ok", &format!("k{}", index % 2)).await;
    }
    let sink = ScriptedSink::new(|_| Act::Panic);
    let running = Setup::new(&store, vec![("a", sink.clone() as Arc<_>)]).run();
    let blocked = "event_outbox where status = 'scheduled' and attempts = 0 and last_error like 'sink_panicked:%'";
    eventually("both keys wait", async || count(&mut connection, blocked).await == 2).await;
    sink.then(|_| Act::Accept);
    eventually("all arrived", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
    assert_eq!(count(&mut connection, "event_dead_letter").await, 0);
    assert_in_order_per_key(&sink.accepted());
}

pub(super) async fn f63_a_call_that_never_ends_is_an_unknown_outcome<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    emit(&mut connection, "e1", "k").await;
    emit(&mut connection, "e2", "k").await;
    let sink = ScriptedSink::new(|_| Act::Hang);
    let mut setup = Setup::new(&store, vec![("a", sink.clone() as Arc<_>)]);
    setup.policy.timeout = Duration::from_millis(100);
    let running = setup.run();
    eventually("it was called again", async || sink.calls() >= 2).await;
    assert_eq!(count(&mut connection, "event_outbox where attempts = 0").await, 2);
    sink.then(|_| Act::Accept);
    eventually("all arrived", async || count(&mut connection, "event_outbox").await == 0).await;
    running.stop().await;
    assert_eq!(sink.names(), ["e1", "e2"]);
}

pub(super) async fn f63_an_event_on_which_routing_panics_is_given_up_alone<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    for index in 0..10 {
        emit(&mut connection, if index == 5 { "bad" } else { "ok" }, "k").await;
    }
    let variables =
        [("DATABASE_URL", store.url()), ("RELAY_STDOUT", "true"), ("FAILPOINTS", "panic_on_event=return(bad)")];
    Running::start(relay(&["--once"], &variables)).finish().exited(3).says(&["routing_panicked"]);
    sql(&mut connection, "select 1").await;
    let log = "select concat_ws(' ', event_type, status, count(*)) from event_processing_log group by event_type, status order by 1";
    assert_eq!(column(&mut connection, log).await, ["bad dead_lettered 1", "ok published 9"]);
}
