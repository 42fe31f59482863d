//! The engine on PostgreSQL, with sinks that do as told: order, failures, destinations, schedules.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use outbox_relay::event::Event;
use outbox_relay::route::{Route, Router, Unrouted};
use wildmatch::WildMatch;

use crate::harness::{Setup, column, count, emit, eventually, sql};
use crate::scripted::{Act, Gate, ScriptedSink};
use crate::servers::database;

/// The log as `type destination status attempt`, in the order of events and attempts.
const LOG: &str = "select concat_ws(' ', event_type, destination, status, attempt) from event_processing_log
                   order by outbox_id, destination, attempt";

fn assert_in_order_per_key(events: &[Event]) {
    let mut last: HashMap<_, i64> = HashMap::new();
    for event in events {
        let Some(key) = event.key() else { continue };
        let before = last.insert(key, event.row.id).unwrap_or(0);
        assert!(before < event.row.id, "{key}: {} came after {before}", event.row.id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_keys_arrive_complete_in_order_and_once_through_three_relays() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "insert into event_outbox (event_type, aggregate_id) select 'e', (i % 10000)::text from generate_series(1, 30000) i",
    )
    .await;
    let sink = ScriptedSink::accepting();
    let relay = || Setup::new(&database, vec![("a", sink.clone())]).drain();
    let (one, two, three) = tokio::join!(relay(), relay(), relay());
    assert_eq!(one.tally.published + two.tally.published + three.tally.published, 30_000);
    assert!(!one.undelivered && !two.undelivered && !three.undelivered);
    let accepted = sink.accepted();
    assert_eq!(accepted.len(), 30_000);
    assert_in_order_per_key(&accepted);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
    assert_eq!(count(&mut connection, "event_processing_log where status = 'published' and attempt = 1").await, 30_000);
}

#[tokio::test]
async fn a_thousand_events_of_one_key_arrive_in_order_in_small_batches() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "insert into event_outbox (event_type, aggregate_id) select 'e', 'k' from generate_series(1, 1000)",
    )
    .await;
    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.relay.batch_events = 7;
    assert_eq!(setup.drain().await.tally.published, 1000);
    assert_in_order_per_key(&sink.accepted());
}

#[tokio::test]
async fn a_key_waits_behind_its_failed_event_and_others_do_not() {
    let database = database().await;
    let mut connection = database.connect().await;
    for (name, key) in [("bad", "k"), ("k2", "k"), ("other", "o"), ("k3", "k"), ("free", "")] {
        emit(&mut connection, name, key).await;
    }
    let sink = ScriptedSink::new(|event| if event.event_type == "bad" { Act::Refuse } else { Act::Accept });
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.relay.retry.base = Duration::from_secs(3600);
    let drained = setup.drain().await;
    assert!(drained.undelivered);
    let through = HashSet::from(["other".to_owned(), "free".to_owned()]);
    assert_eq!(HashSet::from_iter(sink.names()), through);
    assert_eq!(
        column(
            &mut connection,
            "select concat_ws(' ', event_type, status, destination, attempts) from event_outbox order by id"
        )
        .await,
        ["bad scheduled a 1", "k2 scheduled a 0", "k3 scheduled a 0"]
    );

    // A later event of the key waits too, whichever relay claims it.
    emit(&mut connection, "k4", "k").await;
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.relay.retry.base = Duration::from_secs(3600);
    assert!(setup.drain().await.undelivered);
    assert_eq!(HashSet::from_iter(sink.names()), through);

    // When its head is let through, the key follows in order.
    sink.then(|_| Act::Accept);
    sql(&mut connection, "update event_outbox set available_at = now()").await;
    assert!(!Setup::new(&database, vec![("a", sink.clone())]).drain().await.undelivered);
    assert_eq!(sink.names()[2..], ["bad", "k2", "k3", "k4"]);
    assert_eq!(
        column(&mut connection, LOG).await,
        [
            "bad a failed 1",
            "bad a published 2",
            "k2 a published 1",
            "other a published 1",
            "k3 a published 1",
            "free a published 1",
            "k4 a published 1"
        ]
    );
}

