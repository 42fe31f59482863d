//! Finding the event on which Redis closes the connection.
//!
//! A value over the server's `proto-max-bulk-len` is not answered with an error that could be told from an outage: the
//! connection is closed, and with it every event that was in flight. Sent again and again in its batch, such an event
//! would be an outage for ever. So an event that was in flight at several lost connections is published alone, on a
//! connection of its own; when that is closed each time, while the server answers in between, the event is charged.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use uuid::Uuid;

use super::{Commands, LIMITS, OWN_CONNECTION_BYTES, Redis};
use crate::event::{Event, Fault, Outcome, PublishError};
use crate::sink::redis::fault::CONNECTION_LOST;
use crate::sink::rounds::Limits;
use crate::sink::{Batch, ClaimContext, Published};

/// After so many lost connections an event goes alone; after so many more it is charged each time.
const LOSSES: u8 = 3;

/// Smaller events exceed no limit: of `proto-max-bulk-len` and `client-query-buffer-limit` the server takes none below
/// 1 MiB, of which this leaves half to what goes with an event. A network that loses their answers is to blame, or a proxy.
const LARGE: usize = 512 * 1024;

/// More events than can be in flight. Who is forgotten is counted again.
const MAX_SUSPECTS: usize = 100_000;

/// One event in flight.
const ALONE: Limits = Limits { request_events: 1, requests: 1, ..LIMITS };

/// The events that were in flight when connections were lost, until they are delivered.
#[derive(Default)]
pub(super) struct Suspects(Mutex<HashMap<Uuid, Losses>>);

/// How often.
#[derive(Default)]
struct Losses {
    together: u8,
    alone: u8,
}

impl Suspects {
    fn are_among(&self, events: &[&Event]) -> bool {
        let losses = self.lock();
        let must_go_alone =
            |event: &&Event| losses.get(&event.event_id).is_some_and(|losses| losses.together >= LOSSES);
        !losses.is_empty() && events.iter().any(must_go_alone)
    }

    fn note(&self, events: &[&Event], outcomes: &[Outcome]) {
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

    /// One more loss of an event that went alone; whether that is enough to charge it.
    fn lost_alone(&self, event: &Event) -> bool {
        let mut losses = self.lock();
        let losses = losses.entry(event.event_id).or_default();
        losses.alone = losses.alone.saturating_add(1);
        losses.alone >= LOSSES
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Losses>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_lost(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Failed(error) if error.code == CONNECTION_LOST)
}

fn is_large(event: &Event) -> bool {
    event.bytes() >= LARGE
}

impl Redis {
    /// Publishes a batch; the whole of [`Sink::publish`](crate::sink::Sink::publish). Only with `exactly_once` it is recorded in
    /// Redis what was published.
    pub(in crate::sink) async fn publish(
        &self,
        &Batch { events, deadline, claim }: &Batch<'_>,
        exactly_once: bool,
        commands: &dyn Commands,
    ) -> Published {
        let claim = claim.filter(|_| exactly_once);
        let has_own_connection = |event: &&Event| event.bytes() > OWN_CONNECTION_BYTES;
        let published = if self.suspects.are_among(events) || events.iter().any(has_own_connection) {
            self.publish_one_by_one(events, claim.as_ref(), deadline, commands).await
        } else {
            self.publish_within(LIMITS, events, claim.as_ref(), deadline, commands).await
        };
        self.suspects.note(events, &published.outcomes);
        published
    }

    /// Ends at the first loss.
    async fn publish_one_by_one(
        &self,
        events: &[&Event],
        claim: Option<&ClaimContext<'_>>,
        deadline: Instant,
        commands: &dyn Commands,
    ) -> Published {
        // Nobody else's event can close its connection.
        let own = self.aside();
        let mut published = own.publish_within(ALONE, events, claim, deadline, commands).await;
        if let Some(at) = published.outcomes.iter().position(is_lost)
            && is_large(events[at])
            // That it answers when nothing is published is what makes the loss this event's doing.
            && matches!(tokio::time::timeout_at(deadline.into(), own.check()).await, Ok(Ok(_)))
            && self.suspects.lost_alone(events[at])
        {
            let message = "Redis closes the connection on this event alone: is it larger than its proto-max-bulk-len?";
            published.outcomes[at] = Outcome::Failed(PublishError::new(Fault::Event, "connection_closed", message));
        }
        published
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::testing::event;

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
