//! Ends crash loops, in which one event crashes the relay each time it is published.
//!
//! A relay that finds that others have crashed lately is cautious in its first minute: it marks events in the store before it
//! publishes them. Events that a crash leaves marked are published in batches a thirty-second as large, then alone. An event
//! that was alone in three crashes is dead-lettered. As long as relays end normally, the store only notes that they began.
//!
//! A relay also ends because somebody kills it, most often while a destination hangs, and then no event is the cause. So a
//! mark counts in full only for the first second of a call. After that it says only that a relay ended some time later: an
//! event that was alone with three of those relays waits, each time longer, and is neither charged nor dead-lettered. A relay
//! that is stopped removes its marks at once.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use crate::event::{Fault, PublishError};
use crate::outbox::{Claimed, CrashNotes, Outbox, OutboxError, Suspicion};
use crate::relay::Relay;

/// A relay that has run for this long does not crash on its first events, so it need not be cautious any more.
const PROBATION: Duration = Duration::from_secs(60);

/// How many times fewer events than in the last crash are published together.
const NARROWING: usize = 32;

/// An event that was alone in this many crashes is taken for the cause.
const CRASHES_ALONE: usize = 3;

/// If a relay ends later than this after a call began, the cause may be something other than the events of the call.
const AT_ONCE: Duration = Duration::from_secs(1);

/// The state of the crash guard: whether this run is cautious, and which events it has marked.
pub(super) struct CrashGuard {
    run: Mutex<Uuid>,
    stage: Mutex<Stage>,
    /// Events that crashed no relay, and whose marks are still there because the store could not be reached.
    to_clear: Mutex<Vec<Uuid>>,
    /// Held exclusively while marked events are published, so that an event of another lane is not taken for the cause.
    lanes: Arc<RwLock<()>>,
    /// How many events may be claimed at once. After others have crashed it is few, because an event that crashes a relay
    /// during a claim leaves no mark.
    claim: AtomicUsize,
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    /// Nothing has been claimed yet.
    Fresh,
    /// The run began at `since`; `careful` says that others have crashed lately.
    Begun { since: Instant, careful: bool },
    /// The relay is being stopped, and removes its marks.
    Stopping,
    /// The relay has run for a while, or has removed its marks.
    Proven,
}

/// The marks of one batch. The caution for it ends with the value.
#[derive(Default)]
pub(super) struct Care {
    noted: Vec<Uuid>,
    lanes: Option<Turn>,
    ended: Option<DropGuard>,
}

