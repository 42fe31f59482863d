//! The engine: lanes that claim, publish and settle, until stopped or until nothing is due.
//!
//! Data flows one way. Only this module knows stores, sinks, routes, retries and breakers at once; they do not know
//! each other.
//!
//! In the order of the flow:
//!
//! - `config`: the configuration of the engine.
//! - `lane`: one loop on one connection. `shared`: the state that all lanes of a run share.
//! - `poll`: polling for work, and sleeping while there is none.
//! - `claim`: the connection of a lane to the store, and the batches that it claims.
//! - `publish`: publishes a claimed batch and judges the outcomes.
//! - `destination`: one destination with its breaker; `blame`: whether a failed call is the fault of the destination or of
//!   the events.
//! - `echo`: cuts the content of events out of what destinations answer.
//! - `crash_guard`, `panics`: find the event that crashes the process, or on which a destination's code panics.
//! - `guard`: states that are reverted whatever happens.
//! - `ending`: how long a relay that is stopped waits for what is in flight.
//! - `maintenance`: the tasks beside the lanes.
//! - `health`, `liveness`, `metrics`: the state of the relay and its counts. `overview` sums up the state, for others to show.
//! - `replay`: publishes events of the history once more.
//! - `sampler`: asks the store for what the metrics show of it.
//! - `standstills`, `blocked`, `report`: what is logged about events that do not move, and about the work.
//! - `tallies`: what is written for `relay status`.

mod blame;
mod blocked;
mod claim;
mod config;
mod crash_guard;
mod destination;
mod echo;
mod ending;
mod guard;
pub mod health;
mod lane;
mod liveness;
mod maintenance;
pub mod metrics;
mod overview;
mod panics;
mod poll;
mod publish;
pub mod replay;
mod report;
mod sampler;
mod shared;
mod standstills;
mod tallies;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex as AsyncMutex, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::event::Tally;
use crate::outbox::register::Configuration;
use crate::outbox::{Outbox, OutboxError, Standstill};
use crate::retry::doubled;
use crate::route::{Router, Unrouted};
use crate::text::shown;
use blocked::Named;
pub use config::{Endpoint, Policy, RelayConfig};
use crash_guard::CrashGuard;
use destination::{Destination, Observers};
pub use health::{Health, Readiness};
use health::{HealthBoard, State};
use lane::LaneLoop;
use liveness::Pulses;
use maintenance::Tasks;
pub use metrics::Metrics;
pub use overview::{Condition, DestinationOverview, Overview};
use poll::Poller;
use report::Report;
use shared::{Ending, Shared};
use standstills::Standstills;
use tallies::Tallies;

/// How often the relay checks whether something is to be logged.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// The longest message of a panic that is logged, in characters.
const MAX_PANIC_CHARS: usize = 500;

/// The result of a drain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Drained {
    /// The number of events by what became of them.
    pub tally: Tally,
    /// A due event is still undelivered: it was dead-lettered in this run, it waits for a retry, its destination is down, or
    /// others hold it.
    pub undelivered: bool,
    /// Who holds the undelivered events, if others do.
    pub held_by: Vec<String>,
}

/// A store, its destinations, and the rules between them.
pub struct Relay<O: Outbox> {
    outbox: O,
    config: RelayConfig,
    router: Router,
    destinations: Vec<Destination>,
    /// The names of the destinations, in the same order as `destinations`.
    names: Vec<String>,
    /// The longest time that a publish call to any destination may take.
    longest_timeout: Duration,
    health: Arc<HealthBoard>,
    metrics: Metrics,
    pulses: Pulses,
    crash_guard: CrashGuard,
    report: Arc<Report>,
    named: Named,
    standstills: Standstills,
    tallies: Tallies,
    configuration: Arc<Configuration>,
    /// When any lane last polled for events.
    last_poll: Mutex<Instant>,
}

impl<O: Outbox> Relay<O> {
    /// Creates a relay, which does nothing yet. Routes name destinations by their index in `destinations`.
    pub fn new(outbox: O, destinations: Vec<Endpoint>, router: Router, config: RelayConfig) -> Arc<Self> {
        let configuration = Arc::new(configuration(&destinations, &router, config.unrouted));
        let names: Vec<String> = destinations.iter().map(|endpoint| endpoint.name.clone()).collect();
        let longest_timeout = destinations.iter().map(|endpoint| endpoint.policy.timeout).max().unwrap_or_default();
        let (report, metrics) = (Arc::new(Report::new()), Metrics::new(&names));
        let health = Arc::new(HealthBoard::new(&names, metrics.ready()));
        let tallies = Tallies::new(&names);
        let destinations = destinations.into_iter().enumerate().map(|(place, endpoint)| {
            let observers = Observers {
                report: Arc::clone(&report),
                health: Arc::clone(&health),
                metrics: metrics.destination(place),
                place,
            };
            Destination::new(endpoint, observers)
        });
        let destinations = destinations.collect();
        Arc::new(Self {
            outbox,
            config,
            router,
            destinations,
            names,
            longest_timeout,
            health,
            metrics,
            pulses: Pulses::new(),
            crash_guard: CrashGuard::new(),
            report,
            named: Named::default(),
            standstills: Standstills::new(),
            tallies,
            configuration,
            last_poll: Mutex::new(Instant::now()),
        })
    }

