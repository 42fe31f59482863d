//! The engine: lanes that claim, publish and settle, until stopped or until nothing is due.
//!
//! Data flows one way. Only this module knows stores, sinks, routes, retries and breakers at once; they do not know
//! each other.
//!
//! - `blame`: whether a failed call is the destination's fault, or its events'.
//! - `blocked`: which blocked keys the log has named.
//! - `config`: what the engine is given.
//! - `crash_guard`: what ends a crash loop.
//! - `ending`: what is in flight when the relay is told to stop, and how long it is waited for.
//! - `lane`: one loop on one connection.
//! - `panics`: what finds the event on which a destination's code panics.
//! - `poll`: polling for work, and sleeping while there is none.
//! - `publish`: from a claimed batch to what is settled.
//! - `report`: what is logged of events and of the work.
//! - `standstills`: what keeps events from moving, logged and shown.

mod blame;
mod blocked;
mod config;
mod crash_guard;
mod destination;
mod ending;
mod lane;
mod panics;
mod poll;
mod publish;
mod report;
mod standstills;

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::sync::watch as channel;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::event::Tally;
use crate::failpoint::failpoint;
use crate::outbox::register::Configuration;
use crate::outbox::{Outbox, OutboxError, Standstill};
use crate::route::{Router, Unrouted};
use crate::text::shown;
use blocked::Named;
pub use config::{Endpoint, Policy, RelayConfig};
use crash_guard::CrashGuard;
use destination::Destination;
use lane::{Ending, Lane, Shared};
use report::Report;
use standstills::Standstills;

/// How often the days of the processing log are looked after.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(3600);

/// How often it is checked whether something is to be logged.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// The longest message of a panic that is logged, in characters.
const MAX_PANIC_CHARS: usize = 500;

/// The cause of a standstill that the register of relays tells.
const CONFIGURATIONS: &str = "configurations_differ";

/// When to look at the register of relays again where that failed.
const ATTEND_AGAIN: Duration = Duration::from_secs(1);

/// Whether the relay can do its work right now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// It can.
    Ready,
    /// It cannot, and goes on trying; the reason is for people.
    NotReady(String),
}

/// How a drain ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Drained {
    /// What was done.
    pub tally: Tally,
    /// Something due is still undelivered: dead-lettered in this run, waiting for a retry, its destination is down, or others
    /// hold it.
    pub undelivered: bool,
    /// Who holds it, where others do.
    pub held_by: Vec<String>,
}

/// A store, its destinations, and the rules between them.
pub struct Relay<O: Outbox> {
    outbox: O,
    config: RelayConfig,
    router: Router,
    destinations: Vec<Destination>,
    names: Vec<String>,
    /// Of a publish call to any of them.
    longest_timeout: Duration,
    readiness: channel::Sender<Readiness>,
    crash_guard: CrashGuard,
    report: Arc<Report>,
    named: Named,
    standstills: Standstills,
    configuration: Arc<Configuration>,
    /// When some lane last polled for events.
    polled: Mutex<Instant>,
}

impl<O: Outbox> Relay<O> {
    /// A relay that does nothing yet. Routes name destinations by their index here.
    pub fn new(outbox: O, destinations: Vec<Endpoint>, router: Router, config: RelayConfig) -> Arc<Self> {
        let configuration = Arc::new(configuration(&destinations, &router, config.unrouted));
        let names = destinations.iter().map(|endpoint| endpoint.name.clone()).collect();
        let longest_timeout = destinations.iter().map(|endpoint| endpoint.policy.timeout).max().unwrap_or_default();
        let report = Arc::new(Report::new());
        let destinations =
            destinations.into_iter().map(|endpoint| Destination::new(endpoint, Arc::clone(&report))).collect();
        let readiness = channel::Sender::new(Readiness::NotReady("starting".to_owned()));
        let (crash_guard, named, standstills) = (CrashGuard::new(), Named::default(), Standstills::new());
        let polled = Mutex::new(Instant::now());
        Arc::new(Self {
            outbox,
            config,
            router,
            destinations,
            names,
            longest_timeout,
            readiness,
            crash_guard,
            report,
            named,
            standstills,
            configuration,
            polled,
        })
    }

    /// Follows whether the relay can do its work.
    pub fn readiness(&self) -> channel::Receiver<Readiness> {
        self.readiness.subscribe()
    }

    /// Follows what keeps events from moving.
    pub fn standstills(&self) -> channel::Receiver<Vec<Standstill>> {
        self.standstills.shown()
    }

    /// Works until `stop`, then settles what is in flight. Outages of the store or a destination are waited out.
    ///
    /// # Errors
    /// Where waiting cannot help ([`OutboxError::is_final`]), and where something in flight had to be given up
    /// ([`OutboxError::GivenUp`]).
    pub async fn run(self: &Arc<Self>, stop: CancellationToken) -> Result<Tally, OutboxError> {
        // What is in the way of a start is looked for too.
        let looking = self.supervise("search for standstills", &stop, Self::look_for_standstills);
        let prepared = self.prepare(&stop).await;
        if !matches!(prepared, Ok(true)) {
            looking.abort();
            return prepared.map(|_| Tally::default()); // stopped before there was anything to do
        }
        let beside = [
            self.supervise("maintenance of the store", &stop, Self::maintain),
            looking,
            self.supervise("register of relays", &stop, Self::attend),
        ];
        let worked = self.work(Ending::Stop, stop).await;
        // Between two statements of their own they can be dropped: they own no claim. They do own a part of the store, which
        // a relay that has ended must have let go of.
        for task in beside {
            task.abort();
            drop(tokio::time::timeout(ending::IDLE_GRACE, task).await);
        }
        self.deregister().await;
        worked.map(|worked| worked.tally)
    }

