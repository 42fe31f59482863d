//! Settles what can be settled, after the database has refused or swallowed a settle because of its content.
//!
//! The events are published, and must not be published again. So the lane keeps the claim, or takes it again, and then:
//!
//! - If a day partition is missing, it adds that.
//! - If [`proof`] finds that nothing can be recorded, it gives the batch up, and no lane of this relay publishes until a proof
//!   succeeds.
//! - Otherwise some event is the reason. It settles the batch in halves until that event is alone, and parks it: the row says
//!   what became of the event and why that cannot be recorded, and waits until somebody acts. If the database refuses even
//!   that, the event is left out, see `left_out`.
//!
//! To keep a claim, a savepoint is needed, which is one more statement. So there is one only where somebody has added something
//! to the relay's tables that may refuse a write, or a write was refused lately. Elsewhere the claim is lost and taken again.
//! The other lanes of this relay claim nothing meanwhile; another relay may come in between, once.

use std::sync::atomic::Ordering;

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor};

use crate::event::Event;
use crate::outbox::Deliveries;
use crate::outbox::error::OutboxError;
use crate::outbox::postgres::connection::{STATEMENT_TIMEOUT, query_failed, with_timeout};
use crate::outbox::postgres::left_out::{MARK, Survivor};
use crate::outbox::postgres::proof;
use crate::outbox::postgres::refusal::{is_content, is_missing_day, words, words_and_cure};
use crate::outbox::postgres::savepoint::{BACK, CHECK_DEFERRED, KEEP, SAVEPOINT, UNDO};
use crate::outbox::postgres::settle::SettleWriter;
use crate::outbox::postgres::sql::Sql;
use crate::outbox::postgres::store::PgOutbox;
use crate::outbox::postgres::tid;
use crate::outbox::proof::ProofRows;
use crate::outbox::records::{Records, SETTLE_FAILED};

/// Takes partitions again, in the order of their numbers, as every relay that waits for partitions does. In another order two
/// relays could wait for each other.
const TAKE_AGAIN: &str = "
select pg_catalog.pg_advisory_xact_lock('{schema}.event_outbox'::regclass::oid::int, partition::int)
from (select distinct pg_catalog.unnest($1::smallint[]) as partition order by 1) p";

impl PgOutbox {
    /// Finds out whether the application has added anything to the tables that may refuse a write.
    pub(super) async fn look_at_additions(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        let additions = with_timeout("look at what was added to the tables", STATEMENT_TIMEOUT, async {
            self.begin_pooled(connection).await?;
            let additions = proof::additions(connection, self.sql()).await?;
            self.commit_pooled(connection).await?;
            Ok(additions)
        })
        .await?;
        self.refused_writes.wary.store(!additions.is_empty(), Ordering::Relaxed);
        if !additions.is_empty() {
            tracing::debug!(additions = additions.join(", "), "the tables have more than the relay's own");
        }
        Ok(())
    }

    /// Proves that published events can be recorded, and by a commit that the disk takes writes. Adds a day partition that is
    /// missing.
    ///
    /// # Errors
    /// [`OutboxError::Unrecorded`] if a write is refused or swallowed.
    pub(super) async fn prove(&self, connection: &mut PgConnection, begin: &str) -> Result<(), OutboxError> {
        let survivors = self.refused_writes.left_out.too_many();
        let mut proven = self.try_to_prove(connection, begin, &survivors).await;
        if let Err(error) = &proven
            && is_missing_day(error)
        {
            self.add_days(connection).await.map_err(|not_made| proof::no_day(error, &not_made))?;
            proven = self.try_to_prove(connection, begin, &survivors).await;
        }
        match proven {
            Ok(tried) => {
                survivors.iter().for_each(|survivor| self.refused_writes.left_out.forget(survivor));
                self.refused_writes.failed.store(false, Ordering::Relaxed);
                if let ProofRows::Existing(why) = tried {
                    tracing::debug!(why, "a plain insert into event_outbox is refused");
                }
                Ok(())
            }
            Err(error) if is_content(&error) => {
                Err(proof::unrecorded(connection, self.sql(), self.config.usage, error).await)
            }
            Err(error) => Err(query_failed("prove that the database takes writes", error)),
        }
    }

