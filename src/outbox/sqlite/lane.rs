//! Claim and settle: the protocol of a lane.
//!
//! A claim is a read that has ended: the relay that owns the file remembers, in memory, that one of its lanes has a batch,
//! and nobody else takes any. So nothing at all is locked while events are published.
//!
//! A settle that fails is kept and repeated before anything else is claimed. What is published already is not published
//! again because the disk was full or another program held the write lock for too long.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt;
use sqlx::Row;
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use time::PrimitiveDateTime;
use tokio::sync::OwnedMutexGuard;
use uuid::Uuid;

use crate::event::{Event, Fault, PublishError, RowKey};
use crate::outbox::records::Records;
use crate::outbox::sqlite::settle::Settle;
use crate::outbox::sqlite::{SqliteOutbox, answered};
use crate::outbox::{Behind, Claim, ClaimRequest, Claimed, Delivery, Lane, OutboxError, Promoted};

/// Reads pending rows, urgent first, each priority in insertion order: `?1` at most so many; `?2` payload limit; `?3`
/// destinations. What waits behind a failed event of its key is asked per row only where anything waits at all.
const READ_BATCH: &str = "
select o.row_id, o.partition, o.id, o.destination, o.event_id, o.event_type, o.source, o.aggregate_type, o.aggregate_id,
       case when octet_length(o.payload) <= ?2 then o.payload end, nullif(o.headers, '{}'), o.correlation_id,
       o.causation_id, o.schema_version, o.created_at, o.attempts,
       o.available_at <= (select strftime('%Y-%m-%d %H:%M:%f', 'now')), octet_length(o.payload),
       case when o.aggregate_id is not null and (
           select exists (
               select 1 from event_outbox where status = 'scheduled' and destination <> '' and aggregate_id is not null
           )
       ) then (
           select json_group_object(d.value, (
               select cast((julianday(w.available_at) - julianday('now')) * 86400000 as integer)
               from event_outbox w
               where w.status = 'scheduled' and w.destination <> '' and w.destination = d.value
                 and w.aggregate_id is not null and w.aggregate_id = o.aggregate_id
                 and coalesce(w.aggregate_type, '') = coalesce(o.aggregate_type, '')
                 and w.priority = o.priority and w.id < o.id
               order by w.id
               limit 1
           ))
           from json_each(case o.destination when '' then ?3 else json_array(o.destination) end) d
       ) end
from event_outbox o
where o.partition < 640
order by o.partition, o.id, o.destination
limit ?1";

/// The due rows of each destination, its earliest first, and the milliseconds until its next one: `?1` destinations,
/// `?2` at most so many of each.
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
)
from json_each(?1) d";

/// Makes rows pending. Needs no claim: whoever has one sees such a row either waiting, and its key behind it, or pending.
const PROMOTE: &str = "
update event_outbox set status = 'pending' where status = 'scheduled' and row_id in (select value from json_each(?1))";

const HAS_OWED: &str = "select exists (select 1 from event_outbox where status = 'scheduled' and destination <> '')";

/// See the module.
pub struct SqliteLane {
    outbox: SqliteOutbox,
    connection: Option<SqliteConnection>,
    /// This lane has a batch.
    claim: Option<OwnedMutexGuard<()>>,
    /// What could not be recorded; goes with `claim`.
    unsettled: Option<Settle>,
}

impl SqliteLane {
    pub(super) fn new(outbox: SqliteOutbox) -> Self {
        Self { outbox, connection: None, claim: None, unsettled: None }
    }

    async fn connection(&mut self) -> Result<SqliteConnection, OutboxError> {
        match self.connection.take() {
            Some(connection) => Ok(connection),
            None => self.outbox.connect().await,
        }
    }

    /// Records what is left to record, and gives up the claim.
    async fn finish(&mut self) -> Result<(), OutboxError> {
        if let Some(settle) = &self.unsettled
            && !settle.is_empty()
        {
            let mut connection = match self.connection.take() {
                Some(connection) => connection,
                None => self.outbox.connect().await?,
            };
            answered("settle", settle.write(&mut connection, &self.outbox.config.worker)).await?;
            self.connection = Some(connection);
        }
        self.unsettled = None;
        self.claim = None;
        Ok(())
    }
}

impl Lane for SqliteLane {
    async fn claim(&mut self, request: ClaimRequest<'_>) -> Result<Claim, OutboxError> {
        self.finish().await?;
        if !self.outbox.owns()? {
            return Ok(Claim::Busy);
        }
        let Ok(claim) = Arc::clone(&self.outbox.claim).try_lock_owned() else { return Ok(Claim::Busy) };
        let mut connection = self.connection().await?;
        let batch = answered("claim events", read_batch(&mut connection, request)).await?;
        self.connection = Some(connection);
        if matches!(batch, Claim::Batch { .. }) {
            self.claim = Some(claim);
        }
        Ok(batch)
    }

