//! Reads the rows of a batch.

use std::sync::LazyLock;

use foldhash::HashMap;
use futures_util::TryStreamExt;
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{Connection, Row};

use crate::event::{Event, MAX_HEADERS_BYTES, MAX_TEXT_BYTES, RowKey};
use crate::outbox::number::to_i64;
use crate::outbox::postgres::row::{self, CHANGES_BITS, LEFT_OUT, LEFT_OUT_AND_OWED, REINSERTIONS_BITS, column};
use crate::outbox::postgres::sql::Sql;
use crate::outbox::postgres::take::REINSERTIONS;
use crate::outbox::{ClaimRequest, Claimed};

/// Reads the rows of the partitions just taken. It must be a statement of its own, after the one that took the locks:
/// one statement would read with a snapshot from before them, and publish again what the last owner has just settled.
///
/// `$1` partitions; `$2` the most events of each, so that nothing need be sorted; `$3` the largest size to return; `$4`
/// destinations; `$5` for each partition the id above which to read.
///
/// - Only where any event waits at all, each row is checked for an earlier event of its key that waits. An event that is done
///   and could not be recorded holds back no other.
/// - A time that no calendar has is returned as null, because the driver panics at it.
/// - The time left is at most ten minutes, after which an event is checked again: the event that it waits for may wait for a
///   person, who may let it go earlier.
/// - The attempts are -1 for an event without attempts that has failed before. For a marked row (see `left_out`) they are -2,
///   or -3 if it is still owed.
const READ_BATCH: &str = "
select o.ctid::text, o.partition, o.id, o.destination, o.event_id, o.event_type, {source}, {aggregate_type}, {aggregate_id},
       {payload}, {headers}, {correlation_id}, {causation_id},
       o.schema_version, case when o.created_at >= '0001-01-01Z' and o.created_at < '10000-01-01Z' then o.created_at end,
       case when o.last_error is null then o.attempts
           when o.available_at = 'infinity' and pg_catalog.starts_with(o.last_error, 'settle_failed: ')
               then case when pg_catalog.starts_with(o.last_error, 'settle_failed: retry') then -3 else -2 end
           when o.attempts = 0 then -1 else o.attempts end,
       o.available_at <= pg_catalog.statement_timestamp(), o.size,
       case when waiting.apart and o.aggregate_id is not null and exists (
           select from {schema}.event_outbox h
           where h.partition in (o.partition + 1280, o.partition + 1920) and h.id < o.id and h.aggregate_id = o.aggregate_id
             and coalesce(h.aggregate_type, '') = coalesce(o.aggregate_type, '')
       ) then '{\"*\": 0}'::jsonb
       when waiting.any and o.aggregate_id is not null then (
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
       (select last_value from {schema}.event_outbox_epoch),
       {reinsertions} | (select (last_value + coalesce((select pg_catalog.max(changes) from {schema}.event_pause_changes), 0::bigint)) << 40
                         from {schema}.event_relay_changes),
       pg_catalog.date_part('epoch', pg_catalog.statement_timestamp() - case
           when o.destination = '' and o.attempts = 0 and o.last_error is null and o.available_at > o.created_at
               and o.available_at <= pg_catalog.statement_timestamp() then o.available_at
           when o.created_at >= '0001-01-01Z' and o.created_at < '10000-01-01Z' then o.created_at
       end){unfit}
from {rows}
cross join (select {any} as any, exists (
    select from {schema}.event_outbox where partition >= 1280
) as apart) waiting";

/// Whether any event waits. While a session holds an old snapshot, this walks over all rows that have waited and are gone.
const ANY_WAITS: &str = "exists (
    select from {schema}.event_outbox where status = 'scheduled' and destination <> '' and aggregate_id is not null
)";

