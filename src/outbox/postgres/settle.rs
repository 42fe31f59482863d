//! Writes the records of a settle. Each statement takes its rows as arrays, one for each column.
//!
//! A trigger, a rule or a row policy may swallow a write without an error. So each statement returns how many rows it wrote. If
//! these are fewer than were sent, the missing rows are searched for. A row that an operator has changed is at another place
//! (`ctid`), and is written there. A row that was deleted needs no write. A row that is still at its place was swallowed, which
//! is an error.

use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

use sqlx::postgres::PgConnection;

use crate::event::{Event, RowKey};
use crate::failpoint::failpoint;
use crate::outbox::partitions::OTHER_FORMATS;
use crate::outbox::postgres::sql::Sql;
use crate::outbox::postgres::tid;
use crate::outbox::records::{DeadLetter, HistoryRow, LogEntry, Owed, Records};

/// A write that had no effect, as in "insert on event_dead_letter".
#[derive(Debug, thiserror::Error)]
#[error("the {0} has no effect")]
pub(super) struct Suppressed(&'static str);

/// Finds the present places of rows, and their payloads. The partitions of a key differ by multiples of 64, by priority and
/// status.
const LOCATE: &str = "
select k.place::int, o.ctid::text, o.payload::text
from unnest($1::bigint[], $2::uuid[], $3::text[], $4::smallint[]) with ordinality
    as k(id, event_id, destination, partition, place)
cross join pg_catalog.generate_series(0, 1279, 64) as g(first)
join {schema}.event_outbox o on o.partition = (g.first + k.partition::int % 64)::smallint
    and o.id = k.id and o.destination = k.destination and o.event_id = k.event_id";

/// The columns that a copy does not take over from its row.
const OWN_COLUMNS: [&str; 6] = ["status", "destination", "attempts", "last_error", "available_at", "first_failed_at"];

/// All other columns that can be written, so that a copy also has the columns that the application has added.
const COLUMNS: &str = "
select pg_catalog.array_agg(pg_catalog.quote_ident(attname) order by attnum) from pg_catalog.pg_attribute
where attrelid = '{schema}.event_outbox'::regclass::oid and attnum > 0 and not attisdropped and attgenerated = ''
  and attname <> all ($1::text[])";

/// The time at which a row is due: `w` has the delay, `o` is the row. A negative delay grows with the time for which the event
/// has failed. An event whose own time is later keeps that time. Without a delay the row waits until somebody acts.
const AVAILABLE_AT: &str = "case when w.delay_seconds is null then 'infinity'
    else greatest(o.available_at, pg_catalog.statement_timestamp() + case
        when w.delay_seconds >= 0::float8 then pg_catalog.make_interval(secs => w.delay_seconds)
        else (0.5::float8 + pg_catalog.random()) * least(
            greatest(pg_catalog.statement_timestamp() - o.first_failed_at, interval '1 second'), interval '5 minutes'
        )
    end) end";

const FIRST_FAILED_AT: &str = "case when w.error is null then o.first_failed_at
    else coalesce(o.first_failed_at, pg_catalog.statement_timestamp()) end";

const OWED: &str = "unnest($1::text[]::tid[], $2::bigint[], $3::text[], $4::int[], $5::float8[], $6::text[])
    as w(tid, id, destination, attempts, delay_seconds, error)";

/// Updates rows to what is owed. A trigger may have put the old values back, so it returns only the rows that have the new
/// ones.
static UPDATE: LazyLock<String> = LazyLock::new(|| {
    format!(
        "with moved as (
            update {{schema}}.event_outbox o
            set status = 'scheduled', destination = w.destination, attempts = w.attempts,
                last_error = coalesce(w.error, o.last_error), available_at = {AVAILABLE_AT},
                first_failed_at = {FIRST_FAILED_AT}
            from {OWED}
            where o.ctid = w.tid and o.id = w.id
            returning o.id, o.status = 'scheduled' and o.destination = w.destination and o.attempts = w.attempts
                and (w.delay_seconds is not null or o.available_at = 'infinity') as kept
        )
        select coalesce(pg_catalog.array_agg(id) filter (where kept), '{{}}'),
            pg_catalog.nextval('{{schema}}.event_outbox_epoch')
        from moved"
    )
});

/// Rows by their place. A place can be given to another row, so each row has its id as well.
struct Rows {
    tids: Vec<String>,
    ids: Vec<i64>,
}

