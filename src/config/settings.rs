//! Every setting, with its option, its variable, its default, its range and its help.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args, CommandFactory, Parser, ValueEnum};
use secrecy::SecretString;

use crate::breaker::BreakerPolicy;
use crate::relay::{Policy, RelayConfig};
use crate::retry::RetryPolicy;
use crate::route::Unrouted;
use crate::sink::Format;

/// What the destination `redis` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RedisMode {
    /// Entries of a stream.
    Stream,
    /// Messages on a channel.
    Pubsub,
}

/// How logs are written to standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text with colours on a terminal, JSON elsewhere.
    Auto,
    /// Text.
    Text,
    /// One JSON object a line.
    Json,
}

/// All settings; the doc comments are the help.
#[derive(Debug, Clone, Args)]
#[allow(missing_docs)] // each has its help
pub struct Settings {
    /// TOML file with settings, named destinations and routes.
    #[arg(long, env = "RELAY_CONFIG", value_name = "FILE", help_heading = "General")]
    pub config: Option<PathBuf>,
    /// Whether the relay works at all; with false it says so and exits with 0.
    #[arg(long, env = "EVENT_SYSTEM_ENABLED", value_name = "BOOL", default_value = "true", action = ArgAction::Set,
          value_parser = BoolishValueParser::new(), help_heading = "General")]
    pub enabled: bool,
    /// Whether events are published past the outbox: false. Events always go through the outbox; a commit wakes the relay
    /// within milliseconds.
    #[arg(long, env = "EVENT_IMMEDIATE_PROCESSING", value_name = "BOOL", default_value = "false",
          action = ArgAction::Set, value_parser = never, help_heading = "General")]
    pub immediate_processing: bool,
    /// What is logged: a level (error, warn, info, debug, trace), or target=level pairs separated by commas.
    #[arg(long, env = "RELAY_LOG", value_name = "FILTER", default_value = "info", help_heading = "General")]
    pub log: String,
    /// How logs are written to standard error; auto: text on a terminal, JSON elsewhere.
    #[arg(long, env = "RELAY_LOG_FORMAT", value_name = "FORMAT", default_value = "auto", help_heading = "General")]
    pub log_format: LogFormat,

    /// The application's database: postgres://..., or sqlite: and the path of its file. Other users of this host can see arguments; prefer the variable or the file.
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true, help_heading = "Database")]
    pub database_url: Option<SecretString>,
    /// File that holds the URL; read again at every connection.
    #[arg(long, env = "DATABASE_URL_FILE", value_name = "FILE", help_heading = "Database")]
    pub database_url_file: Option<PathBuf>,
    /// A transaction-pooling proxy such as PgBouncer stands in front of PostgreSQL: no named statements, no wake-up.
    #[arg(long, env = "RELAY_DATABASE_POOLED", value_name = "BOOL", default_value = "false", action = ArgAction::Set,
          value_parser = BoolishValueParser::new(), help_heading = "Database")]
    pub database_pooled: bool,
    /// Whether to publish events only once their commits are on disk. For applications that commit with
    /// `synchronous_commit = off`: else an event may be published of a transaction that a crash of the server takes back.
    #[arg(long, env = "RELAY_GHOST_BARRIER", value_name = "BOOL", default_value = "false", action = ArgAction::Set,
          value_parser = BoolishValueParser::new(), help_heading = "Database")]
    pub ghost_barrier: bool,
    /// How long event_processing_log is kept.
    #[arg(long, env = "RELAY_LOG_RETENTION", value_name = "TIME", default_value = "7d", value_parser = days,
          help_heading = "Database")]
    pub log_retention: Duration,
    /// Whether published events are kept with their payloads in event_history.
    #[arg(long, env = "EVENT_HISTORY_ENABLED", value_name = "BOOL", default_value = "false", action = ArgAction::Set,
          value_parser = BoolishValueParser::new(), help_heading = "Database")]
    pub history: bool,
    /// How long event_history is kept.
    #[arg(long, env = "RELAY_HISTORY_RETENTION", value_name = "TIME", default_value = "30d", value_parser = days,
          help_heading = "Database")]
    pub history_retention: Duration,

    /// The longest sleep when idle, in milliseconds; a wake-up ends it earlier.
    #[arg(long, env = "EVENT_OUTBOX_POLLING_INTERVAL", value_name = "MS", default_value = "5000",
          value_parser = clap::value_parser!(u64).range(10..=3_600_000), help_heading = "Work")]
    pub polling_interval: u64,
    /// Events in one batch.
    #[arg(long, env = "EVENT_OUTBOX_BATCH_SIZE", value_name = "COUNT", default_value = "1000",
          value_parser = clap::value_parser!(u64).range(1..=10_000), help_heading = "Work")]
    pub batch_size: u64,
    /// Bytes of events in one batch, about; with the lanes it bounds the memory.
    #[arg(long, env = "RELAY_BATCH_BYTES", value_name = "BYTES", default_value = "4194304",
          value_parser = clap::value_parser!(u64).range(1..=1 << 30), help_heading = "Work")]
    pub batch_bytes: u64,
    /// Batches worked on at the same time, each on a database connection of its own.
    #[arg(long, env = "RELAY_LANES", value_name = "COUNT", default_value = "3",
          value_parser = clap::value_parser!(u64).range(1..=64), help_heading = "Work")]
    pub lanes: u64,
    /// Largest payload in bytes; a larger one is dead-lettered at once.
    #[arg(long, env = "EVENT_MAX_PAYLOAD_SIZE", value_name = "BYTES", default_value = "1048576",
          value_parser = clap::value_parser!(u64).range(1..=256 << 20), help_heading = "Work")]
    pub max_payload_size: u64,
    /// What becomes of an event that no route takes.
    #[arg(long, env = "RELAY_UNROUTED", value_name = "WHAT", default_value = "dead-letter", help_heading = "Work")]
    pub unrouted: Unrouted,
    /// How long what is in flight may take after a signal to stop; then it is given up, and the relay exits with 1. Whoever
    /// kills the relay must wait longer: systemd's TimeoutStopSec, Kubernetes' terminationGracePeriodSeconds, docker stop -t.
    #[arg(long, env = "RELAY_SHUTDOWN_TIMEOUT", value_name = "TIME", default_value = "40s", value_parser = shutdown_time,
          help_heading = "Work")]
    pub shutdown_timeout: Duration,
    /// CloudEvents source of events that have none of their own.
    #[arg(
        long,
        env = "RELAY_DEFAULT_SOURCE",
        value_name = "SOURCE",
        default_value = "outbox-relay",
        help_heading = "Work"
    )]
    pub default_source: String,

    /// Attempts after the first before an event at fault is dead-lettered.
    #[arg(long, env = "EVENT_DEFAULT_MAX_RETRIES", value_name = "COUNT", default_value = "3",
          value_parser = clap::value_parser!(u32).range(0..=1000), help_heading = "Failures")]
    pub max_retries: u32,
    /// Wait before the first retry, in milliseconds.
    #[arg(long, env = "EVENT_DEFAULT_BACKOFF_MS", value_name = "MS", default_value = "1000",
          value_parser = clap::value_parser!(u64).range(1..=3_600_000), help_heading = "Failures")]
    pub retry_backoff: u64,
    /// Whether each further wait is twice the one before, up to an hour.
    #[arg(long, env = "EVENT_EXPONENTIAL_BACKOFF", value_name = "BOOL", default_value = "true", action = ArgAction::Set,
          value_parser = BoolishValueParser::new(), help_heading = "Failures")]
    pub retry_exponential: bool,
    /// Whether waits are spread between half and one and a half of themselves.
    #[arg(long, env = "EVENT_BACKOFF_JITTER", value_name = "BOOL", default_value = "true", action = ArgAction::Set,
          value_parser = BoolishValueParser::new(), help_heading = "Failures")]
    pub retry_jitter: bool,
    /// How long one publish call may take, in milliseconds; what is unanswered then is sent again.
    #[arg(long, env = "EVENT_DEFAULT_TIMEOUT", value_name = "MS", default_value = "30000",
          value_parser = clap::value_parser!(u64).range(10..=600_000), help_heading = "Failures")]
    pub publish_timeout: u64,
    /// Failed calls within the time window that pause a destination.
    #[arg(long, env = "EVENT_CIRCUIT_BREAKER_THRESHOLD", value_name = "COUNT", default_value = "5",
          value_parser = clap::value_parser!(u32).range(1..=1000), help_heading = "Failures")]
    pub breaker_threshold: u32,
    /// The time window, in milliseconds.
    #[arg(long, env = "EVENT_CIRCUIT_BREAKER_TIME_WINDOW", value_name = "MS", default_value = "60000",
          value_parser = clap::value_parser!(u64).range(1..=86_400_000), help_heading = "Failures")]
    pub breaker_window: u64,
    /// How long a destination is paused before it is probed, in milliseconds.
    #[arg(long, env = "EVENT_CIRCUIT_BREAKER_RECOVERY_TIMEOUT", value_name = "MS", default_value = "30000",
          value_parser = clap::value_parser!(u64).range(1..=86_400_000), help_heading = "Failures")]
    pub breaker_recovery: u64,

    /// Connection URL of Redis: redis://, redis-cluster:// with nodes, or redis-sentinel:// with Sentinels and ?master=NAME; rediss... with TLS. Sets up the destination `redis`.
    #[arg(long, env = "REDIS_URL", value_name = "URL", hide_env_values = true, help_heading = "Destination redis")]
    pub redis_url: Option<SecretString>,
    /// File that holds the URL; read again at every connection.
    #[arg(long, env = "REDIS_URL_FILE", value_name = "FILE", help_heading = "Destination redis")]
    pub redis_url_file: Option<PathBuf>,
    /// Host of Redis, instead of a URL; sets up the destination `redis`.
    #[arg(long, env = "REDIS_HOST", value_name = "HOST", help_heading = "Destination redis")]
    pub redis_host: Option<String>,
    /// Port of Redis.
    #[arg(long, env = "REDIS_PORT", value_name = "PORT", default_value = "6379", value_parser = port,
          help_heading = "Destination redis")]
    pub redis_port: u16,
    /// Database number of Redis.
    #[arg(long, env = "REDIS_DB", value_name = "NUMBER", default_value = "0",
          value_parser = clap::value_parser!(i64).range(0..), help_heading = "Destination redis")]
    pub redis_db: i64,
    /// ACL user of Redis.
    #[arg(long, env = "REDIS_USERNAME", value_name = "NAME", help_heading = "Destination redis")]
    pub redis_username: Option<String>,
    /// Password of Redis. Other users of this host can see arguments; prefer the variable or the file.
    #[arg(
        long,
        env = "REDIS_PASSWORD",
        value_name = "PASSWORD",
        hide_env_values = true,
        help_heading = "Destination redis"
    )]
    pub redis_password: Option<SecretString>,
    /// File that holds the password; read again at every connection.
    #[arg(long, env = "REDIS_PASSWORD_FILE", value_name = "FILE", help_heading = "Destination redis")]
    pub redis_password_file: Option<PathBuf>,
    /// Whether events become entries of a stream or messages on a channel.
    #[arg(
        long,
        env = "RELAY_REDIS_MODE",
        value_name = "MODE",
        default_value = "stream",
        help_heading = "Destination redis"
    )]
    pub redis_mode: RedisMode,
    /// Stream, with {event_type}, {aggregate_type} and {source} filled in.
    #[arg(
        long,
        env = "RELAY_REDIS_STREAM",
        value_name = "TEMPLATE",
        default_value = "events",
        help_heading = "Destination redis"
    )]
    pub redis_stream: String,
    /// Entries to keep in each stream, about, read or not; without it streams grow until somebody trims them.
    #[arg(long, env = "RELAY_REDIS_MAXLEN", value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..),
          help_heading = "Destination redis")]
    pub redis_maxlen: Option<u64>,
    /// Whether notes beside each stream keep what a crash or a lost answer makes the relay publish again from arriving again.
    #[arg(
        long,
        env = "RELAY_REDIS_EXACTLY_ONCE",
        value_name = "BOOL",
        default_value = "true",
        action = ArgAction::Set,
        value_parser = BoolishValueParser::new(),
        help_heading = "Destination redis"
    )]
    pub redis_exactly_once: bool,
    /// Channel, with {event_type}, {aggregate_type} and {source} filled in.
    #[arg(
        long,
        env = "RELAY_REDIS_CHANNEL",
        value_name = "TEMPLATE",
        default_value = "{event_type}",
        help_heading = "Destination redis"
    )]
    pub redis_channel: String,
    /// What a message on a channel is.
    #[arg(
        long,
        env = "RELAY_REDIS_FORMAT",
        value_name = "FORMAT",
        default_value = "cloudevents",
        help_heading = "Destination redis"
    )]
    pub redis_format: Format,

    /// Name or ARN of the event bus; sets up the destination `eventbridge`. Credentials, region and endpoint are the AWS
    /// SDK's own: AWS_REGION, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, profiles, roles.
    #[arg(long, env = "AWS_EVENTBRIDGE_BUS_NAME", value_name = "BUS", help_heading = "Destination eventbridge")]
    pub eventbridge_bus_name: Option<String>,
    /// Source of events that have none of their own; without it RELAY_DEFAULT_SOURCE.
    #[arg(long, env = "AWS_EVENTBRIDGE_SOURCE", value_name = "SOURCE", help_heading = "Destination eventbridge")]
    pub eventbridge_source: Option<String>,
    /// What Detail is.
    #[arg(
        long,
        env = "RELAY_EVENTBRIDGE_FORMAT",
        value_name = "FORMAT",
        default_value = "cloudevents",
        help_heading = "Destination eventbridge"
    )]
    pub eventbridge_format: Format,
    /// Largest entry, and request, in bytes: 1 MiB since January 2026, still 256 KiB (262144) in some partitions of AWS.
    #[arg(long, env = "RELAY_EVENTBRIDGE_MAX_ENTRY_SIZE", value_name = "BYTES", default_value = "1048576",
          value_parser = clap::value_parser!(u64).range(1024..=1 << 30), help_heading = "Destination eventbridge")]
    pub eventbridge_max_entry_size: u64,

    /// Sets up the destination `stdout`: one CloudEvent as a line of JSON.
    #[arg(long, env = "RELAY_STDOUT", value_name = "BOOL", default_value = "false", action = ArgAction::Set,
          num_args = 0..=1, default_missing_value = "true", require_equals = true,
          value_parser = BoolishValueParser::new(), help_heading = "Destination stdout")]
    pub stdout: bool,
}