    /// Returns a receiver that follows whether the store and each destination can be used. [`Health::readiness`] sums it up.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.follow()
    }

    /// The metrics of the relay: events by verdict, durations, the state of each breaker.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Returns a receiver that follows the standstills: causes that keep events from moving.
    pub fn standstills(&self) -> watch::Receiver<Vec<Standstill>> {
        self.standstills.shown()
    }

    /// Works until `stop`, then settles what is in flight. During an outage of the store or a destination it waits.
    ///
    /// # Errors
    /// Waiting cannot help ([`OutboxError::is_final`]), or something in flight had to be given up ([`OutboxError::GivenUp`]).
    pub async fn run(self: &Arc<Self>, stop: CancellationToken) -> Result<Tally, OutboxError> {
        let mut tasks = Tasks::default();
        // The search for standstills begins before the start, because one may prevent it.
        tasks.add(self.supervise("search for standstills", &stop, Self::look_for_standstills));
        let prepared = self.prepare(&stop).await;
        if !matches!(prepared, Ok(true)) {
            tasks.end().await;
            return prepared.map(|_| Tally::default()); // stopped before there was anything to do
        }
        tasks.add(self.supervise("maintenance of the store", &stop, Self::maintain));
        tasks.add(self.supervise("register of relays", &stop, Self::attend));
        tasks.add(self.supervise("status", &stop, Self::keep_status));
        if self.config.sample {
            tasks.add(self.supervise("figures for the metrics", &stop, Self::sample));
        }
        let worked = self.work(Ending::Stop, stop).await;
        tasks.end().await;
        self.write_last_tallies().await;
        self.deregister().await;
        worked.map(|worked| worked.tally)
    }

    /// Publishes what is due and returns. It waits during a short pause of a destination, but not for a destination whose
    /// breaker is open.
    ///
    /// # Errors
    /// The store cannot be used.
    pub async fn drain(self: &Arc<Self>, stop: CancellationToken) -> Result<Drained, OutboxError> {
        let prepared = async {
            self.outbox.prepare().await?;
            if let Err(error) = self.maintain_once().await {
                tracing::warn!(error = error.explain(), "the store was not maintained; the next relay tries again");
            }
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
        self.health.store(State::Up, None);
        let mut tasks = Tasks::default();
        tasks.add(self.supervise("search for standstills", &stop, Self::look_for_standstills));
        tasks.add(self.supervise("register of relays", &stop, Self::attend));
        tasks.add(self.supervise("status", &stop, Self::keep_status));
        let worked = self.work(Ending::Drained, stop.clone()).await;
        tasks.end().await;
        self.write_last_tallies().await;
        if !matches!(worked, Ok(Drained { undelivered: false, .. })) && !stop.is_cancelled() {
            self.find_standstills().await;
        }
        self.deregister().await;
        let mut drained = worked?;
        drained.undelivered |= drained.tally.dead_lettered > 0 || stop.is_cancelled();
        Ok(drained)
    }

    /// Records that a lane polls for events now.
    fn polled(&self) {
        *self.last_poll.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Waits until the store can be used. Returns false if `stop` came first.
    async fn prepare(&self, stop: &CancellationToken) -> Result<bool, OutboxError> {
        let (mut backoff, pulse) = (Backoff::default(), self.pulses.add());
        loop {
            pulse.asks_store();
            let prepared = tokio::select! {
                prepared = self.outbox.prepare() => prepared,
                () = stop.cancelled() => return Ok(false),
            };
            match prepared {
                // The destinations of a relay that says it is ready are in the register.
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
            let wait = backoff.next();
            pulse.rests(wait);
            if !sleep(wait, stop).await {
                return Ok(false);
            }
        }
    }

    /// Runs all lanes to their end. A lane that panics is replaced, so that one bad batch does not end the relay.
    async fn work(self: &Arc<Self>, ending: Ending, stop: CancellationToken) -> Result<Drained, OutboxError> {
        let shared = Arc::new(Shared::new(ending));
        let poller = Arc::new(AsyncMutex::new(Poller::new(self.outbox.wakeup())));
        // A lane that fails finally stops the other lanes, but nothing else that uses the caller's token.
        let stop = stop.child_token();
        let spawn = |lanes: &mut JoinSet<_>| {
            let lane = LaneLoop::new(Arc::clone(self), Arc::clone(&shared), Arc::clone(&poller), stop.clone());
            lanes.spawn(lane.run());
        };
        let life = self.supervise("crash guard", &stop, Self::watch_life);
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
                    self.metrics.lane_panics.inc();
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

    fn ready(&self) {
        if self.health.store(State::Up, None) {
            tracing::info!("ready");
            self.standstills.clear("not_ready", "");
        }
    }

    /// Logs the first of the failures in a row. The others would only repeat it.
    fn not_ready(&self, reason: String) {
        if self.health.store(State::Down, Some(&reason)) {
            tracing::error!(error = reason, "not ready; trying again");
            self.standstills.report_logged(Standstill::new("not_ready", format!("not ready: {reason}")));
        }
    }
}

/// Returns everything that decides where events go.
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

/// Sleeps. Returns false at once if `stop` comes first.
async fn sleep(duration: Duration, stop: &CancellationToken) -> bool {
    tokio::select! {
        () = tokio::time::sleep(duration) => true,
        () = stop.cancelled() => false,
    }
}

/// The waits between attempts to reach the store: 50 ms to 2 s, so that work goes on soon after the store is back. They are
/// spread, so that lanes and relays do not all retry at once.
#[derive(Default)]
struct Backoff {
    failures: u32,
}

impl Backoff {
    fn next(&mut self) -> Duration {
        let wait = doubled(Duration::from_millis(50), self.failures, Duration::from_millis(1600));
        self.failures = self.failures.saturating_add(1);
        wait.mul_f64(0.75 + fastrand::f64() / 2.0)
    }
}

/// Returns what is logged meanwhile.
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
