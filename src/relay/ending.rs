//! The end of a relay that is stopped: which events are in flight, and how long the relay waits for them.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::outbox::Outbox;
use crate::relay::Relay;
use crate::relay::shared::Shared;

/// How long a relay that holds no claim waits for answers that it does not need any more.
pub(super) const IDLE_GRACE: Duration = Duration::from_secs(1);

/// The longest part of the shutdown timeout that is kept for recording what was published.
const RECORDING_TIME: Duration = Duration::from_secs(5);

/// How often the relay checks whether something is still in flight.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

impl<O: Outbox> Relay<O> {
    /// Ends when a stopped relay need not be waited for any longer: nothing is in flight, or the time is over. In the second
    /// case it returns a description of what is given up. Before that, publish calls are given up, so that the results of the
    /// others can be recorded.
    pub(super) async fn stopping(&self, shared: &Shared, stop: &CancellationToken) -> Option<String> {
        stop.cancelled().await;
        let begun = Instant::now();
        let (timeout, mut last_held) = (self.config.shutdown_timeout, begun);
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let now = Instant::now();
            if shared.claims.load(Ordering::SeqCst) > 0 {
                last_held = now;
            }
            if now - last_held >= IDLE_GRACE {
                return None;
            }
            if now - begun >= timeout {
                return Some(self.given_up(shared));
            }
            if now - begun >= timeout - RECORDING_TIME.min(timeout / 4) {
                shared.give_up.cancel();
            }
        }
    }

    /// Describes what was in flight and was given up. The text is empty if nothing was.
    pub(super) fn given_up(&self, shared: &Shared) -> String {
        let sent = self.destinations.iter().filter_map(|destination| match destination.count_unanswered() {
            0 => None,
            count => Some(format!("{count} events at destination {}, whose arrival is unknown", destination.name)),
        });
        let sent: Vec<String> = sent.collect();
        match (sent.as_slice(), shared.claims.load(Ordering::SeqCst)) {
            ([], 0) => String::new(),
            ([], claims) => format!(
                "the database did not record what became of {claims} batches; they are pending and may be published again"
            ),
            (sent, _) => format!("{}; they are pending and may be published again", sent.join(", ")),
        }
    }
}
