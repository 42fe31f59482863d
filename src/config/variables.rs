//! Destinations that are set up by variables: fixed variables, such as `REDIS_URL`, as the fields that they stand for, and
//! `RELAY_DESTINATION_<NAME>`, a URL.

use std::path::PathBuf;

use secrecy::ExposeSecret;
use toml::{Table, Value};

use crate::config::settings::{RedisMode, Settings};
use crate::config::{ConfigError, is_service_link, secret};
use crate::secret::Secret;

/// The prefix of variables that set up a destination by a URL.
pub(super) const URL_PREFIX: &str = "RELAY_DESTINATION_";

/// A destination that is set up by fixed variables.
pub(super) struct Fixed {
    pub(super) name: &'static str,
    pub(super) kind: &'static str,
    pub(super) fields: Table,
}

/// Returns the destinations of `REDIS_URL`, `REDIS_HOST`, `AWS_EVENTBRIDGE_BUS_NAME` and `RELAY_STDOUT`.
///
/// # Errors
/// Two variables contradict each other.
pub(super) fn fixed(settings: &Settings) -> Result<Vec<Fixed>, ConfigError> {
    let mut fixed = Vec::new();
    if let Some(fields) = redis(settings)? {
        let kind = match settings.redis_mode {
            RedisMode::Stream => "redis-stream",
            RedisMode::Pubsub => "redis-pubsub",
        };
        fixed.push(Fixed { name: "redis", kind, fields });
    }
    if let Some(bus) = &settings.eventbridge_bus_name {
        let mut fields = Table::from_iter([("bus".to_owned(), bus.clone().into())]);
        if let Some(source) = &settings.eventbridge_source {
            fields.insert("source".to_owned(), source.clone().into());
        }
        fixed.push(Fixed { name: "eventbridge", kind: "eventbridge", fields });
    }
    if settings.stdout {
        fixed.push(Fixed { name: "stdout", kind: "stdout", fields: Table::new() });
    }
    Ok(fixed)
}

fn redis(settings: &Settings) -> Result<Option<Table>, ConfigError> {
    let url = secret("REDIS_URL", settings.redis_url.as_ref(), settings.redis_url_file.as_ref())?;
    let password = secret("REDIS_PASSWORD", settings.redis_password.as_ref(), settings.redis_password_file.as_ref())?;
    let mut fields = Table::new();
    match (url, &settings.redis_host) {
        (Some(_), Some(_)) => {
            return Err(ConfigError::Contradiction(
                "both REDIS_URL and REDIS_HOST are set; unset one of them".to_owned(),
            ));
        }
        (Some(_), None) if password.is_some() || settings.redis_username.is_some() => {
            return Err(ConfigError::Contradiction(
                "REDIS_USERNAME and REDIS_PASSWORD go with REDIS_HOST; with REDIS_URL put them into the URL".to_owned(),
            ));
        }
        (Some(url), None) => insert_secret(&mut fields, "url", url),
        (None, Some(host)) => {
            fields.insert("host".to_owned(), host.clone().into());
            fields.insert("port".to_owned(), i64::from(settings.redis_port).into());
            fields.insert("db".to_owned(), settings.redis_db.into());
            if let Some(username) = &settings.redis_username {
                fields.insert("username".to_owned(), username.clone().into());
            }
            if let Some(password) = password {
                insert_secret(&mut fields, "password", password);
            }
        }
        (None, None) => return Ok(None),
    }
    Ok(Some(fields))
}

fn insert_secret(fields: &mut Table, name: &str, secret: Secret) {
    let (name, value) = match secret {
        Secret::Inline(secret) => (name.to_owned(), secret.expose_secret().to_owned()),
        Secret::File(path) => (format!("{name}_file"), path.display().to_string()),
    };
    fields.insert(name, value.into());
}

/// Returns the values of settings for fields that a destination of this kind does not set itself.
pub(super) fn defaults(kind: &str, settings: &Settings) -> Vec<(&'static str, Value)> {
    let number = |number: u64| Value::Integer(i64::try_from(number).unwrap_or(i64::MAX));
    match kind {
        "redis-stream" => {
            let mut defaults = vec![
                ("stream", settings.redis_stream.clone().into()),
                ("exactly_once", settings.redis_exactly_once.into()),
            ];
            defaults.extend(settings.redis_maxlen.map(|length| ("maxlen", number(length))));
            defaults
        }
        "redis-pubsub" => vec![
            ("channel", settings.redis_channel.clone().into()),
            ("format", settings.redis_format.to_string().into()),
            ("exactly_once", settings.redis_exactly_once.into()),
        ],
        "eventbridge" => vec![
            ("format", settings.eventbridge_format.to_string().into()),
            ("max_entry_size", number(settings.eventbridge_max_entry_size)),
        ],
        _ => Vec::new(),
    }
}

/// Returns the variable for a field of such a destination.
pub(super) fn variable(name: &str, field: &str) -> String {
    let variable = match (name, field) {
        ("redis", "host") => "REDIS_HOST",
        ("redis", "stream") => "RELAY_REDIS_STREAM",
        ("redis", "channel") => "RELAY_REDIS_CHANNEL",
        ("redis", _) => "REDIS_URL",
        ("eventbridge", _) => "AWS_EVENTBRIDGE_BUS_NAME",
        _ => "RELAY_STDOUT",
    };
    variable.to_owned()
}

/// A URL that is given in a variable.
pub(super) struct ByUrl {
    /// The variable.
    pub(super) variable: String,
    /// The name of the destination: the rest of the variable's name, in lower case.
    pub(super) name: String,
    /// The URL.
    pub(super) url: Secret,
}

/// Returns the destinations that are set up by URLs in the environment, by name.
///
/// # Errors
/// A URL is given both directly and by a file.
pub(super) fn by_url() -> Result<Vec<ByUrl>, ConfigError> {
    let mut found: Vec<ByUrl> = Vec::new();
    for (variable, value) in url_variables() {
        let name = &variable[URL_PREFIX.len()..];
        let (name, url) = match name.strip_suffix("_FILE") {
            Some(name) if !name.is_empty() => (name, Secret::File(PathBuf::from(value))),
            _ => (name, Secret::inline(value)),
        };
        let name = name.to_lowercase();
        if let Some(other) = found.iter().find(|other| other.name == name) {
            let both = format!("both {} and {variable} are set; unset one of them", other.variable);
            return Err(ConfigError::Contradiction(both));
        }
        found.push(ByUrl { variable, name, url });
    }
    Ok(found)
}

/// Returns the variables that set up destinations by a URL, with their values, by name.
pub(super) fn url_variables() -> Vec<(String, String)> {
    let mut variables: Vec<(String, String)> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, value)| is_url_variable(name) && !value.is_empty())
        .collect();
    variables.sort();
    variables
}

/// Returns whether a variable sets up a destination by a URL.
pub(super) fn is_url_variable(name: &str) -> bool {
    name.len() > URL_PREFIX.len() && name.starts_with(URL_PREFIX) && !is_service_link(name)
}
