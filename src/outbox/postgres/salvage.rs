//! A settle that the database refuses or swallows for what it says.
//!
//! The events are published, and must not be published again. So the claim is kept, or taken once more, and then:
//!
//! - A missing day is made.
//! - Where nothing can be recorded, as [`proof`] tells, all of it is given up, and no lane of this relay publishes until
//!   that has changed.
//! - Else some event is the reason. The batch is settled in halves until each is alone. It is parked: its row says what became
//!   of it and why that cannot be recorded, and waits until somebody acts. If even that is refused, nothing is published either.
//!
//! To keep a claim takes a savepoint, which is a statement more. So there is one only where somebody has added to the relay's
//! tables what may refuse a write, or something was refused lately. Elsewhere the claim is lost and taken again. The other
//! lanes of this relay claim nothing meanwhile; another relay may come in between, once.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor};

use crate::event::Event;
use crate::outbox::postgres::proof::{self, Survivor, Tried, is_content, is_missing_day, words};
use crate::outbox::postgres::settle::Settle;
use crate::outbox::postgres::sql::Sql;
use crate::outbox::postgres::{PgOutbox, STATEMENT_TIMEOUT, answered, query_failed};
use crate::outbox::records::{Records, SETTLE_FAILED};
use crate::outbox::{Delivery, OutboxError};

pub(super) const SAVEPOINT: &str = "savepoint before_settle";

const BACK: &str = "rollback to savepoint before_settle";

/// In order, as all do who wait for them.
const TAKE_AGAIN: &str = "
select pg_catalog.pg_advisory_xact_lock('{schema}.event_outbox'::regclass::oid::int, partition::int)
from (select distinct pg_catalog.unnest($1::smallint[]) as partition order by 1) p";

/// What goes on is told once in so long.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// Of the events that could neither be settled nor parked so many are tried again.
const SURVIVORS: usize = 10;

/// What a relay knows of writes that were refused.
#[derive(Debug, Clone, Default)]
pub(super) struct Unrecorded {
    wary: Arc<AtomicBool>,
    /// A settle failed for what it said; nothing is published before a proof.
    failed: Arc<AtomicBool>,
    /// Lanes that settle what they can.
    salvages: Arc<AtomicUsize>,
    /// Events that could neither be settled nor parked. As long as there is one, nothing is published.
    survivors: Arc<Mutex<Vec<Survivor>>>,
    warned: Arc<Mutex<Option<Instant>>>,
}

/// See [`Unrecorded::salvaging`].
pub(super) struct Salvaging(Arc<AtomicUsize>);

impl Drop for Salvaging {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Unrecorded {
    /// Whether to keep claims of settles that fail.
    pub(super) fn is_wary(&self) -> bool {
        self.wary.load(Ordering::Relaxed)
    }

    /// Keeps the other lanes of this relay from claiming, for as long as the answer lives.
    pub(super) fn salvaging(&self) -> Salvaging {
        self.salvages.fetch_add(1, Ordering::SeqCst);
        Salvaging(Arc::clone(&self.salvages))
    }

    /// Whether a lane settles what it can.
    pub(super) fn is_salvaging(&self) -> bool {
        self.salvages.load(Ordering::SeqCst) > 0
    }

