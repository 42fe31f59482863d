//! The work beside the lanes: the maintenance of the store, the register of relays, and the search for standstills. Each is a
//! task that is restarted when it fails.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::failpoint::failpoint;
use crate::outbox::{Outbox, OutboxError, Standstill};
use crate::relay::{Relay, ending, sleep};
use crate::retry::doubled;

/// How often the store is maintained: days of the processing log are created a week ahead, and old ones are dropped.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(3600);

/// The wait before a task that failed is restarted. It doubles with each failure, up to the interval of the maintenance.
const RESTART_AFTER: Duration = Duration::from_secs(1);

/// After this time a query to the register of relays that failed is sent again.
const ATTEND_AGAIN: Duration = Duration::from_secs(1);

/// How much longer than a publish call two configurations must differ before that is reported, because they also differ
/// during a rolling update.
const ROLLING_UPDATE: Duration = Duration::from_secs(15);

/// The cause of a standstill that is found in the register of relays.
const CONFIGURATIONS: &str = "configurations_differ";

/// A task that worked for this long before it failed is restarted as after its first failure.
const STEADY: Duration = Duration::from_secs(60);

/// The tasks of one run.
#[derive(Default)]
pub(super) struct Tasks(Vec<JoinHandle<()>>);

impl Tasks {
    pub(super) fn add(&mut self, task: JoinHandle<()>) {
        self.0.push(task);
    }

    /// Ends the tasks and waits for their ends. They can be dropped between two statements, because they hold no claim. But
    /// they hold connections, which must be closed when the relay has ended.
    pub(super) async fn end(self) {
        for task in self.0 {
            task.abort();
            drop(tokio::time::timeout(ending::IDLE_GRACE, task).await);
        }
    }
}

impl<O: Outbox> Relay<O> {
    /// Runs a task until `stop`. If it fails, panics or ends before that, this is logged and counted, and the task is
    /// restarted after a wait. Without this a task could end unnoticed.
    pub(super) fn supervise<F>(
        self: &Arc<Self>,
        name: &'static str,
        stop: &CancellationToken,
        task: fn(Arc<Self>, CancellationToken) -> F,
    ) -> JoinHandle<()>
    where
        F: Future<Output = Result<(), OutboxError>> + Send + 'static,
    {
        let (relay, stop) = (Arc::clone(self), stop.clone());
        tokio::spawn(async move {
            let mut failures = 0;
            loop {
                let begun = Instant::now();
                let ended = AssertUnwindSafe(task(Arc::clone(&relay), stop.clone())).catch_unwind().await;
                if stop.is_cancelled() {
                    return;
                }
                relay.metrics.task_failures.inc();
                if begun.elapsed() >= STEADY {
                    failures = 0;
                }
                let again = doubled(RESTART_AFTER, failures, MAINTENANCE_INTERVAL);
                failures += 1;
                let again_s = again.as_secs();
                match ended {
                    Err(_) => tracing::error!(task = name, again_s, "a background task panicked; it is restarted"),
                    Ok(Err(error)) => {
                        let error = error.explain();
                        tracing::warn!(task = name, error, again_s, "a background task failed; it is restarted");
                    }
                    Ok(Ok(())) => {
                        tracing::error!(task = name, again_s, "a background task ended too early; it is restarted");
                    }
                }
                if !sleep(again, &stop).await {
                    return;
                }
            }
        })
    }

    /// Maintains the store now, and then every hour.
    pub(super) async fn maintain(self: Arc<Self>, stop: CancellationToken) -> Result<(), OutboxError> {
        loop {
            self.maintain_once().await?;
            if !sleep(MAINTENANCE_INTERVAL, &stop).await {
                return Ok(());
            }
        }
    }

    /// Creates the coming days of the processing log, and drops old ones. Days are created a week ahead, so that there is
    /// time to remove an obstacle.
    pub(super) async fn maintain_once(&self) -> Result<(), OutboxError> {
        let maintained = async {
            failpoint("maintain")?;
            self.outbox.maintain().await
        };
        maintained.instrument(tracing::debug_span!("maintain")).await
    }

    /// Asks the store for standstills until `stop`.
    pub(super) async fn look_for_standstills(self: Arc<Self>, stop: CancellationToken) -> Result<(), OutboxError> {
        self.watch_standstills(&stop).await;
        Ok(())
    }

    /// Keeps this relay in the register of relays until `stop`, and reports relays whose configurations differ.
    pub(super) async fn attend(self: Arc<Self>, stop: CancellationToken) -> Result<(), OutboxError> {
        loop {
            let idle = self.last_poll.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
            let next = self.outbox.attend(idle).await.unwrap_or_else(|error| {
                tracing::debug!(error = error.explain(), "the register of relays cannot be read");
                ATTEND_AGAIN
            });
            self.report_differences();
            if !sleep(next, &stop).await {
                return Ok(());
            }
        }
    }

    fn report_differences(&self) {
        let differences = self.outbox.differences(self.longest_timeout + ROLLING_UPDATE);
        if differences.is_empty() {
            self.standstills.clear(CONFIGURATIONS, "");
        } else {
            let text = format!(
                "two configurations are at work, and one of them routes new events: this relay, and {}; give all relays the \
                 same destinations and routes, or stop those that have others",
                differences.join("; ")
            );
            self.standstills.report(Standstill::new(CONFIGURATIONS, text));
        }
    }

    /// Removes this relay from the register of relays.
    pub(super) async fn deregister(&self) {
        match tokio::time::timeout(ending::IDLE_GRACE, self.outbox.deregister()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::debug!(error = error.explain(), "the end was not registered; other relays will find out");
            }
            Err(_) => tracing::debug!("the end was not registered in time; other relays will find out"),
        }
    }
}
