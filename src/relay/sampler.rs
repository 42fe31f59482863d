//! Samples figures in the store for the metrics, while this relay is the one that does so.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::outbox::sample::Sampling;
use crate::outbox::{Outbox, OutboxError};
use crate::relay::{Relay, sleep};

/// How often the relay that samples asks the store. Two statements each time are few beside what an idle relay asks.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(15);

/// How often each other relay asks, with one statement, whether it is to sample now.
const STANDBY_INTERVAL: Duration = Duration::from_secs(60);

impl<O: Outbox> Relay<O> {
    /// Samples until `stop`. While the store cannot be asked, the last figures stay.
    pub(super) async fn sample(self: Arc<Self>, stop: CancellationToken) -> Result<(), OutboxError> {
        loop {
            let wait = match self.outbox.sample(&self.names).await {
                Ok(Sampling::Taken(sample)) => {
                    self.metrics.sampled(Some(&sample));
                    SAMPLE_INTERVAL
                }
                Ok(Sampling::ByAnother) => {
                    self.metrics.sampled(None);
                    STANDBY_INTERVAL
                }
                Ok(Sampling::NotNow) => SAMPLE_INTERVAL,
                Err(error) => {
                    tracing::debug!(error = error.explain(), "the figures for the metrics were not sampled");
                    SAMPLE_INTERVAL
                }
            };
            if !sleep(wait, &stop).await {
                return Ok(());
            }
        }
    }
}
