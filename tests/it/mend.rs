//! What operators do with dead letters and with events that wait, as commands.

mod dead_letters;
mod refusals;
mod roles;
mod waiting;

use crate::binary::{Finished, finished};
use crate::harness::{count, sql};
use crate::stores::Store;

/// Each test is written once, and run on both stores.
macro_rules! on_each_store {
    ($($test:ident)*) => {
        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $test() {
                    super::$test::<crate::stores::Postgres>().await;
                }
            )*
        }

        mod sqlite {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $test() {
                    super::$test::<crate::stores::Sqlite>().await;
                }
            )*
        }
    };
}
pub(crate) use on_each_store;

/// Runs `relay` with this store.
fn relay_on<S: Store>(store: &S, args: &[&str]) -> Finished {
    finished(args, &[("DATABASE_URL", store.url())])
}

/// Runs `relay dead-letter`.
fn dead_letter<S: Store>(store: &S, args: &[&str]) -> Finished {
    relay_on(store, &[&["dead-letter"], args].concat())
}

/// The document that `relay dead-letter ... --json` prints.
fn document<S: Store>(store: &S, args: &[&str]) -> serde_json::Value {
    let said = dead_letter(store, &[args, &["--json"]].concat()).exited(0).stdout;
    serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"))
}

/// The ids that `relay dead-letter list` shows, in its order.
fn listed<S: Store>(store: &S, args: &[&str]) -> Vec<i64> {
    let listed = document(store, &[&["list"], args].concat());
    listed["dead_letters"].as_array().unwrap().iter().map(|letter| letter["id"].as_i64().unwrap()).collect()
}

/// Makes dead letters of all events, as if the destination had refused them.
async fn all_die<S: Store>(connection: &mut S::Connection, destination: &str, code: &str) {
    let statement = format!(
        "insert into event_dead_letter (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
             schema_version, priority, created_at, destination, attempts, error_code, error, first_failed_at, failed_at)
         select id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers, schema_version, priority,
             created_at, '{destination}', 4, '{code}', 'it is refused', created_at, {}
         from event_outbox order by id;
         delete from event_outbox",
        S::in_ms(0)
    );
    sql(connection, statement).await;
}

/// Dead letters of so many events, `e1` and so on, of five keys, at the destination `stdout`.
async fn dead_letters<S: Store>(connection: &mut S::Connection, number: i64) {
    let statement = format!(
        "insert into event_outbox (event_type, aggregate_type, aggregate_id, payload, headers)
         select 'e' || i, 'order', cast(i % 5 as text), {}, {} from {}",
        S::json("'{\"secret\": 1}'"),
        S::json("'{\"tenant\": \"acme\"}'"),
        S::numbers(number)
    );
    sql(connection, statement).await;
    all_die::<S>(connection, "stdout", "BAD").await;
    assert_eq!(count(connection, "event_dead_letter").await, number);
}

/// What the audit table has: action, number of events, filter and details.
async fn audited<S: Store>(connection: &mut S::Connection) -> Vec<String> {
    let query = "select action || ' ' || event_count || ' ' || cast(filter as text) || ' ' || cast(details as text)
                 from event_operator_action order by id";
    let rows = crate::harness::column(connection, query).await;
    rows.into_iter().map(|row| row.replace(": ", ":").replace(", ", ",")).collect()
}
