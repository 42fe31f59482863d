//! What a relay writes for `relay status`: its tallies, and the destinations that it finds down. It is written on the side
//! connection, never in a settle.

use sqlx::Executor;
use sqlx::postgres::PgConnection;

use crate::outbox::error::OutboxError;
use crate::outbox::postgres::connection::query_failed;
use crate::outbox::postgres::store::PgOutbox;
use crate::outbox::status::{Found, TallyCount};

/// Nobody waits for these writes, and a few lost ones do no harm: so they wait neither for a lock nor for the disk.
const BEGIN: &str = "
begin isolation level read committed;
set local lock_timeout = '500ms';
set local synchronous_commit = off";

/// Several relays add to the same rows, so each does so in the same order.
const ADD: &str = "
insert into {schema}.event_tally as t (minute, destination, published, retried, dead_lettered)
select pg_catalog.to_timestamp(pg_catalog.floor(extract(epoch from pg_catalog.statement_timestamp())::float8 / 60.0::float8) * 60.0::float8),
       c.destination, c.published, c.retried, c.dead_lettered
from unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[]) c(destination, published, retried, dead_lettered)
order by c.destination
on conflict (minute, destination) do update
set published = t.published + excluded.published, retried = t.retried + excluded.retried,
    dead_lettered = t.dead_lettered + excluded.dead_lettered";

const FORGET: &str = "
delete from {schema}.event_tally t
where t.ctid = any (array(
    select o.ctid from {schema}.event_tally o
    where o.minute < pg_catalog.statement_timestamp() - interval '16 minutes'
    order by o.minute, o.destination limit 1000
))";

/// `$1` is the id of the relay. For each destination: its name, its state, for how many seconds it lasts, and why.
const TROUBLE: &str = "
update {schema}.event_relay
set trouble = coalesce((
    select pg_catalog.jsonb_object_agg(f.destination, pg_catalog.jsonb_build_object(
        'state', f.state, 'since', extract(epoch from pg_catalog.clock_timestamp())::float8 - f.seconds, 'reason', f.reason))
    from unnest($2::text[], $3::text[], $4::float8[], $5::text[]) f(destination, state, seconds, reason)
), '{}'::jsonb)
where id = $1";

/// Adds to the tallies.
pub(super) async fn add(outbox: &PgOutbox, counts: &[TallyCount]) -> Result<(), OutboxError> {
    let numbers = |number: fn(&TallyCount) -> u64| -> Vec<i64> {
        counts.iter().map(|count| i64::try_from(number(count)).unwrap_or(i64::MAX)).collect()
    };
    let destinations: Vec<&str> = counts.iter().map(|count| count.destination.as_str()).collect();
    write(outbox, "add to event_tally", async |connection| {
        let sql = outbox.sql();
        sql.query(ADD)
            .bind(destinations)
            .bind(numbers(|count| count.published))
            .bind(numbers(|count| count.retried))
            .bind(numbers(|count| count.dead_lettered))
            .execute(&mut *connection)
            .await?;
        sql.query(FORGET).execute(connection).await.map(drop)
    })
    .await
}

/// Writes the destinations that this relay finds down.
pub(super) async fn note_trouble(outbox: &PgOutbox, found: &[Found]) -> Result<(), OutboxError> {
    let Some(member) = outbox.membership.member() else { return Ok(()) };
    let texts = |text: fn(&Found) -> &str| -> Vec<&str> { found.iter().map(text).collect() };
    let seconds: Vec<f64> = found.iter().map(Found::seconds).collect();
    write(outbox, "write which destinations are down", async |connection| {
        let query = outbox.sql().query(TROUBLE).persistent(false);
        let query = query.bind(member.id).bind(texts(|found| &found.destination)).bind(texts(|found| found.state));
        query.bind(seconds).bind(texts(|found| &found.reason)).execute(connection).await.map(drop)
    })
    .await
}

/// Writes in a transaction of its own. An error of the database ends only that transaction: the connection holds this relay's
/// registration.
async fn write(
    outbox: &PgOutbox,
    operation: &'static str,
    query: impl AsyncFnOnce(&mut PgConnection) -> Result<(), sqlx::Error>,
) -> Result<(), OutboxError> {
    let mut slot = outbox.side_connection.lock().await;
    let written = outbox.ask_on(&mut slot, operation, async |connection| {
        connection.execute(BEGIN).await?;
        match query(&mut *connection).await {
            Ok(()) => connection.execute("commit").await.map(|_| Ok(())),
            Err(error @ sqlx::Error::Database(_)) => connection.execute("rollback").await.map(|_| Err(error)),
            Err(error) => Err(error),
        }
    });
    written.await?.map_err(|error| query_failed(operation, error))
}
