//! The input of the probes for standstills.

use std::time::Duration;

use crate::outbox::standstill::Memory;

/// The input of the probes.
pub(super) struct Question<'a> {
    /// The names of all configured destinations.
    pub(super) destinations: &'a [String],
    /// How long one publish call may take.
    pub(super) publish_timeout: Duration,
    /// The states that earlier searches have seen.
    pub(super) memory: &'a Memory,
    /// The relay that works on the file, if it is not this one.
    pub(super) owner: Option<String>,
    /// How long an event that has been due for too long must be seen unclaimed, because somebody may just have put it back.
    pub(super) seen_for: Duration,
}
