//! Several destinations: routing, and settling for each of them.

use outbox_relay::route::{Route, Router, Unrouted};
use wildmatch::WildMatch;

use super::{LOG, assert_in_order_per_key};
use crate::harness::{Setup, column, count, emit, eventually, sql};
use crate::scripted::{Act, ScriptedSink};
use crate::stores::Store;

pub(super) async fn each_destination_is_settled_for_itself_and_redriven_for_itself<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    emit(&mut connection, "e1", "k").await;
    emit(&mut connection, "e2", "k").await;
    let (good, bad) = (
        ScriptedSink::accepting(),
        ScriptedSink::new(|event| match event.event_type.as_str() {
            "e1" => Act::Refuse,
            _ => Act::Accept,
        }),
    );
    let setup = || Setup::new(&store, vec![("good", good.clone()), ("bad", bad.clone())]);
    let running = setup().run();
    eventually("e2 is settled", async || bad.names() == ["e2"]).await;
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
    sql(&mut connection, S::redrive("redriven_at is null")).await;
    assert!(!setup().drain().await.undelivered);
    assert_eq!(bad.names(), ["e2", "e1"]);
    assert_eq!(good.names(), ["e1", "e2"], "a redrive affects only its own destination");
}

pub(super) async fn events_go_on_to_one_destination_while_the_other_is_down_and_are_parked_for_it_in_order<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let (up, down) = (ScriptedSink::accepting(), ScriptedSink::new(|_| Act::Unreachable));
    let running = Setup::new(&store, vec![("up", up.clone()), ("down", down.clone())]).run();
    for index in 0..50 {
        emit(&mut connection, &format!("e{index}"), &format!("k{}", index % 5)).await;
    }
    eventually("everything arrived at the destination that works", async || up.accepted().len() == 50).await;
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

pub(super) async fn routes_choose_destinations_and_what_no_route_takes_is_said<S: Store>() {
    let route = |glob: &str, destinations: &[usize]| Route {
        event_type: Some(WildMatch::new(glob)),
        source: None,
        headers: Default::default(),
        destinations: destinations.to_vec(),
    };
    let routes = vec![route("order.*", &[0]), route("*.paid", &[0, 1]), route("debug.*", &[])];
    for unrouted in [Unrouted::DeadLetter, Unrouted::Drop] {
        let store = S::new().await;
        let mut connection = store.connect().await;
        for name in ["order.created", "invoice.paid", "debug.x", "stranger"] {
            emit(&mut connection, name, "").await;
        }
        let (a, b) = (ScriptedSink::accepting(), ScriptedSink::accepting());
        let mut setup = Setup::new(&store, vec![("a", a.clone()), ("b", b.clone())]);
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

pub(super) async fn history_keeps_what_was_published_where<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    emit(&mut connection, "e", "k").await;
    let (a, b) = (ScriptedSink::accepting(), ScriptedSink::accepting());
    let mut setup = Setup::new(&store, vec![("a", a), ("b", b)]);
    setup.outbox.usage.history = true;
    setup.drain().await;
    assert_eq!(
        column(&mut connection, "select concat_ws(' ', event_type, aggregate_id, payload, destination) from event_history order by destination").await,
        ["e k {} a", "e k {} b"]
    );
}
