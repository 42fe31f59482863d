//! The TOML file: settings by the names of their options, named destinations, and routes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::config::policy::{FIELDS, PolicyFields};
use crate::config::{ConfigError, Unknown};
use crate::redact::may_hold_password;
use crate::sink::spec::{self, Kind};

/// The content of the configuration file. Empty if there is no file.
#[derive(Debug, Default)]
pub struct ConfigFile {
    /// The path of the file.
    pub path: PathBuf,
    /// The settings, by the ids of their arguments.
    pub settings: BTreeMap<String, String>,
    /// The ids of all settings in the file.
    pub names: BTreeSet<String>,
    /// The line of each setting.
    pub lines: BTreeMap<String, usize>,
    /// Variables of the environment that may be misspelt variables of relay.
    pub misspelt: Vec<Unknown>,
    /// Named destinations.
    pub destinations: BTreeMap<String, FileDestination>,
    /// Routes, in order.
    pub routes: Vec<RouteSpec>,
}

/// `[destinations.<name>]`: its kind, the fields of that kind, and the fields that every kind has.
#[derive(Debug, Clone)]
pub struct FileDestination {
    pub(super) kind: Kind,
    pub(super) fields: toml::Table,
    pub(super) policy: PolicyFields,
}

impl FileDestination {
    fn of(mut fields: toml::Table) -> Result<Self, String> {
        // As in `Kind::table`: the last line names the field.
        let said = |error: toml::de::Error| error.to_string();
        let name = match fields.remove("type") {
            Some(toml::Value::String(name)) => name,
            Some(_) => return Err("`type` is a text".to_owned()),
            None => return Err(format!("missing field `type`; there are {}", spec::types())),
        };
        if fields.contains_key("password") {
            return Err(
                "unknown field `password`: the password stands in a file of its own, by password_file".to_owned()
            );
        }
        let kind = spec::of_type(&name).map_err(|reason| format!("type = `{name}`: {reason}"))?;
        let (policy, fields): (toml::Table, toml::Table) =
            fields.into_iter().partition(|(field, _)| FIELDS.contains(&field.as_str()));
        // The fields are checked here without those that settings add later, because the latter are always valid.
        kind.table(fields.clone()).map(drop)?;
        Ok(Self { kind, fields, policy: PolicyFields::deserialize(policy).map_err(said)? })
    }
}

/// `[[routes]]`: a filter, and the destinations of the events that pass it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteSpec {
    /// A glob over the event type.
    pub event_type: Option<String>,
    /// The exact source of the event.
    pub source: Option<String>,
    /// Headers that the event must have, with these values.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// The names of the destinations. If empty, the events are dropped on purpose.
    pub destinations: Vec<String>,
}

impl ConfigFile {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, or contains an unknown name or an unusable value.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let fail = |reason: String| ConfigError::File { path: path.to_owned(), reason };
        // The error's own text quotes the line, which may contain a password.
        let table: toml::Table = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            let place = if line > 0 { format!("line {line}: ") } else { String::new() };
            fail(format!("{place}{}", without_value(error.message())))
        })?;
        let mut file = Self { path: path.to_owned(), ..Self::default() };
        for (name, value) in table {
            let line = line_of(text, None, 0, &name);
            let at = |line: Option<usize>| line.map(|line| format!("line {line}: ")).unwrap_or_default();
            let value = match (name.as_str(), value) {
                ("destinations", toml::Value::Table(destinations)) => {
                    for (name, value) in destinations {
                        let header = format!("destinations.{name}");
                        let destination = match value {
                            toml::Value::Table(fields) => FileDestination::of(fields),
                            _ => Err("a destination is a table".to_owned()),
                        };
                        let destination = destination.map_err(|reason| fail(misfit(text, &header, 0, &reason)))?;
                        file.destinations.insert(name, destination);
                    }
                    continue;
                }
                ("routes", toml::Value::Array(routes)) => {
                    for (index, value) in routes.into_iter().enumerate() {
                        let spec = RouteSpec::deserialize(value);
                        let spec = spec.map_err(|error| fail(misfit(text, "routes", index, &error.to_string())))?;
                        file.routes.push(spec);
                    }
                    continue;
                }
                ("destinations" | "routes", _) => {
                    let shape = "it is written [destinations.NAME] or [[routes]]";
                    return Err(fail(format!("{}{name}: {shape}", at(line))));
                }
                (_, toml::Value::String(text)) => text,
                (_, toml::Value::Integer(number)) => number.to_string(),
                (_, toml::Value::Boolean(flag)) => flag.to_string(),
                (_, value) if value.is_table() || value.get(0).is_some_and(toml::Value::is_table) => {
                    let reason = format!("unknown table [{name}]; there are [destinations.NAME] and [[routes]]");
                    let is_header = |line: &str| line.trim_start_matches(['[', ' ']).starts_with(&name);
                    let line = text.lines().position(|line| line.trim().starts_with('[') && is_header(line.trim()));
                    return Err(fail(format!("{}{reason}", at(line.map(|line| line + 1)))));
                }
                _ => {
                    let reason = format!("setting {name:?} must be a string, an integer or a boolean");
                    return Err(fail(format!("{}{reason}", at(line))));
                }
            };
            file.names.insert(name.clone());
            file.lines.extend(line.map(|line| (name.clone(), line)));
            file.settings.insert(name, value);
        }
        Ok(file)
    }
}

