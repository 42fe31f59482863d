//! What a settle writes, as the column arrays that PostgreSQL's statements take.

use sqlx::postgres::PgConnection;

use crate::event::RowKey;
use crate::failpoint::hit;
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
    /// Named statements, prepared once.
    pub(super) persistent: bool,
    pub(super) worker: &'c str,
}

impl Settle<'_> {
    /// Writes all of `records`, but commits nothing. Returns how many of their rows were there.
    pub(super) async fn write(&mut self, records: &Records<'_>) -> Result<usize, sqlx::Error> {
        self.dead_letters(&records.dead_letters).await?;
        if !records.dead_letters.is_empty() {
            hit("dlq_inserted").map_err(|tripped| sqlx::Error::Decode(Box::new(tripped)))?;
        }
        self.history(&records.history).await?;
        self.owed(&records.owed).await?;
        // The first entry of a row is written as the row is deleted, which is nearly all there is.
        let mut entries = records.log.iter().peekable();
        let (mut first, mut more) = (Vec::with_capacity(records.rows.len()), Vec::new());
        for row in &records.rows {
            first.push(entries.next_if(|entry| std::ptr::eq(entry.row, *row)));
            while let Some(entry) = entries.next_if(|entry| std::ptr::eq(entry.row, *row)) {
                more.push(entry);
            }
        }
        self.log(&more).await?;
        self.delete_and_log(&records.rows, &first).await
    }

    /// Deletes the rows, writes their log, and raises the epoch, in one statement.
    async fn delete_and_log(
        &mut self,
        rows: &[&RowKey],
        entries: &[Option<&LogEntry<'_>>],
    ) -> Result<usize, sqlx::Error> {
        if rows.is_empty() {
            return Ok(0);
        }
        let query = "
            with gone as (
                delete from event_outbox o
                using unnest($1::text[]::tid[], $2::bigint[], $3::text[], $4::text[], $5::text[], $6::text[], $7::int[])
                    as r(tid, id, destination, status, message_id, error, duration_ms)
                where o.ctid = r.tid and o.id = r.id
                returning o.event_id, o.id, o.event_type, r.destination, r.status, o.attempts + 1, r.message_id, r.error,
                    r.duration_ms
            ), logged as (
                insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, message_id,
                    error, duration_ms, worker, processed_at)
                select gone.*, $8, statement_timestamp() from gone where gone.status is not null
            )
            select count(*), nextval('event_outbox_epoch') from gone";
        let rows = Rows::from_iter(rows.iter().copied());
        let (gone, _): (i64, i64) = sqlx::query_as(query)
            .persistent(self.persistent)
            .bind(rows.tids)
            .bind(rows.ids)
            .bind(column(entries, |entry| entry.map_or("", |entry| entry.destination)))
            .bind(column(entries, |entry| entry.map(|entry| entry.status)))
            .bind(column(entries, |entry| entry.and_then(|entry| entry.message_id)))
            .bind(column(entries, |entry| entry.and_then(|entry| entry.error.as_deref())))
            .bind(column(entries, |entry| entry.map_or(0, |entry| entry.duration_ms)))
            .bind(self.worker)
            .fetch_one(&mut *self.connection)
            .await?;
        Ok(usize::try_from(gone).unwrap_or_default())
    }

    /// The further deliveries of events with several destinations.
    async fn log(&mut self, entries: &[&LogEntry<'_>]) -> Result<(), sqlx::Error> {
        if entries.is_empty() {
            return Ok(());
        }
        let query = "
            insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, message_id,
                error, duration_ms, worker, processed_at)
            select o.event_id, o.id, o.event_type, l.destination, l.status, o.attempts + 1, l.message_id, l.error,
                l.duration_ms, $8, statement_timestamp()
            from unnest($1::text[]::tid[], $2::bigint[], $3::text[], $4::text[], $5::text[], $6::text[], $7::int[])
                as l(tid, id, destination, status, message_id, error, duration_ms)
            join event_outbox o on o.ctid = l.tid and o.id = l.id";
        let rows: Rows = entries.iter().map(|entry| entry.row).collect();
        sqlx::query(query)
            .persistent(self.persistent)
            .bind(rows.tids)
            .bind(rows.ids)
            .bind(column(entries, |entry| entry.destination))
            .bind(column(entries, |entry| entry.status))
            .bind(column(entries, |entry| entry.message_id))
            .bind(column(entries, |entry| entry.error.as_deref()))
            .bind(column(entries, |entry| entry.duration_ms))
            .bind(self.worker)
            .execute(&mut *self.connection)
            .await
            .map(drop)
    }

    async fn dead_letters(&mut self, letters: &[DeadLetter<'_>]) -> Result<(), sqlx::Error> {
        if letters.is_empty() {
            return Ok(());
        }
        let query = "
            insert into event_dead_letter (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload,
                headers, correlation_id, causation_id, schema_version, priority, created_at, destination, attempts,
                error_code, error, first_failed_at, failed_at)
            select o.id, o.event_id, o.event_type, o.source, o.aggregate_type, o.aggregate_id, o.payload,
                o.headers, o.correlation_id, o.causation_id, o.schema_version, o.priority, o.created_at, d.destination,
                d.attempts, d.code, d.error, least(o.first_failed_at, statement_timestamp()), statement_timestamp()
            from unnest($1::text[]::tid[], $2::bigint[], $3::text[], $4::int[], $5::text[], $6::text[])
                as d(tid, id, destination, attempts, code, error)
            join event_outbox o on o.ctid = d.tid and o.id = d.id";
        let rows: Rows = letters.iter().map(|letter| letter.row).collect();
        sqlx::query(query)
            .persistent(self.persistent)
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
            insert into event_history (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                correlation_id, causation_id, schema_version, priority, created_at, destination, published_at)
            select o.id, o.event_id, o.event_type, o.source, o.aggregate_type, o.aggregate_id, o.payload, o.headers,
                o.correlation_id, o.causation_id, o.schema_version, o.priority, o.created_at, h.destination,
                statement_timestamp()
            from unnest($1::text[]::tid[], $2::bigint[], $3::text[]) as h(tid, id, destination)
            join event_outbox o on o.ctid = h.tid and o.id = h.id";
        let rows: Rows = kept.iter().map(|kept| kept.row).collect();
        sqlx::query(query)
            .persistent(self.persistent)
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
            insert into event_outbox (id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
                correlation_id, causation_id, schema_version, priority, created_at, status, destination, attempts,
                last_error, available_at, first_failed_at)
            overriding system value
            select o.id, o.event_id, o.event_type, o.source, o.aggregate_type, o.aggregate_id, o.payload, o.headers,
                o.correlation_id, o.causation_id, o.schema_version, o.priority, o.created_at, 'scheduled', w.destination,
                w.attempts, coalesce(w.error, o.last_error),
                greatest(o.available_at, statement_timestamp() + make_interval(secs => w.delay_seconds)),
                case when w.error is null then o.first_failed_at
                     else coalesce(o.first_failed_at, statement_timestamp()) end
            from unnest($1::text[]::tid[], $2::bigint[], $3::text[], $4::int[], $5::float8[], $6::text[])
                as w(tid, id, destination, attempts, delay_seconds, error)
            join event_outbox o on o.ctid = w.tid and o.id = w.id";
        let rows: Rows = owed.iter().map(|owed| owed.row).collect();
        sqlx::query(query)
            .persistent(self.persistent)
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
