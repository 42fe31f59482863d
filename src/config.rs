//! Configuration: every setting once, as an argument of [`clap`], which gives its flag, its variable, its default, its
//! range and its help. A TOML file supplies other defaults, and what variables cannot say: named destinations and routes.
//!
//! - [`settings`]: the settings themselves.
//! - [`file`](mod@file): the TOML file.
//! - [`destinations`]: from both to sinks and routes.

pub mod destinations;
pub mod file;
pub mod settings;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{ArgMatches, Command};

use crate::secret::Secret;
use crate::text;
use file::ConfigFile;
use settings::Settings;

/// What is wrong with the configuration. The process exits with 2.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {}", text::setting(&path.display().to_string()))]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("{path}: {reason}")]
    File {
        /// Which.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// A variable that looks like one of ours, and is none.
    #[error("unknown variable {name}{}", nearest.as_ref().map(|name| format!("; did you mean {name}?")).unwrap_or_default())]
    UnknownVariable {
        /// Its name.
        name: String,
        /// The most similar one there is.
        nearest: Option<String>,
    },
    /// Settings that do not go together, or lack another.
    #[error("{0}")]
    Contradiction(String),
    /// A value that cannot be used.
    #[error("{setting}: {reason}")]
    Invalid {
        /// The setting, as the user wrote it.
        setting: String,
        /// Why, and what would do.
        reason: String,
    },
}

/// Beginnings of variables that can only be meant for us.
const OUR_PREFIXES: [&str; 9] = [
    "RELAY_",
    "EVENT_OUTBOX_",
    "EVENT_DEFAULT_",
    "EVENT_EXPONENTIAL_",
    "EVENT_BACKOFF_",
    "EVENT_CIRCUIT_BREAKER_",
    "EVENT_HISTORY_",
    "EVENT_SYSTEM_",
    "EVENT_MAX_",
];

/// Prepares `command` for parsing: settings of the file become defaults, empty variables count as not set, and every
/// setting may stand before or after the subcommand.
///
/// # Errors
/// The file cannot be used, or the environment holds a variable that only looks like ours.
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
    if let Some(name) = defaults.into_keys().next() {
        let reason =
            format!("unknown setting {name:?}; settings are named as the options of `relay --help`, with _ for -");
        return Err(ConfigError::File { path: file.path, reason });
    }
    unknown_variable(&variables).map_or(Ok((command, file)), Err)
}

/// The path of the file, looked up before anything else is parsed because it changes what the rest means.
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

fn unknown_variable(known: &[String]) -> Option<ConfigError> {
    let name = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()).find(|name| {
        OUR_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) && !known.contains(name) && !is_service_link(name)
    })?;
    let nearest = known.iter().min_by_key(|other| strsim::levenshtein(other, &name)).cloned();
    let nearest = nearest.filter(|other| strsim::levenshtein(other, &name) <= name.len() / 3);
    Some(ConfigError::UnknownVariable { name, nearest })
}

/// What Kubernetes sets in every pod for a Service that happens to be called `relay`.
fn is_service_link(name: &str) -> bool {
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.ends_with("_PORT") && std::env::var(name).is_ok_and(|value| value.contains("://"))
        || name.split_once("_PORT_").is_some_and(|(_, rest)| rest.contains("_TCP") || rest.contains("_UDP"))
}

/// A secret given directly, in a file, or as a systemd credential of the lower-case name of its variable.
///
/// # Errors
/// Given in two ways.
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

/// Every setting in force: its variable, its value with secrets hidden, and where that comes from.
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
        let shown = if Settings::is_secret(id) { settings::hide(&value) } else { text::setting(&value).into_owned() };
        rows.insert(variable.to_owned(), (shown, source));
    }
    rows.into_iter().map(|(variable, (value, source))| (variable, value, source)).collect()
}
