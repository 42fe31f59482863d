//! The command line: parsing, logging, exit codes, and one file per command.

#[cfg(all(feature = "postgres", feature = "redis"))]
mod audit;
mod batches;
mod check;
mod dead_letter;
mod emit;
mod filter;
mod help;
mod interrupt;
mod migrate;
mod pause;
mod prune;
mod replay;
mod routes;
mod run;
mod status;
mod table;
mod tail;
mod waiting;
mod when;

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use anyhow::Context;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

use crate::config::file::ConfigFile;
use crate::config::settings::{LogFormat, Settings};
use crate::config::{self, ConfigError, secret};
use crate::outbox::database::Database;
use crate::redact::may_hold_password;
use crate::sink::spec::KINDS;
use crate::text::shown;
use crate::{shutdown, stderr};

/// The exit code of a wrong usage or configuration.
const WRONG_CONFIGURATION: u8 = 2;

/// The longest line that the relay ends with, in characters.
const MAX_COMPLAINT_CHARS: usize = 4000;

/// The longest message of a panic that is logged, in characters.
const MAX_PANIC_CHARS: usize = 500;

/// The exit code of `--once` where something due is still undelivered.
const UNDELIVERED: u8 = 3;

/// Publishes the committed rows of event_outbox to Redis and Amazon EventBridge: in order per key, each result recorded, nothing lost.
#[derive(Parser)]
#[command(
    name = "relay",
    version,
    max_term_width = 120,
    after_help = "\
Settings: `relay run --help` lists them. Each is an option, a variable, or a line of the file of --config.
RELAY_DESTINATION_<NAME> sets up a destination by a URL, such as redis+stream://host?stream=orders.

