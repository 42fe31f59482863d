//! The outbox in PostgreSQL 13 and later.
//!
//! - The hot path: [`lane`] claims and settles. `take` takes partitions, `batch` reads their rows, `bounds` has the id up to
//!   which a partition has nothing left, `promote` makes due rows pending, `renew` renews a claim, `settle` writes what became
//!   of a batch. [`wake`] sleeps until a producer commits, `flush` waits for the disk.
//! - Where the database refuses a write: `refusal` says what it refuses and how to mend that, `salvage` settles what can be
//!   settled, `left_out` holds what cannot even be parked, `refused_writes` is what the lanes know of all that, `proof` tries
//!   everything that a settle writes, `savepoint` has the statements for a savepoint.
//! - The operator's door: `operate`, with `emit`, `audit`, `check`, `migrate`, `past` and
//!   `follow` for the log and the history, and `days`, which adds and drops day partitions.
//! - Whether a database fits: `home` finds tables and functions, `schema` compares the version, `shape` the columns, `triggers`
//!   the triggers, `exclusion` proves that advisory locks exclude each other. `migrations` is the list, `patience` waits for
//!   its locks.
//! - What keeps events from moving: `standstill` asks `parked`, `unconfigured`, `undecided`, `formats` and `left_out`, each
//!   with a `question`.
//! - Several relays: `register` shows them each other, `crash_notes` ends a crash loop.
//! - Connections: `connection` opens one, `session` has its settings, `side_connection` is one beside the lanes, `store` is
//!   what all share, `sql` and `tid` make statements, `url` checks `DATABASE_URL`.

pub mod audit;
mod batch;
mod bounds;
pub mod check;
mod connection;
mod crash_notes;
mod days;
mod emit;
mod exclusion;
mod flush;
mod follow;
mod formats;
mod home;
pub mod lane;
mod left_out;
mod mend;
pub mod migrate;
mod migrations;
mod operate;
mod parked;
mod past;
mod patience;
mod pause;
mod promote;
mod proof;
mod question;
mod refusal;
mod refused_writes;
mod register;
mod renew;
mod row;
mod salvage;
mod sample;
mod savepoint;
mod schema;
mod session;
mod settle;
mod shape;
mod side_connection;
mod sql;
mod standstill;
mod status;
mod store;
mod take;
mod tally;
mod tid;
mod triggers;
mod unconfigured;
mod undecided;
mod url;
mod waiting;
pub mod wake;

use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnection;

use crate::outbox::error::OutboxError;
use crate::outbox::pause::Pauses;
use crate::outbox::postgres::connection::{STATEMENT_TIMEOUT, with_timeout};
use crate::outbox::postgres::sql::Sql;
use crate::outbox::register::Configuration;
use crate::outbox::{Outbox, Standing};
pub use connection::{open, validate};
pub use store::PgOutbox;

impl PgOutbox {
    /// Fails if this relay cannot work with the database as it is.
    async fn look_at(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        with_timeout("begin", STATEMENT_TIMEOUT, self.begin_pooled(connection)).await?;
        drop(schema::require_fit(connection).await?);
        shape::require(connection, Sql { persistent: false, ..self.sql() }, self.config.usage).await?;
        check::require_all_rows(connection, Sql { persistent: false, ..self.sql() }).await?;
        triggers::require(connection, Sql { persistent: false, ..self.sql() }).await?;
        with_timeout("commit", STATEMENT_TIMEOUT, self.commit_pooled(connection)).await?;
        formats::give_back(connection, self.sql().schema).await
    }
}

impl Outbox for PgOutbox {
    type Lane = lane::PgLane;
    type Wakeup = wake::PgWakeup;

    fn lane(&self) -> lane::PgLane {
        lane::PgLane::new(self.clone())
    }

    fn wakeup(&self) -> Option<wake::PgWakeup> {
        (!self.config.pooled).then(|| wake::PgWakeup::new(self.clone()))
    }

    async fn prepare(&self) -> Result<(), OutboxError> {
        let mut connection = self.connect().await?;
        self.look_at(&mut connection).await?;
        if self.exclusion.get().is_none() {
            exclusion::prove(&mut connection, &mut self.connect().await?).await?;
            self.exclusion.get_or_init(|| ());
        }
        self.add_days(&mut connection).await?;
        self.look_at_additions(&mut connection).await?;
        self.prove(&mut connection, &session::begin(&self.config)).await
    }

    async fn register(&self, configuration: &Arc<Configuration>, once: bool) -> Result<(), OutboxError> {
        self.membership.join(self, configuration, once, Instant::now()).await
    }

    async fn attend(&self, idle: Duration) -> Result<Duration, OutboxError> {
        // For as long as a claim may last.
        let patience = self.config.publish_timeout + Duration::from_secs(15);
        self.membership.attend(self, idle, patience, Instant::now()).await
    }

    fn standing(&self) -> Standing {
        self.membership.standing()
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
