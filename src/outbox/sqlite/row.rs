//! Decodes a row of the outbox that a claim has read.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use time::{Date, Month, PrimitiveDateTime, Time};
use uuid::Uuid;

use crate::event::{Event, Fault, MAX_HEADERS_BYTES, MAX_TEXT_BYTES, PublishError, RowKey};
use crate::outbox::number::milliseconds;
use crate::outbox::{BlockedBy, Claimed, decode};

/// The columns before the payload, in the order of the statement.
#[derive(Deserialize)]
struct Columns {
    row_id: i64,
    partition: i16,
    id: i64,
    destination: Option<String>,
    event_id: Option<Uuid>,
    event_type: Option<String>,
    source: Option<String>,
    aggregate_type: Option<String>,
    aggregate_id: Option<String>,
    headers: Option<String>,
    correlation_id: Option<String>,
    causation_id: Option<String>,
    schema_version: Option<i32>,
    created_at: Option<String>,
    attempts: Option<i32>,
    due: Option<u8>,
    behind: Option<BTreeMap<String, Option<i64>>>,
    sizes: Option<Sizes>,
    /// The seconds since the event was emitted, or since it was due if it was delayed and never tried.
    age: Option<f64>,
}

/// The JSON that is read for headers that are NULL.
const NO_HEADERS: &str = "null";

impl Columns {
    /// Returns the first required column that is NULL, which is possible if somebody has created the table anew without its
    /// constraints.
    fn missing(&self, payload: &[u8]) -> Option<&'static str> {
        let columns = [
            ("payload", payload.is_empty() && self.sizes.is_none()),
            ("headers", self.headers.as_deref() == Some(NO_HEADERS)),
            ("event_id", self.event_id.is_none()),
            ("event_type", self.event_type.is_none()),
            ("source", self.source.is_none()),
            ("schema_version", self.schema_version.is_none()),
            ("created_at", self.created_at.is_none()),
            ("attempts", self.attempts.is_none()),
            ("available_at", self.due.is_none()),
            ("destination", self.destination.is_none()),
        ];
        columns.into_iter().find(|(_, is_missing)| *is_missing).map(|(column, _)| column)
    }
}

/// The sizes in bytes of a row that was not read: payload, headers, and its texts in the order of [`TEXTS`].
#[derive(Debug, Deserialize)]
pub(super) struct Sizes(usize, usize, Option<usize>, Option<usize>, Option<usize>, Option<usize>, Option<usize>);

const TEXTS: [&str; 5] = ["source", "aggregate_type", "aggregate_id", "correlation_id", "causation_id"];

impl Sizes {
    fn texts(&self) -> impl Iterator<Item = (&'static str, usize)> {
        let Self(_, _, source, aggregate_type, aggregate_id, correlation_id, causation_id) = *self;
        let sizes = [source, aggregate_type, aggregate_id, correlation_id, causation_id];
        TEXTS.into_iter().zip(sizes.map(Option::unwrap_or_default))
    }

    /// The sum of all sizes.
    pub(super) fn total(&self) -> usize {
        self.0 + self.1 + self.texts().map(|(_, size)| size).sum::<usize>()
    }

    /// Returns the defect of the row, if a size is over its limit.
    pub(super) fn defect(&self, max_payload: usize) -> Option<PublishError> {
        let headers = (self.1 > MAX_HEADERS_BYTES).then_some(("headers", self.1));
        let text = || self.texts().find(|(_, size)| *size > MAX_TEXT_BYTES);
        let (column, size) = headers.or_else(text).or_else(|| (self.0 > max_payload).then_some(("payload", self.0)))?;
        Some(decode::over(column, size, max_payload))
    }
}

