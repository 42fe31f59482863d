//! From settings and file to destinations and routes.

use std::sync::Arc;
use std::time::Duration;

use url::Url;
use wildmatch::WildMatch;

use crate::config::file::{ConfigFile, DestinationSpec, RedisSpec, RouteSpec};
use crate::config::settings::{RedisMode, Settings};
use crate::config::{ConfigError, secret};
use crate::route::{Route, Router};
use crate::secret::Secret;
use crate::sink::Sink;
use crate::sink::eventbridge::{DEFAULT_REQUESTS_IN_FLIGHT, ENDPOINT_VARIABLES, EventBridge, EventBridgeConfig};
use crate::sink::redis::RedisAddress;
use crate::sink::redis_pubsub::RedisPubSub;
use crate::sink::redis_stream::RedisStream;
use crate::sink::stdout::StdoutSink;
use crate::sink::template::Template;

/// A destination that is configured and not opened yet.
pub struct Destination {
    /// Its name, as it stands in `destination` columns.
    pub name: String,
    kind: Kind,
}

enum Kind {
    Stream { address: RedisAddress, stream: Template, max_length: Option<u64>, exactly_once: bool },
    PubSub { address: RedisAddress, channel: Template, format: crate::sink::Format, exactly_once: bool },
    EventBridge(EventBridgeConfig),
    Stdout,
}

/// All destinations: those of variables, then those of the file by name; and the routes between.
///
/// # Errors
/// None at all, two of one name, a route to one that is not there, or a value that cannot be used.
pub fn destinations(settings: &Settings, file: &ConfigFile) -> Result<(Vec<Destination>, Router), ConfigError> {
    let mut destinations = Vec::new();
    if let Some(address) = redis_address(settings)? {
        let kind = match settings.redis_mode {
            RedisMode::Stream => Kind::Stream {
                address,
                stream: template("RELAY_REDIS_STREAM", &settings.redis_stream)?,
                max_length: settings.redis_maxlen,
                exactly_once: settings.redis_exactly_once,
            },
            RedisMode::Pubsub => Kind::PubSub {
                address,
                channel: template("RELAY_REDIS_CHANNEL", &settings.redis_channel)?,
                format: settings.redis_format,
                exactly_once: settings.redis_exactly_once,
            },
        };
        destinations.push(Destination { name: "redis".to_owned(), kind });
    }
    if let Some(bus) = &settings.eventbridge_bus_name {
        // The SDK ignores one that is no URL, and logs it whole.
        for variable in ENDPOINT_VARIABLES {
            usable_endpoint(variable, &std::env::var(variable).unwrap_or_default())?;
        }
        destinations.push(Destination {
            name: "eventbridge".to_owned(),
            kind: Kind::EventBridge(EventBridgeConfig {
                bus: bus.clone(),
                region: None,
                endpoint_url: None,
                requests_in_flight: DEFAULT_REQUESTS_IN_FLIGHT,
                source: settings.eventbridge_source.clone().unwrap_or_else(|| settings.default_source.clone()),
                format: settings.eventbridge_format,
                max_entry_bytes: usize::try_from(settings.eventbridge_max_entry_size).unwrap_or(usize::MAX),
                timeout: Duration::from_millis(settings.publish_timeout),
            }),
        });
    }
    if settings.stdout {
        destinations.push(Destination { name: "stdout".to_owned(), kind: Kind::Stdout });
    }
    for (name, spec) in &file.destinations {
        if name.is_empty() || destinations.iter().any(|destination| destination.name == *name) {
            return Err(ConfigError::Contradiction(format!(
                "there are two destinations {name:?}: one of {}, one of variables; rename the first",
                file.path.display()
            )));
        }
        destinations.push(Destination { name: name.clone(), kind: kind(settings, name, spec)? });
    }
    if destinations.is_empty() {
        return Err(ConfigError::Contradiction(
            "no destination is configured: set REDIS_URL, AWS_EVENTBRIDGE_BUS_NAME or RELAY_STDOUT=true, or name some in a file"
                .to_owned(),
        ));
    }
    let routes = file.routes.iter().map(|spec| route(spec, &destinations)).collect::<Result<_, _>>()?;
    let count = destinations.len();
    Ok((destinations, Router::new(routes, count)))
}