/// The values of one column for all `records`.
fn column<'a, R, T>(records: &'a [R], value: impl Fn(&'a R) -> T) -> Vec<T> {
    records.iter().map(value).collect()
}

/// Writes settles on a lane's connection, in the name of its worker.
pub(super) struct SettleWriter<'c> {
    connection: &'c mut PgConnection,
    sql: Sql,
    worker: &'c str,
    /// The places of rows that have moved since the claim.
    moved_to: HashMap<RowKey, String>,
    /// Everything that is written will be rolled back.
    is_proof: bool,
}

impl<'c> SettleWriter<'c> {
    pub(super) fn new(connection: &'c mut PgConnection, sql: Sql, worker: &'c str) -> Self {
        Self { connection, sql, worker, moved_to: HashMap::new(), is_proof: false }
    }

    /// A writer whose writes are rolled back, and whose dead letters take no ids from their sequence.
    pub(super) fn proof(connection: &'c mut PgConnection, sql: Sql, worker: &'c str) -> Self {
        Self { is_proof: true, ..Self::new(connection, sql, worker) }
    }

    /// Writes all of `records`, but commits nothing. Returns how many of their rows were there.
    ///
    /// # Errors
    /// An error of the database, [`Suppressed`], or the place of a row that has another row by now.
    pub(super) async fn write(&mut self, records: &Records<'_>) -> Result<usize, sqlx::Error> {
        self.all(&records.dead_letters, "insert on event_dead_letter").await?;
        if !records.dead_letters.is_empty() {
            failpoint(if self.is_proof { "proof_inserted" } else { "dlq_inserted" })
                .map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
        }
        self.all(&records.history, "insert on event_history").await?;
        self.all(&Copy::of(&records.copies), "insert on event_outbox").await?;
        let mut settled = self.change(&records.moved).await?;
        settled.extend(self.delete_all(&records.gone).await?);
        let mut entries: Vec<&LogEntry<'_>> = records.log.iter().collect();
        if settled.len() < records.rows() {
            settled.sort_unstable();
            entries.retain(|entry| settled.binary_search(&entry.event.row.id).is_ok());
        }
        self.log(&entries).await?;
        Ok(settled.len())
    }

