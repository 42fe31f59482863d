//! Reading a batch, and decoding its rows.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::time::Duration;

use foldhash::{HashMap, HashMapExt};
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{Row, ValueRef};
use time::OffsetDateTime;

use crate::event::{Event, Fault, PublishError, RowKey};
use crate::outbox::postgres::lane::to_i64;
use crate::outbox::postgres::sql::Sql;
use crate::outbox::postgres::take::MOVES;
use crate::outbox::postgres::tid;
use crate::outbox::{Behind, ClaimRequest, Claimed, decode};

/// Reads the rows of the partitions just taken. It must be a statement of its own, after the one that took the locks:
/// one statement would read with a snapshot from before them, and publish again what the last owner has just settled.
///
/// `$1` partitions; of each of them at most `$2` events, so that nothing need be sorted; `$3` the largest payload to give, by
/// its size; `$4` destinations; `$5` for each partition the id above which to read. What waits behind a failed event of its key is asked per row only
/// where anything waits at all, and not behind one that is done and could not be recorded. Of times, those that no calendar has are null: a driver panics at them. Whoever waits asks again in ten minutes: what
/// holds up its key may wait for a person, who lets it go earlier.
const READ_BATCH: &str = "
select o.ctid::text, o.partition, o.id, o.destination, o.event_id, o.event_type, o.source, o.aggregate_type, o.aggregate_id,
       case when o.size <= $3 then o.payload end, nullif(o.headers, '{}'), o.correlation_id, o.causation_id,
       o.schema_version, case when o.created_at >= '0001-01-01Z' and o.created_at < '10000-01-01Z' then o.created_at end,
       o.attempts, o.available_at <= pg_catalog.statement_timestamp(), o.size,
       case when waiting.any and o.aggregate_id is not null then (
           select pg_catalog.jsonb_object_agg(d.destination, head.remaining_ms)
           from pg_catalog.unnest(case o.destination when '' then $4::text[] else array[o.destination] end) d(destination)
           cross join lateral (
               select (extract(epoch from
                          least(greatest(w.available_at, pg_catalog.statement_timestamp()), pg_catalog.statement_timestamp() + interval '10 minutes')
                          - pg_catalog.statement_timestamp()) operator(pg_catalog.*) 1000)::bigint as remaining_ms
               from {schema}.event_outbox w
               where w.status = 'scheduled' and w.destination <> '' and w.destination = d.destination
                 and w.aggregate_id is not null
                 and pg_catalog.hashtextextended(w.aggregate_id, pg_catalog.hashtextextended(coalesce(w.aggregate_type, ''), 0))
                   = pg_catalog.hashtextextended(o.aggregate_id, pg_catalog.hashtextextended(coalesce(o.aggregate_type, ''), 0))
                 and w.aggregate_id = o.aggregate_id and coalesce(w.aggregate_type, '') = coalesce(o.aggregate_type, '')
                 and w.partition = o.partition + 640
                 and w.id < o.id
                 and (w.last_error is null or not pg_catalog.starts_with(w.last_error, 'settle_failed: ')
                      or pg_catalog.starts_with(w.last_error, 'settle_failed: retry'))
               order by w.id
               limit 1
           ) head
       ) end,
       (select last_value from {schema}.event_outbox_epoch), {moves}
from unnest($1::smallint[], $5::bigint[]) t(partition, bound)
cross join lateral (
    {rows}
) o
cross join (select exists (
    select from {schema}.event_outbox where status = 'scheduled' and destination <> '' and aggregate_id is not null
) as any) waiting";