impl Settings {
    /// Whether the setting with this id must never be shown whole.
    pub fn is_secret(id: &str) -> bool {
        matches!(id, "database_url" | "redis_url" | "redis_password")
    }

    /// How the engine is to work.
    pub fn relay(&self) -> RelayConfig {
        let count = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
        RelayConfig {
            lanes: count(self.lanes),
            batch_events: count(self.batch_size),
            batch_bytes: count(self.batch_bytes),
            max_payload: count(self.max_payload_size),
            polling_interval: Duration::from_millis(self.polling_interval),
            unrouted: self.unrouted,
            shutdown_timeout: self.shutdown_timeout,
        }
    }

    /// How a destination is dealt with that says nothing else.
    pub fn policy(&self) -> Policy {
        Policy {
            timeout: Duration::from_millis(self.publish_timeout),
            retry: RetryPolicy {
                max_retries: self.max_retries,
                base: Duration::from_millis(self.retry_backoff),
                exponential: self.retry_exponential,
                jitter: self.retry_jitter,
            },
            breaker: BreakerPolicy {
                threshold: self.breaker_threshold,
                window: Duration::from_millis(self.breaker_window),
                recovery: Duration::from_millis(self.breaker_recovery),
            },
        }
    }
}

/// The settings' own command, for looking up their variables whatever became of the real one's.
#[derive(Parser)]
struct Names {
    #[command(flatten)]
    settings: Settings,
}

