//! The configuration of a Redis Streams destination.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use secrecy::SecretString;
use serde::Deserialize;
use tracing::level_filters::LevelFilter;

use crate::sink::Sink;
use crate::sink::redis::RedisAddress;
use crate::sink::redis::spec::{LOG_TARGETS, Location, url_field};
use crate::sink::redis_stream::{RedisStream, RedisStreamConfig};
use crate::sink::spec::{self, Configured, Field, Invalid, Opening, UrlParts};
use crate::sink::template::{Template, TemplateError};

/// The fields of a destination with `type = "redis-stream"`.
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
    #[serde(default = "stream")]
    stream: String,
    maxlen: Option<u64>,
    #[serde(default = "exactly_once")]
    exactly_once: bool,
}

fn stream() -> String {
    "events".to_owned()
}

fn exactly_once() -> bool {
    true
}

impl Spec {
    fn template(&self) -> Result<Template, Invalid> {
        self.stream.parse().map_err(|error: TemplateError| Invalid { field: "stream", reason: error.to_string() })
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
    const TYPE: &'static str = "redis-stream";
    const SCHEMES: &'static [&'static str] = &[
        "redis+stream",
        "rediss+stream",
        "redis-cluster+stream",
        "rediss-cluster+stream",
        "redis-sentinel+stream",
        "rediss-sentinel+stream",
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

    fn fixed_stream(&self) -> Option<(RedisAddress, String)> {
        Some((self.location().address().ok()?, self.template().ok()?.fixed()?.to_owned()))
    }

    async fn open(&self, with: &Opening) -> Result<Arc<dyn Sink>, Invalid> {
        Ok(Arc::new(RedisStream::new(RedisStreamConfig {
            address: self.location().address()?,
            stream: self.template()?,
            max_length: self.maxlen,
            source: with.source.clone(),
            timeout: with.timeout,
            exactly_once: self.exactly_once,
        })))
    }
}