#[tokio::test]
async fn a_poison_event_is_dead_lettered_after_its_retries_and_its_key_goes_on() {
    let database = database().await;
    let mut connection = database.connect().await;
    for (name, key) in [("poison", "k"), ("k2", "k"), ("k3", "k")] {
        emit(&mut connection, name, key).await;
    }
    let sink = ScriptedSink::new(|event| if event.event_type == "poison" { Act::Refuse } else { Act::Accept });
    let running = Setup::new(&database, vec![("a", sink.clone())]).run();
    eventually("the key went on", async || sink.names() == ["k2", "k3"]).await;
    let tally = running.stop().await;
    assert_eq!((tally.published, tally.dead_lettered, tally.retried), (2, 1, 3));
    assert_eq!(
        column(&mut connection, LOG).await,
        [
            "poison a failed 1",
            "poison a failed 2",
            "poison a failed 3",
            "poison a dead_lettered 4",
            "k2 a published 1",
            "k3 a published 1"
        ]
    );
    let dead = "select concat_ws(' ', event_type, aggregate_id, destination, attempts, error_code, error,
                       first_failed_at < failed_at, redriven_at is null) from event_dead_letter";
    assert_eq!(column(&mut connection, dead).await, ["poison k a 4 SCRIPTED Refuse t t"]);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
}

#[tokio::test]
async fn an_outage_costs_time_and_never_attempts() {
    let database = database().await;
    let mut connection = database.connect().await;
    for index in 0..20 {
        emit(&mut connection, &format!("e{index}"), &format!("k{}", index % 3)).await;
    }
    let sink = ScriptedSink::new(|_| Act::Unreachable);
    let running = Setup::new(&database, vec![("a", sink.clone())]).run();
    // Five failures open the breaker; the sixth call is its probe.
    eventually("the breaker was open and probed", async || sink.calls() >= 7).await;
    assert_eq!(count(&mut connection, "event_outbox where attempts = 0 and status = 'pending'").await, 20);
    assert_eq!(count(&mut connection, "event_processing_log").await, 0);
    sink.then(|_| Act::Accept);
    eventually("everything arrived", async || sink.accepted().len() == 20).await;
    assert_eq!(running.stop().await.published, 20);
    assert_in_order_per_key(&sink.accepted());
    assert_eq!(count(&mut connection, "event_dead_letter").await, 0);
}

#[tokio::test]
async fn a_misconfigured_destination_pauses_at_the_first_failure_and_charges_nobody() {
    let database = database().await;
    let mut connection = database.connect().await;
    emit(&mut connection, "e", "k").await;
    let sink = ScriptedSink::new(|_| Act::Misconfigured);
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.relay.breaker.recovery = Duration::from_secs(3600);
    assert!(setup.drain().await.undelivered);
    assert_eq!(sink.calls(), 1);
    assert_eq!(count(&mut connection, "event_outbox where attempts = 0 and status = 'pending'").await, 1);
}

#[tokio::test]
async fn an_unknown_outcome_leaves_the_event_pending_and_repeats_it() {
    let database = database().await;
    let mut connection = database.connect().await;
    emit(&mut connection, "e1", "k").await;
    emit(&mut connection, "e2", "k").await;
    let once = AtomicUsize::new(0);
    let sink = ScriptedSink::new(move |_| match once.fetch_add(1, Ordering::SeqCst) {
        0 => Act::AcceptThenFail,
        _ => Act::Accept,
    });
    let drained = Setup::new(&database, vec![("a", sink.clone())]).drain().await;
    assert!(!drained.undelivered);
    assert_eq!(sink.names(), ["e1", "e1", "e2"]);
    assert_eq!(column(&mut connection, LOG).await, ["e1 a published 1", "e2 a published 1"]);
}

