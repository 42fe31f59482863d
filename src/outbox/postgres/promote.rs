//! Makes due rows pending.
//!
//! While any session holds an old snapshot, a row that was promoted stays in the indexes of scheduled rows. Each promotion
//! walks over all rows that were promoted before it. Each claim after it walks over all dead rows of its partitions, because a
//! promotion ends their bounds. No bound can leave these rows out: a row may come due anywhere among them, by a late commit, a
//! clock that is set back, or a person. So each promotion walks over all of them, but does not stop at one batch: the longer it
//! walked, the more it promotes. So walking costs little for each event, however many rows are dead, and no due row is missed.
//! Without an old snapshot a walk is short, and a promotion is one batch.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use sqlx::Executor;
use sqlx::postgres::PgConnection;

use crate::outbox::number::to_i64;
use crate::outbox::postgres::refusal::is_content;
use crate::outbox::postgres::savepoint::{CHECK_DEFERRED, KEEP, SAVEPOINT, UNDO};
use crate::outbox::postgres::sql::Sql;
use crate::outbox::records::parked_whole_error;

/// Makes due rows pending again, for each destination the earliest first. It needs no partition: the holder of a partition sees
/// such a row either waiting, with its key behind it, or pending, in its place.
///
/// Also returns two times in microseconds. One is how long it searched for the first row of the destination where that took
/// longest, or for any row if there is none. The other is how long everything took. `begun` names the destination, so that it
/// is read anew for each.
const PROMOTE: &str = "
with due as materialized (
    select e.row, d.destination, b.begun, e.found
    from pg_catalog.unnest($1::text[]) d(destination)
    cross join lateral (
        select case when d.destination is not null then pg_catalog.clock_timestamp() end as begun offset 0
    ) b
    cross join lateral (
        select ctid as row, pg_catalog.clock_timestamp() as found from {schema}.event_outbox
        where status = 'scheduled' and destination = d.destination and available_at <= pg_catalog.statement_timestamp()
        order by available_at, id limit $2 for update skip locked
    ) e
), walked as materialized (
    select coalesce(pg_catalog.max(w.walked), pg_catalog.clock_timestamp() - pg_catalog.statement_timestamp()) as walked
    from (select pg_catalog.min(found) - pg_catalog.min(begun) as walked from due group by destination) w
), promoted as (
    update {schema}.event_outbox o set status = 'pending' from due where o.ctid = due.row
    returning 1
)
select (select (extract(epoch from walked) operator(pg_catalog.*) 1000000)::bigint from walked),
       (select pg_catalog.count(*) from promoted), (select pg_catalog.count(*) from due), (
    select (extract(epoch from pg_catalog.min(least(e.available_at, pg_catalog.statement_timestamp() + interval '1 year')) - pg_catalog.statement_timestamp())
            operator(pg_catalog.*) 1000)::bigint
    from pg_catalog.unnest($1::text[]) d(destination)
    cross join lateral (
        select available_at from {schema}.event_outbox
        where status = 'scheduled' and destination = d.destination and available_at > pg_catalog.statement_timestamp()
        order by available_at limit 1
    ) e
), (extract(epoch from pg_catalog.clock_timestamp() - pg_catalog.statement_timestamp()) operator(pg_catalog.*) 1000000)::bigint, (
    select (last_value + coalesce((select pg_catalog.max(changes) from {schema}.event_pause_changes), 0::bigint)) & 8388607::bigint
    from {schema}.event_relay_changes
)";

/// How many times as long as its walk the rest of a promotion is to take: after it, claims walk as far, several times.
const WORTH: u32 = 15;

/// The longest that the rest of a promotion is to take, because the lane that looks for new events waits for it.
const LONGEST: Duration = Duration::from_secs(1);

/// A batch of fewer events, as for a probe, is never made larger. Nor does its time show what one of many events costs.
const FEW: usize = 100;

/// The most that one promotion makes pending of a destination's events: new events queue behind them.
const MOST: usize = 20_000;

/// If a walk takes longer, claims avoid it too: each asks for the rows of its keys, not whether there are any rows at all.
const LONG_WALK: Duration = Duration::from_millis(1);

/// What the last promotion shows for the next one, and for claims.
#[derive(Debug, Default)]
pub(super) struct Walks {
    /// How many events to promote after a walk as long as the last one.
    worth: AtomicUsize,
    long: AtomicBool,
}

impl Walks {
    /// Returns how many events to promote if a batch has so many.
    fn limit(&self, batch: usize) -> usize {
        if batch < FEW { batch } else { batch.max(self.worth.load(Ordering::Relaxed).min(MOST)) }
    }

    /// Returns whether many dead rows lie among the scheduled ones.
    pub(super) fn are_long(&self) -> bool {
        self.long.load(Ordering::Relaxed)
    }

    /// Takes in that a promotion of `count` events walked for the time `walked`, and took the time `besides` for all else.
    fn took(&self, count: usize, walked: Duration, besides: Duration) {
        self.long.store(walked > LONG_WALK, Ordering::Relaxed);
        if count >= FEW {
            let time = walked.saturating_mul(WORTH).min(LONGEST);
            let worth = count as u128 * time.as_micros() / besides.as_micros().max(1);
            self.worth.store(usize::try_from(worth).unwrap_or(MOST), Ordering::Relaxed);
        } else if walked <= LONG_WALK {
            self.worth.store(0, Ordering::Relaxed);
        }
    }
}

