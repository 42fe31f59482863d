//! What a relay writes for `relay status`, which is another process: how many deliveries have ended, every few seconds while
//! there are any, and which destinations are down, when that changes. A relay that has nothing to do writes nothing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::event::Verdict;
use crate::outbox::status::{Found, TallyCount};
use crate::outbox::{Deliveries, Outbox, OutboxError};
use crate::relay::health::{Health, State};
use crate::relay::{Relay, ending};
use crate::text::shown;

/// How often the counts are written, while there are any.
const INTERVAL: Duration = Duration::from_secs(5);

/// How long after a change the state of destinations is written, because several change together.
const SETTLES: Duration = Duration::from_millis(200);

/// While a destination is down, its state is written again after this time: somebody may have deleted the registration.
const AGAIN: Duration = Duration::from_secs(60);

/// The longest reason that is written, in characters.
const MAX_REASON_CHARS: usize = 500;

/// The deliveries that have ended since they were written last.
#[derive(Debug)]
pub(super) struct Tallies(Mutex<Vec<TallyCount>>);

impl Tallies {
    /// Creates counts for these destinations, and for events that are decided before they are routed.
    pub(super) fn new(destinations: &[String]) -> Self {
        let names = destinations.iter().map(String::as_str).chain([""]);
        let zero = |name: &str| TallyCount { destination: name.to_owned(), ..TallyCount::default() };
        Self(Mutex::new(names.map(zero).collect()))
    }

    /// Counts the deliveries of a batch that was settled.
    pub(super) fn settled(&self, deliveries: &Deliveries<'_>) {
        let mut counts = self.counts();
        // Most deliveries in a row are to one destination, whose name is one string.
        let (mut last, mut place) = ("", None);
        for delivery in deliveries.iter() {
            if place.is_none() || !std::ptr::eq(last, delivery.destination) {
                last = delivery.destination;
                place = counts.iter().position(|count| count.destination == last);
            }
            let Some(count) = place.map(|place| &mut counts[place]) else { continue };
            match delivery.verdict {
                Verdict::Published { .. } => count.published += 1,
                Verdict::Retry { .. } => count.retried += 1,
                Verdict::DeadLetter { .. } => count.dead_lettered += 1,
                Verdict::Block { .. } | Verdict::Drop { .. } | Verdict::Wait(_) => {}
            }
        }
    }

    /// Takes the counts that are not zero.
    fn take(&self) -> Vec<TallyCount> {
        let mut counts = self.counts();
        let counted = counts.iter_mut().filter(|count| !count.is_zero()).map(|count| {
            let zero = TallyCount { destination: count.destination.clone(), ..TallyCount::default() };
            std::mem::replace(count, zero)
        });
        counted.collect()
    }

    /// Puts back counts that could not be written.
    fn put_back(&self, taken: Vec<TallyCount>) {
        let mut counts = self.counts();
        for taken in taken {
            if let Some(count) = counts.iter_mut().find(|count| count.destination == taken.destination) {
                count.published += taken.published;
                count.retried += taken.retried;
                count.dead_lettered += taken.dead_lettered;
            }
        }
    }

    fn counts(&self) -> MutexGuard<'_, Vec<TallyCount>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the destinations that are down.
fn trouble(health: &Health) -> Vec<Found> {
    let found = health.destinations.iter().filter_map(|destination| {
        let state = match destination.status.state {
            State::Down => "down",
            State::Misconfigured => "misconfigured",
            State::Unknown | State::Up => return None,
        };
        let reason = destination.status.reason.as_deref().unwrap_or_default();
        Some(Found {
            destination: destination.name.clone(),
            state,
            since: destination.status.since,
            reason: shown(reason, MAX_REASON_CHARS),
        })
    });
    found.collect()
}

/// Returns whether the same destinations are in the same states. A reason may change with each call that fails.
fn same(one: &[Found], other: &[Found]) -> bool {
    let what = |found: &Found| (found.destination.clone(), found.state, found.since);
    one.iter().map(what).eq(other.iter().map(what))
}

impl<O: Outbox> Relay<O> {
    /// Writes counts and states until `stop`.
    pub(super) async fn keep_status(self: Arc<Self>, stop: CancellationToken) -> Result<(), OutboxError> {
        let mut health = self.health();
        let (mut written, mut written_at): (Vec<Found>, Instant) = (Vec::new(), Instant::now());
        let mut tick = tokio::time::interval(INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => self.write_tallies().await,
                changed = health.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    tokio::time::sleep(SETTLES).await;
                }
                () = stop.cancelled() => return Ok(()),
            }
            let found = trouble(&health.borrow_and_update());
            if same(&found, &written) && (found.is_empty() || written_at.elapsed() < AGAIN) {
                continue;
            }
            match self.outbox.note_trouble(&found).await {
                Ok(()) => (written, written_at) = (found, Instant::now()),
                // It is tried again with the next tick.
                Err(error) => tracing::debug!(error = error.explain(), "the state of destinations was not written"),
            }
        }
    }

    async fn write_tallies(&self) {
        let taken = self.tallies.take();
        if taken.is_empty() {
            return;
        }
        if let Err(error) = self.outbox.add_tally(&taken).await {
            tracing::debug!(error = error.explain(), "the tallies were not written; they are written later");
            self.tallies.put_back(taken);
        }
    }

    /// Writes the last counts of a run.
    pub(super) async fn write_last_tallies(&self) {
        drop(tokio::time::timeout(ending::IDLE_GRACE, self.write_tallies()).await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::testing::event;
    use crate::event::{Fault, PublishError, Wait};
    use crate::outbox::Delivery;

    #[test]
    fn deliveries_are_counted_by_destination_and_what_could_not_be_written_is_kept() {
        let tallies = Tallies::new(&["a".to_owned(), "b".to_owned()]);
        assert_eq!(tallies.take(), []);
        let events = [event(1), event(2), event(3)];
        let error = || PublishError::new(Fault::Event, "BAD", "");
        let mut deliveries = Deliveries::default();
        for (event, (destination, verdict)) in events.iter().zip([
            ("a", Verdict::Published { message_id: None }),
            ("b", Verdict::Retry { delay: Duration::ZERO, error: error() }),
            ("", Verdict::DeadLetter { error: error() }),
        ]) {
            let mut group = deliveries.begin(event);
            group.push(Delivery { destination, verdict, duration: Duration::ZERO });
            let verdict = Verdict::Wait(Wait::InPlace);
            group.push(Delivery { destination: "a", verdict, duration: Duration::ZERO });
        }
        let count = |destination: &str, published, retried, dead_lettered| TallyCount {
            destination: destination.to_owned(),
            published,
            retried,
            dead_lettered,
        };
        tallies.settled(&deliveries);
        let taken = tallies.take();
        assert_eq!(taken, [count("a", 1, 0, 0), count("b", 0, 1, 0), count("", 0, 0, 1)]);
        tallies.settled(&deliveries);
        tallies.put_back(taken);
        assert_eq!(tallies.take(), [count("a", 2, 0, 0), count("b", 0, 2, 0), count("", 0, 0, 2)]);
        assert_eq!(tallies.take(), []);
    }
}
