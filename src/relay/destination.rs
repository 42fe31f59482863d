//! One destination as the engine sees it: a sink behind its breaker.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;

use crate::breaker::{Admission, Breaker, BreakerPolicy};
use crate::event::{Event, Fault, Outcome, PublishError, Term};
use crate::failpoint::crash_on;
use crate::relay::report::Report;
use crate::sink::{Ledger, Published, Sink, Tenure};
use crate::text::{cut_content, shown};

/// How often it is logged that a destination is still unwell.
const REMINDER_INTERVAL: Duration = Duration::from_secs(60);

/// The longest name of a place that is logged whole, in characters.
const MAX_PLACE_CHARS: usize = 200;

pub(super) struct Destination {
    pub(super) name: String,
    sink: Arc<dyn Sink>,
    breaker: Mutex<Breaker>,
    in_flight: AtomicUsize,
    given_up: AtomicUsize,
    /// Since when it is unwell.
    outage: Mutex<Option<Outage>>,
    recovery: Duration,
    report: Arc<Report>,
}

/// What is told of a destination that is unwell.
struct Outage {
    since: Instant,
    failed_calls: u32,
    /// When it was logged last that the breaker is open.
    logged: Option<Instant>,
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
    pub(super) fn new(name: String, sink: Arc<dyn Sink>, policy: BreakerPolicy, report: Arc<Report>) -> Self {
        Self {
            outage: Mutex::default(),
            recovery: policy.recovery,
            report,
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
        cut_content(events, &mut outcomes);
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
            breaker.misconfigured(now);
            self.log_outage(
                error,
                now,
                "destination misconfigured, a human must act; its events wait, none is charged",
            );
        } else if let Some(error) = worst(&[Fault::Destination, Fault::Unknown]) {
            if answered {
                breaker.strained(now);
                tracing::debug!(destination = name, %error, "destination took a part only; pausing");
            } else if breaker.failed(now) {
                self.log_outage(error, now, "destination down, breaker open; its events wait, none is charged");
            } else {
                self.outage().get_or_insert(Outage::since(now)).failed_calls += 1;
                if self.report.admits("calls failed; their events wait, none is charged", name, &error.code) {
                    tracing::warn!(destination = name, %error, "publish failed; its events wait, none is charged");
                }
            }
        } else if answered {
            let closed = breaker.succeeded();
            if let (Some(outage), true) = (self.outage().take(), closed) {
                tracing::info!(
                    destination = name,
                    away_s = (now - outage.since).as_secs_f64(),
                    failed_calls = outage.failed_calls,
                    "destination back, breaker closed"
                );
            }
        } else {
            breaker.unused(now);
        }
    }

    /// Logs that the breaker is open: at once, then once a minute.
    fn log_outage(&self, error: &PublishError, now: Instant, message: &str) {
        let mut outage = self.outage();
        let outage = outage.get_or_insert(Outage::since(now));
        outage.failed_calls += 1;
        if outage.logged.is_none_or(|logged| now - logged >= REMINDER_INTERVAL) {
            outage.logged = Some(now);
            tracing::error!(
                destination = self.name,
                since_s = (now - outage.since).as_secs_f64(),
                failed_calls = outage.failed_calls,
                next_probe_s = self.recovery.as_secs_f64(),
                %error,
                "{message}"
            );
        }
    }

    /// Where it puts this event, for a log.
    pub(super) fn place(&self, event: &Event) -> String {
        shown(&self.sink.place(event), MAX_PLACE_CHARS)
    }

    fn outage(&self) -> MutexGuard<'_, Option<Outage>> {
        self.outage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        // A breaker is never left half-changed, so a panic elsewhere does not spoil it.
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outage {
    fn since(now: Instant) -> Self {
        Self { since: now, failed_calls: 0, logged: None }
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
