//! What a settle writes, as the column arrays that PostgreSQL's statements take.

use std::collections::BTreeMap;

use sqlx::postgres::PgConnection;

use crate::event::RowKey;
use crate::failpoint::hit;
use crate::outbox::postgres::sql::Sql;
use crate::outbox::postgres::tid;
use crate::outbox::records::{DeadLetter, Kept, LogEntry, Owed, Records};

/// Rows by their place and, because a place can be given away, their id.
struct Rows {
    tids: Vec<String>,
    ids: Vec<i64>,
}

impl<'a> FromIterator<&'a RowKey> for Rows {
    fn from_iter<I: IntoIterator<Item = &'a RowKey>>(rows: I) -> Self {
        let (tids, ids) = rows.into_iter().map(|row| (tid::from_locator(row.locator), row.id)).unzip();
        Self { tids, ids }
    }
}

/// One column of some records.
fn column<'a, R, T>(records: &'a [R], value: impl Fn(&'a R) -> T) -> Vec<T> {
    records.iter().map(value).collect()
}

/// How a lane sends its statements, and in whose name.
pub(super) struct Settle<'c> {
    pub(super) connection: &'c mut PgConnection,
    pub(super) sql: Sql,
    pub(super) worker: &'c str,
}

impl Settle<'_> {
    /// Writes all of `records`, but commits nothing. Returns how many of their rows were there.
    ///
    /// # Errors
    /// Also where a row's place holds another by now.
    pub(super) async fn write(&mut self, records: &Records<'_>) -> Result<usize, sqlx::Error> {
        self.dead_letters(&records.dead_letters).await?;
        if !records.dead_letters.is_empty() {
            hit("dlq_inserted").map_err(|tripped| sqlx::Error::Decode(Box::new(tripped)))?;
        }
        self.history(&records.history).await?;
        self.owed(&records.owed).await?;
        let gone = self.delete(&records.rows).await?;
        let mut entries: Vec<&LogEntry<'_>> = records.log.iter().collect();
        if gone.len() < records.rows.len() {
            entries.retain(|entry| gone.binary_search(&entry.event.row.id).is_ok());
        }
        self.log(&entries).await?;
        Ok(gone.len())
    }

    /// What the entries of a group have in common goes as one value: each column that is an array costs as much as writing it.
    /// (COPY would take a third less, and 40 ms: the driver sends its end apart, which waits for the data's acknowledgement.)
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
            // `unnest` fills a shorter column up with null.
            let failed = entries.iter().any(|entry| entry.error.is_some());
            let errors = if failed { column(&entries, |entry| entry.error.as_deref()) } else { Vec::new() };
            self.sql
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
                .await?;
        }
        Ok(())
    }

    /// Deletes the rows and raises the epoch. Returns the ids of those that were there, in order.
    async fn delete(&mut self, rows: &[&RowKey]) -> Result<Vec<i64>, sqlx::Error> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        // What is gone is compared here: with a join by place and id it would take half as long again. Partitions and the
        // range of ids keep nearly all others apart to whom a place may have been given meanwhile.
        let query = "
            with gone as (
                delete from {schema}.event_outbox
                where ctid = any($1::text[]::tid[]) and partition = any($2::smallint[]) and id between $3 and $4
                returning id
            )
            select coalesce(pg_catalog.array_agg(id), '{}'), pg_catalog.nextval('{schema}.event_outbox_epoch') from gone";
        let mut partitions: Vec<i16> = column(rows, |row| row.partition);
        partitions.dedup(); // they come in order
        let Rows { tids, mut ids } = rows.iter().copied().collect();
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
        let mut expected = ids.into_iter();
        if gone.iter().all(|id| expected.any(|known| known == *id)) {
            Ok(gone)
        } else {
            let message =
                "somebody else replaced rows of event_outbox while they were being published; nothing was recorded";
            Err(sqlx::Error::Protocol(message.to_owned()))
        }
    }

    async fn dead_letters(&mut self, letters: &[DeadLetter<'_>]) -> Result<(), sqlx::Error> {
        if letters.is_empty() {
            return Ok(());
        }
        let query = "
            insert into {schema}.event_dead_letter (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload,
                headers, correlation_id, causation_id, schema_version, priority, created_at, destination, attempts,
                error_code, error, first_failed_at, failed_at)
            select o.id, o.event_id, o.event_type, o.source, o.aggregate_type, o.aggregate_id, o.payload,
                o.headers, o.correlation_id, o.causation_id, o.schema_version, o.priority, o.created_at, d.destination,
                d.attempts, d.code, d.error, least(o.first_failed_at, pg_catalog.statement_timestamp()), pg_catalog.statement_timestamp()
            from unnest($1::text[]::tid[], $2::bigint[], $3::text[], $4::int[], $5::text[], $6::text[])
                as d(tid, id, destination, attempts, code, error)
            join {schema}.event_outbox o on o.ctid = d.tid and o.id = d.id";
        let rows: Rows = letters.iter().map(|letter| letter.row).collect();
        self.sql
            .query(query)
            .bind(rows.tids)
            .bind(rows.ids)
            .bind(column(letters, |letter| letter.destination))
            .bind(column(letters, |letter| letter.attempts))
            .bind(column(letters, |letter| letter.error.code.as_str()))
            .bind(column(letters, |letter| letter.error.message.as_str()))
            .execute(&mut *self.connection)
            .await
            .map(drop)
    }

    async fn history(&mut self, kept: &[Kept<'_>]) -> Result<(), sqlx::Error> {
        if kept.is_empty() {
            return Ok(());
        }
        let query = "
            insert into {schema}.event_history (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                correlation_id, causation_id, schema_version, priority, created_at, destination, published_at)
            select o.id, o.event_id, o.event_type, o.source, o.aggregate_type, o.aggregate_id, o.payload, o.headers,
                o.correlation_id, o.causation_id, o.schema_version, o.priority, o.created_at, h.destination,
                pg_catalog.statement_timestamp()
            from unnest($1::text[]::tid[], $2::bigint[], $3::text[]) as h(tid, id, destination)
            join {schema}.event_outbox o on o.ctid = h.tid and o.id = h.id";
        let rows: Rows = kept.iter().map(|kept| kept.row).collect();
        self.sql
            .query(query)
            .bind(rows.tids)
            .bind(rows.ids)
            .bind(column(kept, |kept| kept.destination))
            .execute(&mut *self.connection)
            .await
            .map(drop)
    }

    /// Moves what is still owed to the scheduled partitions, one row per destination. An event parked uncharged is due
    /// at once, or behind the head of its key; a delayed one keeps its own time.
    async fn owed(&mut self, owed: &[Owed<'_>]) -> Result<(), sqlx::Error> {
        if owed.is_empty() {
            return Ok(());
        }
        let query = "
            insert into {schema}.event_outbox (id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                correlation_id, causation_id, schema_version, priority, created_at, status, destination, attempts,
                last_error, available_at, first_failed_at)
            overriding system value
            select o.id, o.event_id, o.event_type, o.source, o.aggregate_type, o.aggregate_id, o.payload, o.headers,
                o.correlation_id, o.causation_id, o.schema_version, o.priority, o.created_at, 'scheduled', w.destination,
                w.attempts, coalesce(w.error, o.last_error),
                greatest(o.available_at, pg_catalog.statement_timestamp() + pg_catalog.make_interval(secs => w.delay_seconds)),
                case when w.error is null then o.first_failed_at
                     else coalesce(o.first_failed_at, pg_catalog.statement_timestamp()) end
            from unnest($1::text[]::tid[], $2::bigint[], $3::text[], $4::int[], $5::float8[], $6::text[])
                as w(tid, id, destination, attempts, delay_seconds, error)
            join {schema}.event_outbox o on o.ctid = w.tid and o.id = w.id";
        let rows: Rows = owed.iter().map(|owed| owed.row).collect();
        self.sql
            .query(query)
            .bind(rows.tids)
            .bind(rows.ids)
            .bind(column(owed, |owed| owed.destination))
            .bind(column(owed, |owed| owed.attempts))
            .bind(column(owed, |owed| owed.delay_seconds))
            .bind(column(owed, |owed| owed.error.as_deref()))
            .execute(&mut *self.connection)
            .await
            .map(drop)
    }
}
