//! A row of the outbox as a claim reads it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{Row, ValueRef};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::event::{Event, Fault, PublishError, RowKey};
use crate::outbox::postgres::tid;
use crate::outbox::{BlockedBy, Claimed, decode};

/// The columns that `batch` reads, in the order of its statements. To find a column by its name would cost a look-up for each
/// event.
pub(super) mod column {
    /// Text, see `tid`.
    pub(in crate::outbox::postgres) const CTID: usize = 0;
    pub(in crate::outbox::postgres) const PARTITION: usize = 1;
    pub(in crate::outbox::postgres) const ID: usize = 2;
    pub(in crate::outbox::postgres) const DESTINATION: usize = 3;
    pub(in crate::outbox::postgres) const EVENT_ID: usize = 4;
    pub(in crate::outbox::postgres) const EVENT_TYPE: usize = 5;
    pub(in crate::outbox::postgres) const SOURCE: usize = 6;
    pub(in crate::outbox::postgres) const AGGREGATE_TYPE: usize = 7;
    pub(in crate::outbox::postgres) const AGGREGATE_ID: usize = 8;
    pub(in crate::outbox::postgres) const PAYLOAD: usize = 9;
    pub(in crate::outbox::postgres) const HEADERS: usize = 10;
    pub(in crate::outbox::postgres) const CORRELATION_ID: usize = 11;
    pub(in crate::outbox::postgres) const CAUSATION_ID: usize = 12;
    pub(in crate::outbox::postgres) const SCHEMA_VERSION: usize = 13;
    pub(in crate::outbox::postgres) const CREATED_AT: usize = 14;
    /// -1: the event has failed, and no attempt was charged. [`super::LEFT_OUT`], [`super::LEFT_OUT_AND_OWED`]: it is left out.
    pub(in crate::outbox::postgres) const ATTEMPTS: usize = 15;
    /// Whether `available_at` has come.
    pub(in crate::outbox::postgres) const DUE: usize = 16;
    /// Bytes as PostgreSQL stores them; NULL where a column is NULL that must not be.
    pub(in crate::outbox::postgres) const SIZE: usize = 17;
    /// JSON: for each destination at which an earlier event of the key waits, milliseconds until that one is due.
    pub(in crate::outbox::postgres) const BEHIND: usize = 18;
    /// The epoch, the same in each row.
    pub(in crate::outbox::postgres) const EPOCH: usize = 19;
    /// Two numbers in one, the same in each row. The lower one has [`super::REINSERTIONS_BITS`] bits.
    pub(in crate::outbox::postgres) const REINSERTIONS_AND_CHANGES: usize = 20;
    /// The seconds since the event was emitted, or since it was due if it was delayed and never tried. NULL where no calendar has
    /// that time.
    pub(in crate::outbox::postgres) const AGE: usize = 21;
    /// Only where rows may be large: the column that is too large, and its bytes; or that it is missing.
    pub(in crate::outbox::postgres) const UNFIT: usize = 22;
}

/// The attempts of a marked row, whose event is done and could not be recorded, see `left_out`.
pub(super) const LEFT_OUT: i32 = -2;

/// The same of an event that is still owed, and so holds back its key.
pub(super) const LEFT_OUT_AND_OWED: i32 = -3;

/// How many of the lowest bits have the number of reinsertions.
pub(super) const REINSERTIONS_BITS: u32 = 40;

/// How many of the bits above them have the number of changes of the register of relays.
pub(super) const CHANGES_BITS: u32 = 23;

