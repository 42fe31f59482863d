//! The figures of the scorecard. Each run provokes one fault many times, prints one line, and fails if a promise is broken.
//!
//! `make figures` runs all of them. FIGURE chooses one, and PERCENT scales them down.

mod destinations;
mod relays;
mod servers;

use std::time::{Duration, Instant};

use outbox_relay::audit::Obligation;

use super::{World, parameter};
use crate::binary::Running;
use crate::harness::sql;

fn scaled(count: u64) -> u64 {
    let percent = parameter("CHAOS_SCALE_PERCENT", 100);
    (count * percent / 100).max(3)
}

impl World {
    /// Inserts events of 1,000 keys and adds them to the obligations.
    async fn backlog(&self, count: u64) {
        sql(
            &mut self.database.connect().await,
            format!(
                "insert into event_outbox (event_type, aggregate_type, aggregate_id, payload)
                 select 'f', 'f', (i % 1000)::text, jsonb_build_object('n', i, 'pad', repeat('x', 150))
                 from generate_series(1, {count}) i"
            ),
        )
        .await;
    }

    /// Returns the obligations for all events that are in the outbox now.
    async fn promises(&self) -> Vec<Obligation> {
        let rows: Vec<(uuid::Uuid, Option<String>, i64, String)> = sqlx::query_as(
            "select event_id, aggregate_id, id, encode(sha256(convert_to(payload::text, 'UTF8')), 'hex') from event_outbox",
        )
        .fetch_all(&mut self.database.connect().await)
        .await
        .unwrap();
        let promise = |(event_id, key, sequence, sha256)| Obligation {
            event_id,
            key,
            sequence,
            sha256: Some(sha256),
            committed: Some(true),
        };
        rows.into_iter().map(promise).collect()
    }

    fn entries(&self) -> u64 {
        self.length().unwrap_or(0)
    }

    /// Waits until the stream has more than so many entries. Returns how long that took.
    fn until_entries(&self, more_than: u64) -> Duration {
        let begun = Instant::now();
        while self.entries() <= more_than {
            assert!(begun.elapsed() < Duration::from_secs(120), "no more than {} entries", self.entries());
            std::thread::sleep(Duration::from_millis(2));
        }
        begun.elapsed()
    }

    fn drain_by(&self, relays: Vec<Running>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let begun = Instant::now();
        while runtime.block_on(self.pending()) > 0 {
            assert!(begun.elapsed() < Duration::from_secs(900), "not drained");
            std::thread::sleep(Duration::from_millis(100));
        }
        for relay in relays {
            relay.signal("TERM");
            relay.finish().exited(0);
        }
    }
}

/// Runs blocking code in a thread outside of the runtime.
async fn blocking<T: Send + 'static>(code: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(code).await.unwrap()
}

fn summary(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |part: usize| times[(times.len() - 1) * part / 100].as_secs_f64();
    format!("p50 {:.2} s, p99 {:.2} s, longest {:.2} s", at(50), at(99), at(100))
}