Exit codes: 0 done; 1 it could not do its work; 2 wrong usage or configuration;
3 --once ended with something due still undelivered (it waits for a retry, was dead-lettered in this run, or its destination is
down);
130 a command was stopped by Ctrl-C."
)]
struct Cli {
    /// Publish what is due, then exit. Safe beside other relays, and twice at a time.
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    settings: Settings,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Publish until SIGTERM, SIGINT or SIGHUP; also what `relay` alone does.
    Run {
        /// Publish what is due, then exit.
        #[arg(long)]
        once: bool,
    },
    /// Bring the database to the schema this relay needs. Safe twice, twice at once, and beside running relays.
    Migrate,
    /// Show the configuration in force, and try the database and every destination.
    Check {
        /// Print one JSON document instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Show each destination, the relays, and what keeps events from moving.
    Status(status::StatusArgs),
    /// Stop giving events to a destination. They wait, uncharged and in order; other destinations go on.
    Pause(pause::PauseArgs),
    /// Give events to a paused destination again.
    Resume(pause::ResumeArgs),
    /// Compare a stream with the database: nothing lost, no ghost, in order, bytes unchanged, the log true. Safe beside running
    /// relays.
    #[cfg(all(feature = "postgres", feature = "redis"))]
    Audit(audit::AuditArgs),
    /// Insert one event, in a transaction of its own, and print its event_id.
    Emit(Box<emit::EmitArgs>),
    /// List, show, redrive, discard and purge the events that relay gave up on.
    #[command(subcommand)]
    DeadLetter(dead_letter::DeadLetterCommand),
    /// Make events due now that wait for a retry, and what waits behind them.
    RetryNow(waiting::RetryArgs),
    /// Make dead letters of events that are owed to a destination; their keys go on.
    GiveUp(waiting::GiveUpArgs),
    /// Give what is owed to one destination to another, in the order of keys.
    MoveOwed(waiting::MoveArgs),
    /// Show where an event of a type would go, and why. Needs no database.
    Routes(routes::RoutesArgs),
    /// Follow what relays publish, from event_processing_log.
    Tail(tail::TailArgs),
    /// Publish events of event_history once more, to one destination.
    Replay(Box<replay::ReplayArgs>),
    /// Delete now what is past its retention in event_processing_log and event_history.
    Prune(prune::PruneArgs),
}

/// The commands, their options and the settings, with their help.
fn command_line() -> clap::Command {
    help::with_pages(Cli::command())
}

/// Parses the arguments, does what they say, and returns the exit code.
pub fn main() -> ExitCode {
    #[cfg(feature = "failpoints")]
    let _armed = crate::failpoint::arm();
    if let Err(error) = shutdown::outlive_file_size_limit() {
        stderr::say(&format!("relay: cannot install a signal handler: {error}"));
        return ExitCode::FAILURE;
    }
    let code = match dispatch(std::env::args_os().collect()) {
        Ok(code) => code,
        Err(error) => {
            stderr::say(&format!("relay: {}", shown(&format!("{error:#}"), MAX_COMPLAINT_CHARS)));
            if error.is::<ConfigError>() { WRONG_CONFIGURATION.into() } else { ExitCode::FAILURE }
        }
    };
    stderr::flush();
    code
}

fn dispatch(args: Vec<OsString>) -> anyhow::Result<ExitCode> {
    let (mut command, file) = match config::prepare(command_line(), &args) {
        Ok(prepared) => prepared,
        // Help is there for those whose settings are wrong.
        Err(error) => match command_line().try_get_matches_from(&args) {
            Err(help) if matches!(help.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => help.exit(),
            _ => return Err(error.into()),
        },
    };
    let matches = match command.try_get_matches_from_mut(&args) {
        Ok(matches) => matches,
        Err(error) => {
            let error = with_place(&command, &file, error);
            if !error.use_stderr() {
                error.exit(); // help and version
            }
            if let Some(what) = unshowable(&error) {
                return Err(ConfigError::Invalid { setting: what, reason: NOT_SHOWN.to_owned() }.into());
            }
            stderr::say(&error.render().to_string());
            return Ok(WRONG_CONFIGURATION.into());
        }
    };
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    if cli.once && !matches!(cli.command, None | Some(Command::Run { .. })) {
        command.error(ErrorKind::ArgumentConflict, "--once goes with `relay run` only").exit();
    }
    start_logging(&cli.settings)?;
    for variable in &file.misspelt {
        tracing::warn!("ignored: unknown variable {variable}");
    }
    let settings = &cli.settings;
    let has_http_address = config::is_set("http_addr", &matches, &file);
    match cli.command {
        None => run::run(settings, &file, cli.once, has_http_address),
        Some(Command::Run { once }) => run::run(settings, &file, cli.once || once, has_http_address),
        Some(Command::Migrate) => migrate::migrate(settings),
        Some(Command::Check { json }) => {
            check::check(settings, &file, &config::in_force(&command, &matches, &file), json)
        }
        Some(Command::Status(args)) => status::status(settings, &args),
        Some(Command::Pause(args)) => pause::pause(settings, &args),
        Some(Command::Resume(args)) => pause::resume(settings, &args),
        #[cfg(all(feature = "postgres", feature = "redis"))]
        Some(Command::Audit(args)) => audit::audit(settings, &file, &args),
        Some(Command::Emit(args)) => emit::emit(settings, *args),
        Some(Command::DeadLetter(command)) => dead_letter::dead_letter(settings, command),
        Some(Command::RetryNow(args)) => waiting::retry_now(settings, &args),
        Some(Command::GiveUp(args)) => waiting::give_up(settings, args),
        Some(Command::MoveOwed(args)) => waiting::move_owed(settings, &args),
        Some(Command::Routes(args)) => routes::routes(settings, &file, &args),
        Some(Command::Tail(args)) => tail::tail(settings, args),
        Some(Command::Replay(args)) => replay::replay(settings, &file, &args),
        Some(Command::Prune(args)) => prune::prune(settings, &args),
    }
}

/// Why a refused value is not quoted.
const NOT_SHOWN: &str = "the value cannot be used; it is not shown, because it may hold a password";

/// What was refused, where the error would show a value that may be a password, or hold one.
fn unshowable(error: &clap::Error) -> Option<String> {
    let refused = error.context().filter(|(kind, _)| *kind != ContextKind::Usage).flat_map(|(_, value)| match value {
        ContextValue::String(text) => vec![text.clone()],
        ContextValue::Strings(texts) => texts.clone(),
        _ => Vec::new(),
    });
    if !refused.into_iter().any(|text| may_hold_password(&text)) {
        return None;
    }
    let named = error.get(ContextKind::InvalidArg).map(ToString::to_string);
    let named = named.filter(|name| !may_hold_password(name)).unwrap_or_else(|| "an argument".to_owned());
    // What with_place found.
    let variable = match error.get(ContextKind::Suggested) {
        Some(ContextValue::StyledStrs(tips)) => tips.iter().map(|tip| format!(" ({tip})")).collect(),
        _ => String::new(),
    };
    Some(format!("{named}{variable}"))
}

/// Adds the variable or the line of the file that a refused value stands in; by itself clap names the option only.
fn with_place(command: &clap::Command, file: &ConfigFile, mut error: clap::Error) -> clap::Error {
    let text = |kind| error.get(kind).map(ToString::to_string);
    let (Some(option), Some(value)) = (text(ContextKind::InvalidArg), text(ContextKind::InvalidValue)) else {
        return error;
    };
    let argument = command.get_arguments().find(|argument| argument.to_string() == option);
    let Some(argument) = argument else { return error };
    let set = |variable: &&std::ffi::OsStr| std::env::var_os(variable).is_some_and(|set| set == value.as_str());
    let in_file = || argument.get_default_values().iter().any(|default| *default == value.as_str());
    let place = match (argument.get_env().filter(set), file.lines.get(argument.get_id().as_str())) {
        (Some(variable), _) => format!("the variable {}", variable.display()),
        (None, Some(line)) if in_file() => format!("line {line} of {}", file.path.display()),
        _ => return error,
    };
    let tip = format!("it stands in {place}");
    error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    error
}

/// The database; its URL must be one that can be used.
fn database(settings: &Settings) -> Result<Database, ConfigError> {
    let url = secret("DATABASE_URL", settings.database_url.as_ref(), settings.database_url_file.as_ref())?;
    let url = url.ok_or_else(|| {
        ConfigError::Contradiction(
            "DATABASE_URL is not set: postgres://user:password@host/database or sqlite:file, or its file in DATABASE_URL_FILE"
                .to_owned(),
        )
    })?;
    // Later a file may become unusable for a while, which is no reason to end; now somebody is there to mend it.
    Database::new(url, settings.database_pooled).map_err(|error| ConfigError::Contradiction(error.explain()))
}

/// Logs go to standard error; standard output is for data.
fn start_logging(settings: &Settings) -> Result<(), ConfigError> {
    let invalid = |reason| ConfigError::Invalid { setting: "RELAY_LOG".to_owned(), reason };
    // A word alone would be taken for a target whose lines are all logged, and every other line would be missing.
    let words = settings.log.split(',').map(str::trim).filter(|word| !word.is_empty());
    if let Some(word) = words.into_iter().find(|word| !word.contains('=') && word.parse::<LevelFilter>().is_err()) {
        let levels = "off, error, warn, info, debug and trace";
        return Err(invalid(format!("{word:?} is no level; there are {levels}, alone or as TARGET=LEVEL")));
    }
    let filter: Targets = settings.log.parse().map_err(|error| invalid(format!("{error}")))?;
    // At lower levels sqlx logs statements, which hold payloads; and a parameter of the URL that it does not know, such as
    // sslpassword, it logs with its value, as a warning.
    let filter = filter
        .with_target("sqlx", LevelFilter::WARN)
        .with_target("sqlx_postgres::options", LevelFilter::OFF)
        .with_targets(KINDS.iter().flat_map(|kind| kind.log_targets).copied());
    let terminal = std::io::stderr().is_terminal();
    // See https://no-color.org. The help has no colours.
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(|| stderr::Lines)
        .with_ansi(terminal && !no_color)
        .with_target(false);
    let layer = match settings.log_format {
        LogFormat::Text => layer.boxed(),
        LogFormat::Auto if terminal => layer.boxed(),
        LogFormat::Auto | LogFormat::Json => layer.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(layer.with_filter(filter)).init();
    // The usual hook writes to standard error by itself, and waits for its reader.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let message = panic.payload_as_str().unwrap_or("a value that is no text");
        tracing::error!(place, "panic: {}", shown(message, MAX_PANIC_CHARS));
    }));
    Ok(())
}

/// Writes what a command found to standard output.
///
/// # Errors
/// Nobody takes it.
fn print(text: &str) -> anyhow::Result<()> {
    let mut output = std::io::stdout().lock();
    output.write_all(text.as_bytes()).and_then(|()| output.flush()).context("cannot write to standard output")
}

/// Writes text for people, or the document of `--json`, to standard output. A reader that has gone, as `head` does, is no error.
///
/// # Errors
/// Standard output cannot be written to.
fn tell(text: &str) -> anyhow::Result<ExitCode> {
    let mut output = std::io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// The runtime of a command; `threads` beyond one only where lanes can use them.
fn runtime(threads: usize) -> anyhow::Result<tokio::runtime::Runtime> {
    // The one TLS provider of the process; without it the first encrypted connection panics.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        tracing::debug!("a TLS provider was installed already");
    }
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?)
}
