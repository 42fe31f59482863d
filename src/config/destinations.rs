//! Makes destinations and routes from the settings, the variables and the file.

use std::time::Duration;

use toml::{Table, Value};
use wildmatch::WildMatch;

use crate::config::ConfigError;
use crate::config::file::{ConfigFile, RouteSpec};
use crate::config::policy::{FIELDS, PolicyFields};
use crate::config::settings::Settings;
use crate::config::variables::{self, Fixed};
use crate::relay;
use crate::route::{Route, Router};
#[cfg(feature = "redis")]
use crate::sink::redis::RedisAddress;
use crate::sink::spec::{self, Invalid, Kind, Opening, Spec};

/// A destination that is configured and not opened yet.
pub struct ConfiguredDestination {
    /// The name, as it appears in `destination` columns.
    pub name: String,
    /// The variable or the table of the file that it is configured by, for errors.
    place: String,
    spec: Box<dyn Spec>,
    policy: relay::Policy,
}

/// Returns all destinations: first those of fixed variables, then those of URLs, then those of the file by name; and the
/// router.
///
/// # Errors
/// No destination at all, two with one name, a route to a destination that does not exist, or a value that cannot be used.
pub fn destinations(
    settings: &Settings,
    file: &ConfigFile,
) -> Result<(Vec<ConfiguredDestination>, Router), ConfigError> {
    let mut destinations: Vec<ConfiguredDestination> = Vec::new();
    for Fixed { name, kind, mut fields } in variables::fixed(settings)? {
        let setting = |field: &str| variables::variable(name, field);
        let kind = spec::of_type(kind).map_err(|reason| ConfigError::Invalid { setting: setting(""), reason })?;
        fill(&mut fields, kind, settings);
        destinations.push(configured(name, kind.table(fields), &PolicyFields::default(), settings, setting)?);
    }
    for by_url in variables::by_url()? {
        add(&mut destinations, of_url(&by_url, settings)?)?;
    }
    for (name, configured_in_file) in &file.destinations {
        let setting = |field: &str| {
            if field.is_empty() { format!("destinations.{name}") } else { format!("destinations.{name}.{field}") }
        };
        let mut fields = configured_in_file.fields.clone();
        fill(&mut fields, configured_in_file.kind, settings);
        let spec = configured_in_file.kind.table(fields);
        let destination = configured(name, spec, &configured_in_file.policy, settings, setting)?;
        add(
            &mut destinations,
            ConfiguredDestination { place: format!("{} ({})", destination.place, file.path.display()), ..destination },
        )?;
    }
    if destinations.is_empty() {
        return Err(ConfigError::Contradiction(
            "no destination is configured: set REDIS_URL, AWS_EVENTBRIDGE_BUS_NAME, RELAY_STDOUT=true or a \
             RELAY_DESTINATION_<NAME>, or name some in a file"
                .to_owned(),
        ));
    }
    let routes = file.routes.iter().map(|spec| route(spec, &destinations)).collect::<Result<_, _>>()?;
    let count = destinations.len();
    Ok((destinations, Router::new(routes, count)))
}

fn add(destinations: &mut Vec<ConfiguredDestination>, destination: ConfiguredDestination) -> Result<(), ConfigError> {
    let (name, place) = (&destination.name, &destination.place);
    if name.is_empty() {
        return Err(ConfigError::Contradiction(format!("the destination of {place} has no name; give it one")));
    }
    if let Some(other) = destinations.iter().find(|other| other.name == *name) {
        let other = &other.place;
        return Err(ConfigError::Contradiction(format!(
            "there are two destinations {name:?}, of {other} and of {place}; rename one of them"
        )));
    }
    let used = destination.spec.exclusive();
    if let Some(used) = used
        && let Some(other) = destinations.iter().find(|other| other.spec.exclusive().as_deref() == Some(&used))
    {
        let other = &other.place;
        return Err(ConfigError::Contradiction(format!(
            "two destinations use {used}, of {other} and of {place}, and only one can; give one of them another"
        )));
    }
    destinations.push(destination);
    Ok(())
}

