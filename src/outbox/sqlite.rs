//! The outbox in one SQLite file, shared with the application that owns it.
//!
//! - The hot path: [`lane`] claims and settles, `turn` is the state of the lane that does so, `batch` reads, `row` decodes
//!   rows, `settle` writes the deliveries, `traffic` avoids the application's writes, [`wake`] sleeps until the application
//!   commits.
//! - `owner`: of several relays on one file, one works; `identity`: identifies a file, whatever its name.
//! - `proof`: proves that the file records what is published, and handles events that the file refuses.
//! - The operator's part: `operate`, with `emit`, `check`, `migrate`, `past` for the log and the history, and `retention`,
//!   which deletes old rows.
//! - Whether a file fits: `schema` compares the version, `shape` the columns; `migrations` is the list.
//! - The causes that keep events from moving: `standstill` runs `parked`, `unconfigured` and `formats`, each with a
//!   `question`. `sample` has the figures for the metrics.
//! - Several relays: `register` has their differences, `crash_notes` ends a crash loop.
//! - `connection` opens the file, `store` is what all lanes share.
//!
//! The file is the application's. Nothing here changes its journal mode or any other setting that outlives a connection. The
//! write lock is taken to settle and released at once; it is never held while events are published.

mod batch;
pub mod check;
mod connection;
mod crash_notes;
mod emit;
mod formats;
mod identity;
pub mod lane;
mod mend;
pub mod migrate;
mod migrations;
mod operate;
mod owner;
mod parked;
mod past;
mod pause;
mod proof;
mod question;
mod register;
mod retention;
mod row;
mod sample;
mod schema;
mod settle;
mod shape;
mod standstill;
mod status;
mod store;
mod traffic;
mod turn;
mod unconfigured;
mod waiting;
pub mod wake;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::outbox::error::OutboxError;
use crate::outbox::pause::Pauses;
use crate::outbox::register::Configuration;
use crate::outbox::{Outbox, Standing};
pub use connection::open;
pub(in crate::outbox) use connection::validate;
pub use store::SqliteOutbox;

impl Outbox for SqliteOutbox {
    type Lane = lane::SqliteLane;
    type Wakeup = wake::SqliteWakeup;

    fn lane(&self) -> lane::SqliteLane {
        lane::SqliteLane::new(self.clone())
    }

    fn wakeup(&self) -> Option<wake::SqliteWakeup> {
        Some(wake::SqliteWakeup::new(self.clone()))
    }

    async fn prepare(&self) -> Result<(), OutboxError> {
        let mut connection = self.connect().await?;
        drop(schema::require_fit(&mut connection).await?);
        if let Ok(mut turn) = self.turn.try_lock() {
            turn.fits(connection.file);
        }
        proof::prove(&mut connection, &self.config.worker, self.config.usage).await.map(drop)
    }

    async fn register(&self, configuration: &Arc<Configuration>, once: bool) -> Result<(), OutboxError> {
        self.membership.join(self, configuration, once, Instant::now()).await
    }

    async fn attend(&self, idle: Duration) -> Result<Duration, OutboxError> {
        self.membership.attend(self, idle, Duration::MAX, Instant::now()).await
    }

    fn standing(&self) -> Standing {
        if !self.owner.is_standing_by() {
            return Standing::Works;
        }
        let holder = self.holder().ok().flatten();
        Standing::StandsBy { behind: holder.unwrap_or_else(|| "another relay".to_owned()) }
    }

    fn differences(&self, lasting: Duration) -> Vec<String> {
        self.membership.differences(lasting)
    }

    fn pauses(&self) -> Arc<Pauses> {
        self.membership.pauses()
    }

    async fn refresh_pauses(&self) -> Result<(), OutboxError> {
        self.membership.refresh(self, Instant::now()).await
    }

    async fn deregister(&self) -> Result<(), OutboxError> {
        self.membership.leave(self).await
    }
}
