//! Producers that record what they have committed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outbox_relay::audit::Obligation;
use sqlx::{Connection, PgConnection, Row};
use uuid::Uuid;

use super::{POISON, STREAM};

/// The relays' limit for payloads, in bytes.
pub(super) const MAX_PAYLOAD: usize = 20_000;

/// What producers have committed.
#[derive(Default)]
pub(super) struct Promised {
    pub(super) obligations: Vec<Obligation>,
    /// The poison events among them. The value says whether the event was committed; `None`: unknown.
    pub(super) poison: HashMap<Uuid, Option<bool>>,
}

/// Running producers; each has its own keys.
pub(super) struct Producers {
    stop: Arc<AtomicBool>,
    promised: Arc<Mutex<Promised>>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Producers {
    /// `pause_ms` is the longest pause between two transactions of a producer.
    pub(super) fn start(url: &str, seed: u64, count: u64, pause_ms: u64, poison: bool) -> Self {
        let (stop, promised) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Promised>>::default());
        let threads = (0..count)
            .map(|number| {
                let producer = Producer {
                    url: url.to_owned(),
                    number,
                    random: fastrand::Rng::with_seed(seed ^ (number + 1) << 32),
                    sequence: 0,
                    pause_ms,
                    poison,
                    stop: Arc::clone(&stop),
                    promised: Arc::clone(&promised),
                };
                std::thread::spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                    runtime.block_on(producer.run());
                })
            })
            .collect();
        Self { stop, promised, threads }
    }

    /// Stops them, and returns what they have committed.
    pub(super) fn finish(self) -> Promised {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        std::mem::take(&mut self.promised.lock().unwrap())
    }
}

struct Producer {
    url: String,
    number: u64,
    random: fastrand::Rng,
    /// The number of the producer's last event. Numbers ascend within each key.
    sequence: i64,
    pause_ms: u64,
    poison: bool,
    stop: Arc<AtomicBool>,
    promised: Arc<Mutex<Promised>>,
}

impl Producer {
    async fn run(mut self) {
        let mut connection = None;
        while !self.stop.load(Ordering::SeqCst) {
            let Some(mut open) = connection.take() else {
                connection = PgConnection::connect(&self.url).await.ok();
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            // After an error the connection is dropped, because the server may be gone.
            if self.transaction(&mut open).await.is_ok() {
                connection = Some(open);
            }
            tokio::time::sleep(Duration::from_millis(self.random.u64(0..=self.pause_ms))).await;
        }
    }

    async fn transaction(&mut self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        let mut transaction = connection.begin().await?;
        let mut promised = Vec::new();
        for _ in 0..self.random.usize(1..=5) {
            // One event in five has no key.
            let key =
                self.random.u32(0..5).checked_sub(1).map(|_| format!("{}-{}", self.number, self.random.u32(0..20)));
            self.sequence += 1;
            // Half of the poison has a stream key that is no stream in Redis, the other half is too large.
            let poison = if self.poison { self.random.u32(0..200) } else { 2 };
            let event_type = if poison == 0 { POISON } else { STREAM };
            let padding = if poison == 1 { "x".repeat(MAX_PAYLOAD) } else { String::new() };
            let text: String = (0..self.random.usize(0..300)).map(|_| self.random.char('\u{20}'..'\u{2fff}')).collect();
            let payload = serde_json::json!({ "n": self.sequence, "text": text, "number": self.random.f64(), "padding": padding });
            let row = sqlx::query(
                "insert into event_outbox (event_type, aggregate_type, aggregate_id, payload)
                 values ($3, case when $1::text is not null then 'c' end, $1, $2::text::jsonb)
                 returning event_id, encode(sha256(convert_to(payload::text, 'UTF8')), 'hex')",
            )
            .bind(&key)
            .bind(payload.to_string())
            .bind(event_type)
            .fetch_one(&mut *transaction)
            .await?;
            let obligation = Obligation {
                event_id: row.get::<Uuid, _>(0),
                key,
                sequence: self.sequence,
                sha256: Some(row.get(1)),
                committed: None,
            };
            promised.push((obligation, poison < 2));
        }
        // Some transactions commit late, so that events with higher ids are visible first.
        if self.random.u32(0..10) == 0 {
            tokio::time::sleep(Duration::from_millis(self.random.u64(0..200))).await;
        }
        let rolled_back = self.random.u32(0..10) == 0;
        let ended = if rolled_back { transaction.rollback().await } else { transaction.commit().await };
        let known = ended.is_ok();
        // A rollback takes effect even if the server did not get the statement.
        let committed = if rolled_back { Some(false) } else { known.then_some(true) };
        let mut all = self.promised.lock().unwrap();
        for (obligation, poison) in promised {
            if poison {
                all.poison.insert(obligation.event_id, committed);
            }
            all.obligations.push(Obligation { committed, ..obligation });
        }
        ended
    }
}
