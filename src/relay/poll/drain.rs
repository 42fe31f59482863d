//! Decides when a drain is over, and which events it leaves undelivered.

use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::breaker::Admission;
use crate::event::Tally;
use crate::outbox::{Lane as _, Outbox, OutboxError};
use crate::relay::claim::{Claimer, Polled};
use crate::relay::poll::schedule::Schedule;

/// The state that decides when a drain is over.
#[derive(Default)]
pub(super) struct Drain {
    /// The events that others hold, and for which the drain waits.
    held: Option<Held>,
}

/// Events that were pending when a drain had nothing left to claim.
#[derive(Clone, Copy)]
struct Held {
    last_id: i64,
    /// The end of the time that their holders may take.
    until: Instant,
}

impl Drain {
    /// Returns whether a drain has nothing left to do. To be called after a poll that found no work and began while no lane
    /// had any.
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
        // Checked before the promotion, which leaves out events that are owed to a paused destination. If a destination came back
        // between the two, the drain would end without its events.
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

    /// Returns whether a drain must wait for events that others hold: those that were pending when it had nothing left to
    /// claim, for as long as one publish call may take. After that time it records their holders, and the events count as
    /// undelivered.
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

/// Ends a drain whose destinations are all down, without claiming more for them.
pub(super) async fn give_up<O: Outbox>(claimer: &mut Claimer<O>) -> Result<(), OutboxError> {
    let pending = match claimer.poll().await? {
        Polled::Found(work) => {
            claimer.hand_back(work).await?;
            true
        }
        Polled::HeldByOthers | Polled::Superseded | Polled::Empty => false,
    };
    end(claimer, pending).await
}

async fn end<O: Outbox>(claimer: &mut Claimer<O>, pending: bool) -> Result<(), OutboxError> {
    let owed = claimer.store.has_owed().await?;
    claimer.shared.record(Tally::default(), pending || owed);
    claimer.shared.drained.store(true, Ordering::SeqCst);
    Ok(())
}
