//! The pauses of destinations, which a relay reads with the register.

use std::sync::Arc;
use std::time::Instant;

use crate::outbox::error::OutboxError;
use crate::outbox::pause::Pauses;
use crate::outbox::register::{Membership, Register};

impl Membership {
    /// Returns the pauses as they were last read.
    pub(in crate::outbox) fn pauses(&self) -> Arc<Pauses> {
        Arc::clone(&self.state().pauses)
    }

    /// Reads rows and pauses if the number of changes is another one.
    pub(in crate::outbox) async fn refresh(&self, register: &impl Register, now: Instant) -> Result<(), OutboxError> {
        if self.role_at(register.changes().await?).is_none() {
            self.look(register, now).await?;
        }
        Ok(())
    }

    /// Takes over what was read, and logs what has changed.
    pub(super) fn learn_pauses(&self, pauses: Pauses) {
        let pauses = Arc::new(pauses);
        let before = std::mem::replace(&mut self.state().pauses, Arc::clone(&pauses));
        for pause in pauses.without(&before) {
            tracing::warn!(destination = pause.destination, event_type = pause.event_type, "{}", pause.described());
        }
        for pause in before.without(&pauses) {
            tracing::info!(
                destination = pause.destination,
                event_type = pause.event_type,
                "the destination is resumed"
            );
        }
    }
}
