//! Retries, timeout and breaker of one destination: its own fields, or else the settings for all destinations.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde::Deserialize;

use crate::config::settings::Settings;
use crate::relay::Policy;
use crate::sink::spec::Invalid;
use crate::units::{self, Quantity};

/// The fields that every kind of destination has.
pub(super) const FIELDS: [&str; 10] = [
    "max_retries",
    "backoff",
    "backoff_ms",
    "timeout",
    "timeout_ms",
    "breaker_threshold",
    "breaker_window",
    "breaker_window_ms",
    "breaker_recovery",
    "breaker_recovery_ms",
];

/// A time is written as `30s`. A field with the suffix `_ms` may also be a plain number of milliseconds.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PolicyFields {
    max_retries: Option<u32>,
    backoff: Option<Quantity>,
    backoff_ms: Option<Quantity>,
    timeout: Option<Quantity>,
    timeout_ms: Option<Quantity>,
    breaker_threshold: Option<u32>,
    breaker_window: Option<Quantity>,
    breaker_window_ms: Option<Quantity>,
    breaker_recovery: Option<Quantity>,
    breaker_recovery_ms: Option<Quantity>,
}

const HOUR_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * HOUR_MS;

impl PolicyFields {
    /// Returns the policy. The ranges are those of the corresponding settings.
    ///
    /// # Errors
    /// A field is out of range, not a time, or given twice.
    pub(super) fn policy(&self, settings: &Settings) -> Result<Policy, Invalid> {
        let mut policy = settings.policy();
        if let Some(count) = within("max_retries", self.max_retries, 0..=1000)? {
            policy.retry.max_retries = count;
        }
        if let Some(count) = within("breaker_threshold", self.breaker_threshold, 1..=1000)? {
            policy.breaker.threshold = count;
        }
        for (field, text, ms, range, place) in [
            ("backoff", &self.backoff, &self.backoff_ms, 1..=HOUR_MS, &mut policy.retry.base),
            ("timeout", &self.timeout, &self.timeout_ms, 10..=600_000, &mut policy.timeout),
            ("breaker_window", &self.breaker_window, &self.breaker_window_ms, 1..=DAY_MS, &mut policy.breaker.window),
            (
                "breaker_recovery",
                &self.breaker_recovery,
                &self.breaker_recovery_ms,
                1..=DAY_MS,
                &mut policy.breaker.recovery,
            ),
        ] {
            if let Some(time) = time(field, text.as_ref(), ms.as_ref(), range)? {
                *place = time;
            }
        }
        Ok(policy)
    }
}

fn within(field: &'static str, count: Option<u32>, range: RangeInclusive<u32>) -> Result<Option<u32>, Invalid> {
    if count.is_some_and(|count| !range.contains(&count)) {
        let reason = format!("a number from {} to {}", range.start(), range.end());
        return Err(Invalid { field, reason });
    }
    Ok(count)
}

fn time(
    field: &'static str,
    text: Option<&Quantity>,
    ms: Option<&Quantity>,
    range: RangeInclusive<u64>,
) -> Result<Option<Duration>, Invalid> {
    let found = match (text, ms) {
        (Some(_), Some(_)) => Err(format!("{field} and {field}_ms are both set; remove one of them")),
        (Some(Quantity(text)), None) if text.trim().parse::<u64>().is_ok() => {
            Err(format!("a time is written with its unit, as in 30s; {field}_ms takes milliseconds"))
        }
        (Some(Quantity(text)), None) | (None, Some(Quantity(text))) => units::milliseconds(text, range).map(Some),
        (None, None) => Ok(None),
    };
    found.map_err(|reason| Invalid { field, reason })
}
