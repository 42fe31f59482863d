//! Time: events that are not due, sleeping, waking, and stopping.

use std::sync::Arc;
use std::time::Duration;

use outbox_relay::NewEvent;

use crate::harness::{Setup, column, count, emit, eventually, sql};
use crate::scripted::{Gate, ScriptedSink};
use crate::stores::{Client, Store};

pub(super) async fn a_delayed_event_comes_when_it_is_due_and_holds_up_nobody<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let hour = Duration::from_secs(3600);
    connection.emit(NewEvent::from_json("helper", "{}").key("", "k").delay(hour)).await.unwrap();
    let values = format!("'plain', 'k', {}", S::in_ms(3_600_000));
    sql(
        &mut connection,
        format!("insert into event_outbox (event_type, aggregate_id, available_at) values ({values})"),
    )
    .await;
    emit(&mut connection, "now", "k").await;
    let sink = ScriptedSink::accepting();
    let drained = Setup::new(&store, vec![("a", sink.clone())]).drain().await;
    assert!(!drained.undelivered, "an event that is not due does not count as undelivered");
    assert_eq!(sink.names(), ["now"]);
    assert_eq!(count(&mut connection, "event_outbox where status = 'scheduled' and destination = ''").await, 2);

    let running = Setup::new(&store, vec![("a", sink.clone())]).run();
    sql(&mut connection, format!("update event_outbox set available_at = {}", S::in_ms(100))).await;
    eventually("the delayed ones arrived", async || sink.names().len() == 3).await;
    running.stop().await;
    assert_eq!(sink.names()[1..], ["helper", "plain"]);
}

pub(super) async fn a_sleeping_relay_is_woken_by_a_commit<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    let sink = ScriptedSink::accepting();
    let sleeper = || {
        let mut setup = Setup::new(&store, vec![("a", sink.clone() as Arc<_>)]);
        setup.relay.polling_interval = Duration::from_secs(3600);
        setup.run()
    };
    let relays = [sleeper(), sleeper()];
    for index in 0..5 {
        store.until_asleep().await;
        emit(&mut connection, &format!("e{index}"), "k").await;
        eventually("the event arrived", async || sink.accepted().len() == index + 1).await;
    }
    // The relay that stops may be the one that is woken. The other must notice that.
    let [one, two] = relays;
    one.stop().await;
    store.until_asleep().await;
    emit(&mut connection, "last", "k").await;
    eventually("the last event arrived", async || sink.accepted().len() == 6).await;
    two.stop().await;
}

pub(super) async fn a_stop_settles_what_is_in_flight_and_claims_nothing_more<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    for index in 0..10 {
        emit(&mut connection, &format!("e{index}"), &format!("k{index}")).await;
    }
    let (sink, gate) = (ScriptedSink::accepting(), Gate::new());
    sink.hold_at(&gate);
    let mut setup = Setup::new(&store, vec![("a", sink.clone())]);
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
