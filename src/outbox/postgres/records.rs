//! What a settle writes: verdicts turned into the column arrays that its statements take.

use sqlx::postgres::PgConnection;

use crate::event::{PublishError, RowKey, Verdict};
use crate::outbox::Delivery;
use crate::outbox::postgres::tid;

/// Everything one settle writes.
#[derive(Default)]
pub(super) struct Records<'a> {
    /// The rows that go, because all or part of what they owed is decided.
    pub(super) rows: Rows,
    /// One entry per row, written as the row is deleted: the first delivery of its event that was decided.
    log: Log<'a>,
    /// The other decided deliveries of events with several destinations.
    pub(super) more_log: MoreLog<'a>,
    pub(super) dead_letters: DeadLetters<'a>,
    pub(super) history: History<'a>,
    pub(super) owed: Owed<'a>,
}

/// Rows by their place and, because a place can be given away, their id.
#[derive(Default)]
pub(super) struct Rows {
    tids: Vec<String>,
    pub(super) ids: Vec<i64>,
}

/// What was decided of a delivery.
struct Entry<'a> {
    destination: &'a str,
    status: &'static str,
    message_id: Option<&'a str>,
    error: Option<String>,
    duration_ms: i32,
}

/// Entries of the log; a row that only moves on has none.
#[derive(Default)]
struct Log<'a> {
    destinations: Vec<&'a str>,
    statuses: Vec<Option<&'static str>>,
    message_ids: Vec<Option<&'a str>>,
    errors: Vec<Option<String>>,
    durations: Vec<i32>,
}

#[derive(Default)]
pub(super) struct MoreLog<'a> {
    rows: Rows,
    log: Log<'a>,
}

#[derive(Default)]
pub(super) struct DeadLetters<'a> {
    rows: Rows,
    destinations: Vec<&'a str>,
    attempts: Vec<i32>,
    codes: Vec<&'a str>,
    errors: Vec<&'a str>,
}

#[derive(Default)]
pub(super) struct History<'a> {
    rows: Rows,
    destinations: Vec<&'a str>,
}

#[derive(Default)]
pub(super) struct Owed<'a> {
    rows: Rows,
    destinations: Vec<&'a str>,
    attempts: Vec<i32>,
    delays: Vec<f64>,
    errors: Vec<Option<String>>,
}

impl<'a> Records<'a> {
    /// The records of `deliveries`, which are grouped by event. An event that only waits in place leaves none.
    pub(super) fn new(deliveries: &'a [Delivery<'a>], history: bool) -> Self {
        let mut records = Self::default();
        for group in deliveries.chunk_by(|a, b| std::ptr::eq(a.event, b.event)) {
            if group.iter().all(|delivery| delivery.verdict == Verdict::Wait { park: None }) {
                continue;
            }
            let row = &group[0].event.row;
            let mut entries = group.iter().filter_map(|delivery| records.record(delivery, history)).collect::<Vec<_>>();
            for entry in entries.drain(entries.len().min(1)..) {
                records.more_log.rows.push(row);
                records.more_log.log.push(Some(entry));
            }
            records.rows.push(row);
            records.log.push(entries.pop());
        }
        records
    }

    /// Notes what a delivery leaves behind, but for its entry in the log, which is returned.
    fn record(&mut self, delivery: &'a Delivery<'a>, history: bool) -> Option<Entry<'a>> {
        let row = &delivery.event.row;
        let attempt = delivery.event.attempts.saturating_add(1);
        let (status, message_id, error) = match &delivery.verdict {
            Verdict::Published { message_id } => {
                if history {
                    self.history.rows.push(row);
                    self.history.destinations.push(delivery.destination);
                }
                ("published", message_id.as_deref(), None)
            }
            Verdict::Retry { delay, error } => {
                self.owed.push(delivery, attempt, delay.as_secs_f64(), Some(error));
                ("failed", None, Some(error.to_string()))
            }
            Verdict::DeadLetter { error } => {
                self.dead_letters.rows.push(row);
                self.dead_letters.destinations.push(delivery.destination);
                self.dead_letters.attempts.push(attempt);
                self.dead_letters.codes.push(&error.code);
                self.dead_letters.errors.push(&error.message);
                ("dead_lettered", None, Some(error.to_string()))
            }
            Verdict::Drop { reason } => ("dropped", None, Some((*reason).to_owned())),
            Verdict::Wait { park } => {
                self.owed.push(delivery, delivery.event.attempts, park.unwrap_or_default().as_secs_f64(), None);
                return None;
            }
        };
        let duration_ms = i32::try_from(delivery.duration.as_millis()).unwrap_or(i32::MAX);
        Some(Entry { destination: delivery.destination, status, message_id, error, duration_ms })
    }

    /// Deletes the rows and writes their log in one statement. Returns how many rows were there to delete.
    pub(super) async fn delete_and_log(
        &self,
        connection: &mut PgConnection,
        persistent: bool,
        worker: &str,
    ) -> Result<usize, sqlx::Error> {
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
            select count(*) from gone";
        let gone: i64 = sqlx::query_scalar(query)
            .persistent(persistent)
            .bind(&self.rows.tids)
            .bind(&self.rows.ids)
            .bind(&self.log.destinations)
            .bind(&self.log.statuses)
            .bind(&self.log.message_ids)
            .bind(&self.log.errors)
            .bind(&self.log.durations)
            .bind(worker)
            .fetch_one(connection)
            .await?;
        Ok(usize::try_from(gone).unwrap_or_default())
    }
}