    async fn settle(&mut self, deliveries: &[Delivery<'_>]) -> Result<(), OutboxError> {
        self.unsettled = Some(Settle::new(&Records::new(deliveries, self.outbox.config.history)));
        self.finish().await
    }

    async fn promote(&mut self, destinations: &[&str], max_events: usize) -> Result<Promoted, OutboxError> {
        let mut connection = self.connection().await?;
        let destinations: Vec<&str> = std::iter::once("").chain(destinations.iter().copied()).collect();
        let promoted = answered("promote scheduled events", async {
            let due: Vec<(String, Option<i64>)> = sqlx::query_as(DUE)
                .bind(json_text(&destinations))
                .bind(i64::try_from(max_events).unwrap_or(i64::MAX))
                .fetch_all(&mut connection)
                .await?;
            let mut promoted = Promoted { count: 0, next_due: None };
            for (rows, next_due_ms) in due {
                // Most of the time nothing is due, and then no write lock is taken.
                if rows != "[]" {
                    let count = sqlx::query(PROMOTE).bind(rows).execute(&mut connection).await?.rows_affected();
                    promoted.count += usize::try_from(count).unwrap_or_default();
                }
                let next_due = next_due_ms.map(milliseconds);
                promoted.next_due = promoted.next_due.into_iter().chain(next_due).min();
            }
            Ok(promoted)
        })
        .await?;
        self.connection = Some(connection);
        Ok(promoted)
    }

    async fn has_owed(&mut self) -> Result<bool, OutboxError> {
        let mut connection = self.connection().await?;
        let owed = answered("look for events still owed", async {
            sqlx::query_scalar(HAS_OWED).fetch_one(&mut connection).await
        })
        .await?;
        self.connection = Some(connection);
        Ok(owed)
    }
}

async fn read_batch(connection: &mut SqliteConnection, request: ClaimRequest<'_>) -> Result<Claim, sqlx::Error> {
    let mut rows = sqlx::query(READ_BATCH)
        .bind(i64::try_from(request.max_events).unwrap_or(i64::MAX))
        .bind(i64::try_from(request.max_payload).unwrap_or(i64::MAX))
        .bind(json_text(request.destinations))
        .fetch(connection);
    let (mut claimed, mut bytes) = (Vec::new(), 0);
    while bytes < request.max_bytes
        && let Some(row) = rows.try_next().await?
    {
        let (event, size) = read_claimed(&row, request.max_payload)?;
        claimed.push(event);
        bytes += size;
    }
    if claimed.is_empty() {
        return Ok(Claim::Empty);
    }
    let full = claimed.len() == request.max_events || bytes >= request.max_bytes;
    Ok(Claim::Batch { claimed, full })
}

/// Decodes a row of [`READ_BATCH`], and the size of its payload.
fn read_claimed(row: &SqliteRow, max_payload: usize) -> Result<(Claimed, usize), sqlx::Error> {
    let mut defect = None;
    // SQLite keeps whatever bytes it is given as text.
    let mut text = |index: usize| -> Result<Option<String>, sqlx::Error> {
        let bytes: Option<&[u8]> = row.try_get(index)?;
        Ok(bytes.map(|bytes| match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => {
                defect = Some(PublishError::new(Fault::Unfit, "not_utf8", "a column holds text that is not UTF-8"));
                String::from_utf8_lossy(bytes).into_owned()
            }
        }))
    };
    let (destination, event_id, event_type, source) = (text(3)?, text(4)?, text(5)?, text(6)?);
    let (aggregate_type, aggregate_id, payload) = (text(7)?, text(8)?, text(9)?);
    let (headers, correlation_id, causation_id) = (text(10)?, text(11)?, text(12)?);
    let size = usize::try_from(row.try_get::<i64, _>(17)?).unwrap_or_default();
    if size > max_payload {
        defect = Some(PublishError::new(
            Fault::Unfit,
            "payload_too_large",
            format!("the payload has {size} bytes, EVENT_MAX_PAYLOAD_SIZE allows {max_payload}"),
        ));
    }
    let headers = match headers.map(|headers| serde_json::from_str::<BTreeMap<String, String>>(&headers)) {
        None => Vec::new(),
        Some(Ok(headers)) => headers.into_iter().collect(),
        Some(Err(error)) => {
            let message = format!("the headers are not a flat map of strings ({:?} error)", error.classify());
            defect = Some(PublishError::new(Fault::Unfit, "headers_invalid", message));
            Vec::new()
        }
    };
    let behind: BTreeMap<String, Option<i64>> = match row.try_get::<Option<&str>, _>(18)? {
        None => BTreeMap::new(),
        Some(json) => serde_json::from_str(json).map_err(|error| sqlx::Error::Decode(error.into()))?,
    };
    let event_id = event_id.as_deref().unwrap_or_default();
    let claimed = Claimed {
        event: Event {
            row: RowKey {
                locator: row.try_get(0)?,
                partition: row.try_get(1)?,
                id: row.try_get(2)?,
                destination: destination.unwrap_or_default(),
            },
            // A CHECK of the schema.
            event_id: Uuid::parse_str(event_id).map_err(|error| sqlx::Error::Decode(error.into()))?,
            event_type: event_type.unwrap_or_default(),
            source: source.unwrap_or_default(),
            aggregate_type,
            aggregate_id,
            payload: payload.unwrap_or_default().into_bytes(),
            headers,
            correlation_id,
            causation_id,
            schema_version: row.try_get(13)?,
            created_at: row.try_get::<PrimitiveDateTime, _>(14)?.assume_utc(),
            attempts: row.try_get(15)?,
        },
        due: row.try_get(16)?,
        defect,
        behind: behind
            .into_iter()
            .filter_map(|(destination, ms)| Some(Behind { destination, remaining: milliseconds(ms?) }))
            .collect(),
    };
    Ok((claimed, size))
}

/// A time that has passed is no time.
fn milliseconds(ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or_default())
}

fn json_text<T: AsRef<str>>(texts: &[T]) -> String {
    serde_json::Value::from_iter(texts.iter().map(AsRef::as_ref)).to_string()
}
