//! What the probes for standstills go by.

use std::time::Duration;

use crate::outbox::standstill::Memory;

/// What the probes go by.
pub(super) struct Question<'a> {
    /// The names of all configured destinations.
    pub(super) destinations: &'a [String],
    /// How long one publish call may take.
    pub(super) publish_timeout: Duration,
    /// What was seen before.
    pub(super) memory: &'a Memory,
    /// Who works on the file, where it is not this relay.
    pub(super) owner: Option<String>,
    /// How long an event must be seen that nobody takes, once it has been due for too long; somebody may just have put it back.
    pub(super) seen_for: Duration,
}
