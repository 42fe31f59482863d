//! Claim and settle: the protocol of a lane.
//!
//! A claim is an open transaction that holds one advisory lock per partition it took, and nothing else: no row lock, no
//! transaction id, and between statements no snapshot. So a slow publish holds back neither producers nor vacuum, and a
//! lane that dies frees its partitions at once, with no lease to wait for.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use foldhash::{HashMap, HashMapExt};
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{AssertSqlSafe, Executor, Row, ValueRef};
use time::OffsetDateTime;

use crate::event::{Event, Fault, Noted, PublishError, Renewed, RowKey, Term};
use crate::failpoint::hit;
use crate::outbox::postgres::settle::Settle;
use crate::outbox::postgres::{PgOutbox, STATEMENT_TIMEOUT, answered, query_failed, tid};
use crate::outbox::records::Records;
use crate::outbox::{Behind, Claim, ClaimRequest, Claimed, Delivery, Lane, OutboxError, Promoted};

/// The largest batch that can be configured.
const MAX_ROWS: usize = 10_000;

/// Partitions of pending rows: 64 for each of 10 priorities. Fixed by the schema.
const PARTITIONS: i32 = 640;

/// Takes the first `$1` non-empty partitions that nobody holds, most urgent first. `$2` is the partition taken last: its
/// priority's others come before it, so that a busy one starves none.
///
/// A loose scan of the primary key touches one index entry for each partition, and stops as soon as enough are taken:
/// the ranges are walked in turn, each row of a recursive query is made only when it is asked for.
const TAKE_PARTITIONS: &str = "
select array(
    select pending.partition
    from (values (0, $2 / 64 * 64), ($2 + 1, $2 / 64 * 64 + 64), ($2 / 64 * 64, $2 + 1), ($2 / 64 * 64 + 64, 640))
        as range(low, high)
    cross join lateral (
        with recursive scan(partition) as (
            (select o.partition::int from event_outbox o
             where o.partition >= range.low::smallint and o.partition < range.high::smallint
             order by o.partition limit 1)
            union all
            select (select o.partition::int from event_outbox o
                    where o.partition > scan.partition::smallint and o.partition < range.high::smallint
                    order by o.partition limit 1)
            from scan where scan.partition is not null
        )
        select scan.partition from scan where scan.partition is not null
    ) pending
    where pg_try_advisory_xact_lock('event_outbox'::regclass::oid::int, pending.partition)
    limit $1
), exists (select from event_outbox where partition < 640), statement_timestamp()";

/// Reads the rows of the partitions just taken. It must be a statement of its own, after the one that took the locks:
/// one statement would read with a snapshot from before them, and publish again what the last owner has just settled.
///
/// `$1` partitions; of each of them at most `$2` events and about `$3` bytes, so that nothing need be sorted; `$4` payload
/// limit; `$5` destinations. A payload's text is measured only where it may be large, which its stored size does not tell:
/// it may be compressed a hundredfold, and `#> '{}'` is the payload uncompressed. What waits behind a failed event of its
/// key is asked per row only where anything waits at all. Of times, those that no calendar has are null: a driver panics
/// at them; and `infinity` cannot be subtracted from.
const READ_BATCH: &str = "
select o.ctid::text, o.partition, o.id, o.destination, o.event_id, o.event_type, o.source, o.aggregate_type, o.aggregate_id,
       case when o.size <= $4 then o.payload end, nullif(o.headers, '{}'), o.correlation_id, o.causation_id,
       o.schema_version, case when o.created_at >= '0001-01-01Z' and o.created_at < '10000-01-01Z' then o.created_at end,
       o.attempts, o.available_at <= statement_timestamp(), o.size,
       case when waiting.any and o.aggregate_id is not null then (
           select jsonb_object_agg(d.destination, head.remaining_ms)
           from unnest(case o.destination when '' then $5::text[] else array[o.destination] end) d(destination)
           cross join lateral (
               select (extract(epoch from
                          least(greatest(w.available_at, statement_timestamp()), statement_timestamp() + interval '1 year')
                          - statement_timestamp()) * 1000)::bigint as remaining_ms
               from event_outbox w
               where w.status = 'scheduled' and w.destination <> '' and w.destination = d.destination
                 and w.aggregate_id is not null
                 and hashtextextended(w.aggregate_id, hashtextextended(coalesce(w.aggregate_type, ''), 0))
                   = hashtextextended(o.aggregate_id, hashtextextended(coalesce(o.aggregate_type, ''), 0))
                 and w.aggregate_id = o.aggregate_id and coalesce(w.aggregate_type, '') = coalesce(o.aggregate_type, '')
                 and w.partition = o.partition + 640
                 and w.id < o.id
               order by w.id
               limit 1
           ) head
       ) end,
       (select last_value from event_outbox_epoch)
