//! The configuration. Every setting stands once, as an argument of [`clap`], which gives its flag, its variable, its default,
//! its range and its help. A TOML file can replace the defaults, and adds what variables cannot express: named destinations
//! and routes.
//!
//! - [`settings`]: the settings themselves.
//! - [`file`](mod@file): the TOML file.
//! - [`destinations`]: makes sinks and routes from both.

pub mod destinations;
pub mod file;
mod policy;
pub mod settings;
mod variables;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{ArgMatches, Command};

use crate::redact::{self, hide};
use crate::secret::Secret;
use crate::text;
use file::ConfigFile;
use settings::Settings;

/// An error in the configuration. The process exits with 2.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {}", redact::setting(&path.display().to_string()))]
    Read {
        /// The path of the file.
        path: PathBuf,
        /// The operating system's error.
        #[source]
        source: std::io::Error,
    },
    /// The file is not valid.
    #[error("{path}: {reason}")]
    File {
        /// The path of the file.
        path: PathBuf,
        /// The line, and what is wrong there.
        reason: String,
    },
    /// Variables that belong to relay by their prefix, and are not known.
    #[error("{}", .0.iter().map(|name| format!("unknown variable {name}")).collect::<Vec<_>>().join("; "))]
    UnknownVariables(
        /// The names, each with the most similar known names.
        Vec<Unknown>,
    ),
    /// Settings that exclude each other, or lack another setting.
    #[error("{0}")]
    Contradiction(String),
    /// A value that cannot be used.
    #[error("{setting}: {reason}")]
    Invalid {
        /// The setting, as the user wrote it.
        setting: String,
        /// Why the value cannot be used, and which values can.
        reason: String,
    },
}

/// The prefix of variables that belong to relay only.
const OUR_PREFIX: &str = "RELAY_";

/// The prefixes of variables that may be misspelt variables of relay, or another program's.
const SHARED_PREFIXES: [&str; 4] = ["EVENT_", "REDIS_", "AWS_EVENTBRIDGE_", "DATABASE_"];

/// A variable or setting that relay does not know, and the most similar ones that it knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unknown {
    name: String,
    nearest: Vec<String>,
}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text::shown(&self.name, 100))?;
        if self.nearest.is_empty() { Ok(()) } else { write!(f, "; did you mean {}?", self.nearest.join(" or ")) }
    }
}

/// Prepares `command` for parsing: settings of the file become defaults, empty variables count as not set, and every
/// setting may stand before or after the subcommand.
///
/// # Errors
/// The file cannot be used, or the environment holds an unknown variable with relay's prefix.
pub fn prepare(command: Command, args: &[OsString]) -> Result<(Command, ConfigFile), ConfigError> {
    let mut file = match file_path(args) {
        Some(path) => ConfigFile::read(&path)?,
        None => ConfigFile::default(),
    };
    let mut defaults = std::mem::take(&mut file.settings);
    let mut variables = Vec::new();
    let command = command.mut_args(|arg| {
        let Some(variable) = arg.get_env().and_then(|name| name.to_str()).map(str::to_owned) else { return arg };
        variables.push(variable.clone());
        let mut arg = arg.global(true);
        if let Some(value) = defaults.remove(arg.get_id().as_str()) {
            arg = arg.default_value(value);
        }
        let empty = std::env::var_os(&variable).is_some_and(|value| value.is_empty());
        if empty { arg.env(None::<&str>) } else { arg }
    });
    if !defaults.is_empty() {
        let place = |name: &String| file.lines.get(name).map(|line| format!("line {line}: ")).unwrap_or_default();
        let known: Vec<String> = command.get_arguments().map(|arg| arg.get_id().as_str().to_owned()).collect();
        let names: Vec<_> = defaults
            .into_keys()
            .map(|name| {
                format!("{}unknown setting {}", place(&name), Unknown { nearest: nearest(&name, &known), name })
            })
            .collect();
        let reason =
            format!("{}; settings are named as the options of `relay run --help`, with _ for -", names.join("; "));
        return Err(ConfigError::File { path: file.path, reason });
    }
    let unknown = unknown_variables(&variables, &[OUR_PREFIX]);
    if !unknown.is_empty() {
        return Err(ConfigError::UnknownVariables(unknown));
    }
    file.misspelt = unknown_variables(&variables, &SHARED_PREFIXES);
    Ok((command, file))
}

