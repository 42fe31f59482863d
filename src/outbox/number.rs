//! Numbers as columns hold them.

use std::time::Duration;

/// A count that a column can hold; one that is too large is the largest.
pub(super) fn to_i64(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// A wait in milliseconds; none where the time has passed.
pub(super) fn milliseconds(ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or_default())
}
