//! `relay retry-now`, `relay give-up` and `relay move-owed`: events that wait, in the order of their keys.

use super::{audited, listed, on_each_store, relay_on};
use crate::binary::{Running, drain, relay};
use crate::harness::{column, count, sql};
use crate::stores::Store;

/// Events `e1` to `e10` of two keys are owed to `old`. The first of each key has failed, and the others wait behind it.
pub(super) async fn blocked<S: Store>(connection: &mut S::Connection) {
    let statement = format!(
        "insert into event_outbox (event_type, aggregate_type, aggregate_id)
         select 'e' || i, 'order', cast(i % 2 as text) from {};
         update event_outbox set status = 'scheduled', destination = 'old', available_at = {later};
         update event_outbox set attempts = 2, last_error = 'BAD: it is refused', first_failed_at = created_at
         where event_type in ('e1', 'e2')",
        S::numbers(10),
        later = S::in_ms(3_600_000)
    );
    sql(connection, statement).await;
}

/// The types of the events that are owed to this destination and due, in order.
async fn due<S: Store>(connection: &mut S::Connection, destination: &str) -> Vec<String> {
    let query = format!(
        "select event_type from event_outbox where destination = '{destination}' and available_at <= {} order by id",
        S::in_ms(0)
    );
    column(connection, &query).await
}

async fn a_retry_makes_failed_events_due_and_what_waits_behind_them<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    blocked::<S>(&mut connection).await;
    sql(&mut connection, "update event_outbox set destination = 'stdout'").await;
    let dry = relay_on(&store, &["retry-now", "--dry-run", "--error", "BAD"]).exited(0).stdout;
    assert!(dry.contains("stdout") && dry.contains("BAD") && dry.contains("would retry 2 events\n"), "{dry}");
    assert_eq!(due::<S>(&mut connection, "stdout").await, [""; 0]);
    let one = relay_on(&store, &["retry-now", "--error", "BAD", "--key", "order:1"]).exited(0).stdout;
    assert_eq!(one, "made due 1 event\n");
    assert_eq!(due::<S>(&mut connection, "stdout").await, ["e1", "e3", "e5", "e7", "e9"]);
    assert_eq!(relay_on(&store, &["retry-now"]).exited(0).stdout, "made due 5 events\n");
    assert_eq!(relay_on(&store, &["retry-now"]).exited(0).stdout, "no event matches; nothing to retry\n");
    let published: Vec<i64> =
        drain(store.url()).iter().map(|event| event["type"].as_str().unwrap()[1..].parse().unwrap()).collect();
    assert_eq!(published.len(), 10);
    for key in 0..2 {
        assert!(published.iter().filter(|number| *number % 2 == key).is_sorted(), "{published:?}");
    }
    let audited = audited::<S>(&mut connection).await;
    assert_eq!(audited.len(), 2, "{audited:?}");
    assert!(audited[0].starts_with("retry_now 1 {") && audited[1] == "retry_now 5 {} {}", "{audited:?}");
}

async fn what_may_have_been_delivered_is_changed_only_where_it_is_named<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    blocked::<S>(&mut connection).await;
    let parked = "update event_outbox set last_error = 'settle_failed: delivered, which cannot be recorded: x'
                  where event_type = 'e1'";
    sql(&mut connection, parked).await;
    for command in [&["retry-now"][..], &["give-up", "--destination", "old"], &["move-owed", "old", "new"]] {
        let dry = relay_on(&store, &[command, &["--dry-run"]].concat()).exited(0).stdout;
        assert!(dry.contains(" 9 events\n") && !dry.contains("settle_failed"), "{command:?}: {dry}");
        for named in [&["--id", "1"][..], &["--error", "settle_failed"]] {
            let dry = relay_on(&store, &[command, named, &["--dry-run"]].concat()).exited(0).stdout;
            assert!(dry.contains(" 1 event\n"), "{command:?} {named:?}: {dry}");
        }
    }
}

async fn a_given_up_event_is_a_dead_letter_and_its_key_goes_on<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    blocked::<S>(&mut connection).await;
    let said = relay_on(&store, &["give-up", "--id", "1", "--reason", "the customer is gone"]).exited(0).stdout;
    assert_eq!(said, "gave up 1 event; they are dead letters now: relay dead-letter list --error given_up\n");
    assert_eq!(due::<S>(&mut connection, "old").await, ["e3", "e5", "e7", "e9"], "the other key waits");
    assert_eq!(listed(&store, &["--error", "given_up", "--destination", "old", "--type", "e1"]), [1]);
    let error = column(&mut connection, "select error from event_dead_letter").await;
    assert_eq!(error, ["given up by hand: the customer is gone; before that: BAD: it is refused"]);
    assert_eq!(count(&mut connection, "event_processing_log where status = 'dead_lettered'").await, 1);
    // Of each key the earliest.
    let some = relay_on(&store, &["give-up", "--key", "0", "--limit", "2"]).exited(0).stdout;
    assert!(some.starts_with("gave up 2 events;"), "{some}");
    let left =
        column(&mut connection, "select event_type from event_outbox where aggregate_id = '0' order by id").await;
    assert_eq!(left, ["e6", "e8", "e10"]);
    let rest = relay_on(&store, &["give-up", "--all"]).exited(0).stdout;
    assert!(rest.starts_with("gave up 7 events;"), "{rest}");
    let audited = audited::<S>(&mut connection).await;
    assert_eq!(audited[0], r#"give_up 1 {"id":1} {"reason":"the customer is gone"}"#);
    assert_eq!(audited.len(), 3);
}

