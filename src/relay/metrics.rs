//! The metrics of the relay, with all names and help texts.
//!
//! Every name begins with `outbox_relay_`, all units are base units, and every counter ends in `_total`. Labels are
//! `destination`, `verdict` and `code`, and never contain event data. Every metric exists from the start, with the value 0.
//! Events are counted once a batch, when it is settled.
//!
//! - `codes`: which error codes have a label of their own.
//! - `lag`: the time from commit to publish.
//! - `process`: the process.
//! - `sampled`: what one relay samples in the store for all.

mod codes;
mod lag;
mod process;
mod sampled;

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::breaker::BreakerState;
use crate::event::Verdict;
use crate::outbox::Deliveries;
use crate::outbox::pause::Pauses;
use crate::outbox::sample::Sample;
use codes::Codes;
pub(super) use lag::BatchLags;
use lag::Lag;
use sampled::Sampled;

const PREFIX: &str = "outbox_relay";

/// The upper bounds of durations, in seconds.
const SECONDS: [f64; 15] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// The upper bounds of the events in a batch.
const EVENTS: [f64; 9] = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0];

/// The verdicts, as they appear in the label.
const VERDICTS: [&str; 6] = ["published", "retried", "blocked", "dead_lettered", "dropped", "waiting"];

/// The label for causes without a label of their own.
const OTHER_CAUSE: &str = "other";

/// The causes of standstills, as they appear in the label.
const CAUSES: [&str; 16] = [
    OTHER_CAUSE,
    "configurations_differ",
    "destination_down",
    "destination_unconfigured",
    "events_kept_out",
    "events_parked",
    "events_remembered",
    "format_unknown",
    "keys_blocked",
    "not_ready",
    "not_taken",
    "not_woken",
    "partitions_held",
    "priority_missing",
    "table_locked",
    "undecided",
];

