//! Sleeping until a producer notifies this relay.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::outbox::{Armed, Outbox, OutboxError, Standstill, Wakeup};
use crate::relay::claim::{Claimer, Polled, Work};
use crate::relay::guard::ArmedWakeup;
use crate::relay::poll::schedule::{AWAKE_INTERVAL, Schedule};

/// The cause of the note that wake-ups do not work and the relay only polls.
const NOT_WOKEN: &str = "not_woken";

/// How long a relay sleeps before it checks whether the armed relay still is. If that relay has ended, nobody is notified.
const STANDBY_INTERVAL: Duration = Duration::from_secs(2);

/// Sleeps on the store's wake-up, if there is one.
pub(super) struct Sleeper<W> {
    wakeup: Option<W>,
    /// The log already says that wake-ups do not work.
    warned: bool,
}

impl<W: Wakeup> Sleeper<W> {
    pub(super) fn new(wakeup: Option<W>) -> Self {
        Self { wakeup, warned: false }
    }

    /// Sleeps until there may be work: a polling interval at the longest, and less if an event is due, a paused destination
    /// accepts events again, or a producer notifies. If the poll after arming finds work, returns it without sleeping.
    pub(super) async fn sleep_until_notified<O: Outbox<Wakeup = W>>(
        &mut self,
        schedule: &mut Schedule,
        claimer: &mut Claimer<O>,
    ) -> Result<Option<Work>, OutboxError> {
        let relay = Arc::clone(&claimer.relay);
        let Some(wakeup) = &mut self.wakeup else {
            let at_most = schedule.promote(claimer).await?;
            claimer.rest(at_most).await;
            return Ok(None);
        };
        claimer.pulse.asks_store();
        let mut guard = ArmedWakeup::new(wakeup, || relay.outbox.wakeup());
        match guard.arm().await {
            Ok(Armed::No) => {
                claimer.rest(schedule.interval(AWAKE_INTERVAL)).await;
                Ok(None)
            }
            Ok(armed) => {
                self.warned = false;
                relay.standstills.clear(NOT_WOKEN, "");
                let found = sleep_once(guard.wakeup(), armed, schedule, claimer).await;
                claimer.pulse.asks_store();
                guard.disarm().await;
                found
            }
            Err(error) => {
                let polling = format!(
                    "producers cannot wake this relay; it polls every {} ms until they can: {}",
                    relay.config.polling_interval.as_millis(),
                    error.explain()
                );
                if !std::mem::replace(&mut self.warned, true) {
                    tracing::warn!("{polling}");
                }
                relay.standstills.note(Standstill::new(NOT_WOKEN, polling));
                let at_most = schedule.promote(claimer).await?;
                claimer.rest(at_most).await;
                Ok(None)
            }
        }
    }
}

/// Polls once more, because only producers that commit after the wake-up was armed notify this relay. Sleeps if that finds
/// nothing.
async fn sleep_once<O: Outbox>(
    wakeup: &mut O::Wakeup,
    armed: Armed,
    schedule: &mut Schedule,
    claimer: &mut Claimer<O>,
) -> Result<Option<Work>, OutboxError> {
    match claimer.poll().await? {
        Polled::Found(work) => return Ok(Some(work)),
        Polled::HeldByOthers | Polled::Superseded => return Ok(None),
        Polled::Empty => {}
    }
    let begun = Instant::now();
    let at_most = schedule.promote(claimer).await?;
    if sleep_armed(wakeup, armed, at_most, schedule, claimer).await? {
        schedule.notified(begun, Instant::now());
    }
    Ok(None)
}

/// Sleeps until notified or until there may be work. It peeks after `at_most`, and then once a polling interval, because not
/// every insert notifies. Returns whether to poll at once: it was notified, a lane has settled, the relay stops, or the
/// wake-up was lost.
async fn sleep_armed<O: Outbox>(
    wakeup: &mut O::Wakeup,
    mut armed: Armed,
    at_most: Duration,
    schedule: &mut Schedule,
    claimer: &mut Claimer<O>,
) -> Result<bool, OutboxError> {
    let mut until = Instant::now() + at_most;
    while !claimer.stop.is_cancelled() {
        let now = Instant::now();
        if until <= now {
            let found = claimer.peek().await?;
            if found.pending || found.next_due.is_some_and(|due| due.is_zero()) {
                schedule.promote_now(now);
                return Ok(false);
            }
            until = now + claimer.relay.next_due(now, found.next_due);
        }
        let rest = until.saturating_duration_since(now);
        let slice = if armed == Armed::Standby { rest.min(STANDBY_INTERVAL) } else { rest };
        claimer.pulse.rests(slice);
        let waited = tokio::select! {
            waited = wakeup.wait(slice) => {
                if matches!(waited, Ok(true)) {
                    claimer.relay.metrics.wake_ups.inc();
                }
                waited
            }
            () = claimer.shared.settled.notified() => Ok(true),
            () = claimer.stop.cancelled() => Ok(true),
        };
        match waited {
            Ok(true) => return Ok(true),
            Ok(false) => {}
            Err(error) => {
                // The notification of a commit during this time may have been lost.
                tracing::warn!(
                    error = error.explain(),
                    "the connection that wakes this relay was lost; polling at once"
                );
                return Ok(true);
            }
        }
        if armed == Armed::Standby {
            claimer.pulse.asks_store();
            armed = wakeup.arm().await.unwrap_or(Armed::No);
            if armed != Armed::Standby {
                return Ok(true);
            }
        }
    }
    Ok(true)
}
