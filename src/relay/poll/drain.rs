//! When a drain is over, and what it leaves behind.

use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::breaker::Admission;
use crate::event::Tally;
use crate::outbox::{Lane as _, Outbox, OutboxError};
use crate::relay::claim::{Claimer, Polled};
use crate::relay::poll::schedule::Schedule;

/// What a drain knows about its end.
#[derive(Default)]
pub(super) struct Drain {
    /// What others hold, and for which the drain waits.
    held: Option<Held>,
}

/// Events that were pending when a drain had nothing left to claim.
#[derive(Clone, Copy)]
struct Held {
    last_id: i64,
    /// How long whoever holds them may take.
    until: Instant,
}

impl Drain {
    /// Whether a drain has nothing left to do, after a poll that found no work and began while no lane held any.
    pub(super) async fn is_over<O: Outbox>(
        &mut self,
        polled: &Polled,
        schedule: &mut Schedule,
        claimer: &mut Claimer<O>,
    ) -> Result<bool, OutboxError> {
        if !matches!(polled, Polled::Empty) && self.waits_for_others(claimer).await? {
            return Ok(false);
        }
        let now = Instant::now();
        // Found out before the promotion, which leaves out what is owed to a destination that pauses.
        let pausing = claimer
            .relay
            .destinations
            .iter()
            .any(|destination| matches!(destination.admission(now), Admission::No(_)) && !destination.is_down());
        if pausing || schedule.promote(claimer).await?.is_zero() {
            return Ok(false);
        }
        end(claimer, false).await?;
        Ok(true)
    }

    /// Whether others hold events that a drain must wait for: those that were pending when it had nothing left to claim, for as
    /// long as one publish call may take. After that time it records who holds them, and they count as undelivered.
    async fn waits_for_others<O: Outbox>(&mut self, claimer: &mut Claimer<O>) -> Result<bool, OutboxError> {
        let held = match self.held {
            Some(held) => held,
            None => {
                let until = Instant::now() + claimer.relay.longest_timeout;
                let Some(last_id) = claimer.store.last_id().await? else {
                    return Ok(false);
                };
                *self.held.insert(Held { last_id, until })
            }
        };
        if !claimer.store.is_pending_up_to(held.last_id).await? {
            return Ok(false);
        }
        if Instant::now() < held.until {
            return Ok(true);
        }
        claimer.shared.record_holders(claimer.relay.outbox.holders().await?);
        Ok(false)
    }
}

/// Ends a drain whose destinations are all down: nothing more is claimed for them.
pub(super) async fn give_up<O: Outbox>(claimer: &mut Claimer<O>) -> Result<(), OutboxError> {
    let pending = match claimer.poll().await? {
        Polled::Found(work) => {
            claimer.give_up(work).await?;
            true
        }
        Polled::Busy | Polled::Superseded | Polled::Empty => false,
    };
    end(claimer, pending).await
}

async fn end<O: Outbox>(claimer: &mut Claimer<O>, pending: bool) -> Result<(), OutboxError> {
    let owed = claimer.store.has_owed().await?;
    claimer.shared.record(Tally::default(), pending || owed);
    claimer.shared.drained.store(true, Ordering::SeqCst);
    Ok(())
}