from unnest($1::int[]) t(partition)
cross join lateral (
    select s.*, sum(s.size) over (order by s.id, s.destination rows unbounded preceding) - s.size as bytes_before
    from (
        select e.*, case when e.uncompressed <= 2000 then e.uncompressed else octet_length(e.payload::text) end as size
        from (
            select ctid, *, pg_column_size(payload #> '{}') as uncompressed
            from event_outbox where partition = t.partition::smallint order by id, destination limit $2
        ) e
    ) s
) o
cross join (select exists (
    select from event_outbox where status = 'scheduled' and destination <> '' and aggregate_id is not null
) as any) waiting
where o.bytes_before < $3";

/// `$1` a floor for the epoch; `$2` partitions, `$3` ids, `$4` event ids; `$5` destination. A row may have been scheduled,
/// and so moved, since it was noted.
const RENEW: &str = "
select relay_epoch_above($1), array(
    select n.place::int
    from unnest($2::smallint[], $3::bigint[], $4::uuid[]) with ordinality as n(partition, id, event_id, place)
    where exists (
        select from event_outbox o
        where o.partition in (n.partition, n.partition + 640::smallint) and o.id = n.id and o.event_id = n.event_id
          and o.destination in ('', $5)
    )
)";

/// Makes due rows pending again, for each destination its earliest first. Needs no partition: whoever holds one sees
/// such a row either waiting, and its key behind it, or pending, and in its place.
const PROMOTE: &str = "
with due as materialized (
    select e.row
    from unnest($1::text[]) d(destination)
    cross join lateral (
        select ctid as row from event_outbox
        where status = 'scheduled' and destination = d.destination and available_at <= statement_timestamp()
        order by available_at, id limit $2 for update skip locked
    ) e
), promoted as (
    update event_outbox o set status = 'pending' from due where o.ctid = due.row
    returning 1
)
select (select count(*) from promoted), (
    select (extract(epoch from min(least(e.available_at, statement_timestamp() + interval '1 year')) - statement_timestamp())
            * 1000)::bigint
    from unnest($1::text[]) d(destination)
    cross join lateral (
        select available_at from event_outbox
        where status = 'scheduled' and destination = d.destination and available_at > statement_timestamp()
        order by available_at limit 1
    ) e
)";

const HAS_OWED: &str = "select exists (select from event_outbox where status = 'scheduled' and destination <> '')";

/// Writes as a settle does and takes it back: room for a row, the right to insert, today's partition, and a commit
/// that reaches the disk because the transaction has an id. Of the other tables it asks for locks and rights only.
const PROVE_WRITABLE: &str = "
begin;
savepoint before_proof;
delete from event_outbox where false;
insert into event_outbox (event_type) select '' where false;
insert into event_dead_letter (event_type) select '' where false;
insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, duration_ms, worker)
values (gen_random_uuid(), 0, 'proof', '', 'published', 1, 0, '');
rollback to savepoint before_proof;
commit";

