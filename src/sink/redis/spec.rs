//! The fields that give the address of a Redis.

use std::path::PathBuf;

use secrecy::{ExposeSecret, SecretString};
use tracing::level_filters::LevelFilter;
use url::form_urlencoded;

use crate::secret::Secret;
use crate::sink::redis::RedisAddress;
use crate::sink::spec::{Field, Invalid, UrlParts};

/// The log target of the client. At levels below WARN it logs what it sends.
pub(in crate::sink) const LOG_TARGETS: &[(&str, LevelFilter)] = &[("redis", LevelFilter::WARN)];

/// The parameters that belong to a Redis URL itself and are not fields.
const URL_PARAMETERS: [&str; 6] = ["master", "sentinel_username", "sentinel_password", "db", "user", "pass"];

/// The fields of a destination that give the address of its Redis.
pub(in crate::sink) struct Location<'a> {
    pub(in crate::sink) url: Option<&'a SecretString>,
    pub(in crate::sink) url_file: Option<&'a PathBuf>,
    pub(in crate::sink) host: Option<&'a String>,
    pub(in crate::sink) port: Option<u16>,
    pub(in crate::sink) db: Option<i64>,
    pub(in crate::sink) username: Option<&'a String>,
    pub(in crate::sink) password: Option<&'a SecretString>,
    pub(in crate::sink) password_file: Option<&'a PathBuf>,
}

impl Location<'_> {
    /// Returns the address that the fields give, after checking it.
    pub(in crate::sink) fn address(&self) -> Result<RedisAddress, Invalid> {
        let (field, address) = match (self.url, self.url_file, self.host) {
            (Some(url), None, None) => ("url", RedisAddress::Url(Secret::inline(url.expose_secret()))),
            (None, Some(path), None) => ("url", RedisAddress::Url(Secret::File(path.clone()))),
            (None, None, Some(host)) => {
                let password = match (self.password, self.password_file) {
                    (Some(_), Some(_)) => {
                        let reason = "give at most one of password and password_file".to_owned();
                        return Err(Invalid { field: "", reason });
                    }
                    (Some(password), None) => Some(Secret::Inline(password.clone())),
                    (None, file) => file.cloned().map(Secret::File),
                };
                let parts = RedisAddress::Parts {
                    host: host.clone(),
                    port: self.port.unwrap_or(6379),
                    database: self.db.unwrap_or(0),
                    username: self.username.cloned(),
                    password,
                };
                ("host", parts)
            }
            _ => return Err(Invalid { field: "", reason: "give exactly one of url, url_file and host".to_owned() }),
        };
        match address.validate() {
            Ok(()) => Ok(address),
            Err(error) => Err(Invalid { field, reason: error.message }),
        }
    }
}

/// Returns the field `url` for a URL whose scheme ends in `+stream` or `+pubsub`.
pub(in crate::sink) fn url_field(url: &mut UrlParts<'_>) -> Result<Vec<Field>, String> {
    let scheme = url.scheme.rsplit_once('+').map_or(url.scheme, |(scheme, _)| scheme);
    let (own, fields) = std::mem::take(&mut url.query)
        .into_iter()
        .partition::<Vec<_>, _>(|(name, _)| URL_PARAMETERS.contains(&name.as_str()));
    url.query = fields;
    let mut text = format!("{scheme}://{}", url.address);
    if !own.is_empty() {
        text.push('?');
        text.push_str(&form_urlencoded::Serializer::new(String::new()).extend_pairs(own).finish());
    }
    Ok(vec![("url".to_owned(), text)])
}
