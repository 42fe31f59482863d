//! Reads the rows of a batch.

use futures_util::TryStreamExt;
use sqlx::Row;
use sqlx::sqlite::SqliteConnection;

use crate::event::{ClaimId, MAX_HEADERS_BYTES, MAX_TEXT_BYTES};
use crate::outbox::sqlite::row::{self, Sizes};
use crate::outbox::{Claim, ClaimRequest, Claimed};

/// Reads pending rows: by priority, highest first, then in insertion order. `?1` is the largest number of rows; `?2` is the
/// largest payload, `?4` the largest headers and `?5` the largest of other texts, in bytes; `?3` are the destinations. Of a
/// row with larger values only the sizes are read. The statement checks for each row whether an earlier event of its key
/// waits, but only if any event waits at all. It returns the remaining wait, ten minutes at most. An earlier event that is
/// done and could not be recorded does not block its key. An event without attempts that has failed before has -1 attempts.
///
/// A row is one value: a JSON array and, after it, the payload. The driver passes each value from one thread to another, and
/// for nineteen values that took longer than all other work. It reads up to fifty rows ahead.
const READ_BATCH: &str = "
select case when octet_length(o.payload) > ?2 or octet_length(o.headers) > ?4 or octet_length(o.source) > ?5
    or octet_length(o.aggregate_type) > ?5 or octet_length(o.aggregate_id) > ?5 or octet_length(o.correlation_id) > ?5
    or octet_length(o.causation_id) > ?5
then json_array(o.row_id, o.partition, o.id, o.destination, o.event_id, o.event_type, '',
    case when octet_length(o.aggregate_type) <= ?5 then o.aggregate_type end,
    case when octet_length(o.aggregate_id) <= ?5 then o.aggregate_id end,
    null, null, null, o.schema_version, o.created_at,
    case when o.attempts = 0 and o.last_error is not null then -1 else o.attempts end,
    o.available_at <= (select strftime('%Y-%m-%d %H:%M:%f', 'now')), null, json_array(ifnull(octet_length(o.payload), 0),
    ifnull(octet_length(o.headers), 0), octet_length(o.source), octet_length(o.aggregate_type), octet_length(o.aggregate_id),
    octet_length(o.correlation_id), octet_length(o.causation_id)), 86400 * (julianday('now') - julianday(case when o.destination = '' and o.attempts = 0 and o.last_error is null
        and o.available_at > o.created_at then o.available_at else o.created_at end)))
else json_array(o.row_id, o.partition, o.id, o.destination, o.event_id, o.event_type, o.source, o.aggregate_type,
    o.aggregate_id, nullif(ifnull(o.headers, 'null'), '{}'), o.correlation_id, o.causation_id, o.schema_version, o.created_at,
    case when o.attempts = 0 and o.last_error is not null then -1 else o.attempts end,
    o.available_at <= (select strftime('%Y-%m-%d %H:%M:%f', 'now')),
    json(case when o.aggregate_id is not null and (
        select exists (
            select 1 from event_outbox where status = 'scheduled' and destination <> '' and aggregate_id is not null
        )
    ) then (
        select json_group_object(d.value, (
            select min(cast((julianday(w.available_at) - julianday('now')) * 86400000 as integer), 600000)
            from event_outbox w
            where w.status = 'scheduled' and w.destination <> '' and w.destination = d.value
              and w.aggregate_id is not null and w.aggregate_id = o.aggregate_id
              and coalesce(w.aggregate_type, '') = coalesce(o.aggregate_type, '')
              and w.priority = o.priority and w.id < o.id
              and (coalesce(w.last_error, '') not like 'settle_failed: %' or w.last_error like 'settle_failed: retry%')
            order by w.id
            limit 1
        ))
        from json_each(case o.destination when '' then ?3 else json_array(o.destination) end) d
    ) end), null, 86400 * (julianday('now') - julianday(case when o.destination = '' and o.attempts = 0 and o.last_error is null
        and o.available_at > o.created_at then o.available_at else o.created_at end)))
    || ifnull(o.payload, '') end
from event_outbox o
where o.partition < 640
order by o.partition, o.id, o.destination
limit ?1";

/// Reads the sizes in bytes of the rows that [`READ_BATCH`] reads.
const SIZES: &str = "
select ifnull(octet_length(o.payload), 0) + ifnull(octet_length(o.headers), 0) + ifnull(octet_length(o.source), 0)
    + ifnull(octet_length(o.aggregate_type), 0)
    + ifnull(octet_length(o.aggregate_id), 0) + ifnull(octet_length(o.correlation_id), 0)
    + ifnull(octet_length(o.causation_id), 0)
