//! The figures that one relay samples in the store for all relays. The others show 0.

use std::sync::atomic::AtomicI64;
use std::time::Duration;

use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::outbox::sample::{DatabaseSample, DestinationSample, Sample};
use crate::relay::metrics::{Destination, Seconds, of};
use crate::text::shown;

/// The holder of a snapshot is named only once the snapshot is this old, so that short queries make no series.
const NAMED_AFTER: Duration = Duration::from_secs(60);

/// The longest name of an application that is shown whole, in characters. PostgreSQL cuts it there too.
const MAX_APPLICATION_CHARS: usize = 64;

type Holder = [(&'static str, String); 1];

/// The metrics of what is sampled.
#[derive(Debug)]
pub(super) struct Sampled {
    sampling: Gauge,
    oldest_due: Family<Destination, Seconds>,
    pending: Family<Destination, Gauge>,
    retrying: Family<Destination, Gauge>,
    waiting_behind: Family<Destination, Gauge>,
    parked: Family<Destination, Gauge>,
    blocked_keys: Family<Destination, Gauge>,
    rows: Gauge,
    dead_rows: Gauge,
    dead_letters: Gauge,
    oldest_snapshot: Seconds,
    snapshot_holder: Family<Holder, Gauge>,
    last_autovacuum: Seconds,
    days_ahead: Gauge,
    names: Vec<String>,
}

impl Sampled {
    /// Registers the metrics for these destinations.
    pub(super) fn new(registry: &mut Registry, destinations: &[String]) -> Self {
        let names: Vec<String> = std::iter::once(String::new()).chain(destinations.iter().cloned()).collect();
        let sampled = Self {
            sampling: gauge(
                registry,
                "sampling",
                "1 if this relay samples what all relays share; the others show 0 there",
            ),
            oldest_due: Family::default(),
            pending: counts(registry, "pending_events", "Events that are due, counted up to some 1000"),
            retrying: counts(
                registry,
                "retrying_events",
                "Events that have failed and are tried again at their time, among the next 1000",
            ),
            waiting_behind: counts(
                registry,
                "waiting_behind_events",
                "Events that wait behind an earlier event of their key, among the next 1000; where the destination is empty: \
                 delayed events",
            ),
            parked: counts(registry, "parked_events", "Events that wait until a person acts, counted up to 1000"),
            blocked_keys: counts(
                registry,
                "blocked_keys",
                "Keys whose first event has failed and is tried again, among the next 1000 events",
            ),
            rows: gauge(registry, "outbox_rows", "Rows of event_outbox, by the statistics of the database"),
            dead_rows: gauge(
                registry,
                "outbox_dead_rows",
                "Deleted rows of event_outbox that vacuum has not removed, by the statistics of the database",
            ),
            dead_letters: gauge(
                registry,
                "dead_letters",
                "Rows of event_dead_letter, redriven and discarded ones too, by the statistics of the database",
            ),
            oldest_snapshot: Seconds::default(),
            snapshot_holder: Family::default(),
            last_autovacuum: Seconds::default(),
            days_ahead: gauge(
                registry,
                "days_ahead",
                "Days of the processing log that are made ahead; 7 after maintenance",
            ),
            names,
        };
        let help = "For how long the oldest event has been due; where the destination is empty, events that are not routed yet";
        registry.register_with_unit("oldest_due_age", help, Unit::Seconds, sampled.oldest_due.clone());
        let help =
            "Age of the oldest snapshot of the database that this role can see; it keeps dead rows from being removed";
        registry.register_with_unit("oldest_snapshot_age", help, Unit::Seconds, sampled.oldest_snapshot.clone());
        let help = "1 for the application that holds a snapshot older than a minute";
        registry.register("oldest_snapshot_holder", help, sampled.snapshot_holder.clone());
        let help = "When autovacuum last finished on event_outbox, in seconds since 1970; 0: never";
        registry.register_with_unit("last_autovacuum_timestamp", help, Unit::Seconds, sampled.last_autovacuum.clone());
        sampled.set(None);
        sampled
    }

    /// Shows these figures; `None`: another relay samples.
    pub(super) fn set(&self, sample: Option<&Sample>) {
        self.sampling.set(sample.is_some().into());
        let (empty, none) = (Sample::default(), DestinationSample::default());
        let sample = sample.unwrap_or(&empty);
        for name in &self.names {
            let there = sample.destinations.iter().find(|there| there.name == *name).unwrap_or(&none);
            let label = of(name);
            self.oldest_due.get_or_create(&label).set(there.oldest_due.as_secs_f64());
            for (family, count) in [
                (&self.pending, there.pending),
                (&self.retrying, there.retrying),
                (&self.waiting_behind, there.waiting_behind),
                (&self.parked, there.parked),
                (&self.blocked_keys, there.blocked_keys),
            ] {
                family.get_or_create(&label).set(count);
            }
        }
        let database: &DatabaseSample = &sample.database;
        self.rows.set(database.rows);
        self.dead_rows.set(database.dead_rows);
        self.dead_letters.set(database.dead_letters);
        self.oldest_snapshot.set(database.oldest_snapshot.as_secs_f64());
        self.last_autovacuum.set(database.last_autovacuum);
        self.days_ahead.set(database.days_ahead);
        self.snapshot_holder.clear();
        let old = database.oldest_snapshot >= NAMED_AFTER;
        let holder = database.snapshot_holder.as_deref().filter(|_| old).unwrap_or_default();
        let holder = [("application", shown(holder, MAX_APPLICATION_CHARS))];
        self.snapshot_holder.get_or_create(&holder).set(old.into());
    }
}

fn gauge(registry: &mut Registry, name: &str, help: &str) -> Gauge {
    let gauge = Gauge::<i64, AtomicI64>::default();
    registry.register(name, help, gauge.clone());
    gauge
}

fn counts(registry: &mut Registry, name: &str, help: &str) -> Family<Destination, Gauge> {
    let family = Family::<Destination, Gauge>::default();
    registry.register(name, help, family.clone());
    family
}
