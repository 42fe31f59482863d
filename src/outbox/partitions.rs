//! The numbers of `event_outbox.partition`, the unit that a claim takes.
//!
//! The schemas compute them, so they never change. Statements contain them as numbers: 640 is [`PENDING`], 1280 is
//! [`OTHER_FORMATS`], 1920 is their sum.

/// The number of partitions of one priority. PostgreSQL chooses the partition by the hash of the key; a SQLite file uses the
/// first.
pub(super) const PER_PRIORITY: i16 = 64;

/// The number of partitions of pending rows, which begin with those of priority 9. The partition of a scheduled row is higher
/// by this number.
pub(super) const PENDING: i16 = 10 * PER_PRIORITY;

/// From this partition on PostgreSQL keeps rows of a format that a relay may not know, and rows that wait behind such a row.
pub(super) const OTHER_FORMATS: i16 = 2 * PENDING;
