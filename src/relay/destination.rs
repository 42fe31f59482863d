//! One destination as the engine sees it: a sink behind its breaker.

use std::collections::HashSet;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use crate::breaker::{Admission, Breaker, BreakerState, Ticket};
use crate::event::{ClaimId, Event, Fault, Outcome, PublishError};
use crate::failpoint::{crash_late_on, crash_on};
use crate::outbox::Claimed;
use crate::relay::blame::{Blame, Call, CallHealth, Candidate, Judgement};
use crate::relay::echo::cut_content;
use crate::relay::guard::Counted;
use crate::relay::health::{HealthBoard, State};
use crate::relay::metrics::{BatchLags, DestinationMetrics};
use crate::relay::panics::{PANICS_ALONE, Panics, Split};
use crate::relay::report::Report;
use crate::relay::{Endpoint, Policy};
use crate::retry::RetryPolicy;
use crate::sink::{Batch, ClaimCheck, ClaimContext, Published, Sink};
use crate::text::shown;

/// How often it is logged that a destination is still down.
const REMINDER_INTERVAL: Duration = Duration::from_secs(60);

/// The longest name of a place that is logged whole, in characters.
const MAX_PLACE_CHARS: usize = 200;

/// How long past its deadline a call may last before it is abandoned.
pub(super) const GRACE: Duration = Duration::from_secs(1);

pub(super) struct Destination {
    pub(super) name: String,
    sink: Arc<dyn Sink>,
    breaker: Mutex<Breaker>,
    blame: Mutex<Blame>,
    panics: Mutex<Panics>,
    in_flight: AtomicUsize,
    given_up: AtomicUsize,
    /// The present outage, if there is one.
    outage: Mutex<Option<Outage>>,
    policy: Policy,
    observers: Observers,
}

/// The parts of the relay to which a destination reports the results of its calls.
pub(super) struct Observers {
    pub(super) report: Arc<Report>,
    pub(super) health: Arc<HealthBoard>,
    pub(super) metrics: DestinationMetrics,
    /// The index of this destination among all destinations.
    pub(super) place: usize,
}

/// The state of the log about a destination that is down or fails.
struct Outage {
    since: Instant,
    failed_calls: u32,
    /// When the log last said that the breaker is open.
    logged: Option<Instant>,
}

/// The answers of one publish call.
pub(super) struct Answers {
    /// One per event, in order.
    pub(super) outcomes: Vec<Outcome>,
    /// The places of the events that failed uncharged and whose keys wait. Other uncharged events are retried in place.
    pub(super) blocked: HashSet<usize>,
    pub(super) duration: Duration,
    /// See [`Published::after_settle`].
    pub(super) after_settle: Option<BoxFuture<'static, ()>>,
}

impl Answers {
    /// Returns the answers for a call that was not made.
    pub(super) fn held(count: usize) -> Self {
        let outcomes = vec![Outcome::Held; count];
        Self { outcomes, blocked: HashSet::new(), duration: Duration::ZERO, after_settle: None }
    }
}

impl Destination {
    pub(super) fn new(Endpoint { name, sink, policy }: Endpoint, observers: Observers) -> Self {
        Self {
            name,
            sink,
            breaker: Mutex::new(Breaker::new(policy.breaker.clone())),
            outage: Mutex::default(),
            policy,
            observers,
            blame: Mutex::default(),
            panics: Mutex::default(),
            in_flight: AtomicUsize::new(0),
            given_up: AtomicUsize::new(0),
        }
    }

    /// The retry policy for charged events.
    pub(super) fn retry(&self) -> &RetryPolicy {
        &self.policy.retry
    }

    /// Returns whether the destination would accept a call now. It does not use up the probe.
    pub(super) fn admission(&self, now: Instant) -> Admission {
        self.breaker().peek(now)
    }

    /// Returns whether the destination is down, and not only paused for a moment.
    pub(super) fn is_down(&self) -> bool {
        self.breaker().is_open()
    }

    /// Returns the state of the breaker.
    pub(super) fn state(&self) -> BreakerState {
        self.breaker().state()
    }

