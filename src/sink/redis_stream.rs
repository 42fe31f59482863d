//! Redis Streams: one entry per event, one field per attribute, the payload's exact JSON in `data`.

mod spec;

use std::borrow::Cow;
use std::time::Duration;

use async_trait::async_trait;

use crate::event::{Event, Fault, PublishError};
use crate::sink::redis::{Command, Commands, Redis, RedisAddress};
use crate::sink::template::Template;
use crate::sink::{Batch, Published, Sink, cloudevent};

pub use spec::Spec;

/// The settings of a Redis Streams destination.
#[derive(Debug, Clone)]
pub struct RedisStreamConfig {
    /// The address of the Redis.
    pub address: RedisAddress,
    /// The stream that an event goes to.
    pub stream: Template,
    /// About how many of the newest entries each stream keeps, read or not. `None`: the relay never trims streams.
    pub max_length: Option<u64>,
    /// Replaces the source of an event whose source is empty.
    pub source: String,
    /// The longest wait for one answer.
    pub timeout: Duration,
    /// Whether notes beside each stream keep an event that is published again from being added again.
    pub exactly_once: bool,
}

/// The destination.
pub struct RedisStream {
    redis: Redis,
    entries: Entries,
    exactly_once: bool,
}

struct Entries {
    stream: Template,
    max_length: Option<u64>,
    source: String,
}

impl RedisStream {
    /// Returns a destination that connects at the first event.
    pub fn new(config: RedisStreamConfig) -> Self {
        let RedisStreamConfig { address, stream, max_length, source, timeout, exactly_once } = config;
        Self { redis: Redis::new(address, timeout), entries: Entries { stream, max_length, source }, exactly_once }
    }
}

impl Commands for Entries {
    fn write<'a>(&self, event: &'a Event, command: &mut Command<'a>) {
        command.literal("XADD");
        match self.stream.fixed() {
            Some(stream) => command.literal(stream),
            None => command.shared_arg(self.stream.render(event, &self.source).as_bytes()),
        }
        if let Some(length) = self.max_length {
            command.literal("MAXLEN");
            command.literal("~");
            command.literal(length.to_string());
        }
        command.literal("*");
        cloudevent::attributes(event, &self.source, |name, value| {
            match name {
                "specversion" | "datacontenttype" => {
                    command.literal(name);
                    command.literal(value); // the same for every event
                }
                _ if name.is_empty() => {
                    command.own_arg(name); // a header without a name, which a literal cannot be
                    command.own_arg(value);
                }
                "source" | "type" | "schemaversion" => {
                    command.literal(name);
                    command.shared_arg(value);
                }
                _ => {
                    command.literal(name);
                    command.own_arg(value);
                    if name == "partitionkey" {
                        command.mark_key();
                    }
                }
            }
        });
        command.literal("data");
        command.document(event.payload.as_slice());
    }

    fn key<'a>(&'a self, event: &'a Event) -> Option<Cow<'a, str>> {
        Some(self.stream.render(event, &self.source))
    }

    fn one_key(&self) -> bool {
        self.stream.fixed().is_some()
    }
}

#[async_trait]
impl Sink for RedisStream {
    async fn publish(&self, batch: &Batch<'_>) -> Published {
        self.redis.publish(batch, self.exactly_once, &self.entries).await
    }

    fn place(&self, event: &Event) -> String {
        self.entries.stream.render(event, &self.entries.source).into_owned()
    }

    fn target(&self) -> String {
        format!("redis-stream {}", self.entries.stream)
    }

    async fn check(&self) -> Result<String, PublishError> {
        let server = self.redis.check().await?;
        let Some(stream) = self.entries.stream.fixed() else { return Ok(format!("{server}, streams by template")) };
        match self.redis.key_type(stream).await?.as_str() {
            "stream" | "none" => {
                self.redis.probe(stream, &[&["XADD", "MAXLEN", "x", "*", "a", "b"]]).await?;
                if self.redis.is_exhausted(stream).await {
                    return Err(PublishError::new(Fault::Misconfigured, "ERR", exhausted(stream)));
                }
                if self.exactly_once {
                    self.redis.probe_states(stream).await?;
                }
                Ok(format!("{server}, stream {stream:?}"))
            }
            other => {
                let message = format!(
                    "the key {stream:?} holds a {other}, not a stream; choose another name by RELAY_REDIS_STREAM"
                );
                Err(PublishError::new(Fault::Misconfigured, "WRONGTYPE", message))
            }
        }
    }
}

/// Returns the message for a stream whose last id is the greatest possible.
fn exhausted(stream: &str) -> String {
    format!(
        "the stream {stream:?} has the greatest id there is, so Redis takes no entry more; set its last id to that of its last \
         entry with a time (XSETID), or delete it (DEL), or choose another name by RELAY_REDIS_STREAM"
    )
}
