//! Keeps settles out of the way of the application's own writes.
//!
//! A program that finds SQLite's write lock taken sleeps for a millisecond, then two, five, ten, and so on: longer than most
//! transactions last. So while an application writes, settles are short and rare enough that few of its transactions meet
//! one. Each settle begins when a transaction has just ended, because then the next one is furthest away.

use std::time::{Duration, Instant};

use sqlx::Executor;
use sqlx::sqlite::SqliteConnection;

/// An application that has written within this time counts as writing.
const RECENT: Duration = Duration::from_secs(1);

/// The number of events in a batch while the application writes. A settle then holds the write lock for less than a
/// millisecond.
const EVENTS: usize = 100;

/// While the application writes, settles may take one part in this many of the time.
const SHARE: u32 = 20;

/// The longest rest after a settle, however long the settle took.
const LONGEST_REST: Duration = Duration::from_millis(50);

/// The longest wait for one of the application's transactions to end.
const LONGEST_WAIT: Duration = Duration::from_millis(5);

/// How often the write-ahead log is moved into the database while the application writes. This is often enough that the
/// application's commits need not do it, which SQLite makes them do after 1,000 pages.
const CHECKPOINT_INTERVAL: Duration = Duration::from_millis(100);

/// The recent commits of other connections. Those of the connection that checks do not count.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    version: Option<i64>,
    last_commit: Option<Instant>,
    /// The earliest time for the next settle.
    not_before: Option<Instant>,
    last_checkpoint: Option<Instant>,
}

impl Traffic {
    /// Returns whether anything was committed since the last check.
    pub(super) async fn look(&mut self, connection: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
        let version = sqlx::query_scalar("pragma data_version").fetch_one(connection).await?;
        let committed = self.version.replace(version).is_some_and(|before| before != version);
        if committed {
            self.last_commit = Some(Instant::now());
        }
        Ok(committed)
    }

    /// Returns how many events should be claimed at most.
    pub(super) fn events(&self, max_events: usize) -> usize {
        if self.is_busy() { max_events.min(EVENTS) } else { max_events }
    }

    /// Waits for a suitable moment to settle.
    pub(super) async fn give_way(&mut self, connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        if !self.is_busy() {
            return Ok(());
        }
        if let Some(at) = self.not_before {
            tokio::time::sleep_until(at.into()).await;
        }
        if self.last_checkpoint.is_none_or(|at| at.elapsed() >= CHECKPOINT_INTERVAL) {
            self.wait_for_a_commit(connection).await?;
            // A passive checkpoint waits for nobody and blocks nobody. It does nothing if there is no write-ahead log.
            connection.execute("pragma wal_checkpoint(passive)").await?;
            self.last_checkpoint = Some(Instant::now());
        }
        self.wait_for_a_commit(connection).await
    }

    async fn wait_for_a_commit(&mut self, connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        // Earlier commits do not matter here, only those that come from now on.
        self.look(connection).await?;
        let begun = Instant::now();
        while begun.elapsed() < LONGEST_WAIT {
            pause().await;
            if self.look(connection).await? {
                break;
            }
        }
        Ok(())
    }

    /// Records that a settle is over, which took `took`.
    pub(super) fn settled(&mut self, took: Duration) {
        self.not_before = Some(Instant::now() + (took * (SHARE - 1)).min(LONGEST_REST));
    }

    fn is_busy(&self) -> bool {
        self.last_commit.is_some_and(|at| at.elapsed() < RECENT)
    }
}

/// Sleeps for a tenth of a millisecond, which is too short for tokio's clock.
async fn pause() {
    let slept = tokio::task::spawn_blocking(|| std::thread::sleep(Duration::from_micros(100))).await;
    slept.expect("a sleep does not panic");
}