/// Decodes a row: a JSON array, followed by the payload. If the payload was not read, the array contains the sizes instead.
pub(super) fn decode(row: &[u8]) -> Result<(Claimed, Option<Sizes>), sqlx::Error> {
    let mut defect = None;
    let (columns, payload) = match split(row) {
        Ok(parts) => parts,
        // SQLite stores any bytes as text, but JSON must be UTF-8.
        Err(_) => {
            defect = Some(not_utf8());
            split(String::from_utf8_lossy(row).as_bytes())?
        }
    };
    if defect.is_none() && std::str::from_utf8(&payload).is_err() {
        defect = Some(not_utf8());
    }
    let missing = columns.missing(&payload);
    let headers = decode::headers(columns.headers.as_ref().map(String::as_bytes)).unwrap_or_else(|error| {
        defect = Some(error);
        Vec::new()
    });
    defect = missing.map(decode::missing).or(defect);
    let attempts = columns.attempts.unwrap_or_default();
    // A missing time is a defect of the event. A time that cannot be read is an error of the schema.
    let created_at = match &columns.created_at {
        Some(text) => {
            time(text).ok_or_else(|| sqlx::Error::Decode("created_at is not as the schema demands it".into()))?
        }
        None => PrimitiveDateTime::MIN,
    };
    let claimed = Claimed {
        event: Event {
            row: RowKey {
                locator: columns.row_id,
                partition: columns.partition,
                id: columns.id,
                destination: columns.destination.unwrap_or_default(),
            },
            event_id: columns.event_id.unwrap_or_default(),
            event_type: columns.event_type.unwrap_or_default(),
            source: columns.source.unwrap_or_default(),
            aggregate_type: columns.aggregate_type,
            aggregate_id: columns.aggregate_id,
            payload,
            headers,
            correlation_id: columns.correlation_id,
            causation_id: columns.causation_id,
            schema_version: columns.schema_version.unwrap_or_default(),
            created_at: created_at.assume_utc(),
            attempts: attempts.max(0),
        },
        due: columns.due != Some(0),
        age: Duration::try_from_secs_f64(columns.age.unwrap_or_default()).unwrap_or_default(),
        defect,
        blocked_before: attempts < 0,
        blocked_by: columns
            .behind
            .into_iter()
            .flatten()
            .filter_map(|(destination, ms)| Some(BlockedBy { destination, remaining: milliseconds(ms?) }))
            .collect(),
    };
    Ok((claimed, columns.sizes))
}

fn split(row: &[u8]) -> Result<(Columns, Vec<u8>), sqlx::Error> {
    let mut parts = serde_json::Deserializer::from_slice(row).into_iter();
    let columns = parts.next().ok_or_else(|| sqlx::Error::Decode("an empty row".into()))?.map_err(decode_error)?;
    Ok((columns, row[parts.byte_offset()..].to_vec()))
}

fn decode_error(error: serde_json::Error) -> sqlx::Error {
    // The error's text is left out, because it may quote the row.
    sqlx::Error::Decode(format!("a row of event_outbox ({:?} error)", error.classify()).into())
}

fn not_utf8() -> PublishError {
    PublishError::new(Fault::Unfit, "not_utf8", "the event holds text that is not UTF-8")
}

/// Parses a time in the format that the schema demands: `2026-01-31 12:00:00`, with or without milliseconds.
pub(super) fn time(text: &str) -> Option<PrimitiveDateTime> {
    let number = |from: usize, to: usize| text.get(from..to)?.parse::<u16>().ok();
    let two = |from: usize| u8::try_from(number(from, from + 2)?).ok();
    let month = Month::try_from(two(5)?).ok()?;
    let date = Date::from_calendar_date(number(0, 4)?.into(), month, two(8)?).ok()?;
    let milliseconds = if text.len() > 19 { number(20, 23)? } else { 0 };
    let time = Time::from_hms_milli(two(11)?, two(14)?, two(17)?, milliseconds).ok()?;
    Some(PrimitiveDateTime::new(date, time))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_read_with_and_without_milliseconds() {
        let read = |text| time(text).map(|time| time.assume_utc().unix_timestamp_nanos() / 1_000_000);
        assert_eq!(read("2026-01-01 00:00:00"), Some(1_767_225_600_000));
        assert_eq!(read("2026-01-01 00:00:01.250"), Some(1_767_225_601_250));
        assert_eq!(read("2026-13-01 00:00:00"), None);
        assert_eq!(read("tomorrow"), None);
    }
}
