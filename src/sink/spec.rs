//! The list of the kinds of destinations. Each is configured by a table of the TOML file or by a URL.
//!
//! To add a kind, add a folder beside this file and one line in [`KINDS`].

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::de::DeserializeOwned;
use tracing::level_filters::LevelFilter;
use url::form_urlencoded;

#[cfg(feature = "eventbridge")]
use crate::sink::eventbridge;
#[cfg(feature = "redis")]
use crate::sink::redis::RedisAddress;
use crate::sink::{Sink, file, stdout};
#[cfg(feature = "redis")]
use crate::sink::{redis_pubsub, redis_stream};

/// All kinds that this library is built with.
pub const KINDS: &[Kind] = &[
    #[cfg(feature = "redis")]
    Kind::of::<redis_stream::Spec>(),
    #[cfg(feature = "redis")]
    Kind::of::<redis_pubsub::Spec>(),
    #[cfg(feature = "eventbridge")]
    Kind::of::<eventbridge::Spec>(),
    Kind::of::<stdout::Spec>(),
    Kind::of::<file::Spec>(),
];

/// The features that bring kinds, and whether this library has them. The types and schemes of a feature's kinds begin with the
/// name of the feature.
const FEATURES: [(&str, bool); 2] =
    [("redis", cfg!(feature = "redis")), ("eventbridge", cfg!(feature = "eventbridge"))];

/// The configuration of one destination: its fields as they stand in a file. Implementations refuse unknown fields by
/// `#[serde(deny_unknown_fields)]`.
#[async_trait]
pub trait Spec: Send + Sync {
    /// Checks the fields without connecting.
    ///
    /// # Errors
    /// A field cannot be used. The error names it and says why.
    fn validate(&self) -> Result<(), Invalid>;

    /// Returns a reason why a relay must not start with this destination, as far as this is known without connecting.
    fn obstacle(&self) -> Option<&'static str> {
        None
    }

    /// Returns what only one destination can use, such as the path of a file that it writes.
    fn exclusive(&self) -> Option<String> {
        None
    }

    /// Returns the stream to which all events go, if its name has no placeholder.
    #[cfg(feature = "redis")]
    fn fixed_stream(&self) -> Option<(RedisAddress, String)> {
        None
    }

    /// Opens the destination. It connects at the first event.
    ///
    /// # Errors
    /// The same as those of [`validate`](Self::validate).
    async fn open(&self, with: &Opening) -> Result<Arc<dyn Sink>, Invalid>;
}

/// The settings that every destination is opened with.
#[derive(Debug, Clone)]
pub struct Opening {
    /// Replaces the source of an event whose source is empty.
    pub source: String,
    /// The longest wait for one answer.
    pub timeout: Duration,
}

/// The configuration of a destination, or the reason why it cannot be read.
pub type Parsed = Result<Box<dyn Spec>, String>;

/// A field of a URL: its name and its value.
pub type Field = (String, String);

/// A field that cannot be used.
#[derive(Debug)]
pub struct Invalid {
    /// The name of the field, or of a variable that a library reads. Empty: the reason is about several fields.
    pub field: &'static str,
    /// Why the field cannot be used, and what can be. It holds no secret.
    pub reason: String,
}

/// The parts of a URL, for [`Configured::address`].
pub struct UrlParts<'a> {
    /// The scheme, which is one of [`Configured::SCHEMES`].
    pub scheme: &'a str,
    /// The text between `://` and `?`.
    pub address: &'a str,
    /// The parameters. Those that belong to the address are taken out; the others must be fields.
    pub query: Vec<Field>,
}

/// The part of a [`Kind`] that each kind defines.
pub trait Configured: Spec + DeserializeOwned + 'static {
    /// Its `type` in a file.
    const TYPE: &'static str;
    /// The schemes of its URLs.
    const SCHEMES: &'static [&'static str];
    /// Log targets of the libraries that the kind uses, each with the lowest level whose lines never hold payloads or secrets.
    const LOG_TARGETS: &'static [(&'static str, LevelFilter)];

    /// Returns the fields that the address gives.
    ///
    /// # Errors
    /// The address cannot be used. The message does not quote it, because it may hold a password.
    fn address(url: &mut UrlParts<'_>) -> Result<Vec<Field>, String>;
}

/// A kind of destination.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Its `type` in a file.
    pub name: &'static str,
    /// The schemes of its URLs.
    pub schemes: &'static [&'static str],
    /// See [`Configured::LOG_TARGETS`].
    pub log_targets: &'static [(&'static str, LevelFilter)],
    address: fn(&mut UrlParts<'_>) -> Result<Vec<Field>, String>,
    of_table: fn(toml::Table) -> Parsed,
    of_query: fn(&[Field]) -> Parsed,
}