/// The rows of a partition, for [`READ_BATCH`]. A payload's stored size does not tell how large it is, it may be compressed a
/// hundredfold; `#> '{}'` is the payload uncompressed.
const ROWS: &str = "
    select ctid, *, pg_catalog.pg_column_size(payload operator(pg_catalog.#>) '{}'::text[]) as size
    from {schema}.event_outbox where partition = t.partition and id > t.bound order by id, destination limit $2";

/// The same where some may be large: about `$6` bytes of them, measured by their text where they are. Adding up costs a
/// quarter of all that reading does, and is left out as long as all are small.
const ROWS_WITHIN_BYTES: &str = "
    select s.*
    from (
        select e.*, pg_catalog.sum(e.size) over (order by e.id, e.destination rows unbounded preceding) - e.size as bytes_before
        from (
            select m.*, case when m.uncompressed <= 2000 then m.uncompressed else pg_catalog.octet_length(m.payload::text) end as size
            from (
                select ctid, *, pg_catalog.pg_column_size(payload operator(pg_catalog.#>) '{}'::text[]) as uncompressed
                from {schema}.event_outbox where partition = t.partition and id > t.bound order by id, destination limit $2
            ) m
        ) e
    ) s
    where s.bytes_before < $6";

static READ_SMALL: LazyLock<&str> = LazyLock::new(|| complete(ROWS));
static READ_WITHIN_BYTES: LazyLock<&str> = LazyLock::new(|| complete(ROWS_WITHIN_BYTES));

fn complete(rows: &str) -> &'static str {
    READ_BATCH.replace("{rows}", rows).replace("{moves}", MOVES).leak()
}

/// Payloads up to this size, in bytes as PostgreSQL stores them, are small.
const SMALL: usize = 2000;

/// The rows of the partitions `taken`, of each above the id at its place in `bounds`: of all of them at most the first of
/// `limits`, of each at most the second, and about so many bytes as the third. `large` remembers from batch to batch whether
/// some payload is not small.
pub(super) async fn read(
    connection: &mut PgConnection,
    sql: Sql,
    large: &mut bool,
    (taken, bounds): (&[i16], &[i64]),
    (limit, share, bytes_share): (usize, usize, usize),
    request: ClaimRequest<'_>,
) -> Result<Batch, sqlx::Error> {
    let small = SMALL.min(request.max_bytes / limit).min(request.max_payload);
    let query = |text: &'static str, max_payload| {
        sql.query(text)
            .bind(taken.to_vec())
            .bind(to_i64(share))
            .bind(to_i64(max_payload))
            .bind(request.destinations.to_vec())
            .bind(bounds.to_vec())
    };
    let all_within = |rows: &[PgRow], size: usize| -> Result<bool, sqlx::Error> {
        rows.iter().try_fold(true, |all, row| Ok(all && to_usize(row.try_get(17)?) <= size))
    };
    if !*large {
        let rows = query(&READ_SMALL, small).fetch_all(&mut *connection).await?;
        if all_within(&rows, small)? {
            return Ok(Batch { rows, cut: false });
        }
    }
    let rows = query(&READ_WITHIN_BYTES, request.max_payload).bind(to_i64(bytes_share)).fetch_all(connection).await?;
    // By its text, which may be a quarter of what is stored: else such a batch would be read twice each time.
    *large = !all_within(&rows, small / 4)?;
    Ok(Batch { rows, cut: true })
}

/// What one partition gave to a batch.
#[derive(Default)]
pub(super) struct Given {
    pub(super) events: usize,
    /// Of payload.
    pub(super) bytes: usize,
    pub(super) last_id: i64,
}

/// The rows as they came.
pub(super) struct Batch {
    rows: Vec<PgRow>,
    /// The bytes may have cut some partitions short.
    pub(super) cut: bool,
}

impl Batch {
    /// The epoch when they were read; none without rows.
    pub(super) fn epoch(&self) -> Result<Option<i64>, sqlx::Error> {
        self.rows.first().map(|row| row.try_get(19)).transpose()
    }

    /// The number of moves then; none without rows.
    pub(super) fn moves(&self) -> Result<Option<i64>, sqlx::Error> {
        self.rows.first().map(|row| row.try_get(20)).transpose()
    }

    /// The events, in order, and what each partition gave.
    pub(super) fn decode(&self, max_payload: usize) -> Result<(Vec<Claimed>, HashMap<i16, Given>), sqlx::Error> {
        let mut claimed = Vec::with_capacity(self.rows.len());
        let mut given: HashMap<i16, Given> = HashMap::new();
        for row in &self.rows {
            let (event, size) = read_claimed(row, max_payload)?;
            let given = given.entry(event.event.row.partition).or_default();
            given.events += 1;
            given.bytes += size;
            given.last_id = given.last_id.max(event.event.row.id);
            claimed.push(event);
        }
        claimed.sort_by(|a, b| {
            let place = |claimed: &Claimed| (claimed.event.row.partition, claimed.event.row.id);
            place(a).cmp(&place(b)).then_with(|| a.event.row.destination.cmp(&b.event.row.destination))
        });
        Ok((claimed, given))
    }
}

/// Decodes a row of [`READ_BATCH`], and the size of its payload. Only a driver that disagrees with our own statement makes
/// it fail.
fn read_claimed(row: &PgRow, max_payload: usize) -> Result<(Claimed, usize), sqlx::Error> {
    let payload = jsonb_text(row, 9)?;
    // What the statement measured is not the text where that is small.
    let size = match payload {
        Some(payload) => payload.len(),
        None => to_usize(row.try_get(17)?),
    };
    let mut defect = decode::too_large(size, max_payload);
    let headers = decode::headers(jsonb_text(row, 10)?).unwrap_or_else(|error| {
        defect = Some(error);
        Vec::new()
    });
    let behind: BTreeMap<String, u64> = match jsonb_text(row, 18)? {
        None => BTreeMap::new(),
        Some(json) => serde_json::from_slice(json).map_err(|error| sqlx::Error::Decode(error.into()))?,
    };
    let created_at: Option<OffsetDateTime> = row.try_get(14)?;
    if created_at.is_none() {
        let message = "created_at is infinite, or lies before the year 1 or after 9999";
        defect = Some(PublishError::new(Fault::Unfit, "created_at_invalid", message));
    }
    let mut text = |index| {
        let (text, is_utf8) = text(row, index)?;
        if !is_utf8 {
            defect = Some(PublishError::new(Fault::Unfit, "not_utf8", "a name, key or id of the event is not UTF-8"));
        }
        Ok::<_, sqlx::Error>(text)
    };
    let (event_type, source) = (text(5)?.unwrap_or_default(), text(6)?.unwrap_or_default());
    let (aggregate_type, aggregate_id, correlation_id, causation_id) = (text(7)?, text(8)?, text(11)?, text(12)?);
    let remaining = |(destination, ms)| Behind { destination, remaining: Duration::from_millis(ms) };
    let claimed = Claimed {
        event: Event {
            row: RowKey {
                locator: tid::to_locator(row.try_get(0)?).ok_or_else(|| sqlx::Error::Decode("not a ctid".into()))?,
                partition: row.try_get(1)?,
                id: row.try_get(2)?,
                destination: row.try_get(3)?,
            },
            event_id: row.try_get(4)?,
            event_type,
            source,
            aggregate_type,
            aggregate_id,
            payload: payload.unwrap_or_default().to_vec(),
            headers,
            correlation_id,
            causation_id,
            schema_version: row.try_get(13)?,
            created_at: created_at.unwrap_or(OffsetDateTime::UNIX_EPOCH),
            attempts: row.try_get(15)?,
        },
        due: row.try_get(16)?,
        defect,
        behind: behind.into_iter().map(remaining).collect(),
    };
    Ok((claimed, size))
}

/// A text column, and whether it is UTF-8, which in a database without an encoding (SQL_ASCII) nobody guarantees: that is the
/// row's defect, and must not fail the batch.
fn text(row: &PgRow, index: usize) -> Result<(Option<String>, bool), sqlx::Error> {
    let value = row.try_get_raw(index)?;
    if value.is_null() {
        return Ok((None, true));
    }
    let bytes = value.as_bytes().map_err(sqlx::Error::Decode)?;
    let text = String::from_utf8_lossy(bytes);
    let is_utf8 = matches!(text, Cow::Borrowed(_));
    Ok((Some(text.into_owned()), is_utf8))
}

/// The text of a `jsonb` column, straight from the wire: its binary form is a version byte and the text.
fn jsonb_text(row: &PgRow, index: usize) -> Result<Option<&[u8]>, sqlx::Error> {
    let value = row.try_get_raw(index)?;
    if value.is_null() {
        return Ok(None);
    }
    let bytes = value.as_bytes().map_err(sqlx::Error::Decode)?;
    match bytes.split_first() {
        Some((1, text)) => Ok(Some(text)),
        _ => Err(sqlx::Error::Decode("jsonb of an unknown version".into())),
    }
}

fn to_usize(count: i32) -> usize {
    usize::try_from(count).unwrap_or_default()
}
