//! The histogram of the lag. It counts a batch at once: the library's histogram locks for each event.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::{MetricType, TypedMetric};

/// The upper bounds in milliseconds. The last bucket has none.
const BOUNDS_MS: [u32; 18] = [
    2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000, 1_800_000, 7_200_000,
    86_400_000,
];

const BUCKETS: usize = BOUNDS_MS.len() + 1;

/// How long events took from their commit until a destination had taken them. Clones share their counts.
#[derive(Debug, Clone, Default)]
pub(in crate::relay) struct Lag(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    buckets: [AtomicU64; BUCKETS],
    sum_us: AtomicU64,
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
    /// Adds the lags of a batch.
    pub(in crate::relay) fn add(&self, batch: &BatchLags) {
        for (bucket, &count) in self.0.buckets.iter().zip(&batch.buckets) {
            if count > 0 {
                bucket.fetch_add(count, Ordering::Relaxed);
            }
        }
        self.0.sum_us.fetch_add(batch.sum_us, Ordering::Relaxed);
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
        lag.add(&batch);
        lag.add(&BatchLags::default());
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
}
