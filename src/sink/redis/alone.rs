//! Finding the event on which Redis closes the connection.
//!
//! A value over the server's `proto-max-bulk-len` is not answered with an error that could be told from an outage: the
//! connection is closed, and with it every event that was in flight. Sent again and again in its batch, such an event
//! would be an outage for ever. So an event that was in flight at several lost connections is published alone, on a
//! connection of its own; when that is closed each time, while the server answers in between, the event is charged.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use uuid::Uuid;

use super::{Commands, Redis};
use crate::event::{Event, Fault, Outcome, PublishError};
use crate::sink::redis::fault::CONNECTION_LOST;
use crate::sink::{Published, Tenure};

/// After so many lost connections an event goes alone; after so many more it is charged.
const LOSSES: u8 = 3;

/// More events than can be in flight. Who is forgotten is counted again.
const MAX_SUSPECTS: usize = 100_000;

/// The events that were in flight when connections were lost, and how often, until they are answered.
#[derive(Default)]
pub(super) struct Suspects(Mutex<HashMap<Uuid, u8>>);

impl Suspects {
    fn are_among(&self, events: &[&Event]) -> bool {
        let losses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        !losses.is_empty() && events.iter().any(|event| losses.get(&event.event_id).is_some_and(|&lost| lost >= LOSSES))
    }

    fn note(&self, events: &[&Event], outcomes: &[Outcome]) {
        let mut losses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if losses.len() > MAX_SUSPECTS {
            losses.clear();
        }
        for (event, outcome) in events.iter().zip(outcomes) {
            if is_lost(outcome) {
                let lost = losses.entry(event.event_id).or_default();
                *lost = lost.saturating_add(1);
            } else if matches!(outcome, Outcome::Delivered { .. }) && !losses.is_empty() {
                losses.remove(&event.event_id);
            }
        }
    }
}

fn is_lost(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Failed(error) if error.code == CONNECTION_LOST)
}

impl Redis {
    /// Publishes `events`; the whole of [`Sink::publish`](crate::sink::Sink::publish), and with a `tenure` of
    /// [`Sink::publish_once`](crate::sink::Sink::publish_once).
    pub(in crate::sink) async fn deliver(
        &self,
        events: &[&Event],
        tenure: Option<&Tenure<'_>>,
        deadline: Instant,
        commands: &dyn Commands,
    ) -> Published {
        let published = if self.suspects.are_among(events) {
            self.publish_one_by_one(events, tenure, deadline, commands).await
        } else {
            self.publish(events, tenure, deadline, commands).await
        };
        self.suspects.note(events, &published.outcomes);
        published
    }

    async fn publish_one_by_one(
        &self,
        events: &[&Event],
        tenure: Option<&Tenure<'_>>,
        deadline: Instant,
        commands: &dyn Commands,
    ) -> Published {
        // Nobody else's event can close its connection.
        let alone = Self::new(self.address.clone(), self.timeout);
        let mut outcomes = vec![Outcome::Held; events.len()];
        let mut stopped = HashSet::new();
        for (event, outcome) in events.iter().zip(&mut outcomes) {
            let key = event.key();
            if key.is_some_and(|key| stopped.contains(&key)) {
                continue;
            }
            *outcome = alone.publish_alone(event, tenure, deadline, commands).await;
            match outcome {
                Outcome::Delivered { .. } => {}
                Outcome::Failed(error) if error.fault.charges_event() => stopped.extend(key),
                Outcome::Failed(_) | Outcome::Held => break,
            }
        }
        // Each call knew only its own chunk: the next claim looks into what they left noted.
        Published::of(outcomes)
    }

    async fn publish_alone(
        &self,
        event: &Event,
        tenure: Option<&Tenure<'_>>,
        deadline: Instant,
        commands: &dyn Commands,
    ) -> Outcome {
        for _ in 0..LOSSES {
            let published = self.publish(&[event], tenure, deadline, commands).await;
            let outcome = published.outcomes.into_iter().next().unwrap_or(Outcome::Held);
            if !is_lost(&outcome) {
                return outcome;
            }
            // That it answers when nothing is published is what makes the loss this event's doing.
            match tokio::time::timeout_at(deadline.into(), self.check()).await {
                Ok(Ok(_)) => {}
                Ok(Err(_)) | Err(_) => return outcome,
            }
        }
        let message = "Redis closes the connection on this event alone: is it larger than its proto-max-bulk-len?";
        Outcome::Failed(PublishError::new(Fault::Event, "connection_closed", message))
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
        suspects.note(&[&one], &[Outcome::Delivered { message_id: None }]);
        assert!(!suspects.are_among(&[&one]));
    }
}
