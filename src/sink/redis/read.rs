//! Reading a stream back, for an audit.

use std::collections::HashMap;
use std::time::Duration;

use redis::streams::StreamRangeReply;
use redis::{FromRedisValue, Value};

use crate::audit::{Checksum, Entry};
use crate::event::{Fault, PublishError};
use crate::sink::redis::RedisAddress;
use crate::sink::redis::connection::{Connection, slot_of};
use crate::sink::redis::fault::call_error;

/// Entries asked for at a time.
const PAGE: usize = 1000;

/// How long one page may take.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Calls `each` with every entry of `stream`, from its first to the one that is its last when it is reached.
///
/// # Errors
/// Redis cannot be read, or an entry is not one of ours.
pub async fn read_entries(
    address: &RedisAddress,
    stream: &str,
    mut each: impl FnMut(&Entry<'_>),
) -> Result<(), PublishError> {
    let mut connection = Connection::open(address, TIMEOUT).await?;
    let place = slot_of(stream.as_bytes());
    let mut from = "-".to_owned();
    loop {
        let mut range = redis::cmd("XRANGE");
        range.arg(&[stream, &from, "+", "COUNT"]).arg(PAGE);
        let answer = connection.call(&range, place).await.map_err(call_error)?;
        let page = StreamRangeReply::from_redis_value(answer).map_err(|_| foreign(&from))?;
        for entry in &page.ids {
            read_entry(&entry.id, &entry.map, &mut each).ok_or_else(|| foreign(&entry.id))?;
        }
        match page.ids.last() {
            Some(last) => from = format!("({}", last.id),
            None => return Ok(()),
        }
    }
}

fn foreign(entry: &str) -> PublishError {
    PublishError::new(Fault::Unfit, "foreign_entry", format!("the entry {entry} is not of a relay"))
}

fn read_entry(id: &str, fields: &HashMap<String, Value>, each: &mut impl FnMut(&Entry<'_>)) -> Option<()> {
    let text = |name: &str| match fields.get(name) {
        Some(Value::BulkString(bytes)) => std::str::from_utf8(bytes).ok(),
        _ => None,
    };
    let Some(Value::BulkString(data)) = fields.get("data") else { return None };
    each(&Entry {
        id: id.parse().ok()?,
        event_id: text("id")?.parse().ok()?,
        sequence: text("sequence")?.parse().ok()?,
        key: text("partitionkey"),
        checksum: Checksum::of(data),
    });
    Some(())
}