/// What a promotion did.
pub(super) struct Promotion {
    pub(super) promoted: usize,
    /// How many more rows it found and could not change.
    pub(super) swallowed: i64,
    pub(super) next_due_ms: Option<i64>,
    /// The number of changes of the register and of the pauses; `None` if it was not read.
    pub(super) changes: Option<i64>,
}

/// Promotes due rows of these destinations: of each at most `batch` events, or more if the last walk was long.
pub(super) async fn promote(
    connection: &mut PgConnection,
    sql: Sql,
    walks: &Walks,
    destinations: &[&str],
    batch: usize,
) -> Result<Promotion, sqlx::Error> {
    let (walked_us, count, due, next_due_ms, took_us, changes): (i64, i64, i64, Option<i64>, i64, i64) =
        sql.query_as(PROMOTE).bind(destinations).bind(to_i64(walks.limit(batch))).fetch_one(connection).await?;
    let duration = |us| Duration::from_micros(u64::try_from(us).unwrap_or_default());
    let (walked, took) = (duration(walked_us), duration(took_us));
    let promoted = usize::try_from(count).unwrap_or_default();
    walks.took(promoted, walked, took.saturating_sub(walked));
    Ok(Promotion { promoted, swallowed: due - count, next_due_ms, changes: Some(changes) })
}

/// The rows of a promotion that is refused as a whole.
const DUE: &str = "
select e.tid, e.id
from pg_catalog.unnest($1::text[]) d(destination)
cross join lateral (
    select ctid::text as tid, id from {schema}.event_outbox
    where status = 'scheduled' and destination = d.destination and available_at <= pg_catalog.statement_timestamp()
    order by available_at, id limit 500 for update skip locked
) e";

const PROMOTE_ONE: &str =
    "update {schema}.event_outbox set status = 'pending' where ctid = $1::text::tid and id = $2 and $3::text <> ''";

const PARK_ONE: &str = "
update {schema}.event_outbox set available_at = 'infinity', last_error = $3 where ctid = $1::text::tid and id = $2";

/// Promotes the rows one by one, after a promotion was refused because of `reason`. A row that is refused alone is parked. The
/// rows that cannot be parked either are counted as swallowed.
pub(super) async fn promote_each(
    connection: &mut PgConnection,
    sql: Sql,
    destinations: &[&str],
    reason: &str,
) -> Result<Promotion, sqlx::Error> {
    let due: Vec<(String, i64)> =
        sql.query_as(DUE).persistent(false).bind(destinations).fetch_all(&mut *connection).await?;
    let mut done = Promotion { promoted: 0, swallowed: 0, next_due_ms: None, changes: None };
    let error = parked_whole_error(&[], true, reason);
    for (tid, id) in due {
        let mut written = false;
        for text in [PROMOTE_ONE, PARK_ONE] {
            connection.execute(SAVEPOINT).await?;
            let write = async {
                let query = sql.query(text).persistent(false).bind(&tid).bind(id).bind(&error);
                let rows = query.execute(&mut *connection).await?.rows_affected();
                connection.execute(CHECK_DEFERRED).await?;
                Ok(rows)
            };
            match write.await {
                Ok(rows) => {
                    connection.execute(KEEP).await?;
                    written = rows > 0;
                }
                Err(error) if is_content(&error) => {
                    connection.execute(UNDO).await?;
                }
                Err(error) => return Err(error),
            }
            if written {
                if text == PROMOTE_ONE {
                    done.promoted += 1;
                } else {
                    tracing::error!(
                        outbox_id = id,
                        error,
                        "a scheduled event is due and cannot become pending; it is parked"
                    );
                }
                break;
            }
        }
        done.swallowed += i64::from(!written);
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn after_a_long_walk_the_rest_of_a_promotion_is_so_much_longer() {
        let walks = Walks::default();
        assert_eq!(walks.limit(1000), 1000);
        walks.took(1000, ms(20), ms(50));
        assert_eq!(walks.limit(1000), 6000, "which take 300 ms");
        assert_eq!(walks.limit(10), 10, "a probe stays one");
        walks.took(10, ms(20), ms(1));
        assert_eq!(walks.limit(1000), 6000, "few tell nothing");
        walks.took(6000, ms(2000), ms(600));
        assert_eq!(walks.limit(1000), 10_000, "which take a second");
        walks.took(10_000, ms(2000), ms(100));
        assert_eq!(walks.limit(1000), MOST);
        walks.took(MOST, Duration::ZERO, ms(1000));
        assert_eq!(walks.limit(1000), 1000);
    }

    #[test]
    fn a_clock_that_jumps_makes_no_promotion_larger_than_the_largest() {
        let walks = Walks::default();
        walks.took(1000, Duration::MAX, Duration::ZERO);
        assert_eq!(walks.limit(1000), MOST);
        walks.took(0, Duration::ZERO, Duration::ZERO);
        assert_eq!(walks.limit(1000), 1000, "nothing is dead any more");
    }

    #[test]
    fn claims_are_told_whether_walks_are_long_even_where_nothing_is_due() {
        let walks = Walks::default();
        walks.took(0, ms(20), Duration::ZERO);
        assert!(walks.are_long());
        walks.took(0, Duration::ZERO, Duration::ZERO);
        assert!(!walks.are_long());
    }
}
