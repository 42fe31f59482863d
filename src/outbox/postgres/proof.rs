//! Proves that the database records what is published, and names what may keep it from that.
//!
//! The tables are the application's as much as the relay's: a trigger, a rule, a row policy or a constraint may swallow or
//! refuse a write. So a relay makes all the writes of settles, with rows of its own, and rolls them back: before its first
//! claim, in `relay check`, and after a settle that failed.

use std::collections::BTreeSet;
use std::time::Duration;

use sqlx::Executor;
use sqlx::postgres::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::event::{Event, Fault, PublishError, RowKey, Verdict};
use crate::outbox::error::OutboxError;
use crate::outbox::postgres::batch::{self, Which};
use crate::outbox::postgres::connection::{STATEMENT_TIMEOUT, query_failed, with_timeout};
use crate::outbox::postgres::left_out::Survivor;
use crate::outbox::postgres::refusal::{self, is_content, is_missing_day, is_of_types, suppressed, words};
use crate::outbox::postgres::savepoint::CHECK_DEFERRED;
use crate::outbox::postgres::settle::SettleWriter;
use crate::outbox::postgres::sql::{Schema, Sql};
use crate::outbox::postgres::{shape, tid};
use crate::outbox::proof::ProofRows;
use crate::outbox::records::Records;
use crate::outbox::{ClaimRequest, Deliveries, Delivery, Usage};

/// Inserts rows that no other session sees and no claim takes, with ids that are not drawn from the sequence.
const INSERT: &str = "
insert into {schema}.event_outbox (id, event_type, status, available_at)
overriding system value
select -1 - (pg_catalog.random() * 1e15::float8)::bigint, 'relay.proof', 'scheduled', 'infinity' from pg_catalog.generate_series(1, 4)
returning ctid::text, partition, id, destination, event_id";

/// Reads existing rows that nobody is settling, for a database where the application lets nobody insert such rows.
const ROWS: &str = "
select ctid::text, partition, id, destination, event_id from {schema}.event_outbox
order by partition, id limit 4 for update skip locked";

/// The additions to the relay's tables that may keep it from writing.
const ADDITIONS: &str = "
with ours as (
    select oid, relname from pg_catalog.pg_class
    where oid in ('{schema}.event_outbox'::regclass::oid, '{schema}.event_processing_log'::regclass::oid, '{schema}.event_dead_letter'::regclass::oid,
                  '{schema}.event_history'::regclass::oid)
), days as (
    select i.inhrelid as oid, c.relname from pg_catalog.pg_inherits i
    join ours on ours.oid = i.inhparent join pg_catalog.pg_class c on c.oid = i.inhrelid
)
select pg_catalog.format('trigger %s on %s', t.tgname, r.relname)
from (select * from ours union all select * from days) r
join pg_catalog.pg_trigger t on t.tgrelid = r.oid join pg_catalog.pg_proc p on p.oid = t.tgfoid
where not t.tgisinternal and t.tgparentid = 0::oid and t.tgenabled <> 'D' and p.proname::text not like 'event\\_outbox\\_%'
union all
select pg_catalog.format('rule %s on %s', w.rulename, r.relname)
from (select * from ours union all select * from days) r join pg_catalog.pg_rewrite w on w.ev_class = r.oid
where w.ev_enabled <> 'D'
union all
select pg_catalog.format('row policy %s on %s', p.polname, r.relname)
from ours r join pg_catalog.pg_policy p on p.polrelid = r.oid
union all
select pg_catalog.format('row security on %s', r.relname)
from ours r where pg_catalog.row_security_active(r.oid)
union all
select pg_catalog.format('constraint %s on %s', n.conname, r.relname)
from (select * from ours union all select * from days) r
join pg_catalog.pg_constraint n on (n.conrelid = r.oid or n.confrelid = r.oid)
where n.contype in ('c', 'f', 'u', 'x') and n.conparentid = 0::oid
  and n.conname not in ('event_is_valid', 'status_is_known', 'error_iff_not_delivered', 'attempts_start_at_1',
                        'first_failure_is_not_after_last')
