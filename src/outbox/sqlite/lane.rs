//! Claims and settles: the work of a lane with the file.
//!
//! A claim is a read transaction that has ended. The relay that owns the file keeps in memory which of its lanes has a batch,
//! and no other lane claims meanwhile. So nothing is locked while events are published.
//!
//! A settle that fails is kept and repeated, by whichever lane comes next, before anything else is claimed. So a full disk,
//! or another program that held the write lock for too long, does not cause events to be published again.

use std::sync::Arc;
use std::time::Instant;

use sqlx::Executor;
use sqlx::sqlite::SqliteConnection;
use tokio::sync::OwnedMutexGuard;

use crate::event::{RenewedClaim, SentBefore};
use crate::outbox::number::milliseconds;
use crate::outbox::records::Records;
use crate::outbox::sqlite::batch::{self, json_text};
use crate::outbox::sqlite::connection::{Connected, query_failed, run_query};
use crate::outbox::sqlite::proof::{self, is_content};
use crate::outbox::sqlite::schema;
use crate::outbox::sqlite::settle::SettleScript;
use crate::outbox::sqlite::store::SqliteOutbox;
use crate::outbox::sqlite::turn::Turn;
use crate::outbox::{Claim, ClaimRequest, Deliveries, Lane, NO_DESTINATION, OutboxError, Peek, Promoted};

/// Reads the due rows of each destination, earliest first, and the milliseconds until its next row is due: `?1` are the
/// destinations, `?2` is the largest number of rows of each.
const DUE: &str = "
select (
    select json_group_array(row_id) from (
        select row_id from event_outbox
        where status = 'scheduled' and destination = d.value and available_at <= strftime('%Y-%m-%d %H:%M:%f', 'now')
        order by available_at, id limit ?2
    )
), (
    select cast((julianday(min(available_at)) - julianday('now')) * 86400000 as integer) from event_outbox
    where status = 'scheduled' and destination = d.value and available_at > strftime('%Y-%m-%d %H:%M:%f', 'now')
), (select changes from event_relay_changes)
from json_each(?1) d";

/// Makes rows pending. This needs no claim: a claim sees such a row either as scheduled, with later events of its key behind
/// it, or as pending.
const PROMOTE: &str = "
update event_outbox set status = 'pending' where status = 'scheduled' and row_id in (select value from json_each(?1))";

/// Checks whether any event is pending or due. `?1` are the destinations.
const PEEK: &str = "
select exists (select 1 from event_outbox where partition < 640), (
    select cast((julianday(min(head.available_at)) - julianday('now')) * 86400000 as integer)
    from (
        select (
            select min(available_at) from event_outbox where status = 'scheduled' and destination = d.value
        ) as available_at
        from json_each(?1) d
    ) head
)";

const RAISE_EPOCH: &str = "update event_outbox_epoch set epoch = max(epoch, ?1) + 1 returning epoch";

/// Reads which events are still pending: `?1` are row ids and event ids, `?2` is the destination. A row that was scheduled
/// for one destination is a copy.
const PENDING: &str = "
select e.key from json_each(?1) e
where exists (
    select 1 from event_outbox o
    where o.partition in (e.value ->> 0, (e.value ->> 0) + 640) and o.id = e.value ->> 1 and lower(o.event_id) = e.value ->> 2
      and o.destination in ('', ?2)
)";

const LAST_ID: &str = "select max(id) from event_outbox where partition < 640";

const IS_PENDING_UP_TO: &str = "select exists (select 1 from event_outbox where partition < 640 and id <= ?1)";

/// Whether any event is still owed. An event of an unknown format, and an event behind it, is not owed to a single
/// destination, but it is due all the same.
const HAS_OWED: &str = "
select exists (select 1 from event_outbox where status = 'scheduled' and destination <> '')
    or exists (
        select 1 from event_outbox
        where status = 'scheduled' and destination = '' and available_at = '9999-12-31 23:59:59' and format <> 0
    )";

