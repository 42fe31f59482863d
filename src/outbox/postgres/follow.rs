//! Follows the processing log, for `relay tail`.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::{PgConnection, PgRow};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::outbox::past::{LogFilter, LogLine, LogPage};
use crate::outbox::postgres::sql::Sql;

/// How much earlier than the last question the next one begins. A row gets its time when it is written, and can be seen when its
/// transaction has committed.
const OVERLAP: Duration = Duration::from_secs(5);

/// The most rows of the log that one question returns.
const LOG_ROWS: i64 = 5000;

/// New rows of the log. The history and the dead letters have the keys of events, and the outbox has those that still wait.
const LOG: &str = "
select n.now, l.*
from (select pg_catalog.clock_timestamp() as now) n
left join lateral (
    select l.processed_at, l.status, l.destination, l.event_type, l.outbox_id, l.event_id, l.attempt, l.message_id, l.error,
        l.duration_ms, l.worker
    from {schema}.event_processing_log l
    where l.processed_at >= $1::timestamptz
      and ($2::text is null or l.event_type like $2::text)
      and ($3::text is null or l.destination = $3::text)
      and ($4::text is null or l.status = $4::text)
      and ($5::text is null
          or (l.outbox_id, l.event_id) in (
              select h.outbox_id, h.event_id from {schema}.event_history h
              where h.published_at >= $1::timestamptz - interval '1 minute'
                and (h.aggregate_id = $5::text or h.aggregate_type || ':' || h.aggregate_id = $5::text)
              union all
              select d.outbox_id, d.event_id from {schema}.event_dead_letter d
              where d.failed_at >= $1::timestamptz - interval '1 minute'
                and (d.aggregate_id = $5::text or d.aggregate_type || ':' || d.aggregate_id = $5::text)
          )
          or l.status = 'failed' and exists (
              select from {schema}.event_outbox o
              where o.status = 'scheduled' and o.destination = l.destination and o.destination <> '' and o.aggregate_id is not null
                and pg_catalog.hashtextextended(o.aggregate_id,
                        pg_catalog.hashtextextended(coalesce(o.aggregate_type, ''), 0)) = any ($6::bigint[])
                and o.id = l.outbox_id
          ))
    order by l.processed_at
    limit $7::bigint
) l on true
order by l.processed_at";

/// The hashes of a key whose halves are known, and of one that has no first half.
const KEY_HASHES: &str = "
select array[
    pg_catalog.hashtextextended(pg_catalog.split_part($1::text, ':', 1), pg_catalog.hashtextextended('', 0)),
    pg_catalog.hashtextextended($1::text, pg_catalog.hashtextextended('', 0)),
    pg_catalog.hashtextextended(pg_catalog.substr($1::text, pg_catalog.strpos($1::text, ':') + 1),
        pg_catalog.hashtextextended(pg_catalog.split_part($1::text, ':', 1), 0))
]";

/// The place in the log.
pub(super) struct Following {
    from: OffsetDateTime,
    /// The rows since then that were returned.
    returned: HashMap<(i64, Uuid, String, i32, String), OffsetDateTime>,
    /// The key, and its hashes.
    hashes: Option<(String, Vec<i64>)>,
}

impl Following {
    pub(super) fn new(from: OffsetDateTime) -> Self {
        Self { from, returned: HashMap::new(), hashes: None }
    }

    /// Reads the rows since the place, also those that were returned.
    pub(super) async fn read(
        &mut self,
        connection: &mut PgConnection,
        sql: Sql,
        filter: &LogFilter,
    ) -> Result<Vec<PgRow>, sqlx::Error> {
        let hashes = match (&filter.key, &mut self.hashes) {
            (None, _) => Vec::new(),
            (Some(key), Some((known, hashes))) if known == key => hashes.clone(),
            (Some(key), place) => {
                let hashes: Vec<i64> = sql.query_scalar(KEY_HASHES).bind(key).fetch_one(&mut *connection).await?;
                *place = Some((key.clone(), hashes.clone()));
                hashes
            }
        };
        sql.query(LOG)
            .bind(self.from)
            .bind(filter.event_type.as_deref().map(like))
            .bind(&filter.destination)
            .bind(&filter.status)
            .bind(&filter.key)
            .bind(hashes)
            .bind(LOG_ROWS)
            .fetch_all(connection)
            .await
    }

    /// Returns the rows that are new, and moves on.
    pub(super) fn take_in(&mut self, rows: &[PgRow]) -> Result<LogPage, sqlx::Error> {
        let mut page =
            LogPage { lines: Vec::new(), full: rows.len() >= usize::try_from(LOG_ROWS).unwrap_or(usize::MAX) };
        let mut last = None;
        for row in rows {
            let Some(at) = row.try_get::<Option<OffsetDateTime>, _>("processed_at")? else { continue };
            last = Some(at);
            let line = LogLine {
                processed_at: at.format(&Rfc3339).unwrap_or_default(),
                status: row.try_get("status")?,
                destination: row.try_get("destination")?,
                event_type: row.try_get("event_type")?,
                sequence: row.try_get("outbox_id")?,
                event_id: row.try_get::<Uuid, _>("event_id")?.to_string(),
                attempt: row.try_get("attempt")?,
                message_id: row.try_get("message_id")?,
                error: row.try_get("error")?,
                duration_ms: row.try_get("duration_ms")?,
                worker: row.try_get("worker")?,
            };
            let identity =
                (line.sequence, row.try_get("event_id")?, line.destination.clone(), line.attempt, line.status.clone());
            if self.returned.insert(identity, at) != Some(at) {
                page.lines.push(line);
            }
        }
        // While more rows wait than one question returns, it begins with the last row.
        self.from = match (last, rows.first()) {
            (Some(last), _) if page.full => last.max(self.from),
            (_, Some(row)) => (row.try_get::<OffsetDateTime, _>("now")? - OVERLAP).max(self.from),
            (_, None) => self.from,
        };
        let from = self.from;
        self.returned.retain(|_, at| *at >= from);
        Ok(page)
    }
}

/// Returns a glob as a pattern of `like`.
pub(super) fn like(glob: &str) -> String {
    let mut pattern = String::with_capacity(glob.len());
    for c in glob.chars() {
        match c {
            '*' => pattern.push('%'),
            '?' => pattern.push('_'),
            '%' | '_' | '\\' => pattern.extend(['\\', c]),
            c => pattern.push(c),
        }
    }
    pattern
}
