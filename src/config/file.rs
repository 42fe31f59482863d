//! The TOML file: settings by the names of their options, named destinations, and routes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::config::ConfigError;
use crate::sink::Format;

/// A file that was read; empty where there is none.
#[derive(Debug, Default)]
pub struct ConfigFile {
    /// Where it is.
    pub path: PathBuf,
    /// Settings by the id of their argument.
    pub settings: BTreeMap<String, String>,
    /// The ids of all settings it has.
    pub names: BTreeSet<String>,
    /// Named destinations.
    pub destinations: BTreeMap<String, DestinationSpec>,
    /// Routes, in order.
    pub routes: Vec<RouteSpec>,
}

/// `[destinations.<name>]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum DestinationSpec {
    /// Entries of Redis Streams.
    RedisStream(RedisSpec),
    /// Messages of Redis Pub/Sub.
    RedisPubsub(RedisSpec),
    /// An EventBridge bus.
    Eventbridge(EventBridgeSpec),
    /// Lines of standard output.
    Stdout(StdoutSpec),
}

/// A Redis, by its URL or by its host; what is to be written there.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // as the settings of the same names
pub struct RedisSpec {
    pub url: Option<String>,
    pub url_file: Option<PathBuf>,
    pub host: Option<String>,
    pub port: Option<u16>,
    pub db: Option<i64>,
    pub username: Option<String>,
    pub password_file: Option<PathBuf>,
    /// Streams only.
    pub stream: Option<String>,
    /// Streams only.
    pub maxlen: Option<u64>,
    /// As `RELAY_REDIS_EXACTLY_ONCE`.
    pub exactly_once: Option<bool>,
    /// Pub/Sub only.
    pub channel: Option<String>,
    /// Pub/Sub only.
    pub format: Option<Format>,
}

/// An EventBridge bus.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // as the settings of the same names
pub struct EventBridgeSpec {
    pub bus: String,
    pub source: Option<String>,
    pub format: Option<Format>,
    pub region: Option<String>,
    pub endpoint_url: Option<String>,
    pub max_entry_size: Option<usize>,
    pub requests_in_flight: Option<usize>,
}

/// Nothing to say about standard output.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StdoutSpec {}

/// `[[routes]]`: a filter, then the destinations of what passes it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteSpec {
    /// A glob over the event type.
    pub event_type: Option<String>,
    /// The event's source, exactly.
    pub source: Option<String>,
    /// Headers that must have these values.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// Names of destinations; empty: wanted nowhere.
    pub destinations: Vec<String>,
}

#[derive(Deserialize)]
struct Raw {
    #[serde(default)]
    destinations: BTreeMap<String, DestinationSpec>,
    #[serde(default)]
    routes: Vec<RouteSpec>,
    #[serde(flatten)]
    settings: BTreeMap<String, toml::Value>,
}

impl ConfigFile {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// It cannot be read, is not TOML, or has something in it that is not known.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let fail = |reason: String| ConfigError::File { path: path.to_owned(), reason };
        // The error's own rendering quotes the line, which may hold a password.
        let raw: Raw = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            let place = if line > 0 { format!("line {line}: ") } else { String::new() };
            fail(format!("{place}{}", error.message()))
        })?;
        let mut settings = BTreeMap::new();
        for (name, value) in raw.settings {
            let value = match value {
                toml::Value::String(text) => text,
                toml::Value::Integer(number) => number.to_string(),
                toml::Value::Boolean(flag) => flag.to_string(),
                _ => return Err(fail(format!("setting {name:?} must be a string, an integer or a boolean"))),
            };
            settings.insert(name, value);
        }
        Ok(Self {
            path: path.to_owned(),
            names: settings.keys().cloned().collect(),
            settings,
            destinations: raw.destinations,
            routes: raw.routes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ConfigFile, String> {
        ConfigFile::parse(Path::new("relay.toml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn settings_destinations_and_routes_are_read() {
        let file = parse(
            r#"
            batch_size = 500
            retry_jitter = false
            [destinations.orders]
            type = "redis-stream"
            url = "redis://localhost"
            stream = "orders:{event_type}"
            [destinations.bus]
            type = "eventbridge"
            bus = "main"
            format = "payload"
            [[routes]]
            event_type = "order.*"
            headers = { tenant = "acme" }
            destinations = ["orders", "bus"]
            "#,
        )
        .expect("valid");
        assert_eq!(file.settings["batch_size"], "500");
        assert_eq!(file.settings["retry_jitter"], "false");
        assert!(matches!(&file.destinations["orders"], DestinationSpec::RedisStream(spec) if spec.stream.is_some()));
        assert!(
            matches!(&file.destinations["bus"], DestinationSpec::Eventbridge(spec) if spec.format == Some(Format::Payload))
        );
        assert_eq!(file.routes[0].destinations, ["orders", "bus"]);
    }

    #[test]
    fn what_is_not_known_is_named() {
        let error = parse("[destinations.a]\ntype = \"redis-stream\"\nstraem = \"x\"").expect_err("typo");
        assert!(error.contains("straem"), "{error}");
        let error = parse("[destinations.a]\ntype = \"kafka\"").expect_err("no such type");
        assert!(error.contains("kafka"), "{error}");
        let error = parse("[[routes]]\nevent_types = \"x\"\ndestinations = []").expect_err("typo");
        assert!(error.contains("event_types"), "{error}");
        let error = parse("batch_size = [1]").expect_err("a list");
        assert!(error.contains("batch_size"), "{error}");
    }

    #[test]
    fn an_error_does_not_quote_the_line_it_is_on() {
        let error = parse("x = 1\nredis_url = \"redis://:secret@host\" trailing").expect_err("not TOML");
        assert!(error.starts_with("relay.toml: line 2: ") && !error.contains("secret"), "{error}");
    }
}