impl Turn {
    /// Writes the settles that are still to be recorded.
    async fn record(&mut self, outbox: &SqliteOutbox) -> Result<(), OutboxError> {
        while let Some((settle, file)) = self.unsettled.last()
            && !settle.is_empty()
        {
            let mut connection = outbox.connect_unless(self.connection.take()).await?;
            if connection.file != *file {
                // In the present file these ids belong to other events.
                tracing::warn!(
                    event_count = settle.rows(),
                    "the database file was replaced while its events were published; that cannot be recorded, and what is pending in the new file is published"
                );
                self.unsettled.pop();
                self.connection = Some(connection);
                continue;
            }
            let begun = Instant::now();
            let written = async {
                self.traffic.give_way(&mut connection).await?;
                settle.write(&mut connection, &outbox.config.worker).await?;
                self.traffic.settled(begun.elapsed());
                Ok(())
            };
            match written.await {
                Ok(()) => drop(self.unsettled.pop()),
                Err(error) if is_content(&error) => self.salvage(outbox, &mut connection).await?,
                Err(error) => return Err(query_failed("settle", error)),
            }
            self.connection = Some(connection);
        }
        self.unsettled.clear();
        Ok(())
    }

    /// Handles a settle that cannot be recorded as it is: finds out whether the file records nothing, or refuses single
    /// events.
    async fn salvage(&mut self, outbox: &SqliteOutbox, connection: &mut SqliteConnection) -> Result<(), OutboxError> {
        let Some((settle, file)) = self.unsettled.last() else { return Ok(()) };
        let file = *file;
        drop(connection.execute("rollback").await);
        let config = &outbox.config;
        proof::prove(connection, &config.worker, config.usage).await?;
        let salvaged = run_query("settle", proof::salvage(connection, &config.worker, settle)).await?;
        self.unsettled.pop();
        self.unsettled.extend(salvaged.left.into_iter().map(|left| (left, file)));
        match salvaged.error {
            Some(error) => Err(proof::unrecorded(connection, error).await),
            None => Ok(()),
        }
    }

    async fn read(
        &mut self,
        outbox: &SqliteOutbox,
        request: ClaimRequest<'_>,
    ) -> Result<(Claim, Option<i64>), OutboxError> {
        let mut connection = outbox.connect_unless(self.connection.take()).await?;
        if self.fits != Some(connection.file) {
            schema::require_fit(&mut connection).await?;
            self.fits(connection.file);
        }
        let batch = run_query("claim events", async {
            self.traffic.look(&mut connection).await?;
            let max_events = self.traffic.events(request.max_events);
            batch::read(&mut connection, &mut self.large, ClaimRequest { max_events, ..request }).await
        })
        .await?;
        self.connection = Some(connection);
        Ok(batch)
    }
}

/// A lane of a SQLite outbox.
pub struct SqliteLane {
    outbox: SqliteOutbox,
    /// Locked while this lane has a batch.
    turn: Option<OwnedMutexGuard<Turn>>,
    /// The connection for everything but claims. Another lane may have a claim meanwhile.
    connection: Option<Connected>,
}

impl SqliteLane {
    pub(super) fn new(outbox: SqliteOutbox) -> Self {
        Self { outbox, turn: None, connection: None }
    }

    async fn connection(&mut self) -> Result<Connected, OutboxError> {
        self.outbox.connect_unless(self.connection.take()).await
    }

