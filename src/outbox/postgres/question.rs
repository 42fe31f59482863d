//! The parameters of the probes for standstills.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::outbox::postgres::sql::Sql;
use crate::outbox::standstill::Memory;

/// The parameters of a probe.
pub(super) struct Question<'a> {
    /// How statements are sent.
    pub(super) sql: Sql,
    /// The names of all configured destinations.
    pub(super) destinations: &'a [String],
    /// How long one publish call may take. Another relay may hold its claim for that long, and a little longer.
    pub(super) publish_timeout: Duration,
    /// Whether published events are copied to `event_history`. If they are not, a lock on that table does not matter.
    pub(super) history: bool,
    /// A state that lasts shorter than this is left out.
    pub(super) brief: Duration,
    /// What earlier searches have seen.
    pub(super) memory: &'a Memory,
    /// For each partition, the id above which it may have pending events.
    pub(super) bounds: Vec<i64>,
    /// Set where events wait behind one of a format that this relay does not know.
    pub(super) behind_unknown_format: &'a AtomicBool,
}
