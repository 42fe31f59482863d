//! What one relay asks the store from time to time for its metrics, on behalf of all relays.

use std::time::Duration;

/// The largest number of events that are counted for one figure of one destination, because there may be millions.
pub const MOST_SAMPLED: i64 = 1000;

/// How many pending events of one partition are counted. Almost always all events have one priority, which has 64 partitions.
pub(super) const MOST_PENDING: i64 = 16;

/// The answer to a relay that would sample.
#[derive(Debug, Clone, PartialEq)]
pub enum Sampling {
    /// This relay samples.
    Taken(Sample),
    /// Another relay samples.
    ByAnother,
    /// This relay's connection is in use. It is to be asked again soon.
    NotNow,
}

/// The figures of one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample {
    /// The figures of each destination; the one without a name has the events that are not routed yet.
    pub destinations: Vec<DestinationSample>,
    /// The figures of the database.
    pub database: DatabaseSample,
}

/// What waits for one destination. Counts end at [`MOST_SAMPLED`], that of pending events a little later.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DestinationSample {
    /// The name; empty for events that are not routed yet.
    pub name: String,
    /// For how long the oldest event has been due.
    pub oldest_due: Duration,
    /// Events that are due.
    pub pending: i64,
    /// Events that have failed and are tried again at their time.
    pub retrying: i64,
    /// Events that wait behind an earlier event of their key, or for their own time.
    pub waiting_behind: i64,
    /// Events that wait until a person acts.
    pub parked: i64,
    /// Keys whose first event has failed and is tried again.
    pub blocked_keys: i64,
}

/// The figures of the database. What it does not have is 0.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DatabaseSample {
    /// Rows of the outbox, by the statistics.
    pub rows: i64,
    /// Rows of the outbox that were deleted and are not removed yet, by the statistics.
    pub dead_rows: i64,
    /// Rows of the dead letters, by the statistics.
    pub dead_letters: i64,
    /// How old the oldest snapshot is, which keeps dead rows from being removed.
    pub oldest_snapshot: Duration,
    /// The application that holds that snapshot.
    pub snapshot_holder: Option<String>,
    /// When autovacuum last finished on the outbox, in seconds since 1970.
    pub last_autovacuum: f64,
    /// How many days of the processing log are made ahead.
    pub days_ahead: i64,
}