impl Kind {
    /// Returns the kind that `T` configures.
    const fn of<T: Configured>() -> Self {
        Self {
            name: T::TYPE,
            schemes: T::SCHEMES,
            log_targets: T::LOG_TARGETS,
            address: T::address,
            of_table: |table| match T::deserialize(table) {
                Ok(spec) => Ok(Box::new(spec)),
                // A table that is read already has no lines to quote. The last line of the text is "in `field`".
                Err(error) => Err(error.to_string()),
            },
            of_query: |fields| fields_of::<T>(fields).map(|spec| Box::new(spec) as Box<dyn Spec>),
        }
    }

    /// Reads a table of the file, without its `type`.
    ///
    /// # Errors
    /// An unknown field, a missing one, or one of another type. The message may quote a value.
    pub fn table(&self, table: toml::Table) -> Parsed {
        (self.of_table)(table)
    }

    /// Returns the fields that a URL of this kind gives.
    ///
    /// # Errors
    /// The URL cannot be used. The message holds no secret.
    pub fn fields(&self, mut url: UrlParts<'_>) -> Result<Vec<Field>, String> {
        let mut fields = (self.address)(&mut url)?;
        for (name, value) in url.query {
            if fields.iter().any(|(other, _)| *other == name) {
                return Err(format!("the parameter {name:?} says again what the address or another parameter says"));
            }
            fields.push((name, value));
        }
        Ok(fields)
    }

    /// Reads the fields of a URL.
    ///
    /// # Errors
    /// The same as those of [`table`](Self::table).
    pub fn query(&self, fields: &[Field]) -> Parsed {
        (self.of_query)(fields)
    }
}

/// Returns a struct with these fields, whose values are given as text.
///
/// # Errors
/// An unknown field, a missing one, or one of another type.
pub fn fields_of<T: DeserializeOwned>(fields: &[Field]) -> Result<T, String> {
    let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish();
    serde_urlencoded::from_str(&query).map_err(|error| error.to_string())
}

/// Returns a message if the type or scheme belongs to a feature that this library was built without.
fn left_out(name: &str) -> Option<String> {
    let (feature, _) = FEATURES.into_iter().find(|(feature, built)| !built && name.starts_with(feature))?;
    Some(format!("this relay was built without the feature `{feature}`; use one that was built with it"))
}

/// Returns the kind with this `type`.
///
/// # Errors
/// There is no such kind. The message names the existing ones.
pub fn of_type(name: &str) -> Result<Kind, String> {
    KINDS
        .iter()
        .copied()
        .find(|kind| kind.name == name)
        .ok_or_else(|| left_out(name).unwrap_or_else(|| format!("there is no such type; there are {}", types())))
}

/// The names of all kinds, for people.
pub fn types() -> String {
    KINDS.iter().map(|kind| kind.name).collect::<Vec<_>>().join(", ")
}

/// Returns the kind of a URL, and the URL's parts.
///
/// # Errors
/// The text is no URL, or its scheme is unknown. The message names the known schemes.
pub fn of_url(url: &str) -> Result<(Kind, UrlParts<'_>), String> {
    let (scheme, rest) = url.trim().split_once("://").unwrap_or_default();
    let kind = KINDS.iter().copied().find(|kind| kind.schemes.contains(&scheme)).ok_or_else(|| {
        let schemes: Vec<&str> = KINDS.iter().flat_map(|kind| kind.schemes).copied().collect();
        left_out(scheme).unwrap_or_else(|| {
            format!("the URL begins with no known scheme and ://, as in file:///path; there are {}", schemes.join(", "))
        })
    })?;
    let (address, query) = rest.split_once('?').unwrap_or((rest, ""));
    // The text before the `@` may be the end of a password.
    if query.contains('@') {
        return Err("there is an @ behind the ?; a ? in a password is written %3F, an @ in a parameter %40".to_owned());
    }
    let query = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    Ok((kind, UrlParts { scheme, address, query }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schemes_of_a_kind_tell_its_feature_as_its_type_does() {
        for kind in KINDS {
            let feature = |name: &str| FEATURES.iter().position(|(feature, _)| name.starts_with(feature));
            assert!(kind.schemes.iter().all(|scheme| feature(scheme) == feature(kind.name)), "{}", kind.name);
        }
    }

    #[cfg(not(any(feature = "redis", feature = "eventbridge")))]
    #[test]
    fn a_destination_that_the_relay_was_built_without_is_refused_with_the_feature_to_build_with() {
        for (kind, url, feature) in [
            ("redis-stream", "redis+stream://host?stream=a", "`redis`"),
            ("redis-pubsub", "rediss-cluster+pubsub://host?channel=a", "`redis`"),
            ("eventbridge", "eventbridge://bus", "`eventbridge`"),
        ] {
            assert!(of_type(kind).is_err_and(|reason| reason.contains(feature)), "{kind}");
            assert!(of_url(url).is_err_and(|reason| reason.contains(feature)), "{url}");
        }
        assert!(of_type("kafka").is_err_and(|reason| reason.contains("there are stdout, ")));
    }
}
