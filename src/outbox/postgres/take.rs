//! Takes partitions, and finds out whether any has pending rows.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::LazyLock;

use sqlx::postgres::PgConnection;

use crate::outbox::partitions::{PENDING, PER_PRIORITY};
use crate::outbox::postgres::bounds::{Drawn, Writers};
use crate::outbox::postgres::sql::Sql;

/// Whether any event waits that a claim does not take.
pub(super) const HAS_OWED: &str = "
select exists (select from {schema}.event_outbox where status = 'scheduled' and destination <> '')
    or exists (select from {schema}.event_outbox where partition >= 1280 and available_at <= pg_catalog.statement_timestamp())";

/// The greatest pending id. A scan from the right of each partition touches one index entry.
pub(super) const LAST_ID: &str = "
select pg_catalog.max(last.id)
from pg_catalog.generate_series(0, 639) p(partition)
cross join lateral (
    select o.id from {schema}.event_outbox o where o.partition = p.partition::smallint
    order by o.partition desc, o.id desc limit 1
) last";

/// Whether an event with an id up to `$1` is pending.
pub(super) const IS_PENDING_UP_TO: &str = "
select exists (
    select from pg_catalog.generate_series(0, 639) p(partition)
    cross join lateral (
        select o.id from {schema}.event_outbox o where o.partition = p.partition::smallint and o.id <= $1
        order by o.partition, o.id limit 1
    ) first
)";

/// Takes the first `$4` non-empty partitions of `{ranges}` that nobody holds. Later statements of this transaction may wait for
/// longer: if a settle gave up, its published events would be published again. It still ends before the client gives up.
const TAKE: &str = "
select array(
    select pending.partition from ({ranges}) range cross join lateral ({pending}) pending
    where pg_catalog.pg_try_advisory_xact_lock('{schema}.event_outbox'::regclass::oid::int, pending.partition)
    limit $4::smallint
), {reinsertions}, pg_catalog.set_config('lock_timeout', '55s', true), pg_catalog.set_config('statement_timeout', '58s', true)";

/// Whether any partition of `{ranges}` is non-empty.
const ANY: &str = "select exists (select from ({ranges}) range cross join lateral ({pending}) pending)";

/// The same, and how far ids have come.
const LEFT: &str = "{any}, drawn.last_id, drawn.life from ({drawn}) drawn";

/// The last id drawn, by the sequence that belongs to the column, whatever its name is; and the life of the ids, which tells
/// them from those of another life. A table that is dropped, restored or swapped has another oid. A table that is truncated and
/// a sequence that is restarted have another file.
const DRAWN: &str = "
    select coalesce(pg_catalog.pg_sequence_last_value(serial.sequence), 0::bigint) as last_id, serial.life
    from (
        select s.oid::regclass as sequence,
               pg_catalog.concat_ws('.', t.oid, t.relfilenode, s.oid, s.relfilenode) as life
        from pg_catalog.pg_class t
        left join pg_catalog.pg_class s
            on s.oid = pg_catalog.pg_get_serial_sequence('{schema}.event_outbox', 'id')::regclass::oid
        where t.oid = '{schema}.event_outbox'::regclass::oid
    ) serial";

/// The same, and when the next event is due that is owed to one of `$4`.
const PEEK: &str = "
{any}, (
    select (extract(epoch from pg_catalog.min(least(e.available_at, pg_catalog.statement_timestamp() + interval '1 year')) - pg_catalog.statement_timestamp())
            operator(pg_catalog.*) 1000)::bigint
    from pg_catalog.unnest($4::text[]) d(destination)
    cross join lateral (
        select available_at from {schema}.event_outbox
        where status = 'scheduled' and destination = d.destination
        order by available_at, id limit 1
    ) e
), {reinsertions}, drawn.last_id, drawn.life from ({drawn}) drawn";

/// The last id drawn, and then all transactions that may have drawn it or an earlier one. The list of these refers to the last
/// id, so that it is read after it: an insert locks the table before it draws the id.
const WRITERS: &str = "
select {reinsertions}, drawn.last_id, drawn.life, writers.transactions
from ({drawn}) drawn
cross join lateral (
    select coalesce(pg_catalog.array_agg(virtualtransaction), '{}') as transactions from pg_catalog.pg_locks
    where locktype = 'relation' and database = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
      and relation = '{schema}.event_outbox'::regclass::oid and mode = 'RowExclusiveLock' and granted and drawn.last_id is not null
) writers";

/// For each of the partitions `$1`, whether it has a row up to the id at its index in `$2`. Checks as many partitions as can be
/// walked over in 20 ms, in this order, and one more.
const HIDDEN: &str = "
select searched.partition, (
    select true from {schema}.event_outbox o
    where o.partition = searched.partition and o.id <= searched.bound
    order by o.partition, o.id limit 1
) is not null
from unnest($1::smallint[], $2::bigint[]) searched(partition, bound)
where pg_catalog.clock_timestamp() < pg_catalog.statement_timestamp() + interval '20 ms'";

