//! Order: always kept within a key; urgent events come first; other keys do not wait.

use std::collections::HashSet;
use std::time::Duration;

use super::{LOG, assert_in_order_per_key};
use crate::harness::{Setup, column, count, emit, sql};
use crate::scripted::{Act, ScriptedSink};
use crate::stores::Store;

pub(super) async fn ten_thousand_keys_arrive_complete_in_order_and_once_through_three_relays<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    sql(
        &mut connection,
        format!(
            "insert into event_outbox (event_type, aggregate_id) select 'e', cast(i % 10000 as text) from {}",
            S::numbers(30_000)
        ),
    )
    .await;
    let sink = ScriptedSink::accepting();
    let relay = || {
        let mut setup = Setup::new(&store, vec![("a", sink.clone())]);
        // A drain waits at most this long for events that other relays have claimed. On SQLite one of the three does all the
        // work.
        setup.policy.timeout = Duration::from_secs(300);
        setup.drain()
    };
    let (one, two, three) = tokio::join!(relay(), relay(), relay());
    assert_eq!(one.tally.published + two.tally.published + three.tally.published, 30_000);
    assert!(!one.undelivered && !two.undelivered && !three.undelivered);
    let accepted = sink.accepted();
    assert_eq!(accepted.len(), 30_000);
    assert_in_order_per_key(&accepted);
    assert_eq!(count(&mut connection, "event_outbox").await, 0);
    assert_eq!(count(&mut connection, "event_processing_log where status = 'published' and attempt = 1").await, 30_000);
}

pub(super) async fn a_thousand_events_of_one_key_arrive_in_order_in_small_batches<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    sql(
        &mut connection,
        format!("insert into event_outbox (event_type, aggregate_id) select 'e', 'k' from {}", S::numbers(1000)),
    )
    .await;
    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(&store, vec![("a", sink.clone())]);
    setup.relay.batch_events = 7;
    assert_eq!(setup.drain().await.tally.published, 1000);
    assert_in_order_per_key(&sink.accepted());
}

pub(super) async fn a_key_waits_behind_its_failed_event_and_others_do_not<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    for (name, key) in [("bad", "k"), ("k2", "k"), ("other", "o"), ("k3", "k"), ("free", "")] {
        emit(&mut connection, name, key).await;
    }
    let sink = ScriptedSink::new(|event| if event.event_type == "bad" { Act::Refuse } else { Act::Accept });
    let mut setup = Setup::new(&store, vec![("a", sink.clone())]);
    setup.policy.retry.base = Duration::from_secs(3600);
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

    // A later event of the key waits too, whichever relay could claim it.
    emit(&mut connection, "k4", "k").await;
    let mut setup = Setup::new(&store, vec![("a", sink.clone())]);
    setup.policy.retry.base = Duration::from_secs(3600);
    assert!(setup.drain().await.undelivered);
    assert_eq!(HashSet::from_iter(sink.names()), through);

    // When the first event is accepted, the others of its key follow in order.
    sink.then(|_| Act::Accept);
    sql(&mut connection, format!("update event_outbox set available_at = {}", S::in_ms(0))).await;
    assert!(!Setup::new(&store, vec![("a", sink.clone())]).drain().await.undelivered);
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

pub(super) async fn urgent_events_are_claimed_first<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    sql(
        &mut connection,
        format!("insert into event_outbox (event_type, priority) select 'p' || i % 10, i % 10 from {}", S::numbers(30)),
    )
    .await;
    let sink = ScriptedSink::accepting();
    let mut setup = Setup::new(&store, vec![("a", sink.clone())]);
    (setup.relay.lanes, setup.relay.batch_events) = (1, 1);
    setup.drain().await;
    let mut sorted = sink.names();
    sorted.sort_by(|a, b| b.cmp(a));
    assert_eq!(sink.names(), sorted);
}