from event_outbox o
where o.partition < 640
order by o.partition, o.id, o.destination
limit ?1";

/// Payloads and headers up to this many bytes are small: fifty such rows may be read ahead into memory.
const SMALL: usize = 32 * 1024;

const EPOCH: &str = "select outbox_id, epoch, (select changes from event_relay_changes) from event_outbox_epoch";

/// Reads a batch, and the number of changes of the register and of the pauses. `large` keeps, from batch to batch, whether some
/// event is not small.
pub(super) async fn read(
    connection: &mut SqliteConnection,
    large: &mut bool,
    request: ClaimRequest<'_>,
) -> Result<(Claim, Option<i64>), sqlx::Error> {
    let small = SMALL.min(request.max_payload);
    let mut batch = Batch::default();
    if !*large {
        batch.read(connection, request, (request.max_events, small, SMALL)).await?;
        *large = batch.stopped_by.is_some();
    }
    if batch.claimed.is_empty() && *large {
        let rows = rows_within_bytes(connection, request).await?;
        batch = Batch::default();
        batch.read(connection, request, (rows, request.max_payload, MAX_HEADERS_BYTES)).await?;
        *large = batch.largest > small;
        batch.cut |= rows < request.max_events;
    }
    if batch.claimed.is_empty() {
        return Ok((Claim::Empty, None));
    }
    let full = batch.cut || batch.stopped_by.is_some() || batch.claimed.len() == request.max_events;
    let (outbox, epoch, changes): (String, i64, i64) = sqlx::query_as(EPOCH).fetch_one(connection).await?;
    let claim_id = ClaimId { outbox: outbox.into(), epoch, token: fastrand::u64(..) };
    Ok((Claim::Batch { claimed: batch.claimed, full, claim_id }, Some(changes)))
}

/// Returns how many of the first rows have about as many bytes as are requested; at least one.
async fn rows_within_bytes(connection: &mut SqliteConnection, request: ClaimRequest<'_>) -> Result<usize, sqlx::Error> {
    let mut sizes =
        sqlx::query_scalar(SIZES).bind(i64::try_from(request.max_events).unwrap_or(i64::MAX)).fetch(connection);
    let (mut rows, mut bytes) = (0, 0);
    while let Some(size) = sizes.try_next().await? {
        let size: i64 = size;
        bytes += usize::try_from(size).unwrap_or_default();
        if rows > 0 && bytes > request.max_bytes {
            break;
        }
        rows += 1;
    }
    Ok(rows.max(1))
}

/// The rows that were read.
#[derive(Default)]
struct Batch {
    claimed: Vec<Claimed>,
    bytes: usize,
    /// The size of the largest event.
    largest: usize,
    /// The batch was cut short by the limit in bytes.
    cut: bool,
    /// The batch was cut short by a row that was not read, because it is not small. These are its sizes.
    stopped_by: Option<Sizes>,
}

impl Batch {
    /// Reads this many rows, with payloads and headers up to these sizes.
    async fn read(
        &mut self,
        connection: &mut SqliteConnection,
        request: ClaimRequest<'_>,
        (rows, max_payload, max_headers): (usize, usize, usize),
    ) -> Result<(), sqlx::Error> {
        let number = |number| i64::try_from(number).unwrap_or(i64::MAX);
        let mut rows = sqlx::query(READ_BATCH)
            .bind(number(rows))
            .bind(number(max_payload))
            .bind(json_text(request.destinations))
            .bind(number(max_headers))
            .bind(number(MAX_TEXT_BYTES))
            .fetch(connection);
        while let Some(row) = rows.try_next().await? {
            if self.bytes >= request.max_bytes {
                self.cut = true;
                break;
            }
            let (mut claimed, sizes) = row::decode(row.try_get(0)?)?;
            if let Some(sizes) = sizes {
                let Some(defect) = sizes.defect(request.max_payload) else {
                    self.stopped_by = Some(sizes);
                    break;
                };
                self.bytes += sizes.total(); // settling it copies that
                claimed.defect = Some(defect);
            }
            let size = claimed.event.bytes();
            self.bytes += size;
            self.largest = self.largest.max(size);
            self.claimed.push(claimed);
        }
        Ok(())
    }
}

pub(super) fn json_text<T: AsRef<str>>(texts: &[T]) -> String {
    serde_json::Value::from_iter(texts.iter().map(AsRef::as_ref)).to_string()
}