const RANGES: &str =
    "select low, above, high from unnest($1::smallint[], $2::bigint[], $3::smallint[]) as r(low, above, high)";

/// The non-empty partitions of a range. A loose scan of the primary key touches one index entry for each, and stops as soon as
/// enough are taken, because a row of a recursive query is computed only when it is asked for. The `order by` makes the plan
/// use the index whatever the statistics say.
const NON_EMPTY: &str = "
    with recursive scan(partition) as (
        (select o.partition from {schema}.event_outbox o
         where (o.partition, o.id) > (range.low, range.above) and o.partition < range.high
         order by o.partition, o.id limit 1)
        union all
        select (select o.partition from {schema}.event_outbox o
                where o.partition > scan.partition and o.partition < range.high
                order by o.partition, o.id limit 1)
        from scan where scan.partition + 1 < range.high
    )
    select scan.partition from scan where scan.partition is not null";

/// The number of reinsertions, which can only be compared. The value of the sequence alone does not tell a sequence that was
/// used once from one that never was. It has 40 bits; above them a claim reads another number.
pub(super) const REINSERTIONS: &str =
    "(select (last_value + is_called::int) & 1099511627775::bigint from {schema}.event_outbox_moves)";

/// For a relay that is superseded: makes rows pending that are due for one of the destinations `$1`, at most `$2` of each, in
/// partitions that nobody holds, and takes these partitions. No other session sees the rows before they are settled: a relay
/// that routes would put back those for which it has no destination.
const TAKE_LEFT: &str = "
with due as materialized (
    select e.row, e.partition - 640::smallint as partition
    from pg_catalog.unnest($1::text[]) d(destination)
    cross join lateral (
        select ctid as row, partition from {schema}.event_outbox
        where status = 'scheduled' and destination = d.destination and available_at <= pg_catalog.statement_timestamp()
          and partition < 1280::smallint
        order by available_at, id limit $2 for update skip locked
    ) e
), held as materialized (
    select p.partition from (select distinct partition from due) p
    where pg_catalog.pg_try_advisory_xact_lock('{schema}.event_outbox'::regclass::oid::int, p.partition)
), promoted as (
    update {schema}.event_outbox o set status = 'pending' from due
    where o.ctid = due.row and due.partition in (select partition from held)
    returning 1
)
select array(select partition from held), (select pg_catalog.count(*) from promoted)";

static TAKE_QUERY: LazyLock<&str> = LazyLock::new(|| complete(TAKE));
static ANY_QUERY: LazyLock<&str> = LazyLock::new(|| complete(LEFT));
static PEEK_QUERY: LazyLock<&str> = LazyLock::new(|| complete(PEEK));
static WRITERS_QUERY: LazyLock<&str> = LazyLock::new(|| complete(WRITERS));

fn complete(query: &str) -> &'static str {
    query
        .replace("{any}", ANY)
        .replace("{drawn}", DRAWN)
        .replace("{ranges}", RANGES)
        .replace("{pending}", NON_EMPTY)
        .replace("{reinsertions}", REINSERTIONS)
        .leak()
}

/// The ranges in which to search for pending rows, in this order. Each begins in its `low` partition, above its id, and ends
/// before `high`.
#[derive(Default)]
pub(super) struct Ranges {
    low: Vec<i16>,
    above: Vec<i64>,
    high: Vec<i16>,
}

impl Ranges {
    /// All partitions, by priority.
    pub(super) fn all(bounds: &BTreeMap<i16, i64>) -> Self {
        let mut ranges = Self::default();
        ranges.add(0..PENDING, bounds);
        ranges
    }

    /// All partitions, the most urgent first. `last` was taken last: the others of its priority come before it, so that a busy
    /// partition starves none.
    pub(super) fn after(last: i16, bounds: &BTreeMap<i16, i64>) -> Self {
        let begin = last / PER_PRIORITY * PER_PRIORITY;
        let end = begin + PER_PRIORITY;
        let mut ranges = Self::default();
        ranges.add(0..begin, bounds);
        ranges.add(last + 1..end, bounds);
        ranges.add(begin..last + 1, bounds);
        ranges.add(end..PENDING, bounds);
        ranges
    }

    fn add(&mut self, partitions: Range<i16>, bounds: &BTreeMap<i16, i64>) {
        let mut begin = partitions.start;
        for (&partition, &bound) in bounds.range(partitions.clone()) {
            self.push(begin..partition, i64::MIN);
            self.push(partition..partition + 1, bound);
            begin = partition + 1;
        }
        self.push(begin..partitions.end, i64::MIN);
    }

    fn push(&mut self, partitions: Range<i16>, above: i64) {
        if !partitions.is_empty() {
            self.low.push(partitions.start);
            self.above.push(above);
            self.high.push(partitions.end);
        }
    }
}

