//! The configuration of a relay's access to its store.

use std::time::Duration;

use crate::secret::Secret;

/// The configuration of a relay's access to its store.
#[derive(Debug, Clone)]
pub struct OutboxConfig {
    /// `postgres://...` or `sqlite:...`; it is read again at every connection.
    pub url: Secret,
    /// A transaction-pooling proxy such as PgBouncer is between relay and database: no named statements, no LISTEN.
    pub pooled: bool,
    /// How long one publish call may take, which limits how long a claim may stay idle.
    pub publish_timeout: Duration,
    /// How long the processing log is kept.
    pub log_retention: Duration,
    /// How long the history is kept.
    pub history_retention: Duration,
    /// The parts of the schema that are used.
    pub usage: Usage,
    /// Whether events are published only once their commits are on disk, in a store that does not ensure that by itself.
    pub ghost_barrier: bool,
    /// The name of this relay in the processing log: host name and process id.
    pub worker: String,
}

impl OutboxConfig {
    /// The configuration for the store at `url`, with default settings, for one destination.
    pub fn new(url: Secret) -> Self {
        const DAY: Duration = Duration::from_secs(86_400);
        Self {
            url,
            pooled: false,
            publish_timeout: Duration::from_secs(30),
            log_retention: 7 * DAY,
            history_retention: 30 * DAY,
            usage: Usage::default(),
            ghost_barrier: false,
            worker: format!("{}:{}", gethostname::gethostname().to_string_lossy(), std::process::id()),
        }
    }
}

/// The parts of the schema that a relay uses, by its configuration.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    /// Whether an event may go to several destinations, and so become several rows.
    pub several_destinations: bool,
    /// Whether published events are copied to `event_history`.
    pub history: bool,
}