/// Adds the values of settings for fields that are not set.
fn fill(fields: &mut Table, kind: Kind, settings: &Settings) {
    for (field, value) in variables::defaults(kind.name, settings) {
        fields.entry(field).or_insert(value);
    }
}

fn of_url(
    variables::ByUrl { variable, name, url }: &variables::ByUrl,
    settings: &Settings,
) -> Result<ConfiguredDestination, ConfigError> {
    let refused = |reason: String| ConfigError::Invalid { setting: variable.clone(), reason };
    let url = url.read().map_err(|error| refused(error.to_string()))?;
    let (kind, parts) = spec::of_url(&url).map_err(refused)?;
    let (own, mut fields): (Vec<_>, Vec<_>) =
        kind.fields(parts).map_err(refused)?.into_iter().partition(|(field, _)| FIELDS.contains(&field.as_str()));
    for (field, value) in variables::defaults(kind.name, settings) {
        if !fields.iter().any(|(other, _)| other == field) {
            fields.push((field.to_owned(), text(value)));
        }
    }
    let policy = spec::fields_of(&own).map_err(refused)?;
    let setting = |field: &str| {
        if field.is_empty() { variable.clone() } else { format!("{variable}: {field}") }
    };
    configured(name, kind.query(&fields), &policy, settings, setting)
}

fn text(value: Value) -> String {
    match value {
        Value::String(text) => text,
        Value::Integer(number) => number.to_string(),
        Value::Boolean(flag) => flag.to_string(),
        _ => String::new(),
    }
}

fn configured(
    name: &str,
    spec: Result<Box<dyn Spec>, String>,
    policy: &PolicyFields,
    settings: &Settings,
    setting: impl Fn(&str) -> String,
) -> Result<ConfiguredDestination, ConfigError> {
    let invalid = |Invalid { field, reason }| {
        let is_variable = field.starts_with(char::is_uppercase);
        let setting = if is_variable { field.to_owned() } else { setting(field) };
        ConfigError::Invalid { setting, reason }
    };
    let spec = spec.map_err(|reason| invalid(Invalid { field: "", reason }))?;
    spec.validate().map_err(invalid)?;
    Ok(ConfiguredDestination {
        name: name.to_owned(),
        place: setting(""),
        spec,
        policy: policy.policy(settings).map_err(invalid)?,
    })
}

impl ConfiguredDestination {
    /// Returns the address and the name of the stream that all events go to, if this is a stream with a fixed name.
    #[cfg(feature = "redis")]
    pub fn fixed_stream(&self) -> Option<(RedisAddress, String)> {
        self.spec.fixed_stream()
    }

    /// Returns the reason why a relay must not start, if there is one.
    pub fn obstacle(&self) -> Option<&'static str> {
        self.spec.obstacle()
    }

    /// How long one publish call to the destination may take.
    pub fn timeout(&self) -> Duration {
        self.policy.timeout
    }

    /// Opens the destination. Nothing is connected before the first event.
    ///
    /// # Errors
    /// The file of a secret has disappeared since the configuration was read.
    pub async fn open(self, settings: &Settings) -> Result<relay::Endpoint, ConfigError> {
        let opening = Opening { source: settings.default_source.clone(), timeout: self.policy.timeout };
        let sink = self.spec.open(&opening).await.map_err(|Invalid { field, reason }| ConfigError::Invalid {
            setting: format!("destination {} {field}", self.name),
            reason,
        })?;
        Ok(relay::Endpoint { name: self.name, sink, policy: self.policy })
    }
}

/// Returns the longest time that a publish call may take. The longest time of a claim follows from it.
pub fn longest_timeout(destinations: &[ConfiguredDestination]) -> Duration {
    destinations.iter().map(ConfiguredDestination::timeout).max().unwrap_or_default()
}

fn route(spec: &RouteSpec, destinations: &[ConfiguredDestination]) -> Result<Route, ConfigError> {
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