/// The rows for [`READ_BATCH`], and the size of each, as long as that is small. A stored size does not show how large a value
/// is, because it may be compressed a hundredfold; `#> '{}'` is the value uncompressed. A value is uncompressed only if its
/// stored size is small. Empty headers are stored in 8 bytes at most.
const ROWS: &str = "
unnest($1::smallint[], $5::bigint[]) t(partition, bound)
cross join lateral (
    select ctid, *, case
        when pg_catalog.pg_column_size(payload) > $3 or pg_catalog.pg_column_size(headers) > $3
            or greatest(pg_catalog.octet_length(source), pg_catalog.octet_length(aggregate_type),
                pg_catalog.octet_length(aggregate_id), pg_catalog.octet_length(correlation_id),
                pg_catalog.octet_length(causation_id)) > $3
            then 2147483647
        when pg_catalog.pg_column_size(headers) <= 8
            then pg_catalog.pg_column_size(payload operator(pg_catalog.#>) '{}'::text[])
        else pg_catalog.pg_column_size(payload operator(pg_catalog.#>) '{}'::text[])
            + pg_catalog.pg_column_size(headers operator(pg_catalog.#>) '{}'::text[])
    end as size
    from {schema}.event_outbox where partition = t.partition and id > t.bound order by id, destination limit $2
) o";

/// The same where some rows may be large: about `$6` bytes in total. Adding up the sizes costs a quarter of all that reading
/// does, so it is left out as long as all rows are small. `offset 0` prevents that a value is measured again wherever its size
/// is named.
///
/// - If a value exceeds its limit, only its size is read. `unfit` names the value, and the row counts as what settling it
///   copies.
/// - The text of a `jsonb` has at least a quarter of the bytes that the value takes uncompressed (an example is `[1, 1]`), and
///   uncompressed it takes at least as many as compressed. So a value that is stored in over four times the limit is not
///   uncompressed, and a value that takes over four times the limit uncompressed is not printed. Headers are a map of texts, of
///   which each byte prints as one to six.
/// - A payload or headers that are NULL, where somebody has allowed that, are named by `unfit` too.
/// - After five seconds no more rows are measured. The next claim reads the rest.
const ROWS_WITHIN_BYTES: &str = "
(
    select b.*, (pg_catalog.sum(b.size) over (order by b.place, b.id, b.destination rows unbounded preceding))::bigint
        - b.size as bytes_before
    from (
        select m.*, case
            when m.unfit is null then m.payload_bytes + m.headers_bytes + m.texts_bytes
            else least(2147483647::bigint, m.payload_stored::bigint + m.headers_stored + m.texts_bytes)::int
        end as size
        from (
            select c.*, case
                when c.payload is null then 'payload missing'
                when c.headers is null then 'headers missing'
                when c.headers_bytes > {max_headers} then 'headers ' || c.headers_bytes::text
                when pg_catalog.octet_length(c.source) > {max_text} then 'source ' || pg_catalog.octet_length(c.source)::text
                when pg_catalog.octet_length(c.aggregate_type) > {max_text}
                    then 'aggregate_type ' || pg_catalog.octet_length(c.aggregate_type)::text
                when pg_catalog.octet_length(c.aggregate_id) > {max_text}
                    then 'aggregate_id ' || pg_catalog.octet_length(c.aggregate_id)::text
                when pg_catalog.octet_length(c.correlation_id) > {max_text}
                    then 'correlation_id ' || pg_catalog.octet_length(c.correlation_id)::text
                when pg_catalog.octet_length(c.causation_id) > {max_text}
                    then 'causation_id ' || pg_catalog.octet_length(c.causation_id)::text
                when c.payload_bytes > $3 then 'payload ' || c.payload_bytes::text
            end as unfit,
            least(2147483647::bigint, coalesce(pg_catalog.octet_length(c.source), 0)::bigint
                + coalesce(pg_catalog.octet_length(c.aggregate_type), 0)
                + coalesce(pg_catalog.octet_length(c.aggregate_id), 0)
                + coalesce(pg_catalog.octet_length(c.correlation_id), 0)
                + coalesce(pg_catalog.octet_length(c.causation_id), 0))::int as texts_bytes
            from (
                select u.*, case
                    when u.payload_size is null then u.payload_stored
                    when u.payload_size <= 2000 or u.payload_size > 4 * $3::bigint then u.payload_size
                    else pg_catalog.octet_length(u.payload::text)
                end as payload_bytes, case
                    when u.headers_size <= {max_headers} / 6 - 8 or u.headers_size > {max_headers} + 16 then u.headers_size
                    else pg_catalog.octet_length(u.headers::text)
                end as headers_bytes
                from (
                    select s.*, case
                        when s.payload_stored <= 4 * $3::bigint
                            then pg_catalog.pg_column_size(s.payload operator(pg_catalog.#>) '{}'::text[])
                    end as payload_size, case
                        when s.headers_stored <= 8 then 0
                        when s.headers_stored > {max_headers} + 16 then s.headers_stored
                        else pg_catalog.pg_column_size(s.headers operator(pg_catalog.#>) '{}'::text[])
                    end as headers_size
                    from (
                        select t.place, e.*, coalesce(pg_catalog.pg_column_size(e.payload), 0) as payload_stored,
                            coalesce(pg_catalog.pg_column_size(e.headers), 0) as headers_stored
                        from unnest($1::smallint[], $5::bigint[]) with ordinality t(partition, bound, place)
                        cross join lateral (
                            select ctid, *
                            from {schema}.event_outbox where partition = t.partition and id > t.bound
                            order by id, destination limit $2
                        ) e
                        where pg_catalog.clock_timestamp() < (select pg_catalog.clock_timestamp()) + interval '5 seconds'
                        offset 0
                    ) s
                    offset 0
                ) u
                offset 0
            ) c
            offset 0
        ) m
        offset 0
    ) b
    offset 0
) o";

static READ_SMALL: LazyLock<Reads> = LazyLock::new(|| {
    let small = |column: &str| match column {
        "headers" => {
            "case when o.size <= $3 and pg_catalog.pg_column_size(o.headers) > 8 then o.headers end".to_owned()
        }
        _ => format!("case when o.size <= $3 then o.{column} end"),
    };
    complete(ROWS, "", "", small)
});

static READ_WITHIN_BYTES: LazyLock<Reads> = LazyLock::new(|| within_bytes(ROWS_WITHIN_BYTES));

/// Selects only the rows that are owed to one of the destinations `$4`.
const OWED: &str = "id > t.bound and destination = any ($4::text[])";

static READ_OWED: LazyLock<Reads> = LazyLock::new(|| within_bytes(&ROWS_WITHIN_BYTES.replace("id > t.bound", OWED)));

fn within_bytes(rows: &str) -> Reads {
    // A key within its limits is returned even if the row has a value that is not read.
    let within = |column: &str| match column {
        "headers" => "case when o.unfit is null then nullif(o.headers, '{}') end".to_owned(),
        "payload" => "case when o.unfit is null then o.payload end".to_owned(),
        _ => format!("case when pg_catalog.octet_length(o.{column}) <= {MAX_TEXT_BYTES} then o.{column} end"),
    };
    complete(rows, ", o.unfit", "\nwhere o.bytes_before < $6", within)
}

fn complete(rows: &str, unfit: &str, filter: &str, column: impl Fn(&str) -> String) -> Reads {
    let mut text = READ_BATCH.to_owned() + filter;
    let columns = ["source", "aggregate_type", "aggregate_id", "payload", "headers", "correlation_id", "causation_id"];
    for name in columns {
        text = text.replacen(&format!("{{{name}}}"), &column(name), 1);
    }
    let text = text
        .replace("{rows}", rows)
        .replace("{unfit}", unfit)
        .replace("{reinsertions}", REINSERTIONS)
        .replace("{max_headers}", &MAX_HEADERS_BYTES.to_string())
        .replace("{max_text}", &MAX_TEXT_BYTES.to_string());
    Reads { usual: text.replace("{any}", ANY_WAITS).leak(), among_dead: text.replace("{any}", "true").leak() }
}

/// The same statement in two forms.
struct Reads {
    usual: &'static str,
    /// Does not ask whether any event waits, but checks each event for an earlier one of its key that waits.
    among_dead: &'static str,
}

/// Events up to this size, in bytes as PostgreSQL stores them, are small.
const SMALL: usize = 2000;

/// A connection that has received more bytes than this frees the memory of its buffer.
const LARGE_BUFFER: usize = 1 << 20;

/// Reads rows of the partitions `taken`, of each those above the id at its index in `bounds`. It reads at most `limit` rows, at
/// most `share` of each partition, and about as many bytes as are requested. `large` remembers from batch to batch whether some
/// event is not small.
pub(super) async fn read(
    connection: &mut PgConnection,
    sql: Sql,
    large: &mut bool,
    (taken, bounds): (&[i16], &[i64]),
    (limit, share): (usize, usize),
    request: ClaimRequest<'_>,
    which: Which,
) -> Result<Batch, sqlx::Error> {
    let small = SMALL.min(request.max_bytes / limit).min(request.max_payload);
    let query = |text: &'static str, largest| {
        sql.query(text)
            .bind(taken.to_vec())
            .bind(to_i64(share))
            .bind(i32::try_from(largest).unwrap_or(i32::MAX))
            .bind(request.destinations.to_vec())
            .bind(bounds.to_vec())
    };
    let form = |reads: &Reads| match which {
        Which::All { among_dead: true } => reads.among_dead,
        Which::All { among_dead: false } | Which::Owed => reads.usual,
    };
    if which != Which::Owed && !*large {
        let mut batch = Batch::default();
        let mut all_small = true;
        let mut rows = query(form(&READ_SMALL), small).fetch(&mut *connection);
        while let Some(row) = rows.try_next().await? {
            // The size is NULL if a column is NULL, where somebody has allowed that.
            all_small =
                all_small && row.try_get::<Option<i32>, _>(column::SIZE)?.is_some_and(|size| to_usize(size) <= small);
            if all_small {
                batch.add(&row, request, false)?;
            }
        }
        drop(rows);
        if all_small {
            return Ok(batch);
        }
    }
    let mut batch = Batch::default();
    let text = form(if which == Which::Owed { &READ_OWED } else { &READ_WITHIN_BYTES });
    let mut rows = query(text, request.max_payload).bind(to_i64(request.max_bytes)).fetch(&mut *connection);
    // Here the size is that of the text, which may be a quarter of what is stored. So it is compared with a quarter: else such
    // a batch would be read twice each time.
    *large = false;
    while let Some(row) = rows.try_next().await? {
        *large |= to_usize(row.try_get(column::SIZE)?) > small / 4;
        batch.add(&row, request, true)?;
    }
    drop(rows);
    if batch.bytes > LARGE_BUFFER {
        connection.shrink_buffers();
    }
    batch.cut = true;
    Ok(batch)
}

/// Which rows of a partition to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    /// All of them. `among_dead`: many dead rows of events that have waited cannot be removed yet.
    All { among_dead: bool },
    /// The rows that are owed to the destinations of the request.
    Owed,
}

/// What one partition gave to a batch.
#[derive(Default)]
pub(super) struct PartitionRead {
    pub(super) events: usize,
    pub(super) last_id: i64,
}

/// A marked row (see `left_out`) that a claim has read.
#[derive(Debug)]
pub(super) struct Marked {
    pub(super) row: RowKey,
    /// The key that it holds back, if its event is still owed.
    pub(super) holds: Option<Key>,
}

/// `aggregate_type` and `aggregate_id`.
pub(super) type Key = (String, String);

pub(super) fn key(event: &Event) -> Option<Key> {
    let id = event.aggregate_id.clone()?;
    Some((event.aggregate_type.clone().unwrap_or_default(), id))
}

/// The rows that were read. Each is decoded as it comes, so that it is not held twice.
#[derive(Default)]
pub(super) struct Batch {
    /// In the order in which they were read; [`Batch::sort`] sorts them.
    pub(super) claimed: Vec<Claimed>,
    /// Rows that are left out.
    pub(super) marked: Vec<Marked>,
    pub(super) given: HashMap<i16, PartitionRead>,
    /// The bytes of all rows. If a value was not read, its stored size counts.
    pub(super) bytes: usize,
    /// The bytes may have cut some partitions short.
    pub(super) cut: bool,
    /// The epoch when the rows were read; `None` without rows.
    pub(super) epoch: Option<i64>,
    /// The number of reinsertions at that time; `None` without rows.
    pub(super) reinsertions: Option<i64>,
    /// The number of changes of the register of relays at that time.
    pub(super) changes: i64,
    /// The partition that was read last.
    pub(super) last: Option<i16>,
}

impl Batch {
    /// Adds a row, unless there are enough bytes. The text of a few stored bytes may be long: 1e131071 has so many digits.
    fn add(&mut self, row: &PgRow, request: ClaimRequest<'_>, within_bytes: bool) -> Result<(), sqlx::Error> {
        if self.cut || self.bytes >= request.max_bytes {
            self.cut = true;
            return Ok(()); // it and all after it are for the next claim
        }
        if self.epoch.is_none() {
            let both: i64 = row.try_get(column::REINSERTIONS_AND_CHANGES)?;
            (self.epoch, self.reinsertions) =
                (row.try_get(column::EPOCH)?, Some(both & ((1 << REINSERTIONS_BITS) - 1)));
            self.changes = both >> REINSERTIONS_BITS & ((1 << CHANGES_BITS) - 1);
        }
        let (claimed, attempts) = row::claimed(row, request.max_payload, within_bytes)?;
        self.bytes += claimed.event.bytes();
        if claimed.defect.is_some() {
            // A payload that is too large was read and is not kept.
            self.bytes += to_usize(row.try_get(column::SIZE)?);
        }
        let RowKey { partition, id, .. } = claimed.event.row;
        let given = self.given.entry(partition).or_default();
        given.events += 1;
        given.last_id = given.last_id.max(id);
        self.last = Some(partition);
        if attempts <= LEFT_OUT {
            let holds = if attempts == LEFT_OUT_AND_OWED { key(&claimed.event) } else { None };
            self.marked.push(Marked { row: claimed.event.row, holds });
            return Ok(());
        }
        self.claimed.push(claimed);
        Ok(())
    }

    pub(super) fn sort(&mut self) {
        self.claimed.sort_by(|a, b| {
            let place = |claimed: &Claimed| (claimed.event.row.partition, claimed.event.row.id);
            place(a).cmp(&place(b)).then_with(|| a.event.row.destination.cmp(&b.event.row.destination))
        });
    }
}

fn to_usize(count: i32) -> usize {
    usize::try_from(count).unwrap_or_default()
}