    /// Publishes the events at `indexes` of `batch` and reports the result to the breaker. While the destination is paused, all of
    /// them are held.
    pub(super) async fn publish(
        &self,
        batch: &[Claimed],
        indexes: &[usize],
        claim_id: &ClaimId,
        claim_check: &dyn ClaimCheck,
    ) -> Answers {
        let begun = Instant::now();
        let admitted = {
            let mut breaker = self.breaker();
            let admitted = breaker.admit(begun);
            self.observers.metrics.breaker(breaker.state());
            admitted
        };
        let Ok(ticket) = admitted else { return Answers::held(indexes.len()) };
        let events: Vec<&Event> = indexes.iter().map(|&index| &batch[index].event).collect();
        let deadline = begun + self.policy.timeout;
        let split = self.panics().split(&events);
        let Some(Split { unsuspected, suspects }) = split else {
            return self.call(batch, indexes, claim_id, claim_check, ticket, deadline).await;
        };
        let mut answers = Answers::held(indexes.len());
        let mut stopped = HashSet::new();
        for (number, mut places) in (0..).zip([unsuspected, suspects]) {
            places.retain(|&place| events[place].key().is_none_or(|key| !stopped.contains(&key)));
            if places.is_empty() {
                continue;
            }
            let some: Vec<usize> = places.iter().map(|&place| indexes[place]).collect();
            // Two calls of one claim must have different tokens.
            let claim_id = ClaimId { token: claim_id.token.wrapping_add(number), ..claim_id.clone() };
            let answered = self.call(batch, &some, &claim_id, claim_check, ticket, deadline).await;
            for (&place, outcome) in places.iter().zip(answered.outcomes) {
                if !matches!(outcome, Outcome::Delivered { .. }) {
                    stopped.extend(events[place].key());
                }
                answers.outcomes[place] = outcome;
            }
            answers.blocked.extend(answered.blocked.into_iter().map(|place| places[place]));
            answers.after_settle = match (answers.after_settle.take(), answered.after_settle) {
                (Some(first), Some(second)) => Some(Box::pin(async { _ = tokio::join!(first, second) })),
                (first, second) => first.or(second),
            };
        }
        Answers { duration: begun.elapsed(), ..answers }
    }

    /// Makes one call of the sink. A panic of the sink, or a call that does not end, is an unknown outcome for its events;
    /// the engine goes on.
    async fn call(
        &self,
        batch: &[Claimed],
        indexes: &[usize],
        claim_id: &ClaimId,
        claim_check: &dyn ClaimCheck,
        ticket: Ticket,
        deadline: Instant,
    ) -> Answers {
        let begun = Instant::now();
        let events: Vec<&Event> = indexes.iter().map(|&index| &batch[index].event).collect();
        crash_on(&events);
        crash_late_on(&events).await;
        let claim = ClaimContext { destination: &self.name, id: claim_id, check: claim_check };
        let sent = Batch { events: &events, deadline, claim: Some(claim) };
        let call = AssertUnwindSafe(async { self.sink.publish(&sent).await }).catch_unwind();
        let unknown = |code: &str, message: String| {
            let error = PublishError::new(Fault::Unknown, code, message);
            Published::of(vec![Outcome::Failed(error); events.len()])
        };
        let mut published = match tokio::time::timeout_at((deadline + GRACE).into(), call).await {
            Ok(Ok(published)) => published,
            Ok(Err(_)) => return self.panicked(&events, begun, ticket),
            Err(_) => unknown("no_answer", "the code of this destination did not end in time".to_owned()),
        };
        if published.outcomes.len() != events.len() {
            // If the number of answers is wrong, an answer cannot be matched to its event.
            let count = published.outcomes.len();
            let message = format!("the sink gave {count} answers for {} events", events.len());
            published = unknown("answers_do_not_match", message);
        }
        let Published { mut outcomes, after_settle } = published;
        cut_content(&events, &mut outcomes);
        let answered = events.iter().zip(&outcomes).filter(|(_, outcome)| **outcome != Outcome::Held);
        self.panics().answered(answered.map(|(event, _)| *event));
        let candidate = |place: usize| {
            let claimed: &Claimed = &batch[indexes[place]];
            Candidate { event_id: claimed.event.event_id, blocked_before: claimed.blocked_before }
        };
        let blocked = self.judge_health(candidate, &outcomes, begun, ticket);
        Answers { outcomes, blocked, duration: begun.elapsed(), after_settle }
    }

    /// Returns the answers of a call that panicked. An event that panics each time it is alone is dead-lettered if the
    /// destination has taken other events meanwhile. Otherwise the destination may be unable to publish anything, so the
    /// event's key waits.
    fn panicked(&self, events: &[&Event], begun: Instant, ticket: Ticket) -> Answers {
        let now = Instant::now();
        if self.observers.report.admits(
            "calls panicked; their events are published again in smaller groups",
            &self.name,
            "",
        ) {
            tracing::error!(
                destination = self.name,
                event_count = events.len(),
                "the code of this destination panicked; whether these events arrived is unknown, and they are published again in smaller groups"
            );
        }
        let alone = self.panics().panicked(events, now);
        let message = "the code of this destination panicked while it published this event";
        let mut error = PublishError::new(Fault::Unknown, "sink_panicked", message);
        let mut blocked = HashSet::new();
        match alone {
            Some((times, since)) if times >= PANICS_ALONE => {
                if self.blame.lock().unwrap_or_else(PoisonError::into_inner).delivered_since(since) {
                    error.fault = Fault::Unfit;
                    error.message = format!("{message} and no other, {times} times");
                } else {
                    blocked.insert(0);
                }
                self.breaker().unused(ticket, now);
            }
            _ => {
                let mut breaker = self.breaker();
                if breaker.is_open() {
                    breaker.failed(ticket, now);
                } else {
                    breaker.strained(ticket, now);
                }
                self.observers.metrics.breaker(breaker.state());
            }
        }
        let outcomes = vec![Outcome::Failed(error); events.len()];
        Answers { outcomes, blocked, duration: begun.elapsed(), after_settle: None }
    }