#[tokio::test]
async fn each_destination_is_settled_for_itself_and_redriven_for_itself() {
    let database = database().await;
    let mut connection = database.connect().await;
    emit(&mut connection, "e1", "k").await;
    emit(&mut connection, "e2", "k").await;
    let (good, bad) = (
        ScriptedSink::accepting(),
        ScriptedSink::new(|event| match event.event_type.as_str() {
            "e1" => Act::Refuse,
            _ => Act::Accept,
        }),
    );
    let setup = || Setup::new(&database, vec![("good", good.clone()), ("bad", bad.clone())]);
    let running = setup().run();
    eventually("e2 came through", async || bad.names() == ["e2"]).await;
    running.stop().await;
    assert_eq!(good.names(), ["e1", "e2"]);
    assert_eq!(
        column(&mut connection, LOG).await,
        [
            "e1 bad failed 1",
            "e1 bad failed 2",
            "e1 bad failed 3",
            "e1 bad dead_lettered 4",
            "e1 good published 1",
            "e2 bad published 1",
            "e2 good published 1"
        ]
    );

    bad.then(|_| Act::Accept);
    sql(&mut connection, "select redrive_dead_letter(id) from event_dead_letter").await;
    assert!(!setup().drain().await.undelivered);
    assert_eq!(bad.names(), ["e2", "e1"]);
    assert_eq!(good.names(), ["e1", "e2"], "a redrive concerns its own destination only");
}

#[tokio::test]
async fn events_go_on_to_one_destination_while_the_other_is_down_and_are_parked_for_it_in_order() {
    let database = database().await;
    let mut connection = database.connect().await;
    let (up, down) = (ScriptedSink::accepting(), ScriptedSink::new(|_| Act::Unreachable));
    let running = Setup::new(&database, vec![("up", up.clone()), ("down", down.clone())]).run();
    for index in 0..50 {
        emit(&mut connection, &format!("e{index}"), &format!("k{}", index % 5)).await;
    }
    eventually("all arrived where they can", async || up.accepted().len() == 50).await;
    eventually("all are parked", async || {
        count(&mut connection, "event_outbox where destination = 'down' and attempts = 0").await == 50
    })
    .await;
    assert_eq!(count(&mut connection, "event_outbox").await, 50);
    down.then(|_| Act::Accept);
    eventually("all arrived", async || down.accepted().len() == 50).await;
    running.stop().await;
    assert_in_order_per_key(&up.accepted());
    assert_in_order_per_key(&down.accepted());
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
    assert_eq!(count(&mut connection, "event_processing_log where status = 'published' and attempt = 1").await, 100);
}

#[tokio::test]
async fn a_delayed_event_comes_when_it_is_due_and_holds_up_nobody() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "select emit_event('helper', aggregate_id => 'k', delay => '1 hour');
         insert into event_outbox (event_type, aggregate_id, available_at) values ('plain', 'k', now() + interval '1 hour')",
    )
    .await;
    emit(&mut connection, "now", "k").await;
    let sink = ScriptedSink::accepting();
    let drained = Setup::new(&database, vec![("a", sink.clone())]).drain().await;
    assert!(!drained.undelivered, "what is not due is not owed");
    assert_eq!(sink.names(), ["now"]);
    assert_eq!(count(&mut connection, "event_outbox where status = 'scheduled' and destination = ''").await, 2);

    let running = Setup::new(&database, vec![("a", sink.clone())]).run();
    sql(&mut connection, "update event_outbox set available_at = now() + interval '100 ms'").await;
    eventually("the delayed ones arrived", async || sink.names().len() == 3).await;
    running.stop().await;
    assert_eq!(sink.names()[1..], ["helper", "plain"]);
}

#[tokio::test]
async fn urgent_events_are_claimed_first() {
    let database = database().await;
    let mut connection = database.connect().await;
    sql(
        &mut connection,
        "insert into event_outbox (event_type, priority) select 'p' || p, p from generate_series(0, 9) p, generate_series(1, 3)",
    )
    .await;
    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    (setup.relay.lanes, setup.relay.batch_events) = (1, 1);
    setup.drain().await;
    let mut sorted = sink.names();
    sorted.sort_by(|a, b| b.cmp(a));
    assert_eq!(sink.names(), sorted);
}

