//! Conversions of numbers from and to columns.

use std::time::Duration;

/// Converts a count to a column's type. A count that is too large becomes the largest number.
pub(super) fn to_i64(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Converts milliseconds to a wait. A negative number becomes zero.
pub(super) fn milliseconds(ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or_default())
}
