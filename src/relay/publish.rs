//! Publishes a claimed batch: routes its events, calls all destinations at once, and judges the outcome of each delivery.

use std::collections::{HashMap, HashSet};
use std::iter::{Enumerate, Peekable};
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};
use std::{slice, vec};

use futures_util::future::{BoxFuture, join_all};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::event::{ClaimId, Event, Fault, Key, Outcome, PublishError, Verdict, Wait};
use crate::failpoint::panic_on;
use crate::outbox::{Claimed, Deliveries, Delivery, Outbox};
use crate::relay::Relay;
use crate::relay::destination::{Answers, Destination};
use crate::route::{Destinations, Unrouted};
use crate::sink::ClaimCheck;
use crate::text::shown;

/// A batch split by destination.
struct Plan<'a> {
    /// Deliveries that are decided without publishing, with the index of their event: dead on arrival, dropped, or waiting.
    /// They are in the order of the indexes.
    decided: Vec<(usize, Delivery<'a>)>,
    /// For each destination, the indexes of its events in the batch, in order.
    publish: Vec<Vec<usize>>,
}

/// The answers of one destination, which are judged one by one, in the order of its events.
struct Judge<'a, 'p> {
    destination: &'a Destination,
    /// The indexes of its events, with their places in the call.
    indexes: Peekable<Enumerate<slice::Iter<'p, usize>>>,
    outcomes: vec::IntoIter<Outcome>,
    /// See [`Answers::blocked`].
    blocked: HashSet<usize>,
    duration: Duration,
    /// The keys that failed here and are retried, with the wait before the retry. Events held behind such a key wait as long.
    retried: HashMap<Key<'a>, Duration>,
}