    /// Publishes what is due and returns. Short trouble of a destination is waited out; one whose breaker opens is not.
    ///
    /// # Errors
    /// The store cannot be used.
    pub async fn drain(self: &Arc<Self>, stop: CancellationToken) -> Result<Drained, OutboxError> {
        let prepared = async {
            self.outbox.prepare().await?;
            self.look_after_days().await;
            self.outbox.register(&self.configuration, true).await
        };
        let prepared = tokio::select! {
            prepared = prepared => prepared,
            () = stop.cancelled() => return Ok(Drained { undelivered: true, ..Drained::default() }),
        };
        if let Err(error) = prepared {
            self.find_standstills().await;
            return Err(error);
        }
        self.readiness.send_replace(Readiness::Ready);
        let beside = [
            self.supervise("search for standstills", &stop, Self::look_for_standstills),
            self.supervise("register of relays", &stop, Self::attend),
        ];
        let worked = self.work(Ending::Drained, stop.clone()).await;
        for task in beside {
            task.abort();
            drop(tokio::time::timeout(ending::IDLE_GRACE, task).await);
        }
        if !matches!(worked, Ok(Drained { undelivered: false, .. })) && !stop.is_cancelled() {
            self.find_standstills().await;
        }
        self.deregister().await;
        let mut drained = worked?;
        drained.undelivered |= drained.tally.dead_lettered > 0 || stop.is_cancelled();
        Ok(drained)
    }

    /// Does its part in the register of relays until `stop`, and says where configurations differ.
    async fn attend(self: Arc<Self>, stop: CancellationToken) {
        loop {
            let idle = self.polled.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
            let next = self.outbox.attend(idle).await.unwrap_or_else(|error| {
                tracing::debug!(error = error.explain(), "the register of relays cannot be reached");
                ATTEND_AGAIN
            });
            self.report_differences();
            if !sleep(next, &stop).await {
                break;
            }
        }
    }

    fn report_differences(&self) {
        // A rolling update is no mistake.
        let differences = self.outbox.differences(self.longest_timeout + Duration::from_secs(15));
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

    async fn deregister(&self) {
        match tokio::time::timeout(ending::IDLE_GRACE, self.outbox.deregister()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::debug!(error = error.explain(), "the end was not registered; others will find out");
            }
            Err(_) => tracing::debug!("the end was not registered in time; others will find out"),
        }
    }

    /// Some lane looks for events.
    fn polled(&self) {
        *self.polled.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Waits until the store can be used. Returns false where `stop` came first.
    async fn prepare(&self, stop: &CancellationToken) -> Result<bool, OutboxError> {
        let mut backoff = Backoff::default();
        loop {
            let prepared = tokio::select! {
                prepared = self.outbox.prepare() => prepared,
                () = stop.cancelled() => return Ok(false),
            };
            match prepared {
                // Whoever sees that this relay is ready may rely on its destinations.
                Ok(()) => match self.outbox.register(&self.configuration, false).await {
                    Ok(()) => {
                        self.ready();
                        return Ok(true);
                    }
                    Err(error) => self.not_ready(error.explain()),
                },
                Err(error) if error.is_final() => return Err(error),
                Err(error) => self.not_ready(error.explain()),
            }
            if !sleep(backoff.next(), stop).await {
                return Ok(false);
            }
        }
    }

    /// Runs all lanes to their end. A lane that panics is replaced: one bad batch must not end the relay.
    async fn work(self: &Arc<Self>, ending: Ending, stop: CancellationToken) -> Result<Drained, OutboxError> {
        let shared = Arc::new(Shared::new(self.outbox.wakeup(), ending));
        // A lane that cannot go on stops the others, and nothing else that the caller's token is for.
        let stop = stop.child_token();
        let spawn = |lanes: &mut JoinSet<_>| {
            lanes.spawn(Lane::new(Arc::clone(self), Arc::clone(&shared), stop.clone()).run());
        };
        let life = tokio::spawn(Arc::clone(self).watch_life(stop.clone()));
        let mut lanes = JoinSet::new();
        (0..self.config.lanes).for_each(|_| spawn(&mut lanes));
        let mut result = Ok(());
        let stopping = self.stopping(&shared, &stop);
        tokio::pin!(stopping);
        let mut report = tokio::time::interval(REPORT_INTERVAL);
        loop {
            let ended = tokio::select! {
                ended = lanes.join_next() => ended,
                _ = report.tick() => {
                    self.report.tick(false);
                    continue;
                }
                given_up = &mut stopping => {
                    if let Some(what) = given_up {
                        return Err(OutboxError::GivenUp { after: self.config.shutdown_timeout, what });
                    }
                    break; // what is left waits for an answer that is no longer needed
                }
            };
            let Some(ended) = ended else { break };
            match ended {
                Ok(Ok(())) => {}
                Ok(Err(error)) => result = Err(error),
                Err(panic) => {
                    self.crash_guard.panicked();
                    tracing::error!(
                        error = shown(&panic.to_string(), MAX_PANIC_CHARS),
                        "a lane panicked; its events are pending again, another lane takes its place"
                    );
                    if sleep(Duration::from_secs(1), &stop).await {
                        spawn(&mut lanes);
                    }
                }
            }
        }
        self.report.tick(true);
        life.abort();
        drop(tokio::time::timeout(ending::IDLE_GRACE, self.crash_guard.stop(&self.outbox)).await);
        match (result, self.given_up(&shared)) {
            (Ok(()), what) if !what.is_empty() => {
                Err(OutboxError::GivenUp { after: self.config.shutdown_timeout, what })
            }
            (result, _) => result.map(|()| shared.result()),
        }
    }

    async fn maintain(self: Arc<Self>, stop: CancellationToken) {
        loop {
            self.look_after_days().await;
            if !sleep(MAINTENANCE_INTERVAL, &stop).await {
                break;
            }
        }
    }

    /// Runs a task beside the lanes, to its end, and again after each panic: that must not end what nobody would miss.
    fn supervise<F>(
        self: &Arc<Self>,
        name: &'static str,
        stop: &CancellationToken,
        task: fn(Arc<Self>, CancellationToken) -> F,
    ) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (relay, stop) = (Arc::clone(self), stop.clone());
        tokio::spawn(async move {
            while AssertUnwindSafe(task(Arc::clone(&relay), stop.clone())).catch_unwind().await.is_err() {
                tracing::error!(task = name, "a task panicked; it begins anew");
                if !sleep(Duration::from_secs(1), &stop).await {
                    break;
                }
            }
        })
    }

