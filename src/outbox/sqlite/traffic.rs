//! The application's own writes, and how to stay out of their way.
//!
//! Who finds SQLite's write lock taken sleeps for a millisecond, then two, five, ten, and so on: longer than most
//! transactions last. So beside an application that writes, settles are short and rare enough that few of its transactions
//! meet one, and each begins where a transaction has just ended, because the next is the furthest away then.

use std::time::{Duration, Instant};

use sqlx::Executor;
use sqlx::sqlite::SqliteConnection;

/// An application that has written this recently is writing.
const RECENT: Duration = Duration::from_secs(1);

/// Events in a batch beside an application that writes: less than a millisecond of the write lock.
const EVENTS: usize = 100;

/// The part of the time that settles may take beside an application that writes, as one in so many.
const SHARE: u32 = 20;

/// The longest rest after a settle, however long that took.
const LONGEST_REST: Duration = Duration::from_millis(50);

/// The longest wait for one of the application's transactions to end.
const LONGEST_WAIT: Duration = Duration::from_millis(5);

/// How often to move the write-ahead log into the database beside an application that writes: often enough that its own
/// commits need not, which SQLite makes them do after 1,000 pages.
const CHECKPOINT_INTERVAL: Duration = Duration::from_millis(100);

/// What is known of other connections' commits; those of the connection that looks do not count.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    version: Option<i64>,
    last_commit: Option<Instant>,
    /// When the next settle is welcome.
    not_before: Option<Instant>,
    last_checkpoint: Option<Instant>,
}

impl Traffic {
    /// Looks whether anything was committed since the last look.
    pub(super) async fn look(&mut self, connection: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
        let version = sqlx::query_scalar("pragma data_version").fetch_one(connection).await?;
        let committed = self.version.replace(version).is_some_and(|before| before != version);
        if committed {
            self.last_commit = Some(Instant::now());
        }
        Ok(committed)
    }

    /// At most so many events should be claimed.
    pub(super) fn events(&self, max_events: usize) -> usize {
        if self.is_busy() { max_events.min(EVENTS) } else { max_events }
    }

    /// Waits for a good moment to settle.
    pub(super) async fn give_way(&mut self, connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        if !self.is_busy() {
            return Ok(());
        }
        if let Some(at) = self.not_before {
            tokio::time::sleep_until(at.into()).await;
        }
        if self.last_checkpoint.is_none_or(|at| at.elapsed() >= CHECKPOINT_INTERVAL) {
            self.wait_for_a_commit(connection).await?;
            // Waits for nobody and holds up nobody; does nothing where there is no write-ahead log.
            connection.execute("pragma wal_checkpoint(passive)").await?;
            self.last_checkpoint = Some(Instant::now());
        }
        self.wait_for_a_commit(connection).await
    }

    async fn wait_for_a_commit(&mut self, connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        // What was committed before this says nothing about now.
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

    /// A settle is over that took so long.
    pub(super) fn settled(&mut self, took: Duration) {
        self.not_before = Some(Instant::now() + (took * (SHARE - 1)).min(LONGEST_REST));
    }

    fn is_busy(&self) -> bool {
        self.last_commit.is_some_and(|at| at.elapsed() < RECENT)
    }
}

/// A tenth of a millisecond, which tokio's clock does not know.
async fn pause() {
    let slept = tokio::task::spawn_blocking(|| std::thread::sleep(Duration::from_micros(100))).await;
    slept.expect("a sleep does not panic");
}
