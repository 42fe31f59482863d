//! What the engine is given: how it works, its destinations, and how each is dealt with.

use std::sync::Arc;
use std::time::Duration;

use crate::breaker::BreakerPolicy;
use crate::retry::RetryPolicy;
use crate::route::Unrouted;
use crate::sink::Sink;

/// How the engine works; `src/guide/configuration.md` has the defaults.
#[derive(Debug, Clone, PartialEq)]
pub struct RelayConfig {
    /// Loops, each on a connection of its own.
    pub lanes: usize,
    /// Events in one claim.
    pub batch_events: usize,
    /// Bytes of events in one claim, about.
    pub batch_bytes: usize,
    /// Bytes of one payload; larger ones are dead-lettered at once.
    pub max_payload: usize,
    /// The longest sleep when idle.
    pub polling_interval: Duration,
    /// What becomes of events that no route takes.
    pub unrouted: Unrouted,
    /// How long what is in flight may take after a stop; then it is given up.
    pub shutdown_timeout: Duration,
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
        }
    }
}

/// When a destination is given up, tried again and paused.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// How long one publish call may take.
    pub timeout: Duration,
    /// When charged events are tried again.
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

/// A destination for the engine.
pub struct Endpoint {
    /// Its name, as it stands in `destination` columns.
    pub name: String,
    /// What publishes to it.
    pub sink: Arc<dyn Sink>,
    /// When it is tried again and paused.
    pub policy: Policy,
}