union all
select pg_catalog.format('unique index %s on %s', c.relname, r.relname)
from (select * from ours union all select * from days) r
join pg_catalog.pg_index i on i.indrelid = r.oid join pg_catalog.pg_class c on c.oid = i.indexrelid
where i.indisunique and c.relname not in ('event_outbox_pkey', 'event_dead_letter_pkey')
  and not exists (select from pg_catalog.pg_constraint n where n.conindid = i.indexrelid)
order by 1";

/// Within a transaction, makes all the writes of settles, and settles `survivors`, which could be neither settled nor parked.
/// Then it rolls these writes back.
///
/// # Errors
/// The error of the first write that fails. The transaction goes on without these writes, unless the connection is lost.
pub(super) async fn prove(
    connection: &mut PgConnection,
    sql: Sql,
    worker: &str,
    usage: Usage,
    survivors: &[Survivor],
) -> Result<ProofRows, sqlx::Error> {
    connection.execute("savepoint before_proof").await?;
    let tried = try_all(connection, sql, worker, usage, survivors).await;
    // Also after an error that is not the database's: a caller that commits must not commit rows of a proof.
    let back = connection.execute("rollback to savepoint before_proof").await;
    let tried = tried?;
    back.map(|_| tried)
}

/// The same for `relay check`. Returns the result in words.
///
/// # Errors
/// [`OutboxError::Unrecorded`] if a write is refused or swallowed.
pub(super) async fn check(connection: &mut PgConnection, usage: Usage) -> Result<String, OutboxError> {
    let tried = with_timeout("try what settles write", STATEMENT_TIMEOUT, async {
        // This is the first statement: behind a pooler an earlier one may reach another connection.
        connection.execute("begin; set local lock_timeout = '5s'").await?;
        let sql = Sql { schema: Schema::find(connection).await?.unwrap_or_default(), persistent: false };
        let tried = (prove(connection, sql, "check", usage, &[]).await, sql);
        connection.execute("rollback").await?;
        Ok(tried)
    })
    .await?;
    let (tried, sql) = tried;
    match tried {
        Ok(tried) => Ok(tried.describe()),
        Err(error) if is_missing_day(&error) => Ok(format!("{}: the relay adds that day at its start", words(&error))),
        Err(error) if is_content(&error) => Err(unrecorded(connection, sql, usage, error).await),
        Err(error) => Err(query_failed("try what settles write", error)),
    }
}

type Row = (String, i16, i64, String, Uuid);

async fn try_all(
    connection: &mut PgConnection,
    sql: Sql,
    worker: &str,
    usage: Usage,
    survivors: &[Survivor],
) -> Result<ProofRows, sqlx::Error> {
    let inserted: Result<Vec<Row>, _> = sql.query_as(INSERT).persistent(false).fetch_all(&mut *connection).await;
    let (tried, rows) = match inserted {
        Ok(rows) if rows.len() == 4 => (ProofRows::Own, rows),
        Err(error) if !is_content(&error) => return Err(error),
        refused => {
            let why = refused.err().map_or_else(|| "it has no effect".to_owned(), |error| words(&error));
            connection.execute("rollback to savepoint before_proof").await?;
            (ProofRows::Existing(why), sql.query_as(ROWS).persistent(false).fetch_all(&mut *connection).await?)
        }
    };
    // Existing events may be large, so they are not read.
    let partitions = if tried == ProofRows::Own { rows.iter().map(|row| row.1).collect() } else { BTreeSet::new() };
    read(connection, sql, &partitions.into_iter().collect::<Vec<_>>()).await?;
    let events: Vec<Event> = rows.into_iter().filter_map(event).collect();
    let verdicts = [
        vec![("proof", published())],
        vec![("proof", Verdict::DeadLetter { error: error() })],
        vec![("proof", retry())],
        if usage.several_destinations {
            vec![("proof", retry()), ("proof 2", retry())]
        } else {
            vec![("proof", retry())]
        },
    ];
    let mut deliveries = Deliveries::default();
    let mut add = |event, verdicts: Vec<(&'static str, Verdict)>| {
        let mut group = deliveries.begin(event);
        for (destination, verdict) in verdicts {
            group.push(Delivery { destination, verdict, duration: Duration::ZERO });
        }
    };
    if events.len() == verdicts.len() {
        events.iter().zip(verdicts).for_each(|(event, verdicts)| add(event, verdicts));
    } else {
        events.iter().for_each(|event| add(event, vec![("proof", published())]));
    }
    for survivor in survivors {
        add(&survivor.event, vec![("proof", if survivor.still_owed { retry() } else { published() })]);
    }
    let records = Records::new(deliveries.by_event(), usage.history);
    SettleWriter::proof(&mut *connection, Sql { persistent: false, ..sql }, worker).write(&records).await?;
    connection.execute(CHECK_DEFERRED).await?;
    Ok(tried)
}