impl<O: Outbox> Relay<O> {
    /// Publishes a batch, whose claim began at `begun`, until `give_up` at the longest. Returns the deliveries, and the cleanups to run once they are
    /// settled.
    pub(super) async fn publish<'a>(
        &'a self,
        batch: &'a [Claimed],
        claim_id: &ClaimId,
        claim_check: &dyn ClaimCheck,
        begun: Instant,
        give_up: &CancellationToken,
    ) -> (Deliveries<'a>, Vec<BoxFuture<'static, ()>>) {
        let plan = self.plan(batch);
        let answers = join_all(self.destinations.iter().zip(&plan.publish).map(async |(destination, indexes)| {
            if indexes.is_empty() {
                return Answers::held(0);
            }
            let _in_flight = destination.in_flight(indexes.len());
            let span = tracing::debug_span!("publish", destination = destination.name);
            tokio::select! {
                biased;
                answers = destination.publish(batch, indexes, claim_id, claim_check).instrument(span) => {
                    destination.record_lags(batch, indexes, &answers.outcomes, begun);
                    answers
                }
                () = give_up.cancelled() => destination.given_up(indexes.len()),
            }
        }))
        .await;
        let (mut judges, mut after_settle) = (Vec::new(), Vec::new());
        for ((destination, indexes), answers) in self.destinations.iter().zip(&plan.publish).zip(answers) {
            after_settle.extend(answers.after_settle);
            judges.push(Judge {
                destination,
                indexes: indexes.iter().enumerate().peekable(),
                outcomes: answers.outcomes.into_iter(),
                blocked: answers.blocked,
                duration: answers.duration,
                retried: HashMap::new(),
            });
        }
        let mut deliveries = Deliveries::with_capacity(batch.len());
        let mut decided = plan.decided.into_iter().peekable();
        for (index, Claimed { event, .. }) in batch.iter().enumerate() {
            let mut group = deliveries.begin(event);
            while let Some((_, delivery)) = decided.next_if(|(at, _)| *at == index) {
                group.push(delivery);
            }
            for judge in &mut judges {
                if let Some((place, _)) = judge.indexes.next_if(|(_, at)| **at == index)
                    && let Some(outcome) = judge.outcomes.next()
                {
                    group.push(self.judge(judge, place, event, outcome));
                }
            }
        }
        (deliveries, after_settle)
    }

    fn plan<'a>(&'a self, batch: &'a [Claimed]) -> Plan<'a> {
        // The keys with a waiting event. Later events of such a key wait too.
        let mut blocked = HashSet::new();
        let pauses = self.outbox.pauses();
        // While nothing is published to any destination, nothing is claimed, so no event is in the way of others.
        let all_paused = !pauses.is_empty() && self.names.iter().all(|name| pauses.is_whole(name));
        // The keys of which an event is held back from a destination, because its type is paused.
        let mut held: HashSet<(usize, Key<'_>)> = HashSet::new();
        let mut plan = Plan { decided: Vec::new(), publish: vec![Vec::new(); self.destinations.len()] };
        for (index, claimed) in batch.iter().enumerate() {
            let event = &claimed.event;
            let mut decide = |destination: &'a str, verdict| {
                plan.decided.push((index, Delivery { destination, verdict, duration: Duration::ZERO }));
            };
            if !claimed.due {
                decide(&event.row.destination, Verdict::Wait(Wait::UntilDue));
                continue;
            }
            if event.key().is_some_and(|key| blocked.contains(&key)) {
                decide(&event.row.destination, Verdict::Wait(Wait::InPlace));
                continue;
            }
            let defect = claimed.defect.as_ref();
            if let Some(defect) = defect.filter(|defect| defect.fault.charges_event()) {
                self.log_dead_letter(event, None, defect);
                decide(&event.row.destination, Verdict::DeadLetter { error: defect.clone() });
                continue;
            }
            let targets = match self.targets_or_panic(event) {
                Ok(targets) => targets,
                Err(verdict) => {
                    decide(&event.row.destination, verdict);
                    continue;
                }
            };
            if let Some(reason) = defect {
                blocked.extend(event.key());
                for target in targets {
                    let name = self.names[target].as_str();
                    self.log_blocked(event, &self.destinations[target], reason);
                    decide(name, Verdict::Block { error: reason.clone() });
                }
                continue;
            }
            for target in targets {
                let name = self.names[target].as_str();
                if !pauses.is_empty() {
                    if pauses.is_whole(name) {
                        let wait = if all_paused { Wait::InPlace } else { Wait::ForDestination };
                        decide(name, Verdict::Wait(wait));
                        continue;
                    }
                    let behind = event.key().is_some_and(|key| held.contains(&(target, key)));
                    if behind || pauses.holds(name, &event.event_type) {
                        held.extend(event.key().map(|key| (target, key)));
                        decide(name, Verdict::Wait(Wait::WhilePaused));
                        continue;
                    }
                }
                match claimed.blocked_by.iter().find(|earlier| earlier.destination == name) {
                    Some(earlier) => decide(name, Verdict::Wait(Wait::BehindKey(earlier.remaining))),
                    None => plan.publish[target].push(index),
                }
            }
        }
        plan
    }

    /// Like [`Self::targets`], but a panic is caught: the event that causes it is dead-lettered, and the rest of its batch
    /// goes on.
    fn targets_or_panic(&self, event: &Event) -> Result<Vec<usize>, Verdict> {
        std::panic::catch_unwind(AssertUnwindSafe(|| {
            panic_on(event);
            self.targets(event)
        }))
        .unwrap_or_else(|_| {
            let error = PublishError::new(Fault::Unfit, "routing_panicked", "choosing its destinations panicked");
            self.log_dead_letter(event, None, &error);
            Err(Verdict::DeadLetter { error })
        })
    }

    /// Returns the destinations of an event, or the verdict on an event that has none.
    fn targets(&self, event: &Event) -> Result<Vec<usize>, Verdict> {
        let owed = event.row.destination.as_str();
        if !owed.is_empty() {
            return self.names.iter().position(|name| name == owed).map(|target| vec![target]).ok_or_else(|| {
                // Another relay, or the next version of the configuration, may know this destination, so the event waits. The
                // store reports it as a standstill.
                tracing::debug!(
                    destination = owed,
                    outbox_id = event.row.id,
                    "event owed to a destination that is not configured here; it waits"
                );
                Verdict::Wait(Wait::ForDestination)
            });
        }
        match (self.router.route(event), self.config.unrouted) {
            (Destinations::To(targets), _) => Ok(targets),
            (Destinations::Nowhere, _) => Err(Verdict::Drop { reason: "dropped: its route names no destination" }),
            (Destinations::Unrouted, Unrouted::Drop) => {
                if self.report.admits("events that no route takes were dropped, by setting", "", "unrouted") {
                    let EventText { event_type, key } = EventText::of(event);
                    tracing::info!(event_type, key, outbox_id = event.row.id, "unrouted event dropped, by setting");
                }
                Err(Verdict::Drop { reason: "unrouted: dropped, by setting" })
            }
            (Destinations::Unrouted, Unrouted::DeadLetter) => {
                let error = PublishError::new(Fault::Unfit, "unrouted", "no route takes this event");
                self.log_dead_letter(event, None, &error);
                Err(Verdict::DeadLetter { error })
            }
        }
    }

    /// Returns the delivery that follows from the outcome of the event at this place of a call.
    fn judge<'a>(&self, judge: &mut Judge<'a, '_>, place: usize, event: &'a Event, outcome: Outcome) -> Delivery<'a> {
        let Judge { destination, blocked, duration, retried, .. } = judge;
        let mut verdict = match outcome {
            Outcome::Failed(error) if blocked.contains(&place) => Verdict::Block { error },
            outcome => destination.retry().judge(outcome, event.attempts, fastrand::f64()),
        };
        match (&mut verdict, event.key()) {
            (Verdict::Retry { delay, error }, key) => {
                self.log_retry(event, destination, error, *delay);
                key.map(|key| retried.insert(key, *delay));
            }
            (Verdict::DeadLetter { error }, _) => self.log_dead_letter(event, Some(destination), error),
            (Verdict::Block { error }, _) => self.log_blocked(event, destination, error),
            (Verdict::Wait(wait), key) => {
                // A row that is owed to this destination alone does not stay in place: it would be claimed again with each
                // batch for the other destinations.
                let alone = !event.row.destination.is_empty() && self.destinations.len() > 1;
                if let Some(delay) = key.and_then(|key| retried.get(&key)) {
                    *wait = Wait::BehindKey(*delay);
                } else if alone {
                    *wait = Wait::ForDestination;
                }
            }
            (Verdict::Published { .. } | Verdict::Drop { .. }, _) => {}
        }
        Delivery { destination: destination.name.as_str(), verdict, duration: *duration }
    }

    fn log_retry(&self, event: &Event, destination: &Destination, error: &PublishError, delay: Duration) {
        let name = destination.name.as_str();
        if !self.report.admits("events failed; they will be tried again", name, &error.code) {
            return;
        }
        let EventText { event_type, key } = EventText::of(event);
        tracing::warn!(
            destination = name,
            place = destination.place(event),
            event_type,
            key,
            outbox_id = event.row.id,
            event_id = %event.event_id,
            attempt = event.attempts + 1,
            next_try_s = delay.as_secs_f64(),
            %error,
            "event failed; it will be tried again"
        );
    }

    /// Logs each key and cause once while the relay runs.
    fn log_blocked(&self, event: &Event, destination: &Destination, error: &PublishError) {
        let name = destination.name.as_str();
        if !self.named.is_new(event, name, error)
            || !self.report.admits("events failed while others were taken; their keys wait", name, &error.code)
        {
            return;
        }
        let EventText { event_type, key } = EventText::of(event);
        tracing::warn!(
            destination = name,
            place = destination.place(event),
            event_type,
            key,
            outbox_id = event.row.id,
            event_id = %event.event_id,
            %error,
            "event blocked: it failed while others are taken; its key waits, up to 5 minutes at a time, and it is not charged"
        );
    }

    /// `destination` is `None` if the event was not sent to any.
    fn log_dead_letter(&self, event: &Event, destination: Option<&Destination>, error: &PublishError) {
        let name = destination.map_or(event.row.destination.as_str(), |destination| destination.name.as_str());
        if !self.report.admits("events were dead-lettered", name, &error.code) {
            return;
        }
        let EventText { event_type, key } = EventText::of(event);
        tracing::error!(
            destination = name,
            place = destination.map(|destination| destination.place(event)),
            event_type,
            key,
            outbox_id = event.row.id,
            event_id = %event.event_id,
            attempt = event.attempts + 1,
            %error,
            "event dead-lettered"
        );
    }
}

/// The type and the key of an event for a log. They are an application's text, so they are escaped and bounded.
struct EventText {
    event_type: String,
    /// `None` if the event has no key.
    key: Option<String>,
}

impl EventText {
    /// The longest key that is logged whole, in characters.
    const MAX_CHARS: usize = 200;

    fn of(event: &Event) -> Self {
        let key = event.key().map(|key| shown(&key.to_string(), Self::MAX_CHARS));
        Self { event_type: shown(&event.event_type, Self::MAX_CHARS), key }
    }
}
