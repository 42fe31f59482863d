//! What a settle writes: verdicts turned into the column arrays that its statements take.

use sqlx::postgres::PgConnection;
use uuid::Uuid;

use crate::event::{PublishError, RowKey, Verdict};
use crate::outbox::Delivery;

/// Everything one settle writes.
#[derive(Default)]
pub(super) struct Records<'a> {
    /// The rows that go, because all or part of what they owed is decided.
    pub(super) rows: Rows<'a>,
    pub(super) log: Log<'a>,
    pub(super) dead_letters: DeadLetters<'a>,
    pub(super) history: History<'a>,
    pub(super) owed: Owed<'a>,
}

#[derive(Default)]
pub(super) struct Rows<'a> {
    pub(super) partitions: Vec<i16>,
    pub(super) ids: Vec<i64>,
    pub(super) destinations: Vec<&'a str>,
}

#[derive(Default)]
pub(super) struct Log<'a> {
    pub(super) event_ids: Vec<Uuid>,
    pub(super) outbox_ids: Vec<i64>,
    pub(super) event_types: Vec<&'a str>,
    pub(super) destinations: Vec<&'a str>,
    pub(super) statuses: Vec<&'static str>,
    pub(super) attempts: Vec<i32>,
    pub(super) message_ids: Vec<Option<&'a str>>,
    pub(super) errors: Vec<Option<String>>,
    pub(super) durations: Vec<i32>,
}

#[derive(Default)]
pub(super) struct DeadLetters<'a> {
    rows: Rows<'a>,
    destinations: Vec<&'a str>,
    attempts: Vec<i32>,
    codes: Vec<&'a str>,
    errors: Vec<&'a str>,
}

#[derive(Default)]
pub(super) struct History<'a> {
    rows: Rows<'a>,
    destinations: Vec<&'a str>,
}

#[derive(Default)]
pub(super) struct Owed<'a> {
    rows: Rows<'a>,
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
            records.rows.push(&group[0].event.row);
            for delivery in group {
                records.record(delivery, history);
            }
        }
        records
    }

    fn record(&mut self, delivery: &'a Delivery<'a>, history: bool) {
        let row = &delivery.event.row;
        let attempt = delivery.event.attempts.saturating_add(1);
        match &delivery.verdict {
            Verdict::Published { message_id } => {
                self.log.push(delivery, "published", message_id.as_deref(), None);
                if history {
                    self.history.rows.push(row);
                    self.history.destinations.push(delivery.destination);
                }
            }
            Verdict::Retry { delay, error } => {
                self.log.push(delivery, "failed", None, Some(error.to_string()));
                self.owed.push(delivery, attempt, delay.as_secs_f64(), Some(error));
            }
            Verdict::DeadLetter { error } => {
                self.log.push(delivery, "dead_lettered", None, Some(error.to_string()));
                self.dead_letters.rows.push(row);
                self.dead_letters.destinations.push(delivery.destination);
                self.dead_letters.attempts.push(attempt);
                self.dead_letters.codes.push(&error.code);
                self.dead_letters.errors.push(&error.message);
            }
            Verdict::Drop { reason } => self.log.push(delivery, "dropped", None, Some((*reason).to_owned())),
            Verdict::Wait { park } => {
                let delay = park.unwrap_or_default().as_secs_f64();
                self.owed.push(delivery, delivery.event.attempts, delay, None);
            }
        }
    }

    /// Deletes the rows and writes the log in one statement. Returns how many rows were there to delete.
    pub(super) async fn delete_and_log(
        &self,
        connection: &mut PgConnection,
        persistent: bool,
        worker: &str,
    ) -> Result<usize, sqlx::Error> {
        let query = "
            with gone as (
                delete from event_outbox o
                using unnest($1::smallint[], $2::bigint[], $3::text[]) as r(partition, id, destination)
                where o.partition = r.partition and o.id = r.id and o.destination = r.destination
                returning 1
            ), logged as (
                insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, message_id,
                    error, duration_ms, worker, processed_at)
                select l.*, $13, statement_timestamp()
                from unnest($4::uuid[], $5::bigint[], $6::text[], $7::text[], $8::text[], $9::int[], $10::text[],
                    $11::text[], $12::int[]) as l
            )
            select count(*) from gone";
        let log = &self.log;
        let gone: i64 = sqlx::query_scalar(query)
            .persistent(persistent)
            .bind(&self.rows.partitions)
            .bind(&self.rows.ids)
            .bind(&self.rows.destinations)
            .bind(&log.event_ids)
            .bind(&log.outbox_ids)
            .bind(&log.event_types)
            .bind(&log.destinations)
            .bind(&log.statuses)
            .bind(&log.attempts)
            .bind(&log.message_ids)
            .bind(&log.errors)
            .bind(&log.durations)
            .bind(worker)
            .fetch_one(connection)
            .await?;
        Ok(usize::try_from(gone).unwrap_or_default())
    }
}

impl<'a> Rows<'a> {
    fn push(&mut self, row: &'a RowKey) {
        self.partitions.push(row.partition);
        self.ids.push(row.id);
        self.destinations.push(&row.destination);
    }
}

impl<'a> Log<'a> {
    fn push(
        &mut self,
        delivery: &'a Delivery<'a>,
        status: &'static str,
        message_id: Option<&'a str>,
        error: Option<String>,
    ) {
        let event = delivery.event;
        self.event_ids.push(event.event_id);
        self.outbox_ids.push(event.row.id);
        self.event_types.push(&event.event_type);
        self.destinations.push(delivery.destination);
        self.statuses.push(status);
        self.attempts.push(event.attempts.saturating_add(1));
        self.message_ids.push(message_id);
        self.errors.push(error);
        self.durations.push(i32::try_from(delivery.duration.as_millis()).unwrap_or(i32::MAX));
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
            from unnest($1::smallint[], $2::bigint[], $3::text[], $4::text[], $5::int[], $6::text[], $7::text[])
                as d(partition, id, row_destination, destination, attempts, code, error)
            join event_outbox o on o.partition = d.partition and o.id = d.id and o.destination = d.row_destination";
        sqlx::query(query)
            .persistent(persistent)
            .bind(&self.rows.partitions)
            .bind(&self.rows.ids)
            .bind(&self.rows.destinations)
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
            from unnest($1::smallint[], $2::bigint[], $3::text[], $4::text[]) as h(partition, id, row_destination, destination)
            join event_outbox o on o.partition = h.partition and o.id = h.id and o.destination = h.row_destination";
        sqlx::query(query)
            .persistent(persistent)
            .bind(&self.rows.partitions)
            .bind(&self.rows.ids)
            .bind(&self.rows.destinations)
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
            from unnest($1::smallint[], $2::bigint[], $3::text[], $4::text[], $5::int[], $6::float8[], $7::text[])
                as w(partition, id, row_destination, destination, attempts, delay_seconds, error)
            join event_outbox o on o.partition = w.partition and o.id = w.id and o.destination = w.row_destination";
        sqlx::query(query)
            .persistent(persistent)
            .bind(&self.rows.partitions)
            .bind(&self.rows.ids)
            .bind(&self.rows.destinations)
            .bind(&self.destinations)
            .bind(&self.attempts)
            .bind(&self.delays)
            .bind(&self.errors)
            .execute(connection)
            .await
            .map(drop)
    }
}