impl Destination {
    /// The stream that all its events go to, where it is one of a fixed name.
    pub fn fixed_stream(&self) -> Option<(&RedisAddress, &str)> {
        match &self.kind {
            Kind::Stream { address, stream, .. } => Some((address, stream.fixed()?)),
            _ => None,
        }
    }

    /// Whether it writes to standard output.
    pub fn is_stdout(&self) -> bool {
        matches!(self.kind, Kind::Stdout)
    }

    /// Opens it. Nothing is connected before the first event.
    pub async fn open(self, settings: &Settings) -> (String, Arc<dyn Sink>) {
        let source = settings.default_source.clone();
        let timeout = Duration::from_millis(settings.publish_timeout);
        let sink: Arc<dyn Sink> = match self.kind {
            Kind::Stream { address, stream, max_length, exactly_once } => {
                Arc::new(RedisStream::new(address, stream, max_length, source, timeout, exactly_once))
            }
            Kind::PubSub { address, channel, format, exactly_once } => {
                Arc::new(RedisPubSub::new(address, channel, format, source, timeout, exactly_once))
            }
            Kind::EventBridge(config) => Arc::new(EventBridge::new(config).await),
            Kind::Stdout => Arc::new(StdoutSink::new(source)),
        };
        (self.name, sink)
    }
}

fn kind(settings: &Settings, name: &str, spec: &DestinationSpec) -> Result<Kind, ConfigError> {
    let field = |field: &str| format!("destinations.{name}.{field}");
    let misplaced = |field: &str, kind: &str| {
        Err(ConfigError::Contradiction(format!(
            "destinations.{name}.{field} goes with the type {kind}; remove one of them"
        )))
    };
    Ok(match spec {
        DestinationSpec::RedisStream(s) if s.channel.is_some() => return misplaced("channel", "redis-pubsub"),
        DestinationSpec::RedisStream(s) if s.format.is_some() => return misplaced("format", "redis-pubsub"),
        DestinationSpec::RedisPubsub(s) if s.stream.is_some() => return misplaced("stream", "redis-stream"),
        DestinationSpec::RedisPubsub(s) if s.maxlen.is_some() => return misplaced("maxlen", "redis-stream"),
        DestinationSpec::RedisStream(s) => Kind::Stream {
            address: named_address(name, s)?,
            stream: template(&field("stream"), s.stream.as_ref().unwrap_or(&settings.redis_stream))?,
            max_length: s.maxlen.or(settings.redis_maxlen),
            exactly_once: s.exactly_once.unwrap_or(settings.redis_exactly_once),
        },
        DestinationSpec::RedisPubsub(s) => Kind::PubSub {
            address: named_address(name, s)?,
            channel: template(&field("channel"), s.channel.as_ref().unwrap_or(&settings.redis_channel))?,
            format: s.format.unwrap_or(settings.redis_format),
            exactly_once: s.exactly_once.unwrap_or(settings.redis_exactly_once),
        },
        DestinationSpec::Eventbridge(s) => Kind::EventBridge(EventBridgeConfig {
            endpoint_url: match &s.endpoint_url {
                Some(url) => usable_endpoint(&field("endpoint_url"), url).map(|()| Some(url.clone()))?,
                None => None,
            },
            bus: s.bus.clone(),
            source: s.source.clone().unwrap_or_else(|| settings.default_source.clone()),
            format: s.format.unwrap_or(settings.eventbridge_format),
            region: s.region.clone(),
            timeout: Duration::from_millis(settings.publish_timeout),
            max_entry_bytes: s
                .max_entry_size
                .unwrap_or(usize::try_from(settings.eventbridge_max_entry_size).unwrap_or(usize::MAX)),
            requests_in_flight: s.requests_in_flight.unwrap_or(DEFAULT_REQUESTS_IN_FLIGHT).max(1),
        }),
        DestinationSpec::Stdout(_) => Kind::Stdout,
    })
}