    async fn look_for_standstills(self: Arc<Self>, stop: CancellationToken) {
        self.watch_standstills(&stop).await;
    }

    async fn look_after_days(&self) {
        let maintained = async {
            failpoint("maintain")?;
            self.outbox.maintain().await
        };
        if let Err(error) = maintained.await {
            // Days are made a week ahead, so there is time to mend it.
            tracing::warn!(error = error.explain(), "the days of the processing log were not looked after");
        }
    }

    fn ready(&self) {
        let changed = self
            .readiness
            .send_if_modified(|readiness| std::mem::replace(readiness, Readiness::Ready) != Readiness::Ready);
        if changed {
            tracing::info!("ready");
            self.standstills.clear("not_ready", "");
        }
    }

    /// Logs the first of the failures in a row; the others would only repeat it.
    fn not_ready(&self, reason: String) {
        self.readiness.send_if_modified(|readiness| match readiness {
            Readiness::NotReady(known) if *known == reason => false,
            _ => {
                tracing::error!(error = reason, "not ready; trying again");
                self.standstills.report_logged(Standstill::new("not_ready", format!("not ready: {reason}")));
                *readiness = Readiness::NotReady(reason);
                true
            }
        });
    }
}

/// What decides where events go.
pub fn configuration(destinations: &[Endpoint], router: &Router, unrouted: Unrouted) -> Configuration {
    let names: Vec<String> = destinations.iter().map(|endpoint| endpoint.name.clone()).collect();
    let mut routes = router.described(&names);
    if !routes.is_empty() {
        let rest = match unrouted {
            Unrouted::DeadLetter => "[what no route takes is dead-lettered]",
            Unrouted::Drop => "[what no route takes is dropped]",
        };
        routes.push((rest.to_owned(), rest.to_owned()));
    }
    let targets = destinations.iter().map(|endpoint| (endpoint.name.clone(), endpoint.sink.target()));
    Configuration::new(targets.collect(), routes)
}

/// Sleeps; returns false at once where `stop` comes first.
async fn sleep(duration: Duration, stop: &CancellationToken) -> bool {
    tokio::select! {
        () = tokio::time::sleep(duration) => true,
        () = stop.cancelled() => false,
    }
}

/// The waits between attempts to reach the store: 50 ms to 2 s, so that work goes on soon after it is back, and spread,
/// so that lanes and relays do not come back all at once.
#[derive(Default)]
struct Backoff {
    failures: u32,
}

impl Backoff {
    fn next(&mut self) -> Duration {
        let wait = Duration::from_millis(50) * (1 << self.failures.min(5));
        self.failures = self.failures.saturating_add(1);
        wait.mul_f64(0.75 + fastrand::f64() / 2.0)
    }
}

/// What is logged meanwhile.
#[cfg(test)]
fn captured(work: impl FnOnce()) -> String {
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);
    impl std::io::Write for Log {
        fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).write(line)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    tracing::subscriber::with_default(subscriber, work);
    let log = log.0.lock().unwrap_or_else(PoisonError::into_inner);
    String::from_utf8_lossy(&log).into_owned()
}
