//! The configuration of a Redis Pub/Sub destination.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use secrecy::SecretString;
use serde::Deserialize;
use tracing::level_filters::LevelFilter;

use crate::sink::redis::spec::{LOG_TARGETS, Location, url_field};
use crate::sink::redis_pubsub::{RedisPubSub, RedisPubSubConfig};
use crate::sink::spec::{self, Configured, Field, Invalid, Opening, UrlParts};
use crate::sink::template::{Template, TemplateError};
use crate::sink::{Format, Sink};

/// The fields of a destination with `type = "redis-pubsub"`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    url: Option<SecretString>,
    url_file: Option<PathBuf>,
    host: Option<String>,
    port: Option<u16>,
    db: Option<i64>,
    username: Option<String>,
    password: Option<SecretString>,
    password_file: Option<PathBuf>,
    #[serde(default = "channel")]
    channel: String,
    #[serde(default = "format")]
    format: Format,
    #[serde(default = "exactly_once")]
    exactly_once: bool,
}

fn channel() -> String {
    "{event_type}".to_owned()
}

fn format() -> Format {
    Format::CloudEvents
}

fn exactly_once() -> bool {
    true
}

impl Spec {
    fn template(&self) -> Result<Template, Invalid> {
        self.channel.parse().map_err(|error: TemplateError| Invalid { field: "channel", reason: error.to_string() })
    }

    fn location(&self) -> Location<'_> {
        Location {
            url: self.url.as_ref(),
            url_file: self.url_file.as_ref(),
            host: self.host.as_ref(),
            port: self.port,
            db: self.db,
            username: self.username.as_ref(),
            password: self.password.as_ref(),
            password_file: self.password_file.as_ref(),
        }
    }
}

impl Configured for Spec {
    const TYPE: &'static str = "redis-pubsub";
    const SCHEMES: &'static [&'static str] = &[
        "redis+pubsub",
        "rediss+pubsub",
        "redis-cluster+pubsub",
        "rediss-cluster+pubsub",
        "redis-sentinel+pubsub",
        "rediss-sentinel+pubsub",
    ];
    const LOG_TARGETS: &'static [(&'static str, LevelFilter)] = LOG_TARGETS;

    fn address(url: &mut UrlParts<'_>) -> Result<Vec<Field>, String> {
        url_field(url)
    }
}

#[async_trait]
impl spec::Spec for Spec {
    fn validate(&self) -> Result<(), Invalid> {
        self.location().address()?;
        self.template().map(drop)
    }

    async fn open(&self, with: &Opening) -> Result<Arc<dyn Sink>, Invalid> {
        Ok(Arc::new(RedisPubSub::new(RedisPubSubConfig {
            address: self.location().address()?,
            channel: self.template()?,
            format: self.format,
            source: with.source.clone(),
            timeout: with.timeout,
            exactly_once: self.exactly_once,
        })))
    }
}