/// Returns the error text for a table that does not fit, with its line. The table is below the `index`-th header of this
/// name.
fn misfit(text: &str, header: &str, index: usize, message: &str) -> String {
    // The last line of a message names the field.
    let (message, inside) = message.trim_end().split_once("\nin `").unwrap_or((message, ""));
    let inside = inside.trim_end_matches('`');
    let field = if inside.is_empty() { message.split('`').nth(1).unwrap_or_default() } else { inside };
    let line = line_of(text, Some(header), index, field).or_else(|| line_of(text, Some(header), index, ""));
    let place = line.map(|line| format!("line {line}: ")).unwrap_or_default();
    let dot = if inside.is_empty() { "" } else { "." };
    format!("{place}{header}{dot}{inside}: {}", without_value(message))
}

/// Returns the line, from 1, where `key` is set: before all tables, or below the `index`-th header of this name. For an empty
/// key, returns the line of the header.
fn line_of(text: &str, header: Option<&str>, index: usize, key: &str) -> Option<usize> {
    let (mut seen, mut inside) = (0, header.is_none());
    for (line, number) in text.lines().map(str::trim).zip(1..) {
        if line.starts_with('[') {
            let name: String = line.trim_matches(['[', ']', ' ']).chars().filter(|c| !"\"' ".contains(*c)).collect();
            inside = header == Some(name.as_str()) && seen == index;
            seen += usize::from(header == Some(name.as_str()));
            if inside && key.is_empty() {
                return Some(number);
            }
        } else if inside
            && !key.is_empty()
            && let Some((name, _)) = line.split_once('=')
            && name.trim().trim_matches(['"', '\'']) == key
        {
            return Some(number);
        }
    }
    None
}

/// Returns the parser's message without the value that it quotes, which may be a password.
fn without_value(message: &str) -> String {
    let message = message.trim_end();
    if let Some((kind, rest)) = message.split_once("string \"")
        && let Some((_, expected)) = rest.rsplit_once('"')
    {
        return format!("{kind}string{expected}");
    }
    match (message.find('`'), message.rfind('`')) {
        (Some(begin), Some(end)) if may_hold_password(&message[begin..end]) => {
            "a value cannot be used; it is not shown, because it may hold a password".to_owned()
        }
        _ => message.replace('\n', "; "),
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
        let [orders, bus] = ["orders", "bus"].map(|name| &file.destinations[name]);
        assert_eq!((orders.kind.name, orders.fields["stream"].as_str()), ("redis-stream", Some("orders:{event_type}")));
        assert_eq!((bus.kind.name, bus.fields["format"].as_str()), ("eventbridge", Some("payload")));
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
    fn what_does_not_fit_is_told_with_its_own_line() {
        let text = "lanes = 1\n\n[destinations.\"a\"]\ntype = \"stdout\"\n[destinations.b]\ntype = \"redis-stream\"\nurl = \"x\"\n";
        for (more, place) in [
            ("straem = \"x\"", "line 8: destinations.b: "),
            ("port = \"redis://:secret@host\"", "line 8: destinations.b.port: "),
            ("[destinations.c]\ntype = \"kafka\"", "line 8: destinations.c: "),
            ("[destinations.c]\ntype = \"redis://:secret@host\"", "line 8: destinations.c: "),
            ("[[routes]]\ndestinations = []\n[[routes]]\ndestination = []", "line 11: routes: "),
            ("[destinations.b]\n", "line 8: "),
        ] {
            let error = parse(&format!("{text}{more}")).expect_err(more);
            assert!(error.starts_with(&format!("relay.toml: {place}")), "{error}");
            assert!(!error.contains("secret") && !error.contains('\n'), "{error}");
        }
        assert_eq!(line_of("a = 1\nb = 2\n[x]\nc = 3", None, 0, "b"), Some(2));
        assert_eq!(line_of("a = 1\n[x]\nb = 3", None, 0, "b"), None);
    }

    #[test]
    fn an_error_does_not_quote_the_line_it_is_on() {
        let error = parse("x = 1\nredis_url = \"redis://:secret@host\" trailing").expect_err("not TOML");
        assert!(error.starts_with("relay.toml: line 2: ") && !error.contains("secret"), "{error}");
    }
}
