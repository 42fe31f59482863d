//! Taking partitions, and looking whether there are any to take.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::LazyLock;

use sqlx::Row;
use sqlx::postgres::PgConnection;

use crate::outbox::postgres::bounds::Writers;

/// Partitions of pending rows: 64 for each of 10 priorities. Fixed by the schema.
pub(super) const PARTITIONS: i32 = 640;

/// Takes the first `$4` non-empty partitions of `{ranges}` that nobody holds.
///
/// Where `$5` it asks for the writers too: for the last id drawn, and then, which is why the one is read from the other, for
/// all who may have drawn it. Inserting takes the table's lock before it draws the id.
const TAKE: &str = "
with range as ({ranges}),
taken as materialized (select array(
    select pending.partition from range cross join lateral ({pending}) pending
    where pg_try_advisory_xact_lock('event_outbox'::regclass::oid::int, pending.partition)
    limit $4
) as partitions)
select partitions, partitions = '{}' and exists (select from range cross join lateral ({pending}) pending),
       {moves}, drawn.last_id, writers.transactions
from taken
left join lateral (
    select case when is_called then last_value else last_value - 1 end as last_id from event_outbox_id_seq
) drawn on $5
left join lateral (
    select array_agg(virtualtransaction) as transactions from pg_locks
    where locktype = 'relation' and database = (select oid from pg_database where datname = current_database())
      and relation = 'event_outbox'::regclass and mode = 'RowExclusiveLock' and granted and drawn.last_id is not null
) writers on $5";

/// Whether any partition of `{ranges}` is non-empty; when the next event is due that is owed to one of `$4`.
const PEEK: &str = "
with range as ({ranges})
select exists (select from range cross join lateral ({pending}) pending), (
    select (extract(epoch from min(least(e.available_at, statement_timestamp() + interval '1 year')) - statement_timestamp())
            * 1000)::bigint
    from unnest($4::text[]) d(destination)
    cross join lateral (
        select available_at from event_outbox
        where status = 'scheduled' and destination = d.destination
        order by available_at, id limit 1
    ) e
), {moves}";

const RANGES: &str = "select low, above, high from unnest($1::smallint[], $2::bigint[], $3::smallint[]) as r(low, above, high)";

/// The non-empty partitions of a range. A loose scan of the primary key touches one index entry for each, and stops as soon
/// as enough are taken: each row of a recursive query is made only when it is asked for. By `order by`, so that its plan is by
/// the index whatever the statistics say.
const PENDING: &str = "
    with recursive scan(partition) as (
        (select o.partition::int from event_outbox o
         where (o.partition, o.id) > (range.low, range.above) and o.partition < range.high
         order by o.partition, o.id limit 1)
        union all
        select (select o.partition::int from event_outbox o
                where o.partition > scan.partition::smallint and o.partition < range.high
                order by o.partition, o.id limit 1)
        from scan where scan.partition + 1 < range.high
    )
    select scan.partition from scan where scan.partition is not null";

/// Compared, never counted with: a sequence that was not used yet says the same as after its first use.
pub(super) const MOVES: &str = "(select last_value + is_called::int from event_outbox_moves)";

static TAKE_QUERY: LazyLock<&str> = LazyLock::new(|| complete(TAKE));
static PEEK_QUERY: LazyLock<&str> = LazyLock::new(|| complete(PEEK));

fn complete(query: &str) -> &'static str {
    query.replace("{ranges}", RANGES).replace("{pending}", PENDING).replace("{moves}", MOVES).leak()
}

/// Where to look for pending rows, in this order: from each row's `low` partition and above its id to before `high`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Ranges {
    low: Vec<i16>,
    above: Vec<i64>,
    high: Vec<i16>,
}

impl Ranges {
    /// All partitions, by priority.
    pub(super) fn all(bounds: &BTreeMap<i16, i64>) -> Self {
        let mut ranges = Self::default();
        ranges.add(0..640, bounds);
        ranges
    }

    /// All partitions, the most urgent first. The others of the priority of `last`, which was taken last, come before it,
    /// so that a busy one starves none, unless it has an event with an id above `stay`.
    pub(super) fn after(last: i16, stay: Option<i64>, bounds: &BTreeMap<i16, i64>) -> Self {
        let (begin, end) = (last / 64 * 64, last / 64 * 64 + 64);
        let mut ranges = Self::default();
        ranges.add(0..begin, bounds);
        if let Some(stay) = stay {
            ranges.push(last..last + 1, stay.max(bounds.get(&last).copied().unwrap_or(i64::MIN)));
        }
        ranges.add(last + 1..end, bounds);
        ranges.add(begin..last + 1, bounds);
        ranges.add(end..640, bounds);
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

/// What [`take`] got.
pub(super) struct Taken {
    pub(super) partitions: Vec<i32>,
    /// It got none, but some are not empty.
    pub(super) busy: bool,
    pub(super) moves: i64,
    pub(super) writers: Option<Writers>,
}

/// Takes at most `limit` partitions for the transaction that is open.
pub(super) async fn take(
    connection: &mut PgConnection,
    persistent: bool,
    ranges: Ranges,
    limit: i32,
    ask: bool,
) -> Result<Taken, sqlx::Error> {
    let row = sqlx::query(*TAKE_QUERY)
        .persistent(persistent)
        .bind(ranges.low)
        .bind(ranges.above)
        .bind(ranges.high)
        .bind(limit)
        .bind(ask)
        .fetch_one(connection)
        .await?;
    let last_id: Option<i64> = row.try_get(3)?;
    let transactions: Option<Vec<String>> = row.try_get(4)?;
    Ok(Taken {
        partitions: row.try_get(0)?,
        busy: row.try_get(1)?,
        moves: row.try_get(2)?,
        writers: last_id.map(|last_id| Writers { last_id, transactions: transactions.unwrap_or_default() }),
    })
}

/// Whether something is pending, in how many milliseconds something scheduled is due, and the number of moves.
pub(super) async fn peek(
    connection: &mut PgConnection,
    persistent: bool,
    ranges: Ranges,
    destinations: &[&str],
) -> Result<(bool, Option<i64>, i64), sqlx::Error> {
    sqlx::query_as(*PEEK_QUERY)
        .persistent(persistent)
        .bind(ranges.low)
        .bind(ranges.above)
        .bind(ranges.high)
        .bind(destinations)
        .fetch_one(connection)
        .await
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
        assert_eq!(listed(&Ranges::after(67, None, &bounds)), expected);
    }

    #[test]
    fn to_stay_is_first_of_the_priority_and_keeps_to_the_bound() {
        let bounds = BTreeMap::from([(66, 5)]);
        assert_eq!(listed(&Ranges::after(66, Some(9), &bounds))[1], (66, 9, 67));
        assert_eq!(listed(&Ranges::after(66, Some(3), &bounds))[1], (66, 5, 67));
    }
}