    fn rows<'a>(&self, rows: impl Iterator<Item = &'a RowKey>) -> Rows {
        let place = |row: &RowKey| match self.moved_to.get(row) {
            Some(place) if !self.moved_to.is_empty() => place.clone(),
            _ => tid::from_locator(row.locator),
        };
        let (tids, ids) = rows.map(|row| (place(row), row.id)).unzip();
        Rows { tids, ids }
    }

    /// Finds the rows of these events. Returns for each the index of its event, its place, and whether it is what was
    /// published.
    async fn locate(&mut self, events: &[&Event]) -> Result<Vec<(usize, String, bool)>, sqlx::Error> {
        let found: Vec<(i32, String, String)> = self
            .sql
            .query_as(LOCATE)
            .persistent(false)
            .bind(column(events, |event| event.row.id))
            .bind(column(events, |event| event.event_id))
            .bind(column(events, |event| event.row.destination.as_str()))
            .bind(column(events, |event| event.row.partition))
            .fetch_all(&mut *self.connection)
            .await?;
        let row = |(place, tid, payload): (i32, String, String)| {
            let place = usize::try_from(place - 1).ok()?;
            // Nothing was published of a payload that was too large to be read.
            let read = &events.get(place)?.payload;
            Some((place, tid, read.is_empty() || *read == payload.as_bytes()))
        };
        Ok(found.into_iter().filter_map(row).collect())
    }

    /// Returns the events whose rows have another place now, and remembers these places. Also returns how many rows still have
    /// their old place. A row whose payload was changed counts as another event, because its present payload was not published.
    async fn still_there<'a>(&mut self, events: &[&'a Event]) -> Result<(Vec<&'a Event>, usize), sqlx::Error> {
        let (mut moved, mut unmoved) = (Vec::new(), 0);
        for (place, tid, same) in self.locate(events).await? {
            let Some(event) = events.get(place).filter(|_| same) else { continue };
            if tid == tid::from_locator(event.row.locator) {
                unmoved += 1;
            } else {
                self.moved_to.insert(event.row.clone(), tid);
                moved.push(*event);
            }
        }
        Ok((moved, unmoved))
    }

    /// Writes a row for each of `records` whose event still has its row.
    async fn all<R: Written>(&mut self, records: &[R], what: &'static str) -> Result<(), sqlx::Error> {
        if records.is_empty() {
            return Ok(());
        }
        let every: Vec<&R> = records.iter().collect();
        let written = R::insert(self, &every).await?;
        if written >= records.len() {
            return Ok(());
        }
        let events: Vec<&Event> = records.iter().map(R::event).collect();
        let mut moved = Vec::new();
        let mut unmoved = 0;
        for (place, tid, _) in self.locate(&events).await? {
            let (Some(event), Some(record)) = (events.get(place), every.get(place)) else { continue };
            if tid == tid::from_locator(event.row.locator) {
                unmoved += 1;
            } else {
                self.moved_to.insert(event.row.clone(), tid);
                moved.push(*record);
            }
        }
        if written < unmoved || (!moved.is_empty() && R::insert(self, &moved).await? < moved.len()) {
            return Err(suppressed(what));
        }
        Ok(())
    }

    /// Sends what the entries of a group have in common as one value, because to send a column as an array costs as much as to
    /// write it. (COPY would take a third less, and 40 ms: the driver sends its end apart, which waits until the data is
    /// acknowledged.)
    async fn log(&mut self, entries: &[&LogEntry<'_>]) -> Result<(), sqlx::Error> {
        let query = "
            insert into {schema}.event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, message_id, error,
                duration_ms, worker, processed_at)
            select event_id, id, event_type, $6, $7, $8, message_id, error, $9, $10, pg_catalog.statement_timestamp()
            from unnest($1::uuid[], $2::bigint[], $3::text[], $4::text[], $5::text[])
                as l(event_id, id, event_type, message_id, error)";
        let mut groups: BTreeMap<(&str, &str, i32, i32), Vec<&LogEntry<'_>>> = BTreeMap::new();
        for &entry in entries {
            let attempt = entry.event.attempts.saturating_add(1);
            groups.entry((entry.destination, entry.status, attempt, entry.duration_ms)).or_default().push(entry);
        }
        for ((destination, status, attempt, duration_ms), entries) in groups {
            // `unnest` fills a shorter array up with nulls.
            let failed = entries.iter().any(|entry| entry.error.is_some());
            let errors = if failed { column(&entries, |entry| entry.error.as_deref()) } else { Vec::new() };
            let written = self
                .sql
                .query(query)
                .bind(column(&entries, |entry| entry.event.event_id))
                .bind(column(&entries, |entry| entry.event.row.id))
                .bind(column(&entries, |entry| entry.event.event_type.as_str()))
                .bind(column(&entries, |entry| entry.message_id))
                .bind(errors)
                .bind(destination)
                .bind(status)
                .bind(attempt)
                .bind(duration_ms)
                .bind(self.worker)
                .execute(&mut *self.connection)
                .await?
                .rows_affected();
            if to_usize(written) < entries.len() {
                return Err(suppressed("insert on event_processing_log"));
            }
        }
        Ok(())
    }

    /// Deletes these events' rows. Returns the ids of those that were there.
    async fn delete_all(&mut self, events: &[&Event]) -> Result<Vec<i64>, sqlx::Error> {
        if events.is_empty() {
            return Ok(Vec::new());
        }
        let mut gone = self.delete(events).await?;
        if gone.len() < events.len() {
            let (moved, unmoved) = self.still_there(events).await?;
            if unmoved > 0 {
                return Err(suppressed("delete on event_outbox"));
            }
            if !moved.is_empty() {
                let found = self.delete(&moved).await?;
                gone.extend(&found);
                if found.len() < moved.len() && !self.locate(&moved).await?.is_empty() {
                    return Err(suppressed("delete on event_outbox"));
                }
            }
        }
        Ok(gone)
    }

    /// Deletes the rows and raises the epoch. Returns the ids of those that were there, in order.
    async fn delete(&mut self, events: &[&Event]) -> Result<Vec<i64>, sqlx::Error> {
        // The ids are compared here: a join by place and id would take half as long again. The partitions and the range of ids
        // exclude nearly all other rows that may have been given such a place meanwhile.
        let query = "
            with gone as (
                delete from {schema}.event_outbox
                where ctid = any($1::text[]::tid[]) and partition = any($2::smallint[]) and id between $3 and $4
                returning id
            )
            select coalesce(pg_catalog.array_agg(id), '{}'), pg_catalog.nextval('{schema}.event_outbox_epoch') from gone";
        let mut partitions: Vec<i16> = if self.moved_to.is_empty() {
            column(events, |event| event.row.partition)
        } else {
            (0..OTHER_FORMATS).collect()
        };
        partitions.dedup(); // they come in order
        let Rows { tids, mut ids } = self.rows(events.iter().map(|event| &event.row));
        let (mut gone, _): (Vec<i64>, i64) = self
            .sql
            .query_as(query)
            .bind(tids)
            .bind(partitions)
            .bind(ids.iter().min())
            .bind(ids.iter().max())
            .fetch_one(&mut *self.connection)
            .await?;
        ids.sort_unstable();
        gone.sort_unstable();
        require_among(&gone, ids)?;
        Ok(gone)
    }

    /// Updates rows to what their first destination is still owed. Returns the ids of the rows that were there.
    async fn change(&mut self, owed: &[Owed<'_>]) -> Result<Vec<i64>, sqlx::Error> {
        if owed.is_empty() {
            return Ok(Vec::new());
        }
        let every: Vec<&Owed<'_>> = owed.iter().collect();
        let mut changed = self.update(&every).await?;
        if changed.len() < owed.len() {
            // A row is searched for by its old destination. A row that was updated has another one, so only the others are
            // searched for.
            let missing: Vec<&Owed<'_>> =
                every.into_iter().filter(|owed| !changed.contains(&owed.event.row.id)).collect();
            let events = column(&missing, |owed| owed.event);
            let (moved, unmoved) = self.still_there(&events).await?;
            let again: Vec<&Owed<'_>> =
                missing.into_iter().filter(|owed| moved.iter().any(|event| std::ptr::eq(*event, owed.event))).collect();
            if unmoved > 0 {
                return Err(suppressed("update on event_outbox"));
            }
            if !again.is_empty() {
                let found = self.update(&again).await?;
                if found.len() < again.len() {
                    return Err(suppressed("update on event_outbox"));
                }
                changed.extend(found);
            }
        }
        Ok(changed)
    }

    async fn update(&mut self, owed: &[&Owed<'_>]) -> Result<Vec<i64>, sqlx::Error> {
        let rows = self.rows(owed.iter().map(|owed| &owed.event.row));
        let (changed, _): (Vec<i64>, i64) = self
            .sql
            .query_as(&UPDATE)
            .bind(rows.tids)
            .bind(rows.ids)
            .bind(column(owed, |owed| owed.destination))
            .bind(column(owed, |owed| owed.attempts))
            .bind(column(owed, |owed| owed.delay_seconds))
            .bind(column(owed, |owed| owed.error.as_deref()))
            .fetch_one(&mut *self.connection)
            .await?;
        Ok(changed)
    }
}

/// A record that is written as a row of its own.
trait Written: Sized {
    fn event(&self) -> &Event;

    /// Returns how many rows were written.
    fn insert(
        settle: &mut SettleWriter<'_>,
        records: &[&Self],
    ) -> impl Future<Output = Result<usize, sqlx::Error>> + Send;
}

impl Written for DeadLetter<'_> {
    fn event(&self) -> &Event {
        self.event
    }

    /// A NULL in a column where somebody has allowed it must not keep the event out of the dead letters.
    async fn insert(settle: &mut SettleWriter<'_>, letters: &[&Self]) -> Result<usize, sqlx::Error> {
        let query = "
            insert into {schema}.event_dead_letter ({id}outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload,
                headers, correlation_id, causation_id, schema_version, priority, created_at, destination, attempts,
                error_code, error, first_failed_at, failed_at)
            {own}
            select {value}o.id, coalesce(o.event_id, '00000000-0000-0000-0000-000000000000'), coalesce(o.event_type, ''), coalesce(o.source, ''),
                o.aggregate_type, o.aggregate_id, coalesce(o.payload, 'null'), coalesce(o.headers, '{}'), o.correlation_id,
                o.causation_id, coalesce(o.schema_version, 1), coalesce(o.priority, 0::smallint),
                coalesce(o.created_at, pg_catalog.statement_timestamp()), d.destination,
                d.attempts, d.code, d.error, least(o.first_failed_at, pg_catalog.statement_timestamp()), pg_catalog.statement_timestamp()
            from unnest($1::text[]::tid[], $2::bigint[], $3::text[], $4::int[], $5::text[], $6::text[])
                as d(tid, id, destination, attempts, code, error)
            join {schema}.event_outbox o on o.ctid = d.tid and o.id = d.id";
        let (id, own, value) = match settle.is_proof {
            true => ("id, ", "overriding system value", "-1 - (pg_catalog.random() * 1e15::float8)::bigint, "),
            false => ("", "", ""),
        };
        let query = query.replace("{id}", id).replace("{own}", own).replace("{value}", value);
        let rows = settle.rows(letters.iter().map(|letter| &letter.event.row));
        let written = sqlx::query(settle.sql.schema.fill_once(&query))
            .persistent(settle.sql.persistent)
            .bind(rows.tids)
            .bind(rows.ids)
            .bind(column(letters, |letter| letter.destination))
            .bind(column(letters, |letter| letter.attempts))
            .bind(column(letters, |letter| letter.error.code.as_str()))
            .bind(column(letters, |letter| letter.error.message.as_str()))
            .execute(&mut *settle.connection)
            .await?;
        Ok(to_usize(written.rows_affected()))
    }
}

