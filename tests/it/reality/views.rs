//! What the views show of a blocked key.

use std::time::Duration;

use outbox_relay::NewEvent;

use crate::harness::{Setup, column, emit, refused, sql};
use crate::scripted::{Act, ScriptedSink};
use crate::stores::{Client, Postgres, Sqlite, Store};

const LAG: &str = "select concat_ws('|', destination, status, event_count, due_count, delayed_count, retrying_count,
                       waiting_behind_count, cast(lag_seconds / 3600 as integer))
                   from event_outbox_lag order by destination, status";

async fn a_blocked_key_is_seen_with_what_blocks_it_and_what_waits<S: Store>() {
    let store = S::new().await;
    let mut connection = store.connect().await;
    for (name, key) in [("bad", "k"), ("k2", "k"), ("k3", "k"), ("other", "o"), ("keyless bad", ""), ("k4", "k")] {
        emit(&mut connection, name, key).await;
    }
    connection.emit(NewEvent::from_json("delayed", "{}").delay(Duration::from_secs(86_400))).await.unwrap();
    let sink = ScriptedSink::new(|event| if event.event_type.contains("bad") { Act::Refuse } else { Act::Accept });
    let mut setup = Setup::new(&store, vec![("a", sink.clone())]);
    setup.policy.retry.base = Duration::from_secs(7200);
    setup.policy.retry.jitter = false;
    assert!(setup.drain().await.undelivered);
    sql(
        &mut connection,
        format!("update event_outbox set first_failed_at = {} where attempts > 0", S::in_ms(-3 * 3_600_000 - 100_000)),
    )
    .await;
    // Nothing is due, because each retry moves available_at. The blocking event counts as due since its first failure.
    assert_eq!(column(&mut connection, LAG).await, ["|scheduled|1|0|1|0|0", "a|scheduled|5|0|0|2|3|3"]);
    let blocked = format!(
        "select concat_ws('|', destination, aggregate_type, coalesce(aggregate_id, 'none'), event_type, attempts,
                error like '%refused%' or error <> '', waiting_behind_count, outbox_id, blocked_since < {now}, next_attempt_at > {now})
         from event_blocked_keys order by outbox_id",
        now = S::in_ms(0)
    );
    let yes = if store.url().starts_with("sqlite:") { "1" } else { "t" };
    assert_eq!(
        column(&mut connection, &blocked).await,
        [format!("a|test|k|bad|1|{yes}|3|1|{yes}|{yes}"), format!("a|test|none|keyless bad|1|{yes}|0|5|{yes}|{yes}"),]
    );
    // An event of the same key that is parked for another destination is not blocked.
    sql(
        &mut connection,
        "insert into event_outbox (event_type, aggregate_type, aggregate_id, status, destination)
         values ('k5', 'test', 'k', 'scheduled', 'b'), ('k6', 'test', 'other key', 'scheduled', 'a')",
    )
    .await;
    assert_eq!(
        column(&mut connection, LAG).await,
        ["|scheduled|1|0|1|0|0", "a|scheduled|6|1|0|2|3|3", "b|scheduled|1|1|0|0|0|0"]
    );
    // An event that waits for an operator has no time of its next attempt.
    let never = if store.url().starts_with("sqlite:") { "'9999-12-31 23:59:59'" } else { "'infinity'" };
    sql(&mut connection, format!("update event_outbox set available_at = {never} where attempts > 0")).await;
    let waits = "select cast(count(*) as text) from event_blocked_keys where next_attempt_at is null";
    assert_eq!(column(&mut connection, waits).await, ["2"]);
    assert_eq!(column(&mut connection, LAG).await[1], "a|scheduled|6|1|0|2|3|3");
    for content in ["payload", "headers"] {
        refused(&mut connection, format!("select event_blocked_keys.{content} from event_blocked_keys")).await;
    }
    // The count is bounded, so that the view is cheap even if very many events wait.
    let many = format!(
        "insert into event_outbox (event_type, aggregate_type, aggregate_id, status, destination)
         select 'more', 'test', 'k', 'scheduled', 'a' from {}",
        S::numbers(1500)
    );
    sql(&mut connection, many).await;
    let counted = "select cast(max(waiting_behind_count) as text) from event_blocked_keys";
    assert_eq!(column(&mut connection, counted).await, ["1000"]);
}

#[tokio::test]
async fn f85_a_blocked_key_is_seen_with_what_blocks_it_and_what_waits() {
    a_blocked_key_is_seen_with_what_blocks_it_and_what_waits::<Postgres>().await;
}

#[tokio::test]
async fn f85_a_blocked_key_of_a_file_is_seen_with_what_blocks_it_and_what_waits() {
    a_blocked_key_is_seen_with_what_blocks_it_and_what_waits::<Sqlite>().await;
}
