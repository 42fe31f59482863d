//! How a relay uses its store.

use std::time::Duration;

use crate::secret::Secret;

/// How a relay uses its store.
#[derive(Debug, Clone)]
pub struct OutboxConfig {
    /// `postgres://...` or `sqlite:...`; read again at every connection.
    pub url: Secret,
    /// A transaction-pooling proxy such as PgBouncer stands in front: no named statements, no LISTEN.
    pub pooled: bool,
    /// How long one publish call may take, which bounds how long a claim stays idle.
    pub publish_timeout: Duration,
    /// How long the processing log is kept.
    pub log_retention: Duration,
    /// How long the history is kept.
    pub history_retention: Duration,
    /// Which of the tables are used.
    pub usage: Usage,
    /// Whether events are published only once their commits are on disk, where the store cannot take that for granted.
    pub ghost_barrier: bool,
    /// How this relay is named in the processing log: host name and process id.
    pub worker: String,
}

impl OutboxConfig {
    /// The store at `url`, with the settings that hold by default, for one destination.
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

/// Which parts of the schema a relay uses, by its configuration.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    /// Whether an event may go to more than one destination, and so become several rows.
    pub several_destinations: bool,
    /// Whether published events are copied to `event_history`.
    pub history: bool,
}