impl Rows {
    fn push(&mut self, row: &RowKey) {
        self.tids.push(tid::from_locator(row.locator));
        self.ids.push(row.id);
    }
}

impl<'a> Log<'a> {
    fn push(&mut self, entry: Option<Entry<'a>>) {
        self.destinations.push(entry.as_ref().map_or("", |entry| entry.destination));
        self.statuses.push(entry.as_ref().map(|entry| entry.status));
        self.message_ids.push(entry.as_ref().and_then(|entry| entry.message_id));
        self.durations.push(entry.as_ref().map_or(0, |entry| entry.duration_ms));
        self.errors.push(entry.and_then(|entry| entry.error));
    }
}

impl MoreLog<'_> {
    pub(super) async fn insert(
        &self,
        connection: &mut PgConnection,
        persistent: bool,
        worker: &str,
    ) -> Result<(), sqlx::Error> {
        if self.rows.ids.is_empty() {
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
        sqlx::query(query)
            .persistent(persistent)
            .bind(&self.rows.tids)
            .bind(&self.rows.ids)
            .bind(&self.log.destinations)
            .bind(&self.log.statuses)
            .bind(&self.log.message_ids)
            .bind(&self.log.errors)
            .bind(&self.log.durations)
            .bind(worker)
            .execute(connection)
            .await
            .map(drop)
    }
}

impl DeadLetters<'_> {
    pub(super) async fn insert(&self, connection: &mut PgConnection, persistent: bool) -> Result<(), sqlx::Error> {
        if self.rows.ids.is_empty() {
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
        sqlx::query(query)
            .persistent(persistent)
            .bind(&self.rows.tids)
            .bind(&self.rows.ids)
            .bind(&self.destinations)
            .bind(&self.attempts)
            .bind(&self.codes)
            .bind(&self.errors)
            .execute(connection)
            .await
            .map(drop)
    }
}

impl History<'_> {
    pub(super) async fn insert(&self, connection: &mut PgConnection, persistent: bool) -> Result<(), sqlx::Error> {
        if self.rows.ids.is_empty() {
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
        sqlx::query(query)
            .persistent(persistent)
            .bind(&self.rows.tids)
            .bind(&self.rows.ids)
            .bind(&self.destinations)
            .execute(connection)
            .await
            .map(drop)
    }
}

impl<'a> Owed<'a> {
    fn push(&mut self, delivery: &'a Delivery<'a>, attempts: i32, delay_seconds: f64, error: Option<&PublishError>) {
        self.rows.push(&delivery.event.row);
        self.destinations.push(delivery.destination);
        self.attempts.push(attempts);
        self.delays.push(delay_seconds);
        self.errors.push(error.map(ToString::to_string));
    }

    /// Moves what is still owed to the scheduled partitions, one row per destination. An event parked uncharged is due
    /// at once, or behind the head of its key; a delayed one keeps its own time.
    pub(super) async fn insert(&self, connection: &mut PgConnection, persistent: bool) -> Result<(), sqlx::Error> {
        if self.rows.ids.is_empty() {
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
        sqlx::query(query)
            .persistent(persistent)
            .bind(&self.rows.tids)
            .bind(&self.rows.ids)
            .bind(&self.destinations)
            .bind(&self.attempts)
            .bind(&self.delays)
            .bind(&self.errors)
            .execute(connection)
            .await
            .map(drop)
    }
}