impl Written for HistoryRow<'_> {
    fn event(&self) -> &Event {
        self.event
    }

    async fn insert(settle: &mut SettleWriter<'_>, kept: &[&Self]) -> Result<usize, sqlx::Error> {
        let query = "
            insert into {schema}.event_history (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                correlation_id, causation_id, schema_version, priority, created_at, destination, published_at)
            select o.id, o.event_id, o.event_type, o.source, o.aggregate_type, o.aggregate_id, o.payload, o.headers,
                o.correlation_id, o.causation_id, o.schema_version, o.priority, o.created_at, h.destination,
                pg_catalog.statement_timestamp()
            from unnest($1::text[]::tid[], $2::bigint[], $3::text[]) as h(tid, id, destination)
            join {schema}.event_outbox o on o.ctid = h.tid and o.id = h.id";
        let rows = settle.rows(kept.iter().map(|kept| &kept.event.row));
        let written = settle
            .sql
            .query(query)
            .bind(rows.tids)
            .bind(rows.ids)
            .bind(column(kept, |kept| kept.destination))
            .execute(&mut *settle.connection)
            .await?;
        Ok(to_usize(written.rows_affected()))
    }
}

/// The row of a further destination that is owed the event.
struct Copy<'r>(&'r Owed<'r>);

impl<'r> Copy<'r> {
    fn of(owed: &'r [Owed<'r>]) -> Vec<Self> {
        owed.iter().map(Self).collect()
    }
}

