//! What the probes for standstills go by.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::outbox::postgres::sql::Sql;
use crate::outbox::standstill::Memory;

/// What the probes go by.
pub(super) struct Question<'a> {
    /// How statements are sent.
    pub(super) sql: Sql,
    /// The names of all configured destinations.
    pub(super) destinations: &'a [String],
    /// How long one publish call may take: so long, and a little more, another relay may hold its claim.
    pub(super) publish_timeout: Duration,
    /// Whether published events are copied to `event_history`; else a lock there is nobody's trouble.
    pub(super) history: bool,
    /// What was seen before.
    pub(super) memory: &'a Memory,
    /// For each partition, the id above which it may have pending events.
    pub(super) bounds: Vec<i64>,
    /// Set where events wait behind one of a format that this relay does not know.
    pub(super) behind_unknown_format: &'a AtomicBool,
}
