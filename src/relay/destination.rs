//! One destination as the engine sees it: a sink behind its breaker.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;

use crate::breaker::{Admission, Breaker, BreakerPolicy};
use crate::event::{Event, Fault, Outcome, PublishError, Term};
use crate::failpoint::crash_on;
use crate::sink::{Ledger, Published, Sink, Tenure};

pub(super) struct Destination {
    pub(super) name: String,
    sink: Arc<dyn Sink>,
    breaker: Mutex<Breaker>,
    in_flight: AtomicUsize,
    given_up: AtomicUsize,
}

/// The answers of one publish call.
pub(super) struct Answers {
    /// One per event, in order.
    pub(super) outcomes: Vec<Outcome>,
    pub(super) duration: Duration,
    /// See [`Published::once_settled`].
    pub(super) once_settled: Option<BoxFuture<'static, ()>>,
}

impl Answers {
    /// Of a call that was not made.
    pub(super) fn held(count: usize) -> Self {
        Self { outcomes: vec![Outcome::Held; count], duration: Duration::ZERO, once_settled: None }
    }
}

impl Destination {
    pub(super) fn new(name: String, sink: Arc<dyn Sink>, policy: BreakerPolicy) -> Self {
        Self {
            name,
            sink,
            breaker: Mutex::new(Breaker::new(policy)),
            in_flight: AtomicUsize::new(0),
            given_up: AtomicUsize::new(0),
        }
    }

    /// Whether it would take events now; takes no probe.
    pub(super) fn admission(&self, now: Instant) -> Admission {
        self.breaker().peek(now)
    }

    /// Whether it is down, not just pausing.
    pub(super) fn is_down(&self) -> bool {
        self.breaker().is_open()
    }

    /// Publishes `events` and tells the breaker. While it is paused, all of them are held.
    pub(super) async fn publish(
        &self,
        events: &[&Event],
        term: &Term,
        ledger: &dyn Ledger,
        timeout: Duration,
    ) -> Answers {
        let begun = Instant::now();
        let admission = self.breaker().admit(begun);
        if let Admission::No(_) = admission {
            return Answers::held(events.len());
        }
        crash_on(events);
        let tenure = Tenure { destination: &self.name, term, ledger };
        let Published { mut outcomes, mut once_settled } =
            self.sink.publish_once(events, &tenure, begun + timeout).await;
        if outcomes.len() != events.len() {
            // A sink that loses count must not settle anything by accident.
            let message = format!("the sink gave {} answers for {} events", outcomes.len(), events.len());
            let error = PublishError::new(Fault::Unknown, "answers_do_not_match", message);
            (outcomes, once_settled) = (vec![Outcome::Failed(error); events.len()], None);
        }
        self.judge_health(&outcomes);
        Answers { outcomes, duration: begun.elapsed(), once_settled }
    }

    /// Counts events as in flight while the value lives.
    pub(super) fn in_flight(&self, count: usize) -> InFlight<'_> {
        self.in_flight.fetch_add(count, Ordering::SeqCst);
        InFlight { destination: self, count }
    }

    /// How many events were sent to it and have no answer: not yet, or never, because the relay is to end.
    pub(super) fn count_unanswered(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst) + self.given_up.load(Ordering::SeqCst)
    }

    /// The answers of a call that is no longer waited for, because the relay is to end.
    pub(super) fn given_up(&self, count: usize) -> Answers {
        self.given_up.fetch_add(count, Ordering::SeqCst);
        tracing::warn!(
            destination = self.name,
            event_count = count,
            "no answer in time to stop: whether these events arrived is unknown; they stay pending"
        );
        let error = PublishError::new(Fault::Unknown, "stopped", "no answer before the relay had to end");
        Answers { outcomes: vec![Outcome::Failed(error); count], ..Answers::held(0) }
    }

    fn judge_health(&self, outcomes: &[Outcome]) {
        let worst = |wanted: &[Fault]| {
            outcomes.iter().find_map(|outcome| match outcome {
                Outcome::Failed(error) if wanted.contains(&error.fault) => Some(error),
                _ => None,
            })
        };
        let answered = outcomes.iter().any(|outcome| match outcome {
            Outcome::Delivered { .. } => true,
            Outcome::Failed(error) => error.fault == Fault::Event,
            Outcome::Held => false,
        });
        let now = Instant::now();
        let (name, mut breaker) = (self.name.as_str(), self.breaker());
        if let Some(error) = worst(&[Fault::Misconfigured]) {
            if breaker.misconfigured(now) {
                tracing::error!(destination = name, %error, "destination misconfigured, a human must act; its events wait, none is charged");
            }
        } else if let Some(error) = worst(&[Fault::Destination, Fault::Unknown]) {
            if answered {
                breaker.strained(now);
                tracing::debug!(destination = name, %error, "destination took a part only; pausing");
            } else if breaker.failed(now) {
                tracing::error!(destination = name, %error, "destination down, breaker open; its events wait, none is charged");
            } else {
                tracing::warn!(destination = name, %error, "publish failed; its events wait, none is charged");
            }
        } else if answered {
            if breaker.succeeded() {
                tracing::info!(destination = name, "destination back, breaker closed");
            }
        } else {
            breaker.unused(now);
        }
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        // A breaker is never left half-changed, so a panic elsewhere does not spoil it.
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Destination::in_flight`].
pub(super) struct InFlight<'a> {
    destination: &'a Destination,
    count: usize,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.destination.in_flight.fetch_sub(self.count, Ordering::SeqCst);
    }
}
