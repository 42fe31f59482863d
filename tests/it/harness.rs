//! A relay in this process, with a store of its own and with the test's sinks.

use std::marker::PhantomData;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outbox_relay::breaker::BreakerPolicy;
use outbox_relay::event::Tally;
use outbox_relay::outbox::{OutboxConfig, OutboxError, Usage};
use outbox_relay::relay::{Drained, Endpoint, Health, Policy, Readiness, Relay, RelayConfig};
use outbox_relay::retry::RetryPolicy;
use outbox_relay::route::{Router, Unrouted};
use outbox_relay::secret::Secret;
use outbox_relay::sink::Sink;
use tokio::sync::watch::Receiver;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::stores::{Client, Store};

/// What a test can change before it starts a relay. Waits are milliseconds, so that tests are quick.
pub(crate) struct Setup<S> {
    pub(crate) relay: RelayConfig,
    /// The policy of every destination.
    pub(crate) policy: Policy,
    pub(crate) outbox: OutboxConfig,
    pub(crate) router: Router,
    sinks: Vec<(String, Arc<dyn Sink>)>,
    store: PhantomData<S>,
}

impl<S: Store> Setup<S> {
    pub(crate) fn new(store: &S, sinks: Vec<(&str, Arc<dyn Sink>)>) -> Self {
        let sinks: Vec<_> = sinks.into_iter().map(|(name, sink)| (name.to_owned(), sink)).collect();
        Self {
            relay: relay_config(),
            policy: policy(),
            outbox: OutboxConfig {
                url: Secret::inline(store.url()),
                pooled: false,
                publish_timeout: Duration::from_secs(10),
                log_retention: Duration::from_secs(7 * 86400),
                history_retention: Duration::from_secs(30 * 86400),
                usage: Usage { several_destinations: sinks.len() > 1, history: false },
                ghost_barrier: false,
                worker: "test:1".to_owned(),
            },
            router: Router::new(vec![], sinks.len()),
            sinks,
            store: PhantomData,
        }
    }

    pub(crate) fn relay(self) -> Arc<Relay<S::Outbox>> {
        let endpoint = |(name, sink)| Endpoint { name, sink, policy: self.policy.clone() };
        let endpoints = self.sinks.into_iter().map(endpoint).collect();
        Relay::new(S::outbox(self.outbox), endpoints, self.router, self.relay)
    }

    pub(crate) async fn drain(self) -> Drained {
        self.relay().drain(CancellationToken::new()).await.unwrap()
    }

    pub(crate) fn run(self) -> Running {
        let stop = CancellationToken::new();
        let relay = self.relay();
        let health = relay.health();
        let task = tokio::spawn({
            let stop = stop.clone();
            async move { relay.run(stop).await }
        });
        Running { stop, task, health }
    }
}

/// The default configuration with short waits.
pub(crate) fn relay_config() -> RelayConfig {
    RelayConfig {
        lanes: 3,
        batch_events: 1000,
        batch_bytes: 4 << 20,
        max_payload: 1 << 20,
        polling_interval: Duration::from_millis(50),
        unrouted: Unrouted::DeadLetter,
        shutdown_timeout: Duration::from_secs(40),
        sample: false,
    }
}

/// The default policy with short waits.
pub(crate) fn policy() -> Policy {
    Policy {
        timeout: Duration::from_secs(10),
        retry: RetryPolicy { max_retries: 3, base: Duration::from_millis(10), exponential: true, jitter: true },
        breaker: BreakerPolicy { threshold: 5, window: Duration::from_secs(60), recovery: Duration::from_millis(200) },
    }
}

/// A running relay.
pub(crate) struct Running {
    stop: CancellationToken,
    task: JoinHandle<Result<Tally, OutboxError>>,
    health: Receiver<Health>,
}

impl Running {
    /// Stops the relay in the same way as SIGTERM.
    pub(crate) async fn stop(self) -> Tally {
        self.stop.cancel();
        self.task.await.unwrap().unwrap()
    }

    /// Waits until the relay is not ready and its reason contains these words.
    pub(crate) async fn until_not_ready(&mut self, words: &str) {
        let told = |now: &Health| matches!(now.readiness(), Readiness::NotReady(reason) if reason.contains(words));
        let waited = tokio::time::timeout(Duration::from_secs(60), self.health.wait_for(told)).await;
        assert!(
            waited.is_ok_and(|told| told.is_ok()),
            "the relay did not report {words}; it is {:?}",
            *self.health.borrow()
        );
    }

    /// Waits until the relay is ready.
    pub(crate) async fn until_ready(&mut self) {
        let waited = tokio::time::timeout(
            Duration::from_secs(60),
            self.health.wait_for(|now| now.readiness() == Readiness::Ready),
        )
        .await;
        assert!(waited.is_ok_and(|told| told.is_ok()), "not ready; now it is {:?}", *self.health.borrow());
    }

    /// Asks the relay to stop, and does not wait.
    pub(crate) fn ask_to_stop(&self) {
        self.stop.cancel();
    }
}

/// Runs statements that return nothing.
pub(crate) async fn sql(connection: &mut impl Client, statement: impl AsRef<str>) {
    let statement = statement.as_ref();
    connection.execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error}"));
}

/// Runs a statement that must be refused. Returns the error.
pub(crate) async fn refused(connection: &mut impl Client, statement: impl AsRef<str>) -> String {
    match connection.execute(statement.as_ref()).await {
        Ok(_) => panic!("the statement was not refused: {}", statement.as_ref()),
        Err(error) => error.to_string(),
    }
}

/// Returns `select count(*)` from a table, with or without a condition.
pub(crate) async fn count(connection: &mut impl Client, from: &str) -> i64 {
    connection.number(&format!("select count(*) from {from}")).await
}

/// The first column of every row, as text.
pub(crate) async fn column(connection: &mut impl Client, query: &str) -> Vec<String> {
    connection.texts(query).await
}

/// Emits an event named `name`; an empty `key` means no key.
pub(crate) async fn emit(connection: &mut impl Client, name: &str, key: &str) {
    let values = format!("'{name}', 'test', nullif('{key}', '')");
    sql(connection, format!("insert into event_outbox (event_type, aggregate_type, aggregate_id) values ({values})"))
        .await;
}

/// Waits until `condition` holds. Only a test that fails reaches the deadline.
pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition().await {
        assert!(Instant::now() < deadline, "not within the deadline: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