/// Reads the first rows of these partitions as a claim does, both as small and as large ones.
async fn read(connection: &mut PgConnection, sql: Sql, partitions: &[i16]) -> Result<(), sqlx::Error> {
    let (max_bytes, max_payload) = (1 << 20, 1 << 20);
    let request = ClaimRequest { max_events: 4, max_bytes, max_payload, destinations: &[] };
    let (sql, bounds) = (Sql { persistent: false, ..sql }, vec![i64::MIN; partitions.len()]);
    for mut large in [false, true] {
        let (which, limits) = (Which::All { among_dead: true }, (4, 4));
        drop(batch::read(connection, sql, &mut large, (partitions, &bounds), limits, request, which).await?);
    }
    Ok(())
}

fn published() -> Verdict {
    Verdict::Published { message_id: None }
}

fn retry() -> Verdict {
    Verdict::Retry { delay: Duration::ZERO, error: error() }
}

fn error() -> PublishError {
    PublishError::new(Fault::Event, "proof", "proof")
}

fn event((tid, partition, id, destination, event_id): Row) -> Option<Event> {
    Some(Event {
        row: RowKey { locator: tid::to_locator(&tid)?, partition, id, destination },
        event_id,
        event_type: "relay.proof".to_owned(),
        source: String::new(),
        aggregate_type: None,
        aggregate_id: None,
        payload: Vec::new(),
        headers: Vec::new(),
        correlation_id: None,
        causation_id: None,
        schema_version: 1,
        created_at: OffsetDateTime::UNIX_EPOCH,
        attempts: 0,
    })
}

/// Returns the additions to the relay's tables, in words.
pub(super) async fn additions(connection: &mut PgConnection, sql: Sql) -> Result<Vec<String>, sqlx::Error> {
    sql.query_scalar(ADDITIONS).persistent(false).fetch_all(connection).await
}

/// The error of a database that does not record what is published, with the additions that may be the reason.
pub(super) async fn unrecorded(
    connection: &mut PgConnection,
    sql: Sql,
    usage: Usage,
    error: sqlx::Error,
) -> OutboxError {
    if is_of_types(&error) {
        let changes = shape::changes(connection, sql, usage, true).await.unwrap_or_default();
        if !changes.is_empty() {
            return OutboxError::SchemaBroken { reason: format!("{}; {}", words(&error), changes.join("; ")) };
        }
    }
    let cure = match refusal::cure(&error) {
        None => refusal::cure_of_publication(connection, sql, &error).await,
        cure => cure,
    };
    if let Some(cure) = cure {
        return OutboxError::Unrecorded { reason: format!("{}; {cure}", words(&error)) };
    }
    let additions = additions(connection, sql).await.unwrap_or_default();
    if additions.is_empty() && suppressed(&error).is_none() {
        return query_failed("settle", error);
    }
    let look = "; drop or correct whichever of these does it: ";
    let additions = if additions.is_empty() { String::new() } else { format!("{look}{}", additions.join(", ")) };
    OutboxError::Unrecorded { reason: format!("{}{additions}", words(&error)) }
}

/// The error of a table that has no partition for now, if none can be added.
pub(super) fn no_day(error: &sqlx::Error, not_made: &OutboxError) -> OutboxError {
    let table = error.as_database_error().and_then(|error| error.table()).unwrap_or("event_processing_log");
    let reason = format!(
        "{}, and that day cannot be added ({}); let the owner run `select relay_add_days('{table}', 7)`",
        words(error),
        not_made.explain()
    );
    OutboxError::Unrecorded { reason }
}