    /// From time to time, tries whether events that were left out can be settled by now. Those are published again.
    pub(super) async fn try_kept(&self, connection: &mut PgConnection, begin: &str) -> Result<(), OutboxError> {
        for survivor in self.refused_writes.left_out.to_try() {
            match self.try_to_prove(connection, begin, std::slice::from_ref(&survivor)).await {
                Ok(_) => self.refused_writes.left_out.forget(&survivor),
                Err(error) if is_content(&error) => {}
                Err(error) => return Err(query_failed("prove that an event can be settled", error)),
            }
        }
        Ok(())
    }

    async fn try_to_prove(
        &self,
        connection: &mut PgConnection,
        begin: &str,
        survivors: &[Survivor],
    ) -> Result<ProofRows, sqlx::Error> {
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

    /// Settles what can be settled of a batch whose settle failed with `error`, and parks the other events. `held`: the claim
    /// was kept.
    pub(super) async fn salvage(
        &self,
        connection: &mut PgConnection,
        begin: &str,
        held: bool,
        deliveries: &Deliveries<'_>,
        error: sqlx::Error,
    ) -> Result<(), OutboxError> {
        self.refused_writes.wary.store(true, Ordering::Relaxed);
        tracing::warn!(
            error = words(&error),
            event_count = deliveries.by_event().count(),
            "a settle was refused; settling what can be settled"
        );
        let (mut not_made, mut halved) = (None, false);
        let salvaged = with_timeout("settle", 10 * STATEMENT_TIMEOUT, async {
            self.take_again(connection, begin, held, deliveries).await?;
            if is_missing_day(&error) {
                if let Err(error_of_day) = self.add_days(connection).await {
                    not_made = Some(error_of_day);
                    return Ok(Err(error));
                }
                let records = Records::new(deliveries.by_event(), self.config.usage.history);
                if self.try_records(connection, &records).await?.is_ok() {
                    return Ok(Ok(()));
                }
            }
            match proof::prove(connection, self.sql(), &self.config.worker, self.config.usage, &[]).await {
                Err(error) if is_content(&error) => Ok(Err(error)),
                Err(error) => Err(error),
                Ok(_) => {
                    halved = true;
                    self.halve(connection, deliveries).await.map(|unparked| unparked.map_or(Ok(()), Err))
                }
            }
        })
        .await?;
        match salvaged {
            Ok(()) => with_timeout("settle", STATEMENT_TIMEOUT, connection.execute("commit")).await.map(drop),
            Err(error) => {
                self.refused_writes.failed.store(true, Ordering::Relaxed);
                let end = if halved { "commit" } else { "rollback" };
                with_timeout("settle", STATEMENT_TIMEOUT, connection.execute(end)).await?;
                match not_made {
                    Some(not_made) => Err(proof::no_day(&error, &not_made)),
                    None => Err(proof::unrecorded(connection, self.sql(), self.config.usage, error).await),
                }
            }
        }
    }

    /// Goes back to the state before the settle, and holds the claim.
    async fn take_again(
        &self,
        connection: &mut PgConnection,
        begin: &str,
        held: bool,
        deliveries: &Deliveries<'_>,
    ) -> Result<(), sqlx::Error> {
        if held {
            connection.execute(BACK).await?;
            return Ok(());
        }
        connection.execute("rollback").await?;
        connection.execute(AssertSqlSafe(begin.to_owned())).await?;
        let partitions: Vec<i16> = deliveries.by_event().map(|(event, _)| event.row.partition).collect();
        self.sql().query(TAKE_AGAIN).persistent(false).bind(partitions).execute(&mut *connection).await?;
        Ok(())
    }

    async fn write_records(&self, connection: &mut PgConnection, records: &Records<'_>) -> Result<(), sqlx::Error> {
        SettleWriter::new(&mut *connection, Sql { persistent: false, ..self.sql() }, &self.config.worker)
            .write(records)
            .await?;
        connection.execute(CHECK_DEFERRED).await.map(drop)
    }

    /// Writes all of `records`, or nothing.
    ///
    /// # Errors
    /// The outer error means that the transaction is lost, the inner one that the records were refused.
    async fn try_records(
        &self,
        connection: &mut PgConnection,
        records: &Records<'_>,
    ) -> Result<Result<(), sqlx::Error>, sqlx::Error> {
        connection.execute(SAVEPOINT).await?;
        match self.write_records(connection, records).await {
            Ok(()) => {
                connection.execute(KEEP).await?;
                Ok(Ok(()))
            }
            Err(error) if is_content(&error) => {
                connection.execute(UNDO).await?;
                Ok(Err(error))
            }
            Err(error) => Err(error),
        }
    }

    /// Settles by halves. An event that is refused alone is parked, or left out. Returns the error of an event that could not
    /// be parked either, if too many are left out already.
    async fn halve(
        &self,
        connection: &mut PgConnection,
        deliveries: &Deliveries<'_>,
    ) -> Result<Option<sqlx::Error>, sqlx::Error> {
        let groups: Vec<_> = deliveries.by_event().collect();
        let (mut parts, mut unparked) = (vec![(0, groups.len())], None);
        while let Some((start, end)) = parts.pop() {
            let records = Records::new(groups[start..end].iter().copied(), self.config.usage.history);
            let Err(error) = self.try_records(connection, &records).await? else { continue };
            if end - start > 1 {
                let middle = start.midpoint(end);
                parts.extend([(middle, end), (start, middle)]);
                continue;
            }
            let Some(&(event, _)) = groups.get(start) else { continue };
            let reason = words_and_cure(&error);
            let (row, event_type) = (&event.row, &event.event_type);
            if self.park(connection, &records, &reason).await? {
                tracing::error!(
                    outbox_id = row.id,
                    event_id = %event.event_id,
                    event_type,
                    error = reason,
                    "an event cannot be settled; it is parked with the code {SETTLE_FAILED}, and published again only when \
                     somebody says so"
                );
                continue;
            }
            let marked = self.mark_row(connection, &records, &reason).await?;
            tracing::error!(
                outbox_id = row.id,
                event_id = %event.event_id,
                event_type,
                noted = marked,
                error = reason,
                "an event can be neither settled nor parked; it is left out, and the others go on"
            );
            if !marked {
                let event = Event { payload: Vec::new(), ..event.clone() };
                let survivor = Survivor { event, still_owed: records.gone.is_empty() };
                if !self.refused_writes.left_out.remember(survivor, reason) {
                    unparked = Some(error);
                }
            }
        }
        Ok(unparked)
    }

    /// Parks the event of these records. Returns whether that succeeded.
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

    /// Writes what became of an event into its row, which keeps its place. Returns whether that succeeded.
    async fn mark_row(
        &self,
        connection: &mut PgConnection,
        records: &Records<'_>,
        reason: &str,
    ) -> Result<bool, sqlx::Error> {
        let parked = records.parked_whole(reason);
        let Some(owed) = parked.moved.first() else { return Ok(false) };
        let row = &owed.event.row;
        connection.execute(SAVEPOINT).await?;
        let marked = async {
            let query = self.sql().query_scalar(MARK).persistent(false);
            let query = query.bind(tid::from_locator(row.locator)).bind(row.id).bind(owed.error.as_deref());
            let marked: Option<bool> = query.fetch_optional(&mut *connection).await?;
            connection.execute(CHECK_DEFERRED).await?;
            Ok(marked == Some(true))
        };
        match marked.await {
            Ok(true) => {
                connection.execute(KEEP).await?;
                Ok(true)
            }
            Err(error) if !is_content(&error) => Err(error),
            _ => {
                connection.execute(UNDO).await?;
                Ok(false)
            }
        }
    }
}
