//! A function of the application as a destination: an application of one process needs no broker.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::time::Instant;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, stream};

use crate::event::{Event, Fault, Outcome, PublishError};
use crate::sink::{Batch, Published, Sink};
use crate::text::shown;

/// The most keys that are handled at the same time in one batch.
const KEYS_AT_ONCE: usize = 16;

/// The longest reason that is recorded, in characters.
const MAX_REASON_CHARS: usize = 1000;

/// Why a handler did not take an event.
///
/// The operator `?` turns every error of the application into a `HandlerError` that charges the event.
#[derive(Debug)]
pub struct HandlerError {
    fault: Fault,
    reason: String,
}

impl HandlerError {
    /// The event is the cause: it is charged, tried again, and dead-lettered after its retries. The reason is stored and must not
    /// hold secrets.
    pub fn event(reason: impl ToString) -> Self {
        Self { fault: Fault::Event, reason: reason.to_string() }
    }

    /// No attempt with this event can succeed: it is dead-lettered at once.
    pub fn unfit(reason: impl ToString) -> Self {
        Self { fault: Fault::Unfit, reason: reason.to_string() }
    }

    /// Something that the handler needs for all events is not available: all its events wait, and none is charged.
    pub fn unavailable(reason: impl ToString) -> Self {
        Self { fault: Fault::Destination, reason: reason.to_string() }
    }
}

impl<E: std::error::Error> From<E> for HandlerError {
    fn from(error: E) -> Self {
        Self::event(error)
    }
}

/// Returns a destination that calls `handle` for each event: the events of one key one after the other and in order, and several
/// keys at the same time.
///
/// An event counts as delivered when `handle` has returned `Ok`. If that could not be recorded, as after a crash, the event is
/// handled again, so the handler must be idempotent, for example by [`Event::event_id`]. If the handler panics, the event is
/// charged. If the handler has not returned at the deadline, its future is dropped and the event is handled again.
///
/// ```
/// use outbox_relay::sink::{HandlerError, handler};
///
/// let mailer = handler(|event| async move {
///     if event.event_type.is_empty() {
///         return Err(HandlerError::unfit("an event without a type"));
///     }
///     println!("a mail about {}", event.event_type);
///     Ok(())
/// });
/// # drop(mailer);
/// ```
pub fn handler<H, F>(handle: H) -> impl Sink
where
    H: Fn(Event) -> F + Send + Sync,
    F: Future<Output = Result<(), HandlerError>> + Send,
{
    Handler { handle }
}

struct Handler<H> {
    handle: H,
}

impl<H, F> Handler<H>
where
    H: Fn(Event) -> F + Send + Sync,
    F: Future<Output = Result<(), HandlerError>> + Send,
{
    /// Handles the events of one key, up to the first that is not delivered.
    async fn handle_in_order(&self, events: Vec<(usize, &Event)>, deadline: Instant) -> Vec<(usize, Outcome)> {
        let mut outcomes = Vec::with_capacity(events.len());
        let mut stopped = false;
        for (index, event) in events {
            let outcome = if stopped || Instant::now() >= deadline {
                Outcome::Held
            } else {
                self.handle_one(event, deadline).await
            };
            stopped |= !matches!(outcome, Outcome::Delivered { .. });
            outcomes.push((index, outcome));
        }
        outcomes
    }

    async fn handle_one(&self, event: &Event, deadline: Instant) -> Outcome {
        // The call that returns the future may panic too.
        let call = AssertUnwindSafe(async { (self.handle)(event.clone()).await }).catch_unwind();
        let failed = |fault, code, reason: &str| {
            Outcome::Failed(PublishError::new(fault, code, shown(reason, MAX_REASON_CHARS)))
        };
        match tokio::time::timeout_at(deadline.into(), call).await {
            Ok(Ok(Ok(()))) => Outcome::Delivered { message_id: None },
            Ok(Ok(Err(HandlerError { fault, reason }))) => failed(fault, "handler", &reason),
            Ok(Err(_)) => failed(Fault::Event, "handler_panicked", "the handler panicked on this event"),
            Err(_) => failed(Fault::Unknown, "timeout", "the handler was not done in time"),
        }
    }
}

#[async_trait]
impl<H, F> Sink for Handler<H>
where
    H: Fn(Event) -> F + Send + Sync,
    F: Future<Output = Result<(), HandlerError>> + Send,
{
    async fn publish(&self, &Batch { events, deadline, .. }: &Batch<'_>) -> Published {
        let mut groups: Vec<Vec<(usize, &Event)>> = Vec::new();
        let mut group_of = HashMap::new();
        for (index, event) in events.iter().enumerate() {
            let next = groups.len();
            let group = event.key().map_or(next, |key| *group_of.entry(key).or_insert(next));
            if group == next {
                groups.push(Vec::new());
            }
            groups[group].push((index, *event));
        }
        let mut outcomes = vec![Outcome::Held; events.len()];
        let mut calls: Vec<BoxFuture<'_, Vec<(usize, Outcome)>>> = Vec::with_capacity(groups.len());
        for group in groups {
            calls.push(self.handle_in_order(group, deadline).boxed());
        }
        let mut handled = stream::iter(calls).buffer_unordered(KEYS_AT_ONCE);
        while let Some(group) = handled.next().await {
            group.into_iter().for_each(|(index, outcome)| outcomes[index] = outcome);
        }
        Published::of(outcomes)
    }

    fn target(&self) -> String {
        "handler".to_owned()
    }

    async fn check(&self) -> Result<String, PublishError> {
        Ok("a function of this process".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::event::testing::keyed;

    async fn outcomes(sink: &dyn Sink, events: &[Event], timeout: Duration) -> Vec<Outcome> {
        let refs: Vec<&Event> = events.iter().collect();
        sink.publish(&Batch::new(&refs, Instant::now() + timeout)).await.outcomes
    }

    fn fault(outcome: &Outcome) -> Option<Fault> {
        match outcome {
            Outcome::Failed(error) => Some(error.fault),
            _ => None,
        }
    }

    #[tokio::test]
    async fn a_key_stops_at_its_first_failure_and_others_go_on() {
        let sink = handler(|event| async move {
            match event.row.id {
                1 => panic!("a test asked for this panic"),
                4 => Err(HandlerError::unfit("never")),
                5 => Err(std::io::Error::other("an error of the application").into()),
                _ => Ok(()),
            }
        });
        let events = [keyed(1, "a"), keyed(2, "b"), keyed(3, "a"), keyed(4, "c"), keyed(5, "d"), keyed(6, "b")];
        let outcomes = outcomes(&sink, &events, Duration::from_secs(60)).await;
        let faults: Vec<_> = outcomes.iter().map(fault).collect();
        assert_eq!(faults, [Some(Fault::Event), None, None, Some(Fault::Unfit), Some(Fault::Event), None]);
        assert_eq!((&outcomes[2], &outcomes[5]), (&Outcome::Held, &Outcome::Delivered { message_id: None }));
    }

    #[tokio::test]
    async fn one_that_hangs_is_dropped_at_the_deadline() {
        let sink = handler(|event| async move {
            if event.row.id == 1 {
                std::future::pending::<()>().await;
            }
            Ok(())
        });
        let events = [keyed(1, "a"), keyed(2, "b")];
        let outcomes = outcomes(&sink, &events, Duration::from_millis(100)).await;
        assert_eq!((fault(&outcomes[0]), fault(&outcomes[1])), (Some(Fault::Unknown), None));
    }
}
