//! Samples figures in the store for the metrics, while this relay is the one that does so.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::outbox::{Outbox, OutboxError};
use crate::relay::{Relay, sleep};

/// How often the store is asked. Two statements each time are few beside what an idle relay asks.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(15);

impl<O: Outbox> Relay<O> {
    /// Samples until `stop`. While the store cannot be asked, the last figures stay.
    pub(super) async fn sample(self: Arc<Self>, stop: CancellationToken) -> Result<(), OutboxError> {
        loop {
            match self.outbox.sample(&self.names).await {
                Ok(sample) => self.metrics.sampled(sample.as_ref()),
                Err(error) => tracing::debug!(error = error.explain(), "the figures for the metrics were not sampled"),
            }
            if !sleep(SAMPLE_INTERVAL, &stop).await {
                return Ok(());
            }
        }
    }
}
