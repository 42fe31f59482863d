//! Finds events that are owed to destinations that nobody has configured.

use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use sqlx::postgres::PgConnection;

use crate::outbox::postgres::question::Question;
use crate::outbox::postgres::register;
use crate::outbox::quote::literal;
use crate::outbox::standstill::{MOST_COUNTED, Standstill, Unconfigured};

/// Each destination of scheduled rows that is not one of `$1`: how many rows, at most one more than are counted, and how old
/// the first one is. A loose scan of the index touches one entry for each destination.
const UNCONFIGURED: &str = "
with recursive owed(destination) as (
    (select e.destination from {schema}.event_outbox e
     where e.status = 'scheduled' and e.destination > '' order by e.destination limit 1)
    union all
    select (select e.destination from {schema}.event_outbox e
            where e.status = 'scheduled' and e.destination > owed.destination order by e.destination limit 1)
    from owed where owed.destination is not null
)
select owed.destination, counted.events, counted.seconds
from owed
cross join lateral (
    select pg_catalog.count(*) as events,
           extract(epoch from pg_catalog.clock_timestamp() - pg_catalog.min(c.created_at))::float8 as seconds
    from (
        select e.created_at from {schema}.event_outbox e
        where e.status = 'scheduled' and e.destination = owed.destination
        order by e.available_at, e.id limit $2
    ) c
) counted
where owed.destination is not null and owed.destination <> all ($1::text[])
order by owed.destination limit 20";

/// Returns one standstill for each such destination that no relay at work has either.
pub(super) fn find<'a>(
    connection: &'a mut PgConnection,
    question: &'a Question<'a>,
) -> BoxFuture<'a, Result<Vec<Standstill>, sqlx::Error>> {
    async {
        let found: Vec<(String, i64, Option<f64>)> = question
            .sql
            .query_as(UNCONFIGURED)
            .bind(question.destinations)
            .bind(MOST_COUNTED + 1)
            .fetch_all(&mut *connection)
            .await?;
        if found.is_empty() {
            return Ok(Vec::new());
        }
        let relays = register::rows(question.sql, connection).await?;
        let known = |name: &String| {
            relays.iter().any(|relay| relay.lives() && relay.configuration.destinations.contains_key(name))
        };
        let found = found.into_iter().filter(|(destination, ..)| !known(destination));
        let told = found.map(|(destination, count, seconds)| {
            let to = question.destinations.first().map_or("another", String::as_str);
            let (from_literal, to_literal) = (literal(&destination), literal(to));
            let oldest = seconds.map(|seconds| Duration::from_secs_f64(seconds.max(0.0)));
            Unconfigured {
                count,
                oldest,
                move_them: format!("select move_owed({from_literal}, {to_literal})"),
                give_them_up: format!("select give_up_owed({from_literal})"),
                destination,
            }
            .told()
        });
        Ok(told.collect())
    }
    .boxed()
}