enum Turn {
    Alone(#[expect(dead_code, reason = "held")] OwnedRwLockWriteGuard<()>),
    Beside(#[expect(dead_code, reason = "held")] OwnedRwLockReadGuard<()>),
}

impl CrashGuard {
    pub(super) fn new() -> Self {
        Self {
            run: Mutex::new(Uuid::new_v4()),
            stage: Mutex::new(Stage::Fresh),
            to_clear: Mutex::default(),
            lanes: Arc::default(),
            claim: AtomicUsize::new(usize::MAX),
        }
    }

    /// Returns whether the store has noted that this relay began.
    pub(super) fn has_begun(&self) -> bool {
        self.stage() != Stage::Fresh
    }

    /// To be called before the first claim: a relay may crash because it reads a batch.
    pub(super) async fn begin(&self, outbox: &impl CrashNotes, batch_events: usize) -> Result<(), OutboxError> {
        let others = outbox.begin_run(self.run()).await?;
        if self.has_begun() {
            return Ok(()); // another lane has noted it meanwhile
        }
        self.set(Stage::Begun { since: Instant::now(), careful: others > 0 });
        if others > 0 {
            self.claim.store(first_claim(batch_events, others), Ordering::SeqCst);
            tracing::info!(
                "another relay crashed lately, or has just started: for a minute this relay marks events before it publishes them"
            );
        }
        Ok(())
    }

    /// Returns how many of `events` events to claim at once.
    pub(super) fn claim_events(&self, events: usize) -> usize {
        events.min(self.claim.load(Ordering::SeqCst))
    }

    /// To be called before a batch is published. A cautious relay shortens it to what may be published together, gives a defect
    /// to the events that are known to crash relays, and marks the others.
    pub(super) async fn before(
        &self,
        outbox: &impl CrashNotes,
        batch: &mut Vec<Claimed>,
        stop: &CancellationToken,
    ) -> Result<Care, OutboxError> {
        match self.stage() {
            Stage::Begun { careful: true, .. } if !stop.is_cancelled() => {}
            _ => return Ok(Care::default()),
        }
        self.clear(outbox, &[]).await;
        let ids: Vec<Uuid> = batch.iter().map(|claimed| claimed.event.event_id).collect();
        let run = self.run();
        let known = outbox.suspicions(run, &ids).await?;
        let lanes = if known.is_empty() {
            Turn::Beside(Arc::clone(&self.lanes).read_owned().await)
        } else {
            Turn::Alone(Arc::clone(&self.lanes).write_owned().await)
        };
        batch.truncate(together(batch.len(), &known));
        let mut parked = Vec::new();
        for (place, suspicion) in known {
            let Some(claimed) = batch.get_mut(place) else { continue };
            match suspicion.judge() {
                Judgement::Kills => {
                    let count = suspicion.crashes_alone;
                    let message = format!("{count} relays crashed while they published this event and no other");
                    claimed.defect = Some(PublishError::new(Fault::Unfit, "relay_crashed", message));
                }
                Judgement::MayKill => {
                    let message = "relays crashed some time after they began to publish this event and no other; whether it \
                                   is the cause is not known, so it waits, and is not charged";
                    claimed.defect = Some(PublishError::new(Fault::Unknown, "relay_died", message));
                    parked.push(claimed.event.event_id);
                }
                Judgement::Unknown => {}
            }
        }
        if !parked.is_empty() {
            outbox.forgive(&parked).await?;
        }
        let noted: Vec<Uuid> =
            batch.iter().filter(|claimed| claimed.defect.is_none()).map(|claimed| claimed.event.event_id).collect();
        outbox.mark(run, &noted).await?;
        if stop.is_cancelled() {
            self.clear(outbox, &noted).await; // the relay may have been stopped before they were marked
        }
        Ok(Care { noted, lanes: Some(lanes), ended: None })
    }

    /// To be called when the batch is settled, or its settle has failed. Either way this relay did not crash on it.
    pub(super) async fn after(&self, outbox: &impl CrashNotes, care: Care) {
        drop(care.ended);
        if self.claim.load(Ordering::SeqCst) != usize::MAX {
            let twice = |limit: usize| Some(limit.saturating_mul(2));
            _ = self.claim.fetch_update(Ordering::SeqCst, Ordering::SeqCst, twice);
        }
        self.clear(outbox, &care.noted).await;
    }

    async fn clear(&self, outbox: &impl CrashNotes, events: &[Uuid]) {
        let mut to_clear = std::mem::take(&mut *self.to_clear.lock().unwrap_or_else(PoisonError::into_inner));
        to_clear.extend_from_slice(events);
        if !to_clear.is_empty()
            && let Err(error) = outbox.clear(&to_clear).await
        {
            tracing::debug!(error = error.explain(), "events stay marked for now");
            self.to_clear.lock().unwrap_or_else(PoisonError::into_inner).append(&mut to_clear);
        }
    }

    /// To be called when a lane has panicked, which counts as a crash: from now on the relay is cautious. The marks of that lane
    /// become those of a run that has ended.
    pub(super) fn panicked(&self) {
        *self.run.lock().unwrap_or_else(PoisonError::into_inner) = Uuid::new_v4();
        self.set(Stage::Begun { since: Instant::now(), careful: true });
    }

    /// To be called when the relay is stopped: no event is the cause of how it ends after that.
    pub(super) async fn stop(&self, outbox: &impl CrashNotes) {
        if matches!(self.stage(), Stage::Begun { .. } | Stage::Stopping) {
            self.set(Stage::Stopping);
            match outbox.withdraw(self.run()).await {
                Ok(()) => self.set(Stage::Proven),
                Err(error) => {
                    tracing::debug!(error = error.explain(), "the end was not noted; the next relay begins with care");
                }
            }
        }
    }

    /// To be called now and then. A relay that has run for a while is not cautious any more.
    async fn prove(&self, outbox: &impl CrashNotes) {
        if let Stage::Begun { since, .. } = self.stage()
            && since.elapsed() > PROBATION
        {
            self.set(Stage::Proven);
            self.claim.store(usize::MAX, Ordering::SeqCst);
            if let Err(error) = outbox.end_run(self.run()).await {
                tracing::debug!(error = error.explain(), "the note that this relay is at work was not written");
            }
        }
    }

    fn run(&self) -> Uuid {
        *self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stage(&self) -> Stage {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, stage: Stage) {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner) = stage;
    }
}

impl<O: Outbox> Relay<O> {
    /// Makes the marks of a call that begins now count in full for its first second only. Other lanes go on after that.
    pub(super) fn watch_call(self: &Arc<Self>, care: &mut Care) {
        if care.noted.is_empty() {
            return;
        }
        let (relay, noted, lanes) = (Arc::clone(self), care.noted.clone(), care.lanes.take());
        let (run, ended) = (self.crash_guard.run(), CancellationToken::new());
        care.ended = Some(ended.clone().drop_guard());
        tokio::spawn(async move {
            if tokio::time::timeout(AT_ONCE, ended.cancelled()).await.is_err()
                && let Err(error) = relay.outbox.outlived(run, &noted).await
            {
                tracing::debug!(error = error.explain(), "the note that this relay is at work was not written");
            }
            drop(lanes);
        });
    }

    /// Removes the marks when the relay is stopped, and ends its caution when it has run for a while.
    pub(super) async fn watch_life(self: Arc<Self>, stop: CancellationToken) -> Result<(), OutboxError> {
        while tokio::time::timeout(PROBATION, stop.cancelled()).await.is_err() {
            self.crash_guard.prove(&self.outbox).await;
        }
        self.crash_guard.stop(&self.outbox).await;
        Ok(())
    }
}

/// How many events are claimed at first if `others` other relays have crashed.
fn first_claim(batch_events: usize, others: usize) -> usize {
    (0..others.min(9)).fold(batch_events, |events, _| events / NARROWING).max(1)
}

/// How to treat an event after the crashes in which it was marked.
enum Judgement {
    Kills,
    MayKill,
    Unknown,
}

impl Suspicion {
    fn judge(self) -> Judgement {
        if self.crashes_alone >= CRASHES_ALONE {
            Judgement::Kills
        } else if self.crashes_alone + self.deaths_alone >= CRASHES_ALONE {
            Judgement::MayKill
        } else {
            Judgement::Unknown
        }
    }
}

/// How many events from the beginning of a batch may be published together.
fn together(batch: usize, known: &[(usize, Suspicion)]) -> usize {
    let mut known = known.to_vec();
    known.sort_unstable_by_key(|(place, _)| *place);
    let mut most = batch;
    for (place, suspicion) in known {
        if !matches!(suspicion.judge(), Judgement::Unknown) {
            continue; // it is not published
        }
        if place >= most {
            break;
        }
        let limit = (suspicion.together / NARROWING).max(1);
        // Either up to and including this event, within its limit; or all events before it.
        most = if limit > place { most.min(limit) } else { place };
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suspect(place: usize, together: usize) -> (usize, Suspicion) {
        (place, Suspicion { together, crashes_alone: 0, deaths_alone: 0 })
    }

    #[test]
    fn what_killed_a_relay_comes_back_in_smaller_pieces() {
        assert_eq!(together(1000, &[]), 1000);
        let all: Vec<_> = (0..1000).map(|place| suspect(place, 1000)).collect();
        assert_eq!(together(1000, &all), 31);
        assert_eq!(together(10, &[suspect(0, 31)]), 1);
        assert_eq!(together(10, &[suspect(0, 1)]), 1);
    }

    #[test]
    fn what_comes_before_a_suspect_does_not_wait_for_it() {
        assert_eq!(together(1000, &[suspect(700, 1000)]), 700);
        assert_eq!(together(1000, &[suspect(5, 1000), suspect(700, 1000)]), 31);
        assert_eq!(together(1000, &[suspect(700, 1000), suspect(5, 31)]), 5);
    }

    #[test]
    fn a_known_killer_limits_nobody() {
        let known = |crashes_alone, deaths_alone| (0, Suspicion { together: 1, crashes_alone, deaths_alone });
        assert_eq!(together(10, &[known(3, 0)]), 10);
        assert_eq!(together(10, &[known(1, 2)]), 10);
        assert_eq!(together(10, &[known(1, 1)]), 1);
    }

    #[test]
    fn the_more_have_died_the_fewer_events_are_claimed_at_first() {
        assert_eq!([1, 2, 3, 50].map(|others| first_claim(1000, others)), [31, 1, 1, 1]);
        assert_eq!(first_claim(10_000, 2), 9);
    }
}