/// See the module.
pub struct PgLane {
    outbox: PgOutbox,
    connection: Option<PgConnection>,
    begin: String,
    /// How many partitions to take at once. A full batch halves it, a short one doubles it: a quiet system is one
    /// transaction for everything, a deep backlog as many in parallel as there are lanes.
    partitions: i32,
    /// Where to go on taking partitions.
    last_taken: i32,
    /// How many rows to look at. A batch cut by its bytes lowers it, so that large payloads are not measured in vain.
    rows: usize,
    /// A settle failed, and nothing was written since.
    unproven: bool,
    clock: Clock,
}

/// The database's clock, as it was read last: what goes into its tables is told by no other.
struct Clock {
    read: OffsetDateTime,
    at: Instant,
}

impl Clock {
    /// In microseconds since 2000.
    fn now(&self) -> i64 {
        let microseconds = (self.read + self.at.elapsed()).unix_timestamp_nanos() / 1000 - 946_684_800_000_000;
        i64::try_from(microseconds).unwrap_or(i64::MAX)
    }
}

impl PgLane {
    pub(super) fn new(outbox: PgOutbox) -> Self {
        let config = &outbox.config;
        // Everything is local to the transaction, so that it holds behind a transaction-pooling proxy too.
        // - Each statement after the first must see what was committed before it: no higher isolation.
        // - The timeout ends the claim of a relay that stalled; it must outlast every publish.
        // - A queue's statistics are always stale. Each statement has one good plan, by its indexes; prepared once.
        let begin = format!(
            "begin isolation level read committed;
             set local idle_in_transaction_session_timeout = {};
             set local plan_cache_mode = force_generic_plan;
             set local enable_seqscan = off; set local enable_bitmapscan = off;
             set local enable_hashjoin = off; set local enable_mergejoin = off; set local jit = off",
            (config.publish_timeout + Duration::from_secs(15)).as_millis(),
        );
        Self {
            outbox,
            connection: None,
            begin,
            partitions: PARTITIONS,
            last_taken: fastrand::i32(0..PARTITIONS),
            rows: MAX_ROWS,
            unproven: false,
            clock: Clock { read: OffsetDateTime::UNIX_EPOCH, at: Instant::now() },
        }
    }