    /// Runs one query.
    async fn ask<T>(
        &mut self,
        operation: &'static str,
        query: impl AsyncFnOnce(&mut SqliteConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, OutboxError> {
        let mut connection = self.connection().await?;
        let answer = run_query(operation, query(&mut connection)).await?;
        self.connection = Some(connection);
        Ok(answer)
    }
}

impl Lane for SqliteLane {
    async fn claim(&mut self, request: ClaimRequest<'_>) -> Result<Claim, OutboxError> {
        if !self.outbox.owns()? {
            return Ok(Claim::Busy);
        }
        let Ok(mut turn) = Arc::clone(&self.outbox.turn).try_lock_owned() else {
            return Ok(Claim::Busy);
        };
        turn.record(&self.outbox).await?;
        let (batch, changes) = turn.read(&self.outbox, request).await?;
        if let Some(changes) = changes {
            self.outbox.learn(changes).await?;
        }
        if matches!(batch, Claim::Batch { .. }) {
            self.turn = Some(turn);
        }
        Ok(batch)
    }

    async fn renew(
        &mut self,
        floor: i64,
        noted: &[SentBefore],
        destination: &str,
    ) -> Result<RenewedClaim, OutboxError> {
        let Some(turn) = &mut self.turn else {
            return Err(OutboxError::File {
                operation: "renew a claim that is not held",
                source: std::io::ErrorKind::NotFound.into(),
            });
        };
        let mut connection = self.outbox.connect_unless(turn.connection.take()).await?;
        let noted = serde_json::Value::from_iter(
            noted.iter().map(|noted| serde_json::json!([noted.partition, noted.id, noted.event_id])),
        );
        let renewed = run_query("renew the claim", async {
            let epoch = sqlx::query_scalar(RAISE_EPOCH).bind(floor).fetch_one(&mut *connection).await?;
            let places: Vec<i64> = sqlx::query_scalar(PENDING)
                .bind(noted.to_string())
                .bind(destination)
                .fetch_all(&mut *connection)
                .await?;
            Ok(RenewedClaim {
                epoch,
                pending: places.into_iter().filter_map(|place| usize::try_from(place).ok()).collect(),
            })
        })
        .await?;
        turn.connection = Some(connection);
        Ok(renewed)
    }

    async fn settle(&mut self, deliveries: &Deliveries<'_>) -> Result<(), OutboxError> {
        let Some(mut turn) = self.turn.take() else { return Ok(()) };
        if let Some(file) = turn.fits {
            let settle = SettleScript::new(&Records::new(deliveries.by_event(), self.outbox.config.usage.history));
            turn.unsettled.push((settle, file));
        }
        turn.record(&self.outbox).await
    }

    async fn promote(&mut self, destinations: &[&str], max_events: usize) -> Result<Promoted, OutboxError> {
        let mut connection = self.connection().await?;
        let destinations: Vec<&str> = std::iter::once(NO_DESTINATION).chain(destinations.iter().copied()).collect();
        let (promoted, swallowed, changes) = run_query("promote scheduled events", async {
            let due: Vec<(String, Option<i64>, i64)> = sqlx::query_as(DUE)
                .bind(json_text(&destinations))
                .bind(i64::try_from(max_events).unwrap_or(i64::MAX))
                .fetch_all(&mut *connection)
                .await?;
            let mut promoted = Promoted { count: 0, next_due: None };
            let (mut swallowed, mut changes) = (false, None);
            for (rows, next_due_ms, counted) in due {
                changes = Some(counted);
                // Most of the time nothing is due. Then no write lock is taken.
                if rows != "[]" {
                    let due = rows.split(',').count();
                    let count = sqlx::query(PROMOTE).bind(rows).execute(&mut *connection).await?.rows_affected();
                    swallowed |= usize::try_from(count).is_ok_and(|count| count < due);
                    promoted.count += usize::try_from(count).unwrap_or_default();
                }
                let next_due = next_due_ms.map(milliseconds);
                promoted.next_due = promoted.next_due.into_iter().chain(next_due).min();
            }
            Ok((promoted, swallowed, changes))
        })
        .await?;
        if swallowed {
            // The update has no effect for all rows, which stops the relay, or only for some.
            let config = &self.outbox.config;
            proof::prove(&mut connection, &config.worker, config.usage).await?;
            tracing::warn!(
                "scheduled events are due, and an update of their rows to `pending` has no effect: look at the triggers on event_outbox"
            );
        }
        if let Some(changes) = changes {
            self.outbox.learn(changes).await?;
        }
        self.connection = Some(connection);
        Ok(promoted)
    }

    async fn peek(&mut self, destinations: &[&str]) -> Result<Peek, OutboxError> {
        let mut connection = self.connection().await?;
        let destinations: Vec<&str> = std::iter::once(NO_DESTINATION).chain(destinations.iter().copied()).collect();
        let (pending, next_due_ms): (bool, Option<i64>) = run_query("ask whether there are events", async {
            sqlx::query_as(PEEK).bind(json_text(&destinations)).fetch_one(&mut *connection).await
        })
        .await?;
        self.connection = Some(connection);
        Ok(Peek { pending, next_due: next_due_ms.map(milliseconds) })
    }

    async fn has_owed(&mut self) -> Result<bool, OutboxError> {
        self.ask("look for events still owed", async |connection| {
            sqlx::query_scalar(HAS_OWED).fetch_one(connection).await
        })
        .await
    }

    async fn last_id(&mut self) -> Result<Option<i64>, OutboxError> {
        self.ask("look for the last event", async |connection| sqlx::query_scalar(LAST_ID).fetch_one(connection).await)
            .await
    }

    async fn is_pending_up_to(&mut self, id: i64) -> Result<bool, OutboxError> {
        self.ask("look whether others are done", async |connection| {
            sqlx::query_scalar(IS_PENDING_UP_TO).bind(id).fetch_one(connection).await
        })
        .await
    }
}
