//! The histogram of the lag. It counts a batch at once: the library's histogram locks for each event.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::{MetricType, TypedMetric};

/// The upper bounds in milliseconds. The last bucket has none.
const BOUNDS_MS: [u32; 18] = [
    2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000, 1_800_000, 7_200_000,
    86_400_000,
];

const BUCKETS: usize = BOUNDS_MS.len() + 1;

/// How many minutes are remembered, the present one included.
const MINUTES: u64 = 15;

/// How long events took from their commit until a destination had taken them. Clones share their counts.
#[derive(Debug, Clone, Default)]
pub(in crate::relay) struct Lag(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    buckets: [AtomicU64; BUCKETS],
    sum_us: AtomicU64,
    begun: Instant,
    /// The minutes since `begun` in which there were events, the latest last.
    minutes: Mutex<VecDeque<Minute>>,
}

#[derive(Debug)]
struct Minute {
    number: u64,
    events: u64,
    sum_us: u64,
}

impl Default for Counts {
    fn default() -> Self {
        let (buckets, sum_us) = Default::default();
        Self { buckets, sum_us, begun: Instant::now(), minutes: Mutex::default() }
    }
}

/// The lags of one batch.
#[derive(Debug, Default)]
pub(in crate::relay) struct BatchLags {
    buckets: [u64; BUCKETS],
    sum_us: u64,
}

impl BatchLags {
    /// Adds the lag of one event.
    pub(in crate::relay) fn add(&mut self, lag: Duration) {
        self.buckets[BOUNDS_MS.partition_point(|bound| Duration::from_millis((*bound).into()) < lag)] += 1;
        self.sum_us = self.sum_us.saturating_add(u64::try_from(lag.as_micros()).unwrap_or(u64::MAX));
    }
}

impl Lag {
    /// Adds the lags of a batch that was published `now`.
    pub(in crate::relay) fn add(&self, batch: &BatchLags, now: Instant) {
        for (bucket, &count) in self.0.buckets.iter().zip(&batch.buckets) {
            if count > 0 {
                bucket.fetch_add(count, Ordering::Relaxed);
            }
        }
        self.0.sum_us.fetch_add(batch.sum_us, Ordering::Relaxed);
        let (number, events) = (self.minute(now), batch.buckets.iter().sum());
        if events == 0 {
            return;
        }
        let mut minutes = self.0.minutes.lock().unwrap_or_else(PoisonError::into_inner);
        match minutes.back_mut() {
            Some(last) if last.number >= number => {
                last.events += events;
                last.sum_us = last.sum_us.saturating_add(batch.sum_us);
            }
            _ => minutes.push_back(Minute { number, events, sum_us: batch.sum_us }),
        }
        minutes.retain(|minute| minute.number + MINUTES > number);
    }

    /// Returns the mean lag of each of the last minutes that are over, the latest last; `None` for a minute without events.
    pub(in crate::relay) fn by_minute(&self, now: Instant) -> Vec<Option<Duration>> {
        let present = self.minute(now);
        let minutes = self.0.minutes.lock().unwrap_or_else(PoisonError::into_inner);
        let mean = |ago: u64| {
            let minute = minutes.iter().find(|minute| minute.number + ago == present)?;
            minute.sum_us.checked_div(minute.events).map(Duration::from_micros)
        };
        (1..MINUTES).rev().map(mean).collect()
    }

    fn minute(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.0.begun).as_secs() / 60
    }
}

impl EncodeMetric for Lag {
    fn encode(&self, mut encoder: MetricEncoder) -> fmt::Result {
        let bounds = BOUNDS_MS.iter().map(|&ms| f64::from(ms) / 1000.0).chain([f64::INFINITY]);
        let counts = self.0.buckets.iter().map(|count| count.load(Ordering::Relaxed));
        let buckets: Vec<(f64, u64)> = bounds.zip(counts).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = Duration::from_micros(self.0.sum_us.load(Ordering::Relaxed)).as_secs_f64();
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

impl TypedMetric for Lag {
    const TYPE: MetricType = MetricType::Histogram;
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text;
    use prometheus_client::registry::Registry;

    use super::*;

    #[test]
    fn a_batch_is_counted_in_its_buckets() {
        let (mut registry, lag, mut batch) = (Registry::default(), Lag::default(), BatchLags::default());
        registry.register("lag", "help", lag.clone());
        for ms in [0, 2, 3, 1000, 86_400_001] {
            batch.add(Duration::from_millis(ms));
        }
        lag.add(&batch, Instant::now());
        lag.add(&BatchLags::default(), Instant::now());
        let mut shown = String::new();
        text::encode(&mut shown, &registry).expect("a string takes everything");
        for line in [
            "# TYPE lag histogram",
            "lag_count 5",
            "lag_sum 86401.006",
            "lag_bucket{le=\"0.002\"} 2",
            "lag_bucket{le=\"0.005\"} 3",
            "lag_bucket{le=\"1.0\"} 4",
            "lag_bucket{le=\"86400.0\"} 4",
            "lag_bucket{le=\"+Inf\"} 5",
        ] {
            assert!(shown.lines().any(|there| there == line), "{line} is missing in\n{shown}");
        }
    }

    #[test]
    fn the_mean_of_each_minute_is_kept_for_a_quarter_of_an_hour() {
        let (lag, minute) = (Lag::default(), Duration::from_secs(60));
        let batch = |lags_ms: &[u64]| {
            let mut batch = BatchLags::default();
            lags_ms.iter().for_each(|ms| batch.add(Duration::from_millis(*ms)));
            batch
        };
        let begun = lag.0.begun;
        lag.add(&batch(&[10, 20]), begun);
        lag.add(&batch(&[30]), begun + minute / 2);
        lag.add(&batch(&[5]), begun + minute * 2);
        let mean = lag.by_minute(begun + minute * 3);
        assert_eq!(mean.len(), 14);
        assert_eq!(mean[11..], [Some(Duration::from_millis(20)), None, Some(Duration::from_millis(5))]);
        assert_eq!(lag.by_minute(begun)[13], None, "the present minute is not over");
        lag.add(&batch(&[1]), begun + minute * 15);
        assert_eq!(lag.0.minutes.lock().expect("nobody panicked").len(), 2, "the first minute is forgotten");
    }
}