/// Decodes a row, and returns its attempts as they are stored. NULL, where somebody has allowed that, counts as 0. Fails only if
/// the driver disagrees with our own statement.
pub(super) fn claimed(row: &PgRow, max_payload: usize, within_bytes: bool) -> Result<(Claimed, i32), sqlx::Error> {
    let mut payload = jsonb_text(row, column::PAYLOAD)?.unwrap_or_default();
    // Of a small value the statement measures the size in the database, not the text.
    let mut defect = decode::too_large(payload.len(), max_payload);
    if defect.is_some() {
        payload = &[];
    }
    if within_bytes && let Some(over) = row.try_get::<Option<&str>, _>(column::UNFIT)? {
        let (column, bytes) = over.split_once(' ').unwrap_or((over, ""));
        defect = Some(match bytes {
            "missing" => decode::missing(column),
            _ => decode::over(column, bytes.parse().unwrap_or_default(), max_payload),
        });
    }
    let headers = decode::headers(jsonb_text(row, column::HEADERS)?).unwrap_or_else(|error| {
        defect = Some(error);
        Vec::new()
    });
    let behind: BTreeMap<String, u64> = match jsonb_text(row, column::BEHIND)? {
        None => BTreeMap::new(),
        Some(json) => serde_json::from_slice(json).map_err(|error| sqlx::Error::Decode(error.into()))?,
    };
    let created_at: Option<OffsetDateTime> = row.try_get(column::CREATED_AT)?;
    if created_at.is_none() {
        let message = "created_at is infinite, or lies before the year 1 or after 9999";
        defect = Some(PublishError::new(Fault::Unfit, "created_at_invalid", message));
    }
    let mut text = |index| {
        let (text, is_utf8) = text(row, index)?;
        if !is_utf8 {
            defect = Some(PublishError::new(Fault::Unfit, "not_utf8", "a name, key or id of the event is not UTF-8"));
        }
        Ok::<_, sqlx::Error>(text)
    };
    let (event_type, source) = (text(column::EVENT_TYPE)?, text(column::SOURCE)?);
    let (aggregate_type, aggregate_id, correlation_id, causation_id) = (
        text(column::AGGREGATE_TYPE)?,
        text(column::AGGREGATE_ID)?,
        text(column::CORRELATION_ID)?,
        text(column::CAUSATION_ID)?,
    );
    let (event_id, schema_version): (Option<Uuid>, Option<i32>) =
        (row.try_get(column::EVENT_ID)?, row.try_get(column::SCHEMA_VERSION)?);
    let (attempts, due): (Option<i32>, Option<bool>) = (row.try_get(column::ATTEMPTS)?, row.try_get(column::DUE)?);
    let destination: Option<String> = row.try_get(column::DESTINATION)?;
    if defect.is_none() {
        let columns = [
            ("event_id", event_id.is_none()),
            ("event_type", event_type.is_none()),
            ("source", source.is_none()),
            ("schema_version", schema_version.is_none()),
            ("attempts", attempts.is_none()),
            ("available_at", due.is_none()),
            ("destination", destination.is_none()),
        ];
        defect = columns.into_iter().find(|(_, is_missing)| *is_missing).map(|(column, _)| decode::missing(column));
    }
    let attempts = attempts.unwrap_or_default();
    let age: Option<f64> = row.try_get(column::AGE)?;
    let remaining = |(destination, ms)| BlockedBy { destination, remaining: Duration::from_millis(ms) };
    let claimed = Claimed {
        event: Event {
            row: RowKey {
                locator: tid::to_locator(row.try_get(column::CTID)?)
                    .ok_or_else(|| sqlx::Error::Decode("not a ctid".into()))?,
                partition: row.try_get(column::PARTITION)?,
                id: row.try_get(column::ID)?,
                destination: destination.unwrap_or_default(),
            },
            event_id: event_id.unwrap_or_default(),
            event_type: event_type.unwrap_or_default(),
            source: source.unwrap_or_default(),
            aggregate_type,
            aggregate_id,
            payload: payload.to_vec(),
            headers,
            correlation_id,
            causation_id,
            schema_version: schema_version.unwrap_or_default(),
            created_at: created_at.unwrap_or(OffsetDateTime::UNIX_EPOCH),
            attempts: attempts.max(0),
        },
        due: due.unwrap_or(true),
        age: Duration::try_from_secs_f64(age.unwrap_or_default()).unwrap_or_default(),
        defect,
        blocked_before: attempts < 0,
        blocked_by: behind.into_iter().map(remaining).collect(),
    };
    Ok((claimed, attempts))
}

/// Returns a text column, and whether it is UTF-8. In a database without an encoding (SQL_ASCII) nobody guarantees that. A text
/// that is not UTF-8 is a defect of its row, and must not fail the batch.
fn text(row: &PgRow, index: usize) -> Result<(Option<String>, bool), sqlx::Error> {
    let value = row.try_get_raw(index)?;
    if value.is_null() {
        return Ok((None, true));
    }
    let bytes = value.as_bytes().map_err(sqlx::Error::Decode)?;
    let text = String::from_utf8_lossy(bytes);
    let is_utf8 = matches!(text, Cow::Borrowed(_));
    Ok((Some(text.into_owned()), is_utf8))
}

/// Returns the text of a `jsonb` column, straight from the wire: its binary form is a version byte and the text.
fn jsonb_text(row: &PgRow, index: usize) -> Result<Option<&[u8]>, sqlx::Error> {
    let value = row.try_get_raw(index)?;
    if value.is_null() {
        return Ok(None);
    }
    let bytes = value.as_bytes().map_err(sqlx::Error::Decode)?;
    match bytes.split_first() {
        Some((1, text)) => Ok(Some(text)),
        _ => Err(sqlx::Error::Decode("jsonb of an unknown version".into())),
    }
}