type Code = [(&'static str, &'static str); 1];
type Destination = [(&'static str, String); 1];
type DestinationCode = [(&'static str, String); 2];
type DestinationVerdictCode = [(&'static str, String); 3];
type Seconds = Gauge<f64, AtomicU64>;

fn of(destination: &str) -> Destination {
    [("destination", destination.to_owned())]
}

fn histogram(bounds: &[f64]) -> Histogram {
    Histogram::new(bounds.iter().copied())
}

/// The metrics of one relay.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    events: Family<DestinationVerdictCode, Counter>,
    codes: Codes,
    claim: Histogram,
    settle: Histogram,
    batch_events: Histogram,
    ready: Gauge,
    pub(super) polls: Counter,
    pub(super) wake_ups: Counter,
    pub(super) lane_panics: Counter,
    pub(super) task_failures: Counter,
    log_lines_dropped: Counter,
    standstills: Family<Code, Gauge>,
    paused: Family<Destination, Gauge>,
    sampled: Sampled,
    destinations: Vec<DestinationMetrics>,
}

/// The metrics of one destination. Clones share their counters.
#[derive(Debug, Clone)]
pub(super) struct DestinationMetrics {
    name: String,
    publish: Histogram,
    lag: Lag,
    failures: Family<DestinationCode, Counter>,
    codes: Codes,
    breaker: Gauge,
    opened: Counter,
    closed: Counter,
    misconfigured: Gauge,
    last_success: Seconds,
    /// The state of the breaker that was recorded last.
    noted: std::sync::Arc<AtomicU8>,
}

impl Metrics {
    /// Creates the metrics of a relay with these destinations.
    pub(super) fn new(destinations: &[String]) -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let events = Family::<DestinationVerdictCode, Counter>::default();
        registry.register(
            "events",
            "Events by what became of them at a destination, when that was recorded; the destination is empty for an event \
             that goes to none, the code is that of the error",
            events.clone(),
        );
        let publish = Family::<Destination, Histogram, fn() -> Histogram>::new_with_constructor(|| histogram(&SECONDS));
        registry.register_with_unit(
            "publish_duration",
            "How long calls that publish a batch took",
            Unit::Seconds,
            publish.clone(),
        );
        let lag = Family::<Destination, Lag>::default();
        registry.register_with_unit(
            "lag",
            "How long events took from their commit until the destination had taken them, by the clock of the database; a delayed \
             event from its time on",
            Unit::Seconds,
            lag.clone(),
        );
        let failures = Family::<DestinationCode, Counter>::default();
        registry.register(
            "destination_failures",
            "Calls that failed by the fault of the destination, by error code; their events wait and are not charged",
            failures.clone(),
        );
        let breaker = Family::<Destination, Gauge>::default();
        registry.register(
            "breaker_state",
            "Whether the circuit breaker lets events through: 0 closed, 1 probing, 2 open",
            breaker.clone(),
        );
        let opened = Family::<Destination, Counter>::default();
        registry.register("breaker_opened", "How often the circuit breaker opened", opened.clone());
        let closed = Family::<Destination, Counter>::default();
        registry.register("breaker_closed", "How often the circuit breaker closed again", closed.clone());
        let misconfigured = Family::<Destination, Gauge>::default();
        registry.register(
            "destination_misconfigured",
            "1 while the destination refuses events for a reason that a person must mend",
            misconfigured.clone(),
        );
        let last_success = Family::<Destination, Seconds>::default();
        registry.register_with_unit(
            "last_success_timestamp",
            "When the destination took an event last, in seconds since 1970; 0 where it took none yet",
            Unit::Seconds,
            last_success.clone(),
        );
        let (claim, settle, batch_events) = (histogram(&SECONDS), histogram(&SECONDS), histogram(&EVENTS));
        let help = "How long claims of a batch took";
        registry.register_with_unit("claim_duration", help, Unit::Seconds, claim.clone());
        let help = "How long it took to record what became of a batch";
        registry.register_with_unit("settle_duration", help, Unit::Seconds, settle.clone());
        registry.register("batch_events", "Events in a claimed batch", batch_events.clone());
        let polls = Counter::default();
        registry.register("polls", "Questions to the database whether there is work", polls.clone());
        let wake_ups = Counter::default();
        registry.register("wake_ups", "Sleeps that a producer's notification ended", wake_ups.clone());
        let ready = Gauge::default();
        registry.register(
            "ready",
            "1 while the database can be used and at least one destination takes events, as `/readyz` says it",
            ready.clone(),
        );
        let lane_panics = Counter::default();
        registry.register("lane_panics", "Lanes that panicked and were replaced", lane_panics.clone());
        let task_failures = Counter::default();
        registry.register(
            "task_failures",
            "Background tasks, such as the maintenance of the store, that failed and were restarted",
            task_failures.clone(),
        );
        let log_lines_dropped = Counter::default();
        let help = "Lines of the log that were dropped because nobody read standard error";
        registry.register("log_lines_dropped", help, log_lines_dropped.clone());
        let standstills = Family::<Code, Gauge>::default();
        let help = "Causes that keep events from moving, by their code; the log and `/readyz` say more";
        registry.register("standstills", help, standstills.clone());
        for cause in CAUSES {
            drop(standstills.get_or_create(&[("code", cause)]));
        }
        let paused = Family::<Destination, Gauge>::default();
        let help = "1 while an operator has paused the destination, or some types of its events";
        registry.register("destination_paused", help, paused.clone());
        for destination in destinations {
            drop(paused.get_or_create(&of(destination)));
        }
        process::register(&mut registry);
        let sampled = Sampled::new(&mut registry, destinations);
        let codes = Codes::default();
        for destination in destinations.iter().map(String::as_str).chain([""]) {
            for verdict in VERDICTS {
                drop(events.get_or_create(&labels(destination, verdict, "")));
            }
        }
        for destination in destinations {
            drop(failures.get_or_create(&[("destination", destination.clone()), ("code", String::new())]));
        }
        let destinations = destinations.iter().map(|name| DestinationMetrics {
            name: name.clone(),
            publish: publish.get_or_create_owned(&of(name)),
            lag: lag.get_or_create_owned(&of(name)),
            failures: failures.clone(),
            codes: codes.clone(),
            breaker: breaker.get_or_create_owned(&of(name)),
            opened: opened.get_or_create_owned(&of(name)),
            closed: closed.get_or_create_owned(&of(name)),
            misconfigured: misconfigured.get_or_create_owned(&of(name)),
            last_success: last_success.get_or_create_owned(&of(name)),
            noted: std::sync::Arc::default(),
        });
        let destinations = destinations.collect();
        Self {
            registry,
            events,
            codes,
            claim,
            settle,
            batch_events,
            ready,
            polls,
            wake_ups,
            lane_panics,
            task_failures,
            log_lines_dropped,
            standstills,
            paused,
            sampled,
            destinations,
        }
    }

    /// The registry of all metrics, to be encoded.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Encodes the present values as OpenMetrics text, which Prometheus reads.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = text::encode(&mut text, &self.registry);
        text
    }

    /// Shows what was sampled in the store; `None`: another relay samples.
    pub(super) fn sampled(&self, sample: Option<&Sample>) {
        self.sampled.set(sample);
    }

    /// Shows which destinations are paused.
    pub(super) fn paused(&self, pauses: &Pauses) {
        for destination in &self.destinations {
            let is_paused = pauses.iter().any(|pause| pause.destination == destination.name);
            self.paused.get_or_create(&of(&destination.name)).set(is_paused.into());
        }
    }

    /// Shows how many causes keep events from moving.
    pub(super) fn standstills<'a>(&self, causes: impl Iterator<Item = &'a str> + Clone) {
        for known in CAUSES {
            let is_known = |cause: &&str| if known == OTHER_CAUSE { !CAUSES.contains(cause) } else { *cause == known };
            let count = causes.clone().filter(is_known).count();
            self.standstills.get_or_create(&[("code", known)]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// Sets how many lines of the log were dropped since the process began. The program counts them.
    pub fn set_log_lines_dropped(&self, lines: u64) {
        self.log_lines_dropped.inner().store(lines, Ordering::Relaxed);
    }

    /// Returns the metrics of the destination at this place.
    pub(super) fn destination(&self, place: usize) -> DestinationMetrics {
        self.destinations[place].clone()
    }

    /// The gauge that says whether the relay is ready.
    pub(super) fn ready(&self) -> Gauge {
        self.ready.clone()
    }

    /// Records that a batch of `events` events was claimed.
    #[expect(clippy::cast_precision_loss, reason = "no batch has 2^52 events")]
    pub(super) fn claimed(&self, events: usize, took: Duration) {
        self.batch_events.observe(events as f64);
        self.claim.observe(took.as_secs_f64());
    }

    /// Records that a batch was settled.
    pub(super) fn settled(&self, deliveries: &Deliveries<'_>, took: Duration) {
        self.settle.observe(took.as_secs_f64());
        // Most events of a batch have the same few labels, so a search of a list is faster than a hash.
        let mut counts: Vec<((&str, &str, &str), u64)> = Vec::new();
        for delivery in deliveries.iter() {
            let (verdict, code) = verdict_and_code(&delivery.verdict);
            let labels = (delivery.destination, verdict, code);
            match counts.iter_mut().find(|(counted, _)| *counted == labels) {
                Some((_, count)) => *count += 1,
                None => counts.push((labels, 1)),
            }
        }
        for ((destination, verdict, code), count) in counts {
            let code = self.codes.label(destination, code);
            self.events.get_or_create(&labels(destination, verdict, &code)).inc_by(count);
        }
    }
}

impl DestinationMetrics {
    /// Records that a publish call has ended. `delivered` says that the destination took at least one event.
    pub(super) fn called(&self, took: Duration, delivered: bool) {
        self.publish.observe(took.as_secs_f64());
        if delivered {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            self.last_success.set(now.as_secs_f64());
            self.misconfigured.set(0);
        }
    }

    /// Returns the mean lag of each of the last 14 minutes, the latest last; `None` for a minute without events.
    pub(super) fn lag_by_minute(&self) -> Vec<Option<Duration>> {
        self.lag.by_minute(Instant::now())
    }

    /// Adds the lags of the events of a batch that the destination took.
    pub(super) fn lags(&self, lags: &BatchLags) {
        self.lag.add(lags, Instant::now());
    }

    /// Records that a call failed by the fault of the destination.
    pub(super) fn failed(&self, code: &str, misconfigured: bool) {
        let code = self.codes.label(&self.name, code);
        self.failures.get_or_create(&[("destination", self.name.clone()), ("code", code)]).inc();
        self.misconfigured.set(misconfigured.into());
    }

    /// Records the state of the breaker. Must be called while its lock is held.
    pub(super) fn breaker(&self, state: BreakerState) {
        let state = state as u8;
        let before = self.noted.swap(state, Ordering::Relaxed);
        if before == state {
            return;
        }
        self.breaker.set(state.into());
        if state == BreakerState::Open as u8 {
            self.opened.inc();
        } else if state == BreakerState::Closed as u8 {
            self.closed.inc();
        }
    }
}

fn labels(destination: &str, verdict: &'static str, code: &str) -> DestinationVerdictCode {
    [("destination", destination.to_owned()), ("verdict", verdict.to_owned()), ("code", code.to_owned())]
}

/// Returns the labels of a verdict. The code is empty if there is no error.
fn verdict_and_code(verdict: &Verdict) -> (&'static str, &str) {
    match verdict {
        Verdict::Published { .. } => ("published", ""),
        Verdict::Retry { error, .. } => ("retried", &error.code),
        Verdict::Block { error } => ("blocked", &error.code),
        Verdict::DeadLetter { error } => ("dead_lettered", &error.code),
        Verdict::Drop { .. } => ("dropped", ""),
        Verdict::Wait(_) => ("waiting", ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::testing::event;
    use crate::event::{Fault, PublishError, Wait};
    use crate::outbox::Delivery;

    #[test]
    fn everything_is_there_from_the_start_under_its_prefix() {
        let text = Metrics::new(&["a".to_owned()]).encode();
        for line in [
            "outbox_relay_events_total{destination=\"a\",verdict=\"published\",code=\"\"} 0",
            "outbox_relay_events_total{destination=\"\",verdict=\"dead_lettered\",code=\"\"} 0",
            "outbox_relay_publish_duration_seconds_count{destination=\"a\"} 0",
            "outbox_relay_breaker_state{destination=\"a\"} 0",
            "outbox_relay_breaker_opened_total{destination=\"a\"} 0",
            "outbox_relay_breaker_closed_total{destination=\"a\"} 0",
            "outbox_relay_destination_misconfigured{destination=\"a\"} 0",
            "outbox_relay_last_success_timestamp_seconds{destination=\"a\"} 0.0",
            "outbox_relay_claim_duration_seconds_count 0",
            "outbox_relay_settle_duration_seconds_count 0",
            "outbox_relay_batch_events_count 0",
            "outbox_relay_polls_total 0",
            "outbox_relay_wake_ups_total 0",
            "outbox_relay_ready 0",
            "outbox_relay_lane_panics_total 0",
            "outbox_relay_task_failures_total 0",
            "outbox_relay_log_lines_dropped_total 0",
            "outbox_relay_lag_seconds_count{destination=\"a\"} 0",
            "outbox_relay_standstills{code=\"table_locked\"} 0",
            concat!("outbox_relay_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
            "outbox_relay_sampling 0",
            "outbox_relay_oldest_due_age_seconds{destination=\"\"} 0.0",
            "outbox_relay_pending_events{destination=\"a\"} 0",
            "outbox_relay_blocked_keys{destination=\"a\"} 0",
            "outbox_relay_days_ahead 0",
        ] {
            assert!(text.lines().any(|there| there == line), "{line} is missing in\n{text}");
        }
        let names = text.lines().filter_map(|line| line.strip_prefix("# HELP "));
        assert!(names.clone().count() > 10 && names.clone().all(|name| name.starts_with("outbox_relay_")), "{text}");
    }

    #[test]
    fn a_batch_is_counted_by_destination_verdict_and_code() {
        let metrics = Metrics::new(&["a".to_owned()]);
        let events = [event(1), event(2), event(3), event(4)];
        let error = PublishError::new(Fault::Event, "BAD", "");
        let verdicts = [
            Verdict::Published { message_id: None },
            Verdict::Published { message_id: None },
            Verdict::Retry { delay: Duration::ZERO, error },
            Verdict::Wait(Wait::InPlace),
        ];
        let mut deliveries = Deliveries::default();
        for (event, verdict) in events.iter().zip(verdicts) {
            deliveries.begin(event).push(Delivery { destination: "a", verdict, duration: Duration::ZERO });
        }
        metrics.settled(&deliveries, Duration::from_millis(3));
        let text = metrics.encode();
        for line in [
            "outbox_relay_events_total{destination=\"a\",verdict=\"published\",code=\"\"} 2",
            "outbox_relay_events_total{destination=\"a\",verdict=\"retried\",code=\"BAD\"} 1",
            "outbox_relay_events_total{destination=\"a\",verdict=\"waiting\",code=\"\"} 1",
            "outbox_relay_settle_duration_seconds_count 1",
        ] {
            assert!(text.lines().any(|there| there == line), "{line} is missing in\n{text}");
        }
    }

    #[test]
    fn a_breaker_counts_once_each_time_it_opens_or_closes() {
        let metrics = Metrics::new(&["a".to_owned()]);
        let destination = metrics.destination(0);
        for state in [
            BreakerState::Closed,
            BreakerState::Open,
            BreakerState::Open,
            BreakerState::Probing,
            BreakerState::Open,
            BreakerState::Probing,
            BreakerState::Closed,
        ] {
            destination.breaker(state);
        }
        assert_eq!((destination.opened.get(), destination.closed.get(), destination.breaker.get()), (2, 1, 0));
    }
}