    /// Whether nothing is to be published before a proof.
    pub(super) fn is_set(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// Some rows that are due do not become pending.
    pub(super) fn warn_of_promotions(&self, count: i64) {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_none_or(|at| at.elapsed() >= WARNING_INTERVAL) {
            *warned = Some(Instant::now());
            tracing::warn!(
                count,
                "scheduled events are due, and an update of their rows to `pending` has no effect: look at the triggers on event_outbox"
            );
        }
    }

    fn survivors(&self) -> MutexGuard<'_, Vec<Survivor>> {
        self.survivors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PgOutbox {
    /// Looks whether the application has added to the tables what may refuse a write.
    pub(super) async fn look_at_additions(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        let additions = answered("look at what was added to the tables", STATEMENT_TIMEOUT, async {
            self.begin_pooled(connection).await?;
            let additions = proof::additions(connection, self.sql()).await?;
            self.commit_pooled(connection).await?;
            Ok(additions)
        })
        .await?;
        self.unrecorded.wary.store(!additions.is_empty(), Ordering::Relaxed);
        if !additions.is_empty() {
            tracing::debug!(additions = additions.join(", "), "the tables have more than the relay's own");
        }
        Ok(())
    }

    /// Proves that what is published can be recorded, and by a commit that the disk takes writes. A day that is missing is made.
    ///
    /// # Errors
    /// [`OutboxError::Unrecorded`] where something is refused or swallowed.
    pub(super) async fn prove(&self, connection: &mut PgConnection, begin: &str) -> Result<(), OutboxError> {
        let survivors = self.unrecorded.survivors().clone();
        let mut proven = self.try_to_prove(connection, begin, &survivors).await;
        if let Err(error) = &proven
            && is_missing_day(error)
        {
            self.add_days(connection).await.map_err(|not_made| proof::no_day(error, &not_made))?;
            proven = self.try_to_prove(connection, begin, &survivors).await;
        }
        match proven {
            Ok(tried) => {
                self.unrecorded.survivors().clear();
                self.unrecorded.failed.store(false, Ordering::Relaxed);
                if let Tried::Refused(why) = tried {
                    tracing::debug!(why, "a plain insert into event_outbox is refused");
                }
                Ok(())
            }
            Err(error) if is_content(&error) => Err(proof::unrecorded(connection, self.sql(), error).await),
            Err(error) => Err(query_failed("prove that the database takes writes", error)),
        }
    }

    async fn try_to_prove(
        &self,
        connection: &mut PgConnection,
        begin: &str,
        survivors: &[Survivor],
    ) -> Result<Tried, sqlx::Error> {
        let prove = async {
            connection.execute(AssertSqlSafe(begin.to_owned())).await?;
            let proven = proof::prove(connection, self.sql(), &self.config.worker, self.config.usage, survivors).await;
            let committed = connection.execute("commit").await;
            let tried = proven?;
            committed.map(|_| tried)
        };
        match tokio::time::timeout(STATEMENT_TIMEOUT, prove).await {
            Ok(proven) => proven,
            Err(_) => Err(sqlx::Error::Protocol("no answer in time".to_owned())),
        }
    }

    /// Settles what can be settled of a batch of which a settle failed with `error`, and parks the events that cannot. `held`:
    /// the claim was kept.
    pub(super) async fn salvage(
        &self,
        connection: &mut PgConnection,
        begin: &str,
        held: bool,
        deliveries: &[Delivery<'_>],
        error: sqlx::Error,
    ) -> Result<(), OutboxError> {
        self.unrecorded.wary.store(true, Ordering::Relaxed);
        tracing::warn!(
            error = words(&error),
            event_count = deliveries.len(),
            "a settle was refused; settling what can be settled"
        );
        let mut not_made = None;
        let salvaged = answered("settle", 10 * STATEMENT_TIMEOUT, async {
            self.take_again(connection, begin, held, deliveries).await?;
            if is_missing_day(&error) {
                if let Err(error_of_day) = self.add_days(connection).await {
                    not_made = Some(error_of_day);
                    return Ok(Err(error));
                }
                connection.execute(SAVEPOINT).await?;
                if self.write(connection, deliveries).await.is_ok() {
                    return Ok(Ok(()));
                }
                connection.execute(BACK).await?;
            }
            match proof::prove(connection, self.sql(), &self.config.worker, self.config.usage, &[]).await {
                Err(error) if is_content(&error) => Ok(Err(error)),
                Err(error) => Err(error),
                Ok(_) => self.halve(connection, deliveries).await.map(|halved| halved.map_or(Ok(()), Err)),
            }
        })
        .await?;
        match salvaged {
            Ok(()) => answered("settle", STATEMENT_TIMEOUT, connection.execute("commit")).await.map(drop),
            Err(error) => {
                self.unrecorded.failed.store(true, Ordering::Relaxed);
                let halved = !self.unrecorded.survivors().is_empty();
                let end = if halved && not_made.is_none() { "commit" } else { "rollback" };
                answered("settle", STATEMENT_TIMEOUT, connection.execute(end)).await?;
                match not_made {
                    Some(not_made) => Err(proof::no_day(&error, &not_made)),
                    None => Err(proof::unrecorded(connection, self.sql(), error).await),
                }
            }
        }
    }

    /// Goes back to before the settle, with the claim.
    async fn take_again(
        &self,
        connection: &mut PgConnection,
        begin: &str,
        held: bool,
        deliveries: &[Delivery<'_>],
    ) -> Result<(), sqlx::Error> {
        if held {
            connection.execute(BACK).await?;
            return Ok(());
        }
        connection.execute("rollback").await?;
        connection.execute(AssertSqlSafe(begin.to_owned())).await?;
        let partitions: Vec<i16> = deliveries.iter().map(|delivery| delivery.event.row.partition).collect();
        self.sql().query(TAKE_AGAIN).persistent(false).bind(partitions).execute(&mut *connection).await?;
        Ok(())
    }

    async fn write(&self, connection: &mut PgConnection, deliveries: &[Delivery<'_>]) -> Result<(), sqlx::Error> {
        self.write_records(connection, &Records::new(deliveries, self.config.usage.history)).await
    }

    async fn write_records(&self, connection: &mut PgConnection, records: &Records<'_>) -> Result<(), sqlx::Error> {
        Settle::new(connection, Sql { persistent: false, ..self.sql() }, &self.config.worker)
            .write(records)
            .await
            .map(drop)
    }

    /// Writes `records`, or nothing.
    ///
    /// # Errors
    /// The outer one: the transaction is lost.
    async fn try_records(
        &self,
        connection: &mut PgConnection,
        records: &Records<'_>,
    ) -> Result<Result<(), sqlx::Error>, sqlx::Error> {
        connection.execute(SAVEPOINT).await?;
        match self.write_records(connection, records).await {
            Ok(()) => {
                connection.execute("release savepoint before_settle").await?;
                Ok(Ok(()))
            }
            Err(error) if is_content(&error) => {
                connection.execute("rollback to savepoint before_settle; release savepoint before_settle").await?;
                Ok(Err(error))
            }
            Err(error) => Err(error),
        }
    }

    /// Settles by halves and parks what is refused alone. Returns why an event could not be parked either.
    async fn halve(
        &self,
        connection: &mut PgConnection,
        deliveries: &[Delivery<'_>],
    ) -> Result<Option<sqlx::Error>, sqlx::Error> {
        let groups: Vec<&[Delivery<'_>]> = deliveries.chunk_by(|a, b| std::ptr::eq(a.event, b.event)).collect();
        let mut ends = vec![0];
        for group in &groups {
            ends.push(ends[ends.len() - 1] + group.len());
        }
        let (mut parts, mut unparked) = (vec![(0, groups.len())], None);
        while let Some((start, end)) = parts.pop() {
            let deliveries = &deliveries[ends[start]..ends[end]];
            let records = Records::new(deliveries, self.config.usage.history);
            let Err(error) = self.try_records(connection, &records).await? else { continue };
            if end - start > 1 {
                let middle = start.midpoint(end);
                parts.extend([(middle, end), (start, middle)]);
                continue;
            }
            let Some(first) = deliveries.first() else { continue };
            if self.park(connection, &records, &words(&error)).await? {
                tracing::error!(
                    outbox_id = first.event.row.id,
                    event_id = %first.event.event_id,
                    event_type = first.event.event_type,
                    error = words(&error),
                    "an event cannot be settled; it is parked with the code {SETTLE_FAILED}, and published again only when \
                     somebody says so"
                );
            } else {
                let mut survivors = self.unrecorded.survivors();
                if survivors.len() < SURVIVORS {
                    let event = Event { payload: Vec::new(), ..first.event.clone() };
                    survivors.push(Survivor { event, moves: records.gone.is_empty() });
                }
                unparked = Some(error);
            }
        }
        Ok(unparked)
    }

    /// Whether the event of these records is parked now.
    async fn park(
        &self,
        connection: &mut PgConnection,
        records: &Records<'_>,
        reason: &str,
    ) -> Result<bool, sqlx::Error> {
        for parked in [records.parked(reason), records.parked_whole(reason)] {
            if self.try_records(connection, &parked).await?.is_ok() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