fn named_address(name: &str, spec: &RedisSpec) -> Result<RedisAddress, ConfigError> {
    let setting = format!("destinations.{name}");
    let address = match (&spec.url, &spec.url_file, &spec.host) {
        (Some(url), None, None) => RedisAddress::Url(Secret::inline(url)),
        (None, Some(path), None) => RedisAddress::Url(Secret::File(path.clone())),
        (None, None, Some(host)) => RedisAddress::Parts {
            host: host.clone(),
            port: spec.port.unwrap_or(6379),
            database: spec.db.unwrap_or(0),
            username: spec.username.clone(),
            password: spec.password_file.clone().map(Secret::File),
        },
        _ => {
            let reason = "give exactly one of url, url_file and host".to_owned();
            return Err(ConfigError::Invalid { setting, reason });
        }
    };
    usable(&setting, address)
}

/// The address, unless its URL is none, or the file of its secret cannot be read.
fn usable(setting: &str, address: RedisAddress) -> Result<RedisAddress, ConfigError> {
    match address.validate() {
        Ok(()) => Ok(address),
        Err(error) => Err(ConfigError::Invalid { setting: setting.to_owned(), reason: error.message }),
    }
}

/// Empty: there is none. The value may hold a password, so it is not quoted.
fn usable_endpoint(setting: &str, url: &str) -> Result<(), ConfigError> {
    let reason = match Url::parse(url) {
        _ if url.is_empty() => return Ok(()),
        Ok(url) if !url.username().is_empty() || url.password().is_some() => {
            "an endpoint takes no user and no password"
        }
        Ok(url) if url.has_host() && matches!(url.scheme(), "http" | "https") => return Ok(()),
        _ => "this is no URL of an endpoint; it is written https://host or http://host:port",
    };
    Err(ConfigError::Invalid { setting: setting.to_owned(), reason: reason.to_owned() })
}

fn redis_address(settings: &Settings) -> Result<Option<RedisAddress>, ConfigError> {
    let url = secret("REDIS_URL", settings.redis_url.as_ref(), settings.redis_url_file.as_ref())?;
    let password = secret("REDIS_PASSWORD", settings.redis_password.as_ref(), settings.redis_password_file.as_ref())?;
    match (url, &settings.redis_host) {
        (Some(_), Some(_)) => {
            Err(ConfigError::Contradiction("both REDIS_URL and REDIS_HOST are set; unset one of them".to_owned()))
        }
        (Some(_), None) if password.is_some() || settings.redis_username.is_some() => Err(ConfigError::Contradiction(
            "REDIS_USERNAME and REDIS_PASSWORD go with REDIS_HOST; with REDIS_URL put them into the URL".to_owned(),
        )),
        (Some(url), None) => usable("REDIS_URL", RedisAddress::Url(url)).map(Some),
        (None, Some(host)) => {
            let address = RedisAddress::Parts {
                host: host.clone(),
                port: settings.redis_port,
                database: settings.redis_db,
                username: settings.redis_username.clone(),
                password,
            };
            usable("REDIS_HOST", address).map(Some)
        }
        (None, None) => Ok(None),
    }
}

fn template(setting: &str, text: &str) -> Result<Template, ConfigError> {
    text.parse().map_err(|error: crate::sink::template::TemplateError| ConfigError::Invalid {
        setting: setting.to_owned(),
        reason: error.to_string(),
    })
}

fn route(spec: &RouteSpec, destinations: &[Destination]) -> Result<Route, ConfigError> {
    let index = |name: &String| {
        destinations.iter().position(|destination| destination.name == *name).ok_or_else(|| ConfigError::Invalid {
            setting: "routes".to_owned(),
            reason: format!(
                "there is no destination {name:?}; there are {}",
                destinations.iter().map(|destination| destination.name.as_str()).collect::<Vec<_>>().join(", ")
            ),
        })
    };
    Ok(Route {
        event_type: spec.event_type.as_deref().map(WildMatch::new),
        source: spec.source.clone(),
        headers: spec.headers.clone(),
        destinations: spec.destinations.iter().map(index).collect::<Result<_, _>>()?,
    })
}