impl Written for Copy<'_> {
    fn event(&self) -> &Event {
        self.0.event
    }

    async fn insert(settle: &mut SettleWriter<'_>, copies: &[&Self]) -> Result<usize, sqlx::Error> {
        let columns: Vec<String> = settle
            .sql
            .query_scalar(COLUMNS)
            .persistent(false)
            .bind(OWN_COLUMNS.map(str::to_owned).to_vec())
            .fetch_one(&mut *settle.connection)
            .await?;
        let names = columns.join(", ");
        let values = columns.iter().map(|name| format!("o.{name}")).collect::<Vec<_>>().join(", ");
        let query = format!(
            "insert into {{schema}}.event_outbox ({names}, status, destination, attempts, last_error, available_at, first_failed_at)
             overriding system value
             select {values}, 'scheduled', w.destination, w.attempts, coalesce(w.error, o.last_error), {AVAILABLE_AT},
                 {FIRST_FAILED_AT}
             from {OWED}
             join {{schema}}.event_outbox o on o.ctid = w.tid and o.id = w.id"
        );
        let rows = settle.rows(copies.iter().map(|copy| &copy.0.event.row));
        let written = sqlx::query(settle.sql.schema.fill_once(&query))
            .persistent(false)
            .bind(rows.tids)
            .bind(rows.ids)
            .bind(column(copies, |copy| copy.0.destination))
            .bind(column(copies, |copy| copy.0.attempts))
            .bind(column(copies, |copy| copy.0.delay_seconds))
            .bind(column(copies, |copy| copy.0.error.as_deref()))
            .execute(&mut *settle.connection)
            .await?;
        Ok(to_usize(written.rows_affected()))
    }
}

/// Fails if a row was deleted that was not to be deleted. Both lists are in order.
fn require_among(gone: &[i64], expected: Vec<i64>) -> Result<(), sqlx::Error> {
    let mut expected = expected.into_iter();
    if gone.iter().all(|id| expected.any(|known| known == *id)) {
        return Ok(());
    }
    let message = "somebody else replaced rows of event_outbox while they were being published; nothing was recorded";
    Err(sqlx::Error::Protocol(message.to_owned()))
}

fn suppressed(what: &'static str) -> sqlx::Error {
    sqlx::Error::Decode(Box::new(Suppressed(what)))
}

fn to_usize(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}
