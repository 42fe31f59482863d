//! Finds the event on which Redis closes the connection.
//!
//! Redis closes the connection when a value is over its `proto-max-bulk-len`. This looks like an outage, and the outcome of every
//! event in flight is unknown. If such an event were always published with its batch, the outage would never end. So an event
//! that was in flight when several connections were lost is published alone, on a separate connection. If that connection is
//! closed each time, while the server answers in between, the event is charged.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use crate::event::{Event, Outcome};
use crate::sink::redis::fault::CONNECTION_LOST;

/// After so many lost connections an event is published alone; after so many more it is charged each time.
const LOSSES: u8 = 3;

/// Events below this size, in bytes, exceed no limit: the server allows no `proto-max-bulk-len` and no
/// `client-query-buffer-limit` below 1 MiB, and half of that is left for what is sent with an event. If the answers to smaller
/// events are lost, the network or a proxy is the cause.
const LARGE: usize = 512 * 1024;

/// More events than can be in flight. When the map is cleared, counting starts anew.
const MAX_SUSPECTS: usize = 100_000;

/// The events that were in flight when connections were lost, until they are delivered.
#[derive(Default)]
pub(super) struct Suspects(Mutex<HashMap<Uuid, Losses>>);

/// The number of connections that were lost with an event in flight.
#[derive(Default)]
struct Losses {
    /// While other events were in flight too.
    together: u8,
    /// While it was published alone.
    alone: u8,
}

impl Suspects {
    /// Whether one of `events` must be published alone.
    pub(super) fn are_among(&self, events: &[&Event]) -> bool {
        let losses = self.lock();
        let must_go_alone =
            |event: &&Event| losses.get(&event.event_id).is_some_and(|losses| losses.together >= LOSSES);
        !losses.is_empty() && events.iter().any(must_go_alone)
    }

    /// Counts the losses among `outcomes`, and removes events that were delivered.
    pub(super) fn note(&self, events: &[&Event], outcomes: &[Outcome]) {
        let mut losses = self.lock();
        if losses.len() > MAX_SUSPECTS {
            losses.clear();
        }
        for (event, outcome) in events.iter().zip(outcomes) {
            if is_lost(outcome) {
                let losses = losses.entry(event.event_id).or_default();
                losses.together = losses.together.saturating_add(1);
            } else if matches!(outcome, Outcome::Delivered { .. }) && !losses.is_empty() {
                losses.remove(&event.event_id);
            }
        }
    }

    /// Counts a loss of an event that was published alone. Returns whether there were enough losses to charge it.
    pub(super) fn lost_alone(&self, event: &Event) -> bool {
        let mut losses = self.lock();
        let losses = losses.entry(event.event_id).or_default();
        losses.alone = losses.alone.saturating_add(1);
        losses.alone >= LOSSES
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Losses>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the connection was lost before the answer.
pub(super) fn is_lost(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Failed(error) if error.code == CONNECTION_LOST)
}

/// Whether the event may exceed a limit of the server.
pub(super) fn is_large(event: &Event) -> bool {
    event.bytes() >= LARGE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::testing::event;
    use crate::event::{Fault, PublishError};

    #[test]
    fn an_event_is_suspected_after_several_losses_until_it_is_delivered() {
        let (one, other) = (event(1), event(2));
        let suspects = Suspects::default();
        let lost = Outcome::Failed(PublishError::new(Fault::Unknown, CONNECTION_LOST, ""));
        let timeout = Outcome::Failed(PublishError::new(Fault::Unknown, "timeout", ""));
        for _ in 0..LOSSES {
            assert!(!suspects.are_among(&[&one, &other]));
            suspects.note(&[&one, &other], &[lost.clone(), timeout.clone()]);
        }
        assert!(suspects.are_among(&[&other, &one]) && !suspects.are_among(&[&other]));
        suspects.note(&[&one], &[Outcome::Held]);
        assert!(suspects.are_among(&[&one]));
        assert_eq!([(); 4].map(|()| suspects.lost_alone(&one)), [false, false, true, true]);
        suspects.note(&[&one], &[Outcome::Delivered { message_id: None }]);
        assert!(!suspects.are_among(&[&one]) && !suspects.lost_alone(&one));
    }
}