#[tokio::test]
async fn routes_choose_destinations_and_what_no_route_takes_is_said() {
    let route = |glob: &str, destinations: &[usize]| Route {
        event_type: Some(WildMatch::new(glob)),
        source: None,
        headers: Default::default(),
        destinations: destinations.to_vec(),
    };
    let routes = vec![route("order.*", &[0]), route("*.paid", &[0, 1]), route("debug.*", &[])];
    for unrouted in [Unrouted::DeadLetter, Unrouted::Drop] {
        let database = database().await;
        let mut connection = database.connect().await;
        for name in ["order.created", "invoice.paid", "debug.x", "stranger"] {
            emit(&mut connection, name, "").await;
        }
        let (a, b) = (ScriptedSink::accepting(), ScriptedSink::accepting());
        let mut setup = Setup::new(&database, vec![("a", a.clone()), ("b", b.clone())]);
        setup.router = Router::new(routes.clone(), 2);
        setup.relay.unrouted = unrouted;
        let drained = setup.drain().await;
        let mut names = a.names();
        names.sort();
        assert_eq!(names, ["invoice.paid", "order.created"]);
        assert_eq!(b.names(), ["invoice.paid"]);
        let (stranger, dead) = match unrouted {
            Unrouted::DeadLetter => ("stranger  dead_lettered 1", 1),
            Unrouted::Drop => ("stranger  dropped 1", 0),
        };
        assert_eq!(column(&mut connection, LOG).await[3..], ["debug.x  dropped 1", stranger]);
        assert_eq!(
            count(&mut connection, "event_dead_letter where error_code = 'unrouted' and destination = ''").await,
            dead
        );
        assert_eq!(drained.undelivered, dead == 1);
        assert_eq!(count(&mut connection, "event_outbox").await, 0);
    }
}

#[tokio::test]
async fn history_keeps_what_was_published_where() {
    let database = database().await;
    let mut connection = database.connect().await;
    emit(&mut connection, "e", "k").await;
    let (a, b) = (ScriptedSink::accepting(), ScriptedSink::accepting());
    let mut setup = Setup::new(&database, vec![("a", a), ("b", b)]);
    setup.outbox.history = true;
    setup.drain().await;
    assert_eq!(
        column(&mut connection, "select concat_ws(' ', event_type, aggregate_id, payload, destination) from event_history order by destination").await,
        ["e k {} a", "e k {} b"]
    );
}

#[tokio::test]
async fn a_sleeping_relay_is_woken_by_a_commit() {
    let database = database().await;
    let mut connection = database.connect().await;
    let sink = ScriptedSink::accepting();
    let sleeper = || {
        let mut setup = Setup::new(&database, vec![("a", sink.clone() as Arc<_>)]);
        setup.relay.polling_interval = Duration::from_secs(3600);
        setup.run()
    };
    let relays = [sleeper(), sleeper()];
    let asleep = "pg_locks where locktype = 'advisory' and mode = 'ExclusiveLock' and objid = 4294967295
                  and database = (select oid from pg_database where datname = current_database())";
    for index in 0..5 {
        eventually("one of them sleeps armed", async || count(&mut connection, asleep).await == 1).await;
        emit(&mut connection, &format!("e{index}"), "k").await;
        eventually("the event arrived", async || sink.accepted().len() == index + 1).await;
    }
    // The one that holds the sleepers' lock goes; the other must notice.
    let [one, two] = relays;
    one.stop().await;
    eventually("the other sleeps armed", async || count(&mut connection, asleep).await == 1).await;
    emit(&mut connection, "last", "k").await;
    eventually("the last event arrived", async || sink.accepted().len() == 6).await;
    two.stop().await;
}

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

#[tokio::test]
async fn a_stop_settles_what_is_in_flight_and_claims_nothing_more() {
    let database = database().await;
    let mut connection = database.connect().await;
    for index in 0..10 {
        emit(&mut connection, &format!("e{index}"), &format!("k{index}")).await;
    }
    let (sink, gate) = (ScriptedSink::accepting(), Gate::new());
    sink.hold_at(&gate);
    let mut setup = Setup::new(&database, vec![("a", sink.clone())]);
    setup.relay.lanes = 1;
    let running = setup.run();
    gate.entered().await;
    running.ask_to_stop();
    emit(&mut connection, "after", "").await;
    gate.open(1);
    assert_eq!(running.stop().await.published, 10);
    assert_eq!(sink.calls(), 1);
    assert_eq!(column(&mut connection, "select event_type from event_outbox").await, ["after"]);
    assert_eq!(count(&mut connection, "event_processing_log where status = 'published'").await, 10);
}
