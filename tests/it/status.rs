//! `relay status` of another process: it shows what is stuck, since when, and why.

mod command;
mod pause;
mod states;

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::binary::finished;

/// How long an operator may have to wait for a change.
const WITHIN: Duration = Duration::from_secs(10);

/// `relay status --json --keys`.
#[track_caller]
fn status(url: &str) -> Value {
    let shown = finished(&["status", "--json", "--keys"], &[("DATABASE_URL", url)]).exited(0);
    serde_json::from_str(&shown.stdout).unwrap()
}

/// Waits until `holds` is true of the status, at most [`WITHIN`]. Returns the status.
async fn until_status(url: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + WITHIN;
    loop {
        let status = tokio::task::block_in_place(|| status(url));
        if holds(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "not within {WITHIN:?}: {what}; the status is {status:#}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Returns the destination with this name.
fn of<'a>(status: &'a Value, name: &str) -> &'a Value {
    let destinations = status["destinations"].as_array().unwrap();
    destinations.iter().find(|destination| destination["name"] == name).unwrap_or(&Value::Null)
}

/// Returns a count, which must be exact.
fn counted(count: &Value) -> u64 {
    assert_eq!(count["more"], false, "{count}");
    count["count"].as_u64().unwrap()
}

/// Runs a test on each kind of store.
macro_rules! on_each_store {
    ($($test:ident: $what:ident)*) => {
        $(
            mod $what {
                use super::*;

                #[tokio::test(flavor = "multi_thread")]
                async fn $test() {
                    super::$what::<Postgres>().await;
                }

                mod sqlite {
                    use super::*;

                    #[tokio::test(flavor = "multi_thread")]
                    async fn $test() {
                        super::super::$what::<Sqlite>().await;
                    }
                }
            }
        )*
    };
}
use on_each_store;
