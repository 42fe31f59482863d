//! The configuration of the engine: its limits, its destinations, and the policy of each destination.

use std::sync::Arc;
use std::time::Duration;

use crate::breaker::BreakerPolicy;
use crate::retry::RetryPolicy;
use crate::route::Unrouted;
use crate::sink::Sink;

/// The limits of the engine. `src/guide/configuration.md` has the defaults.
#[derive(Debug, Clone, PartialEq)]
pub struct RelayConfig {
    /// The number of loops, each of which has its own connection.
    pub lanes: usize,
    /// The largest number of events in one claim.
    pub batch_events: usize,
    /// The approximate limit of a claim, in bytes of its events.
    pub batch_bytes: usize,
    /// The largest payload, in bytes. An event with a larger one is dead-lettered at once.
    pub max_payload: usize,
    /// The longest sleep of an idle relay.
    pub polling_interval: Duration,
    /// The treatment of events that no route takes.
    pub unrouted: Unrouted,
    /// How long after a stop the relay waits for events in flight before it gives them up.
    pub shutdown_timeout: Duration,
    /// Whether the store is asked, every 15 s, for the figures that the metrics show of it.
    pub sample: bool,
}

/// The defaults of the settings.
impl Default for RelayConfig {
    fn default() -> Self {
        Self {
            lanes: 3,
            batch_events: 1000,
            batch_bytes: 4 << 20,
            max_payload: 1 << 20,
            polling_interval: Duration::from_secs(5),
            unrouted: Unrouted::DeadLetter,
            shutdown_timeout: Duration::from_secs(40),
            sample: true,
        }
    }
}

/// When calls to a destination time out, its events are retried, and it is paused.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// How long one publish call may take.
    pub timeout: Duration,
    /// When charged events are retried.
    pub retry: RetryPolicy,
    /// When the destination is paused.
    pub breaker: BreakerPolicy,
}

/// The defaults of the settings.
impl Default for Policy {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(30),
            retry: RetryPolicy { max_retries: 3, base: Duration::from_secs(1), exponential: true, jitter: true },
            breaker: BreakerPolicy { threshold: 5, window: Duration::from_secs(60), recovery: Duration::from_secs(30) },
        }
    }
}

/// A destination, as the engine gets it.
pub struct Endpoint {
    /// Its name, as it stands in `destination` columns.
    pub name: String,
    /// The sink that publishes to the destination.
    pub sink: Arc<dyn Sink>,
    /// When its calls time out, its events are retried, and it is paused.
    pub policy: Policy,
}