    /// A connection that can be written to.
    async fn ready(&mut self) -> Result<PgConnection, OutboxError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.outbox.connect().await?,
        };
        if self.unproven {
            answered(
                "prove that the database takes writes again",
                STATEMENT_TIMEOUT,
                connection.execute(PROVE_WRITABLE),
            )
            .await?;
            self.unproven = false;
        }
        Ok(connection)
    }

    async fn try_claim(
        &mut self,
        connection: &mut PgConnection,
        request: ClaimRequest<'_>,
    ) -> Result<Claim, sqlx::Error> {
        let persistent = !self.outbox.config.pooled;
        connection.execute(AssertSqlSafe(self.begin.clone())).await?;
        let limit = self.rows.min(request.max_events);
        let (taken, pending, now): (Vec<i32>, bool, OffsetDateTime) = sqlx::query_as(TAKE_PARTITIONS)
            .persistent(persistent)
            .bind(i32::try_from(limit).unwrap_or(PARTITIONS).min(self.partitions))
            .bind(self.last_taken)
            .fetch_one(&mut *connection)
            .await?;
        self.clock = Clock { read: now, at: Instant::now() };
        let Some(last) = taken.last() else {
            connection.execute("commit").await?;
            return Ok(if pending { Claim::Busy } else { Claim::Empty });
        };
        self.last_taken = *last;
        // Each partition gives the same share, so a batch is full as soon as one of them has more to give.
        let share = limit / taken.len();
        let bytes_share = request.max_bytes.div_ceil(taken.len());
        let rows = sqlx::query(READ_BATCH)
            .persistent(persistent)
            .bind(&taken)
            .bind(to_i64(share))
            .bind(to_i64(bytes_share))
            .bind(to_i64(request.max_payload))
            .bind(request.destinations)
            .fetch_all(&mut *connection)
            .await?;
        let mut claimed = Vec::with_capacity(rows.len());
        let mut given: HashMap<i16, (usize, usize)> = HashMap::with_capacity(taken.len());
        for row in &rows {
            let (event, size) = read_claimed(row, request.max_payload)?;
            let (count, bytes) = given.entry(event.event.row.partition).or_default();
            *count += 1;
            *bytes += size;
            claimed.push(event);
        }
        claimed.sort_by(|a, b| {
            let place = |claimed: &Claimed| (claimed.event.row.partition, claimed.event.row.id);
            place(a).cmp(&place(b)).then_with(|| a.event.row.destination.cmp(&b.event.row.destination))
        });
        let out_of_bytes = given.values().any(|(_, bytes)| *bytes >= bytes_share);
        let full = out_of_bytes || given.values().any(|(count, _)| *count == share);
        let count = i32::try_from(taken.len()).unwrap_or(PARTITIONS);
        self.partitions = if full { count / 2 } else { self.partitions.saturating_mul(2) }.clamp(1, PARTITIONS);
        // What a few stored bytes print as may be long: 1e131071 has so many digits.
        let bytes: usize = given.values().map(|(_, bytes)| bytes).sum();
        self.rows =
            if out_of_bytes { rows.len() * request.max_bytes / bytes.max(1) } else { self.rows * 2 }.clamp(1, MAX_ROWS);
        if rows.is_empty() {
            connection.execute("commit").await?;
            return Ok(Claim::Busy); // the last owner settled between our two statements
        }
        let term =
            Term { outbox: self.outbox.id(connection).await?, epoch: rows[0].try_get(19)?, token: fastrand::u64(..) };
        Ok(Claim::Batch { claimed, full, term })
    }

    async fn try_settle(&self, connection: &mut PgConnection, deliveries: &[Delivery<'_>]) -> Result<(), sqlx::Error> {
        let config = &self.outbox.config;
        let records = Records::new(deliveries, config.history);
        let now = self.clock.now();
        let mut settle = Settle { connection, persistent: !config.pooled, worker: &config.worker, now };
        let gone = settle.write(&records).await?;
        if gone != records.rows.len() {
            tracing::warn!(
                expected = records.rows.len(),
                gone,
                "someone else deleted rows of event_outbox while they were being published"
            );
        }
        hit("before_commit").map_err(|tripped| sqlx::Error::Decode(Box::new(tripped)))?;
        connection.execute("commit").await?;
        hit("committed").map_err(|tripped| sqlx::Error::Decode(Box::new(tripped)))
    }
}

impl Lane for PgLane {
    async fn claim(&mut self, request: ClaimRequest<'_>) -> Result<Claim, OutboxError> {
        let mut connection = self.ready().await?;
        let claim = answered("claim events", STATEMENT_TIMEOUT, self.try_claim(&mut connection, request)).await?;
        hit("claimed")?;
        if self.outbox.config.ghost_barrier
            && matches!(claim, Claim::Batch { .. })
            && !answered("look whether commits are flushed", STATEMENT_TIMEOUT, flushed(&mut connection)).await?
        {
            self.outbox.flush().await?;
        }
        self.connection = Some(connection);
        Ok(claim)
    }

    async fn renew(&mut self, floor: i64, noted: &[Noted], destination: &str) -> Result<Renewed, OutboxError> {
        let lost = || query_failed("renew the claim", sqlx::Error::WorkerCrashed);
        // The claim's own connection, taken back only if it answers: whoever lost the claim has lost this transaction.
        let mut connection = self.connection.take().ok_or_else(lost)?;
        let (epoch, places): (i64, Vec<i32>) = answered("renew the claim", STATEMENT_TIMEOUT, async {
            sqlx::query_as(RENEW)
                .persistent(!self.outbox.config.pooled)
                .bind(floor)
                .bind(noted.iter().map(|noted| noted.partition).collect::<Vec<_>>())
                .bind(noted.iter().map(|noted| noted.id).collect::<Vec<_>>())
                .bind(noted.iter().map(|noted| noted.event_id).collect::<Vec<_>>())
                .bind(destination)
                .fetch_one(&mut connection)
                .await
        })
        .await?;
        self.connection = Some(connection);
        let pending = places.into_iter().filter_map(|place| usize::try_from(place - 1).ok()).collect();
        Ok(Renewed { epoch, pending })
    }

