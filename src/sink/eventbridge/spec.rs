//! The configuration of an Amazon EventBridge destination.

use std::sync::Arc;

use async_trait::async_trait;
use serde::Deserialize;
use tracing::level_filters::LevelFilter;
use url::Url;

use crate::sink::eventbridge::{
    DEFAULT_MAX_ENTRY_BYTES, DEFAULT_REQUESTS_IN_FLIGHT, ENDPOINT_VARIABLES, EventBridge, EventBridgeConfig,
};
use crate::sink::spec::{self, Configured, Field, Invalid, Opening, UrlParts};
use crate::sink::{Format, Sink};
use crate::units::{self, Quantity};

/// The fields of a destination with `type = "eventbridge"`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    bus: String,
    source: Option<String>,
    #[serde(default = "format")]
    format: Format,
    region: Option<String>,
    endpoint_url: Option<String>,
    max_entry_size: Option<Quantity>,
    requests_in_flight: Option<usize>,
}

fn format() -> Format {
    Format::CloudEvents
}

impl Spec {
    /// Returns the most bytes of an entry and of a request.
    fn max_entry_bytes(&self) -> Result<usize, Invalid> {
        let Some(Quantity(text)) = &self.max_entry_size else { return Ok(DEFAULT_MAX_ENTRY_BYTES) };
        let bytes = units::bytes(text, 1024..=1 << 30).map_err(|reason| Invalid { field: "max_entry_size", reason })?;
        Ok(usize::try_from(bytes).unwrap_or(usize::MAX))
    }
}

impl Configured for Spec {
    const TYPE: &'static str = "eventbridge";
    const SCHEMES: &'static [&'static str] = &["eventbridge"];
    const LOG_TARGETS: &'static [(&'static str, LevelFilter)] = &[
        ("aws_", LevelFilter::WARN),
        ("hyper", LevelFilter::WARN),
        ("h2", LevelFilter::WARN),
        // These log settings that they cannot use in full, and those may hold secrets. What matters is also returned as an error.
        ("aws_config", LevelFilter::ERROR),
        ("aws_runtime", LevelFilter::ERROR),
        ("aws_types", LevelFilter::ERROR),
    ];

    fn address(url: &mut UrlParts<'_>) -> Result<Vec<Field>, String> {
        if url.address.is_empty() || url.address.contains('@') {
            return Err("it is written eventbridge://NAME, with the name or the ARN of the bus".to_owned());
        }
        Ok(vec![("bus".to_owned(), url.address.to_owned())])
    }
}

#[async_trait]
impl spec::Spec for Spec {
    fn validate(&self) -> Result<(), Invalid> {
        self.max_entry_bytes()?;
        match &self.endpoint_url {
            Some(url) => usable_endpoint(url).map_err(|reason| Invalid { field: "endpoint_url", reason }),
            // If the value of a variable is no URL, the SDK ignores it and logs all of it.
            None => ENDPOINT_VARIABLES.into_iter().try_for_each(|variable| {
                usable_endpoint(&std::env::var(variable).unwrap_or_default())
                    .map_err(|reason| Invalid { field: variable, reason })
            }),
        }
    }

    async fn open(&self, with: &Opening) -> Result<Arc<dyn Sink>, Invalid> {
        let config = EventBridgeConfig {
            bus: self.bus.clone(),
            source: self.source.clone().unwrap_or_else(|| with.source.clone()),
            format: self.format,
            region: self.region.clone(),
            endpoint_url: self.endpoint_url.clone().filter(|url| !url.is_empty()),
            timeout: with.timeout,
            max_entry_bytes: self.max_entry_bytes()?,
            requests_in_flight: self.requests_in_flight.unwrap_or(DEFAULT_REQUESTS_IN_FLIGHT).max(1),
        };
        Ok(Arc::new(EventBridge::new(config).await))
    }
}

/// Checks the URL of an endpoint. An empty one means that there is none. The error does not quote the URL, because it may hold
/// a password.
fn usable_endpoint(url: &str) -> Result<(), String> {
    let reason = match Url::parse(url) {
        _ if url.is_empty() => return Ok(()),
        Ok(url) if !url.username().is_empty() || url.password().is_some() => {
            "an endpoint takes no user and no password"
        }
        Ok(url) if url.has_host() && matches!(url.scheme(), "http" | "https") => return Ok(()),
        _ => "this is no URL of an endpoint; it is written https://host or http://host:port",
    };
    Err(reason.to_owned())
}