    /// Records how long the events that were delivered just now took since their commit. Their claim began at `begun`, a little
    /// before the store told their ages.
    pub(super) fn record_lags(&self, batch: &[Claimed], indexes: &[usize], outcomes: &[Outcome], begun: Instant) {
        let (since, mut lags) = (begun.elapsed(), BatchLags::default());
        for (&index, outcome) in indexes.iter().zip(outcomes) {
            if matches!(outcome, Outcome::Delivered { .. }) {
                lags.add(batch[index].age + since);
            }
        }
        self.observers.metrics.lags(&lags);
    }

    /// See [`DestinationMetrics::lag_by_minute`].
    pub(super) fn lag_by_minute(&self) -> Vec<Option<Duration>> {
        self.observers.metrics.lag_by_minute()
    }

    /// Counts events as in flight while the value lives.
    pub(super) fn in_flight(&self, count: usize) -> Counted<'_> {
        Counted::new(&self.in_flight, count)
    }

    /// Returns how many events were sent to the destination and have no answer, including those given up because the relay
    /// stops.
    pub(super) fn count_unanswered(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst) + self.given_up.load(Ordering::SeqCst)
    }

    /// Returns the answers of a call that is given up because the relay stops.
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

    /// Reports a call that began at `begun` to the breaker, the metrics and the health. Returns the places of the events
    /// whose keys wait.
    fn judge_health(
        &self,
        candidate: impl Fn(usize) -> Candidate,
        outcomes: &[Outcome],
        begun: Instant,
        ticket: Ticket,
    ) -> HashSet<usize> {
        let now = Instant::now();
        let (name, mut breaker) = (self.name.as_str(), self.breaker());
        let current = breaker.is_current(ticket);
        let call = Call { begun, now, current, probe: current && breaker.is_open() };
        let mut blame = self.blame.lock().unwrap_or_else(PoisonError::into_inner);
        let Judgement { health, blocked } = blame.judge(candidate, outcomes, call);
        let delivered = outcomes.iter().any(|outcome| matches!(outcome, Outcome::Delivered { .. }));
        self.observers.metrics.called(now - begun, delivered);
        if let CallHealth::Misconfigured(error) | CallHealth::Failed(error) | CallHealth::Strained(error) = health {
            self.observers.metrics.failed(&error.code, matches!(health, CallHealth::Misconfigured(_)));
        }
        let closed = match health {
            CallHealth::Misconfigured(error) => {
                breaker.misconfigured(ticket, now);
                if current {
                    let message = "destination misconfigured, a person must act; its events wait, none is charged";
                    self.log_outage(error, now, message);
                }
                false
            }
            CallHealth::Failed(error) => {
                if breaker.failed(ticket, now) {
                    self.log_outage(error, now, "destination down, breaker open; its events wait, none is charged");
                } else if current {
                    self.outage().get_or_insert(Outage::since(now)).failed_calls += 1;
                    if self.observers.report.admits(
                        "calls failed; their events wait, none is charged",
                        name,
                        &error.code,
                    ) {
                        tracing::warn!(destination = name, %error, "publish failed; its events wait, none is charged");
                    }
                }
                false
            }
            CallHealth::Strained(error) => {
                tracing::debug!(destination = name, %error, "destination took a part only; pausing");
                breaker.strained(ticket, now)
            }
            CallHealth::Answered => {
                let closed = breaker.succeeded(ticket);
                if !closed && current {
                    self.outage().take();
                }
                closed
            }
            CallHealth::Silent => {
                breaker.unused(ticket, now);
                false
            }
        };
        self.observers.metrics.breaker(breaker.state());
        let place = self.observers.place;
        match health {
            CallHealth::Misconfigured(error) if breaker.is_open() => {
                self.observers.health.destination(place, State::Misconfigured, Some(&error.to_string()));
            }
            CallHealth::Failed(error) if breaker.is_open() => {
                self.observers.health.destination(place, State::Down, Some(&error.to_string()));
            }
            CallHealth::Answered | CallHealth::Strained(_) if !breaker.is_open() => {
                self.observers.health.destination(place, State::Up, None);
            }
            _ => {}
        }
        if closed && let Some(outage) = self.outage().take() {
            tracing::info!(
                destination = name,
                away_s = (now - outage.since).as_secs_f64(),
                failed_calls = outage.failed_calls,
                "destination back, breaker closed"
            );
        }
        blocked.into_iter().collect()
    }

    fn panics(&self) -> MutexGuard<'_, Panics> {
        self.panics.lock().unwrap_or_else(PoisonError::into_inner)
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
                next_probe_s = self.policy.breaker.recovery.as_secs_f64(),
                %error,
                "{message}"
            );
        }
    }

    /// Describes where the destination puts this event, for a log.
    pub(super) fn place(&self, event: &Event) -> String {
        shown(&self.sink.place(event), MAX_PLACE_CHARS)
    }

    fn outage(&self) -> MutexGuard<'_, Option<Outage>> {
        self.outage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        // A breaker is never left half-changed, so it stays usable after a panic in another thread.
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outage {
    fn since(now: Instant) -> Self {
        Self { since: now, failed_calls: 0, logged: None }
    }
}
