//! What ends a crash loop: an event that kills the relay each time it is published.
//!
//! A relay that finds that others have died lately publishes with care in its first minute: it notes the events before it
//! publishes them. What a crash leaves noted comes back in batches of a thirty-second, then alone; an event that was alone
//! with three relays that died is dead-lettered. As long as relays end in good order, nothing is noted but that they began.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::event::{Fault, PublishError};
use crate::outbox::{Claimed, CrashNotes, OutboxError, Suspicion};

/// How long a relay must live to be one that does not die of its first events.
const PROBATION: Duration = Duration::from_secs(60);

/// How many times fewer events than in the last crash are published together.
const NARROWING: usize = 32;

/// So many crashes alone are no coincidence.
const CRASHES_ALONE: usize = 3;

/// One run's care.
pub(super) struct Caution {
    run: Uuid,
    stage: Mutex<Stage>,
    /// Events that nobody died of, and whose notes are still there: the store could not be reached.
    innocent: Mutex<Vec<Uuid>>,
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    /// Nothing was published yet.
    Fresh,
    /// It began then; `careful`: others have died.
    Begun { since: Instant, careful: bool },
    /// It has lived for a while.
    Proven,
}

impl Caution {
    pub(super) fn new() -> Self {
        Self { run: Uuid::new_v4(), stage: Mutex::new(Stage::Fresh), innocent: Mutex::default() }
    }

    /// To be called before a batch is published. Where care is needed, shortens it to what may be published together, gives
    /// those a defect that are known to kill, notes the rest, and returns them.
    pub(super) async fn before(
        &self,
        outbox: &impl CrashNotes,
        batch: &mut Vec<Claimed>,
    ) -> Result<Vec<Uuid>, OutboxError> {
        if self.stage() == Stage::Fresh {
            let careful = outbox.begin_run(self.run).await?;
            self.set(Stage::Begun { since: Instant::now(), careful });
            if careful {
                tracing::info!(
                    "another relay ended without a word, or has just begun: publishing with care for a minute"
                );
            }
        }
        match self.stage() {
            Stage::Begun { since, .. } if since.elapsed() > PROBATION => {
                self.set(Stage::Proven);
                outbox.end_run(self.run).await?;
                return Ok(Vec::new());
            }
            Stage::Begun { careful: true, .. } => {}
            _ => return Ok(Vec::new()),
        }
        self.acquit(outbox, &[]).await;
        let ids: Vec<Uuid> = batch.iter().map(|claimed| claimed.event.event_id).collect();
        let known = outbox.suspicions(self.run, &ids).await?;
        batch.truncate(together(batch.len(), &known));
        for (place, suspicion) in known {
            if let Some(claimed) = batch.get_mut(place)
                && suspicion.crashes_alone >= CRASHES_ALONE
            {
                let message =
                    format!("{} relays died while they published this event and no other", suspicion.crashes_alone);
                claimed.defect = Some(PublishError::new(Fault::Unfit, "relay_crashed", message));
            }
        }
        let noted: Vec<Uuid> =
            batch.iter().filter(|claimed| claimed.defect.is_none()).map(|claimed| claimed.event.event_id).collect();
        outbox.suspect(self.run, &noted).await?;
        Ok(noted)
    }

    /// To be called when the batch is settled, or could not be: whatever became of it, nobody died.
    pub(super) async fn after(&self, outbox: &impl CrashNotes, noted: &[Uuid]) {
        self.acquit(outbox, noted).await;
    }

    async fn acquit(&self, outbox: &impl CrashNotes, events: &[Uuid]) {
        let mut innocent = std::mem::take(&mut *self.innocent.lock().unwrap_or_else(PoisonError::into_inner));
        innocent.extend_from_slice(events);
        if !innocent.is_empty()
            && let Err(error) = outbox.acquit(&innocent).await
        {
            tracing::debug!(error = error.explain(), "events stay noted as suspects for now");
            self.innocent.lock().unwrap_or_else(PoisonError::into_inner).append(&mut innocent);
        }
    }

    /// A panic is a crash that somebody survived: from now on with care.
    pub(super) fn panicked(&self) {
        self.set(Stage::Begun { since: Instant::now(), careful: true });
    }

    /// To be called at the end.
    pub(super) async fn end(&self, outbox: &impl CrashNotes) {
        if matches!(self.stage(), Stage::Begun { .. })
            && let Err(error) = outbox.end_run(self.run).await
        {
            tracing::debug!(error = error.explain(), "the end was not noted; the next relay begins with care");
        }
    }

    fn stage(&self) -> Stage {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, stage: Stage) {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner) = stage;
    }
}

/// How many of a batch may be published together, from its beginning.
fn together(batch: usize, known: &[(usize, Suspicion)]) -> usize {
    let mut known = known.to_vec();
    known.sort_unstable_by_key(|(place, _)| *place);
    let mut most = batch;
    for (place, suspicion) in known {
        if suspicion.crashes_alone >= CRASHES_ALONE {
            continue; // it is not published
        }
        if place >= most {
            break;
        }
        let limit = (suspicion.together / NARROWING).max(1);
        // With this one no more than its limit; or all before it, without it.
        most = if limit > place { most.min(limit) } else { place };
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suspect(place: usize, together: usize) -> (usize, Suspicion) {
        (place, Suspicion { together, crashes_alone: 0 })
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
        assert_eq!(together(10, &[(0, Suspicion { together: 1, crashes_alone: 3 })]), 10);
    }
}