    async fn settle(&mut self, deliveries: &[Delivery<'_>]) -> Result<(), OutboxError> {
        self.unproven = true;
        hit("before_settle")?;
        let lost = || query_failed("settle", sqlx::Error::WorkerCrashed);
        let mut connection = self.connection.take().ok_or_else(lost)?;
        answered("settle", 2 * STATEMENT_TIMEOUT, self.try_settle(&mut connection, deliveries)).await?;
        self.unproven = false;
        self.connection = Some(connection);
        Ok(())
    }

    async fn promote(&mut self, destinations: &[&str], max_events: usize) -> Result<Promoted, OutboxError> {
        let mut connection = self.ready().await?;
        let destinations: Vec<&str> = std::iter::once("").chain(destinations.iter().copied()).collect();
        let (count, next_due_ms): (i64, Option<i64>) = answered("promote scheduled events", STATEMENT_TIMEOUT, async {
            // For its plan: with the statistics of a deep backlog it would read all of that to find a few due rows.
            connection.execute(AssertSqlSafe(self.begin.clone())).await?;
            let promoted = sqlx::query_as(PROMOTE)
                .persistent(!self.outbox.config.pooled)
                .bind(destinations)
                .bind(to_i64(max_events))
                .fetch_one(&mut connection)
                .await?;
            connection.execute("commit").await?;
            Ok(promoted)
        })
        .await?;
        self.connection = Some(connection);
        Ok(Promoted {
            count: usize::try_from(count).unwrap_or_default(),
            next_due: next_due_ms.map(|ms| Duration::from_millis(u64::try_from(ms).unwrap_or_default())),
        })
    }

    async fn has_owed(&mut self) -> Result<bool, OutboxError> {
        let mut connection = self.ready().await?;
        let owed = answered("look for events still owed", STATEMENT_TIMEOUT, async {
            sqlx::query_scalar(HAS_OWED).persistent(!self.outbox.config.pooled).fetch_one(&mut connection).await
        })
        .await?;
        self.connection = Some(connection);
        Ok(owed)
    }
}

/// Whether every commit that a statement before this one saw is on disk. Commits of others come in between all the time, so
/// this is the usual answer only where little goes on, or all of it waits for the disk.
async fn flushed(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("select pg_current_wal_insert_lsn() <= pg_current_wal_flush_lsn()")
        .persistent(false)
        .fetch_one(connection)
        .await
}

/// Decodes a row of [`READ_BATCH`], and the size of its payload. Only a driver that disagrees with our own statement makes
/// it fail.
fn read_claimed(row: &PgRow, max_payload: usize) -> Result<(Claimed, usize), sqlx::Error> {
    let payload = jsonb_text(row, 9)?;
    // What the statement measured is not the text where that is small.
    let size = match payload {
        Some(payload) => payload.len(),
        None => usize::try_from(row.try_get::<i32, _>(17)?).unwrap_or_default(),
    };
    let mut defect = None;
    if size > max_payload {
        defect = Some(PublishError::new(
            Fault::Unfit,
            "payload_too_large",
            format!("the payload has {size} bytes, EVENT_MAX_PAYLOAD_SIZE allows {max_payload}"),
        ));
    }
    let headers = match jsonb_text(row, 10)?.map(serde_json::from_slice::<BTreeMap<String, String>>) {
        None => Vec::new(),
        Some(Ok(headers)) => headers.into_iter().collect(),
        Some(Err(error)) => {
            let message = format!("the headers are not a flat map of strings ({:?} error)", error.classify());
            defect = Some(PublishError::new(Fault::Unfit, "headers_invalid", message));
            Vec::new()
        }
    };
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

fn to_i64(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