/// Takes at most `limit` partitions for the open transaction. Also returns the number of reinsertions.
pub(super) async fn take(
    connection: &mut PgConnection,
    sql: Sql,
    ranges: Ranges,
    limit: i16,
) -> Result<(Vec<i16>, i64), sqlx::Error> {
    let query = sql.query_as(*TAKE_QUERY).bind(ranges.low).bind(ranges.above).bind(ranges.high).bind(limit);
    let (taken, reinsertions, _, _): (_, _, String, String) = query.fetch_one(connection).await?;
    Ok((taken, reinsertions))
}

/// For a relay that is superseded: takes the partitions in which events are due for `destinations`, and makes at most `limit`
/// rows of each destination pending.
pub(super) async fn take_left(
    connection: &mut PgConnection,
    sql: Sql,
    destinations: &[String],
    limit: i64,
) -> Result<Vec<i16>, sqlx::Error> {
    let query = sql.query_as(TAKE_LEFT).bind(destinations).bind(limit);
    let (partitions, _): (Vec<i16>, i64) = query.fetch_one(connection).await?;
    Ok(partitions)
}

/// Returns whether any partition has rows, whoever holds it, and how far ids have come.
pub(super) async fn any(connection: &mut PgConnection, sql: Sql, ranges: Ranges) -> Result<(bool, Drawn), sqlx::Error> {
    let query = sql.query_as(*ANY_QUERY).bind(ranges.low).bind(ranges.above).bind(ranges.high);
    let (any, last_id, life) = query.fetch_one(connection).await?;
    Ok((any, Drawn { last_id, life }))
}

/// Returns the number of reinsertions, and the transactions that may be writing.
pub(super) async fn writers(connection: &mut PgConnection, sql: Sql) -> Result<(i64, Writers), sqlx::Error> {
    let (reinsertions, last_id, life, transactions) = sql.query_as(*WRITERS_QUERY).fetch_one(connection).await?;
    Ok((reinsertions, Writers { drawn: Drawn { last_id, life }, transactions }))
}

/// Returns, for each of the first of these partitions, whether it has a row up to its bound.
pub(super) async fn hidden(
    connection: &mut PgConnection,
    sql: Sql,
    bounds: &[(i16, i64)],
) -> Result<Vec<(i16, bool)>, sqlx::Error> {
    let (partitions, bounds): (Vec<i16>, Vec<i64>) = bounds.iter().copied().unzip();
    sql.query_as(HIDDEN).bind(partitions).bind(bounds).fetch_all(connection).await
}

/// What a [`peek`] found.
#[derive(Debug)]
pub(super) struct Peeked {
    pub(super) pending: bool,
    /// In how many milliseconds the next scheduled event is due.
    pub(super) next_due_ms: Option<i64>,
    pub(super) reinsertions: i64,
    pub(super) drawn: Drawn,
}

/// Returns whether an event is pending, or soon will be, and how far reinsertions and ids have come.
pub(super) async fn peek(
    connection: &mut PgConnection,
    sql: Sql,
    ranges: Ranges,
    destinations: &[&str],
) -> Result<Peeked, sqlx::Error> {
    let (pending, next_due_ms, reinsertions, last_id, life) = sql
        .query_as(*PEEK_QUERY)
        .bind(ranges.low)
        .bind(ranges.above)
        .bind(ranges.high)
        .bind(destinations)
        .fetch_one(connection)
        .await?;
    Ok(Peeked { pending, next_due_ms, reinsertions, drawn: Drawn { last_id, life } })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(ranges: &Ranges) -> Vec<(i16, i64, i16)> {
        let ends = ranges.above.iter().zip(&ranges.high);
        ranges.low.iter().zip(ends).map(|(low, (above, high))| (*low, *above, *high)).collect()
    }

    #[test]
    fn all_partitions_are_one_range_but_for_those_with_bounds() {
        assert_eq!(listed(&Ranges::all(&BTreeMap::new())), [(0, i64::MIN, 640)]);
        let bounds = BTreeMap::from([(0, 7), (1, 8), (639, 9)]);
        let expected = [(0, 7, 1), (1, 8, 2), (2, i64::MIN, 639), (639, 9, 640)];
        assert_eq!(listed(&Ranges::all(&bounds)), expected);
    }

    #[test]
    fn after_one_partition_come_the_more_urgent_then_the_others_of_its_priority_then_the_rest() {
        let bounds = BTreeMap::from([(66, 5), (70, 6)]);
        let expected = [
            (0, i64::MIN, 64),
            (68, i64::MIN, 70),
            (70, 6, 71),
            (71, i64::MIN, 128),
            (64, i64::MIN, 66),
            (66, 5, 67),
            (67, i64::MIN, 68),
            (128, i64::MIN, 640),
        ];
        assert_eq!(listed(&Ranges::after(67, &bounds)), expected);
    }
}
