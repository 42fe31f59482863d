//! Renews a claim, for a destination that refuses claims older than the ones it has seen.

use sqlx::postgres::PgConnection;

use crate::event::{RenewedClaim, SentBefore};
use crate::outbox::postgres::sql::Sql;

/// `$1` a number below the new epoch; `$2` partitions, `$3` ids, `$4` event ids; `$5` destination. A row may have been scheduled,
/// and so moved, since it was noted.
const RENEW: &str = "
select {schema}.relay_epoch_above($1), array(
    select n.place::int
    from unnest($2::smallint[], $3::bigint[], $4::uuid[]) with ordinality as n(partition, id, event_id, place)
    where exists (
        select from {schema}.event_outbox o
        where o.partition in (n.partition, n.partition + 640::smallint) and o.id = n.id and o.event_id = n.event_id
          and o.destination in ('', $5)
    )
)";

/// Gives the claim of this transaction an epoch above `floor`. Returns which of `noted` still wait for `destination`.
pub(super) async fn renew(
    connection: &mut PgConnection,
    sql: Sql,
    floor: i64,
    noted: &[SentBefore],
    destination: &str,
) -> Result<RenewedClaim, sqlx::Error> {
    let (epoch, places): (i64, Vec<i32>) = sql
        .query_as(RENEW)
        .bind(floor)
        .bind(noted.iter().map(|noted| noted.partition).collect::<Vec<_>>())
        .bind(noted.iter().map(|noted| noted.id).collect::<Vec<_>>())
        .bind(noted.iter().map(|noted| noted.event_id).collect::<Vec<_>>())
        .bind(destination)
        .fetch_one(connection)
        .await?;
    let pending = places.into_iter().filter_map(|place| usize::try_from(place - 1).ok()).collect();
    Ok(RenewedClaim { epoch, pending })
}