/// The variable of the setting with this id.
pub fn variable(id: &str) -> Option<String> {
    let command = Names::command();
    let arg = command.get_arguments().find(|arg| arg.get_id() == id)?;
    arg.get_env().and_then(|name| name.to_str()).map(str::to_owned)
}

fn never(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "false" | "0" | "no" | "n" | "off" | "f" => Ok(false),
        _ => {
            Err("only false: events always go through the outbox; a commit wakes the relay within milliseconds"
                .to_owned())
        }
    }
}

fn days(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| format!("{error}; write it as 7d or 36h"))?;
    if time < Duration::from_secs(3600) { Err("at least 1h".to_owned()) } else { Ok(time) }
}

fn shutdown_time(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| format!("{error}; write it as 40s or 2m"))?;
    let range = Duration::from_secs(1)..=Duration::from_secs(3600);
    if range.contains(&time) { Ok(time) } else { Err("at least 1s and at most 1h".to_owned()) }
}

fn port(text: &str) -> Result<u16, String> {
    if text.contains("://") {
        return Err(
            "this is set by Kubernetes for a Service of that name, not by you; set enableServiceLinks: false in \
                    the pod, or REDIS_PORT yourself"
                .to_owned(),
        );
    }
    text.parse::<u16>().map_err(|_| "a port is a number from 1 to 65535".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_of_the_library_are_those_of_the_program() {
        let names = Names::parse_from(["relay"]);
        assert_eq!(names.settings.relay(), RelayConfig::default());
        assert_eq!(names.settings.policy(), Policy::default());
    }

    #[test]
    fn a_service_link_of_kubernetes_is_explained() {
        assert!(port("tcp://10.0.0.7:6379").expect_err("a URL").contains("enableServiceLinks"));
        assert_eq!(port("6380"), Ok(6380));
        assert!(port("66000").is_err());
    }

    #[test]
    fn retention_is_written_with_a_unit() {
        assert_eq!(days("7d"), Ok(Duration::from_secs(7 * 86400)));
        assert!(days("7").is_err());
        assert!(days("5s").is_err());
    }
}
