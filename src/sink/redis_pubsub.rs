//! Redis Pub/Sub: one message per event. Publishing succeeds without a subscriber too, and whether a subscriber received a
//! message is never known.

mod spec;

use std::borrow::Cow;
use std::time::Duration;

use async_trait::async_trait;

use crate::event::{Event, Outcome, PublishError};
use crate::sink::redis::{Command, Commands, Redis, RedisAddress};
use crate::sink::template::Template;
use crate::sink::{Batch, Format, Published, Sink, cloudevent};

pub use spec::Spec;

/// The settings of a Redis Pub/Sub destination.
#[derive(Debug, Clone)]
pub struct RedisPubSubConfig {
    /// The address of the Redis.
    pub address: RedisAddress,
    /// The channel that an event goes to.
    pub channel: Template,
    /// The content of a message.
    pub format: Format,
    /// Replaces the source of an event whose source is empty.
    pub source: String,
    /// The longest wait for one answer.
    pub timeout: Duration,
    /// Whether notes in Redis keep an event that is published again from being sent again.
    pub exactly_once: bool,
}

/// The destination.
pub struct RedisPubSub {
    redis: Redis,
    messages: Messages,
    exactly_once: bool,
}

struct Messages {
    channel: Template,
    format: Format,
    source: String,
}

impl RedisPubSub {
    /// Returns a destination that connects at the first event.
    pub fn new(config: RedisPubSubConfig) -> Self {
        let RedisPubSubConfig { address, channel, format, source, timeout, exactly_once } = config;
        Self { redis: Redis::new(address, timeout), messages: Messages { channel, format, source }, exactly_once }
    }
}

impl Commands for Messages {
    fn write<'a>(&self, event: &'a Event, command: &mut Command<'a>) {
        command.literal("PUBLISH");
        command.shared_arg(self.channel.render(event, &self.source).as_bytes());
        match self.format {
            Format::CloudEvents => command.document(cloudevent::json(event, &self.source)),
            Format::Payload => command.document(event.payload.as_slice()),
        }
    }

    fn key<'a>(&'a self, _: &'a Event) -> Option<Cow<'a, str>> {
        None // a channel is not a key
    }

    fn one_key(&self) -> bool {
        self.channel.fixed().is_some()
    }
}

#[async_trait]
impl Sink for RedisPubSub {
    async fn publish(&self, batch: &Batch<'_>) -> Published {
        without_ids(self.redis.publish(batch, self.exactly_once, &self.messages).await)
    }

    fn place(&self, event: &Event) -> String {
        self.messages.channel.render(event, &self.messages.source).into_owned()
    }

    fn target(&self) -> String {
        format!("redis-pubsub {}, format {}", self.messages.channel, self.messages.format)
    }

    async fn check(&self) -> Result<String, PublishError> {
        let server = self.redis.check().await?;
        Ok(match self.messages.channel.fixed() {
            Some(channel) => {
                self.redis.may_publish(channel).await?;
                format!("{server}, channel {channel:?}")
            }
            None => format!("{server}, channels by template"),
        })
    }
}

/// Removes the message ids: what Redis answers is the number of receivers, which does not identify the message.
fn without_ids(mut published: Published) -> Published {
    for outcome in &mut published.outcomes {
        if let Outcome::Delivered { message_id } = outcome {
            *message_id = None;
        }
    }
    published
}
