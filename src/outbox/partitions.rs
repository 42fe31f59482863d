//! The numbers of `event_outbox.partition`, the unit that a claim takes.
//!
//! The schemas compute them, so they never change. Statements have them as numbers: 640 is [`PENDING`], 1280 is
//! [`OTHER_FORMATS`], 1920 the two together.

/// The partitions of one priority. PostgreSQL chooses one by the hash of the key; a SQLite file uses the first.
pub(super) const PER_PRIORITY: i16 = 64;

/// The partitions of pending rows, which begin with those of priority 9. A scheduled row lies so many partitions higher.
pub(super) const PENDING: i16 = 10 * PER_PRIORITY;

/// From here on PostgreSQL keeps rows of a format that a relay may not know, and rows that wait behind one.
pub(super) const OTHER_FORMATS: i16 = 2 * PENDING;
