//! Reads a stream back, for an audit.

use std::collections::HashMap;
use std::time::Duration;

use redis::streams::StreamRangeReply;
use redis::{Cmd, FromRedisValue, Value};

use crate::audit::{Checksum, Entry};
use crate::event::{Fault, PublishError};
use crate::sink::cloudevent::REPLAYED;
use crate::sink::redis::RedisAddress;
use crate::sink::redis::connection::{Connection, slot_of};
use crate::sink::redis::fault::call_error;

/// The most entries that are read at a time. Each may have a payload of a megabyte.
const PAGE: usize = 100;

/// The longest wait for one page.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Reads the entries of a stream in order.
pub struct StreamReader<'a> {
    stream: &'a str,
    connection: Connection,
    /// The last entry that was read.
    last: Option<String>,
}

impl<'a> StreamReader<'a> {
    /// Connects, and returns a reader at the beginning of the stream.
    ///
    /// # Errors
    /// There is no connection.
    pub async fn open(address: &RedisAddress, stream: &'a str) -> Result<Self, PublishError> {
        Ok(Self { stream, connection: Connection::open(address, TIMEOUT).await?, last: None })
    }

    /// Calls `each` with every entry after the last that was read, up to the present end of the stream. `None`: an entry that no
    /// relay made, or one that `relay replay` made, which the database knows nothing of.
    ///
    /// # Errors
    /// Redis cannot be read.
    pub async fn read(&mut self, mut each: impl FnMut(Option<&Entry<'_>>)) -> Result<(), PublishError> {
        let Some(end) = self.range("XREVRANGE", "+", "-", 1).await?.ids.pop() else { return Ok(()) };
        loop {
            let from = self.last.as_ref().map_or_else(|| "-".to_owned(), |last| format!("({last}"));
            let page = self.range("XRANGE", &from, &end.id, PAGE).await?;
            for entry in &page.ids {
                if read_entry(&entry.id, &entry.map, |entry| each(Some(entry))).is_none() {
                    each(None);
                }
            }
            match page.ids.last() {
                Some(last) => self.last = Some(last.id.clone()),
                None => return Ok(()),
            }
        }
    }

    /// Returns how many entries were trimmed from the stream or deleted.
    ///
    /// # Errors
    /// Redis cannot be read.
    pub async fn trimmed(&mut self) -> Result<u64, PublishError> {
        if self.call(redis::cmd("EXISTS").arg(self.stream)).await? == Value::Int(0) {
            return Ok(0);
        }
        let answer = self.call(redis::cmd("XINFO").arg("STREAM").arg(self.stream)).await?;
        let info: HashMap<String, Value> = HashMap::from_redis_value(answer).map_err(|_| unreadable(self.stream))?;
        let number = |name: &str| match info.get(name) {
            Some(Value::Int(number)) => u64::try_from(*number).ok(),
            _ => None,
        };
        let (added, length) = number("entries-added").zip(number("length")).ok_or_else(|| unreadable(self.stream))?;
        Ok(added.saturating_sub(length))
    }

    async fn range(
        &mut self,
        command: &str,
        from: &str,
        to: &str,
        count: usize,
    ) -> Result<StreamRangeReply, PublishError> {
        let answer = self.call(redis::cmd(command).arg(&[self.stream, from, to, "COUNT"]).arg(count)).await?;
        StreamRangeReply::from_redis_value(answer).map_err(|_| unreadable(self.stream))
    }

    async fn call(&mut self, command: &Cmd) -> Result<Value, PublishError> {
        self.connection.call(command, slot_of(self.stream.as_bytes())).await.map_err(call_error)
    }
}

fn unreadable(stream: &str) -> PublishError {
    PublishError::new(Fault::Misconfigured, "unreadable", format!("{stream:?} cannot be read as a stream"))
}

fn read_entry(id: &str, fields: &HashMap<String, Value>, each: impl FnOnce(&Entry<'_>)) -> Option<()> {
    let text = |name: &str| match fields.get(name) {
        Some(Value::BulkString(bytes)) => std::str::from_utf8(bytes).ok(),
        _ => None,
    };
    let Some(Value::BulkString(data)) = fields.get("data") else { return None };
    if fields.contains_key(REPLAYED) {
        return None;
    }
    each(&Entry {
        id: id.parse().ok()?,
        event_id: text("id")?.parse().ok()?,
        sequence: text("sequence")?.parse().ok()?,
        key: text("partitionkey"),
        checksum: Checksum::of(data),
    });
    Some(())
}