async fn moved_events_come_in_order_before_later_ones_of_their_keys<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    blocked::<S>(&mut connection).await;
    // A later one has not been routed yet.
    let more = "insert into event_outbox (event_type, aggregate_type, aggregate_id) values ('e11', 'order', '1')";
    sql(&mut connection, more).await;
    let dry = relay_on(&store, &["move-owed", "old", "stdout", "--dry-run"]).exited(0).stdout;
    assert!(dry.contains("would move 10 events\n"), "{dry}");
    let some = relay_on(&store, &["move-owed", "old", "stdout", "--type", "e1?", "--since", "1h"]).exited(0).stdout;
    assert_eq!(some, "moved 1 event from old to stdout\n");
    let back = relay_on(&store, &["move-owed", "stdout", "old"]).exited(0).stdout;
    assert_eq!(back, "moved 1 event from stdout to old\n");
    let all = relay_on(&store, &["move-owed", "old", "stdout"]).exited(0).stdout;
    assert_eq!(all, "moved 10 events from old to stdout\n");
    assert_eq!(due::<S>(&mut connection, "stdout").await, ["e1", "e2"], "what failed elsewhere is tried at once");
    assert_eq!(count(&mut connection, "event_outbox where last_error is not null or attempts > 0").await, 0);
    relay_on(&store, &["retry-now", "--destination", "stdout"]).exited(0);
    let published: Vec<i64> =
        drain(store.url()).iter().map(|event| event["type"].as_str().unwrap()[1..].parse().unwrap()).collect();
    assert_eq!(published.len(), 11);
    for key in 0..2 {
        assert!(published.iter().filter(|number| *number % 2 == key).is_sorted(), "{published:?}");
    }
    let audited = audited::<S>(&mut connection).await;
    assert_eq!(audited[2], r#"move_owed 10 {"destination":"old"} {"to":"stdout"}"#);
}

async fn what_is_owed_to_both_destinations_is_owed_once_after_a_move<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    blocked::<S>(&mut connection).await;
    relay_on(&store, &["move-owed", "old", "new", "--id", "3"]).exited(0);
    // The event as it was owed to the old one.
    let columns = "event_id, event_type, aggregate_type, aggregate_id, status, available_at";
    let again = format!(
        "insert into event_outbox ({id}, {columns}, destination){over} select id, {columns}, 'old' from event_outbox where event_type = 'e3'",
        id = if store.url().starts_with("sqlite") { "copy_of" } else { "id" },
        over = if store.url().starts_with("sqlite") { "" } else { " overriding system value" },
    );
    sql(&mut connection, again).await;
    assert_eq!(count(&mut connection, "event_outbox where event_type = 'e3'").await, 2);
    let all = relay_on(&store, &["move-owed", "old", "new"]).exited(0).stdout;
    assert_eq!(all, "moved 10 events from old to new\n");
    assert_eq!(count(&mut connection, "event_outbox where destination = 'new'").await, 10);
    assert_eq!(count(&mut connection, "event_outbox").await, 10);
}

async fn wrong_input_changes_nothing<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    blocked::<S>(&mut connection).await;
    for args in [
        &["give-up"][..],
        &["give-up", "--reason", "x"],
        &["move-owed", "old"],
        &["move-owed", "old", "old"],
        &["move-owed", "", "new"],
        &["move-owed", "old", "new", "--destination", "third"],
        &["retry-now", "--limit", "0"],
        &["retry-now", "--since", "soon"],
    ] {
        let refused = relay_on(&store, args).exited(2);
        assert!(refused.stdout.is_empty() && !refused.stderr.is_empty(), "{args:?}");
    }
    for args in
        [&["retry-now", "--id", "3,4711"][..], &["give-up", "--id", "4711"], &["move-owed", "old", "new", "--id", "99"]]
    {
        let refused = relay_on(&store, args).exited(1);
        assert!(refused.complaint().contains("ids wait for a destination"), "{}", refused.stderr);
    }
    for args in [&["retry-now", "--error", "GOOD"][..], &["give-up", "--key", "7"], &["move-owed", "third", "new"]] {
        let nothing = relay_on(&store, args).exited(0).stdout;
        assert!(nothing.starts_with("no event matches; nothing to "), "{nothing}");
    }
    // A misspelt destination is told, where relays are at work.
    let mut running = Running::start(relay(&["run"], &[("DATABASE_URL", store.url()), ("RELAY_STDOUT", "true")]));
    running.until_log("\"message\":\"ready\"");
    let refused = relay_on(&store, &["move-owed", "old", "stdot"]).exited(1);
    assert!(refused.complaint().contains("no relay has a destination stdot; there are: stdout"), "{}", refused.stderr);
    relay_on(&store, &["move-owed", "old", "stdot", "--force", "--dry-run"]).exited(0);
    let refused = relay_on(&store, &["dead-letter", "redrive", "--to", "stdot"]).exited(1);
    assert!(refused.complaint().contains("there are: stdout"), "{}", refused.stderr);
    assert_eq!(count(&mut connection, "event_outbox where destination = 'old'").await, 10);
    assert_eq!(count(&mut connection, "event_operator_action").await, 0);
}

on_each_store! {
    a_retry_makes_failed_events_due_and_what_waits_behind_them
    what_may_have_been_delivered_is_changed_only_where_it_is_named
    a_given_up_event_is_a_dead_letter_and_its_key_goes_on
    moved_events_come_in_order_before_later_ones_of_their_keys
    what_is_owed_to_both_destinations_is_owed_once_after_a_move
    wrong_input_changes_nothing
}