/// Returns the path of the file. It is needed before the arguments are parsed, because the file changes their defaults.
fn file_path(args: &[OsString]) -> Option<PathBuf> {
    let mut args = args.iter().skip(1);
    while let Some(arg) = args.next() {
        if arg == "--config" {
            return args.next().map(PathBuf::from);
        }
        if let Some(path) = arg.to_str().and_then(|arg| arg.strip_prefix("--config=")) {
            return Some(PathBuf::from(path));
        }
    }
    std::env::var_os("RELAY_CONFIG").filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// Returns the variables of the environment with one of these prefixes that are not `known`, by name.
fn unknown_variables(known: &[String], prefixes: &[&str]) -> Vec<Unknown> {
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()).filter(|name| {
        prefixes.iter().any(|prefix| name.starts_with(prefix))
            && !known.contains(name)
            && !variables::is_url_variable(name)
            && !is_service_link(name)
    });
    let mut unknown: Vec<Unknown> = names.map(|name| Unknown { nearest: nearest(&name, known), name }).collect();
    unknown.sort_by(|one, other| one.name.cmp(&other.name));
    unknown
}

/// Returns the names most similar to this name, at most three.
fn nearest(name: &str, known: &[String]) -> Vec<String> {
    let distance = |other: &String| {
        // A name without some of its words counts as the same name, because users leave words out.
        let mut words = other.split('_');
        let shortened = name.split('_').all(|word| words.any(|other| other == word)) || other.starts_with(name);
        if shortened { 1 } else { strsim::levenshtein(other, name) }
    };
    let Some(least) = known.iter().map(distance).min().filter(|least| *least <= name.len() / 3) else {
        return Vec::new();
    };
    known.iter().filter(|other| distance(other) == least).take(3).cloned().collect()
}

/// Returns whether Kubernetes sets this variable in every pod for a Service that happens to be called `relay`.
fn is_service_link(name: &str) -> bool {
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.ends_with("_PORT") && std::env::var(name).is_ok_and(|value| is_link(&value))
        || name.split_once("_PORT_").is_some_and(|(_, rest)| rest.contains("_TCP") || rest.contains("_UDP"))
}

fn is_link(value: &str) -> bool {
    ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme))
}

/// Returns a secret that is given directly, by a file, or as a systemd credential with the lower-case name of its variable.
///
/// # Errors
/// The secret is given in two ways.
pub fn secret(
    variable: &str,
    inline: Option<&secrecy::SecretString>,
    path: Option<&PathBuf>,
) -> Result<Option<Secret>, ConfigError> {
    match (inline, path) {
        (Some(_), Some(_)) => {
            Err(ConfigError::Contradiction(format!("both {variable} and {variable}_FILE are set; unset one of them")))
        }
        (Some(inline), None) => Ok(Some(Secret::Inline(inline.clone()))),
        (None, Some(path)) => Ok(Some(Secret::File(path.clone()))),
        (None, None) => Ok(std::env::var_os("CREDENTIALS_DIRECTORY")
            .filter(|directory| !directory.is_empty())
            .map(|directory| PathBuf::from(directory).join(variable.to_lowercase()))
            .filter(|path| path.is_file())
            .map(Secret::File)),
    }
}

/// Returns whether somebody has set the setting with this id, and be it to its default.
pub fn is_set(id: &str, matches: &ArgMatches, file: &ConfigFile) -> bool {
    matches.value_source(id).is_some_and(|source| source != ValueSource::DefaultValue) || file.names.contains(id)
}

/// Returns every setting in force: its variable, its value with secrets hidden, and the source of the value.
pub fn in_force(command: &Command, matches: &ArgMatches, file: &ConfigFile) -> Vec<(String, String, &'static str)> {
    let mut rows = BTreeMap::new();
    for arg in command.get_arguments() {
        let id = arg.get_id().as_str();
        let Some(variable) = settings::variable(id) else { continue };
        let source = match matches.value_source(id) {
            Some(ValueSource::CommandLine) => "option",
            Some(ValueSource::EnvVariable) => "environment",
            Some(_) if file.names.contains(id) => "file",
            Some(_) => "default",
            None => continue,
        };
        let values: Vec<String> =
            matches.get_raw(id).into_iter().flatten().map(|value| value.to_string_lossy().into_owned()).collect();
        let value = values.join(" ");
        let shown = if Settings::is_secret(id) { hide(&value) } else { redact::setting(&value).into_owned() };
        rows.insert(variable.to_owned(), (shown, source));
    }
    for (variable, value) in variables::url_variables() {
        let shown = if variable.ends_with("_FILE") { redact::setting(&value).into_owned() } else { hide(&value) };
        rows.insert(variable, (shown, "environment"));
    }
    rows.into_iter().map(|(variable, (value, source))| (variable, value, source)).collect()
}
