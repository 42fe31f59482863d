//! Every setting, with its option, its variable, its default, its range and its help.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args, CommandFactory, Parser, ValueEnum};
use secrecy::SecretString;

use crate::breaker::BreakerPolicy;
use crate::http::address::HttpAddress;
use crate::relay::{Policy, RelayConfig};
use crate::retry::RetryPolicy;
use crate::route::Unrouted;
use crate::sink::Format;
use crate::units;

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
    /// With false the relay says so and exits with 0.
    #[arg(long, env = "EVENT_SYSTEM_ENABLED", value_name = "BOOL", default_value = "true", action = ArgAction::Set,
          value_parser = BoolishValueParser::new(), help_heading = "General")]
    pub enabled: bool,
    /// Only false is accepted: events always go through the outbox.
    #[arg(long, env = "EVENT_IMMEDIATE_PROCESSING", value_name = "BOOL", default_value = "false",
          action = ArgAction::Set, value_parser = never, help_heading = "General")]
    pub immediate_processing: bool,
    /// error, warn, info, debug or trace, or target=level pairs with commas.
    #[arg(long, env = "RELAY_LOG", value_name = "FILTER", default_value = "info", help_heading = "General")]
    pub log: String,
    /// Of logs; auto: text on a terminal, else JSON.
    #[arg(long, env = "RELAY_LOG_FORMAT", value_name = "FORMAT", default_value = "auto", help_heading = "General")]
    pub log_format: LogFormat,
    /// Serves metrics and health by HTTP; off: not. To all: 0.0.0.0:9464.
    #[arg(
        long,
        env = "RELAY_HTTP_ADDR",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:9464",
        help_heading = "General"
    )]
    pub http_addr: HttpAddress,

    /// postgres://... or sqlite:PATH. Others can see options: use the variable.
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true, help_heading = "Database")]
    pub database_url: Option<SecretString>,
    /// File that holds the URL; it is read again at every connection.
    #[arg(long, env = "DATABASE_URL_FILE", value_name = "FILE", help_heading = "Database")]
    pub database_url_file: Option<PathBuf>,
    /// A pooler in transaction mode, such as PgBouncer, stands before PostgreSQL.
    #[arg(long, env = "RELAY_DATABASE_POOLED", value_name = "BOOL", default_value = "false", action = ArgAction::Set,
          value_parser = BoolishValueParser::new(), help_heading = "Database")]
    pub database_pooled: bool,
    /// Publish only commits that are on disk, with synchronous_commit = off.
    #[arg(long, env = "RELAY_GHOST_BARRIER", value_name = "BOOL", default_value = "false", action = ArgAction::Set,
          value_parser = BoolishValueParser::new(), help_heading = "Database")]
    pub ghost_barrier: bool,
    /// How long event_processing_log is kept.
    #[arg(long, env = "RELAY_LOG_RETENTION", value_name = "TIME", default_value = "7d", value_parser = days,
          help_heading = "Database")]
    pub log_retention: Duration,
    /// Keep published events with their payloads in event_history.
    #[arg(long, env = "EVENT_HISTORY_ENABLED", value_name = "BOOL", default_value = "false", action = ArgAction::Set,
          value_parser = BoolishValueParser::new(), help_heading = "Database")]
    pub history: bool,
    /// How long event_history is kept.
    #[arg(long, env = "RELAY_HISTORY_RETENTION", value_name = "TIME", default_value = "30d", value_parser = days,
          help_heading = "Database")]
    pub history_retention: Duration,

    /// The longest sleep when idle; a commit ends it earlier.
    #[arg(long, env = "EVENT_OUTBOX_POLLING_INTERVAL", value_name = "TIME", default_value = "5000",
          value_parser = milliseconds(10..=3_600_000), help_heading = "Work")]
    pub polling_interval: Duration,
    /// Events in one batch.
    #[arg(long, env = "EVENT_OUTBOX_BATCH_SIZE", value_name = "COUNT", default_value = "1000",
          value_parser = clap::value_parser!(u64).range(1..=10_000), help_heading = "Work")]
    pub batch_size: u64,
    /// Size of one batch, about; with the lanes it bounds the memory.
    #[arg(long, env = "RELAY_BATCH_BYTES", value_name = "SIZE", default_value = "4194304",
          value_parser = bytes(1..=1 << 30), help_heading = "Work")]
    pub batch_bytes: u64,
    /// Batches in work at the same time, each on a connection of its own.
    #[arg(long, env = "RELAY_LANES", value_name = "COUNT", default_value = "3",
          value_parser = clap::value_parser!(u64).range(1..=64), help_heading = "Work")]
    pub lanes: u64,
    /// Largest payload; a larger one is dead-lettered at once.
    #[arg(long, env = "EVENT_MAX_PAYLOAD_SIZE", value_name = "SIZE", default_value = "1048576",
          value_parser = bytes(1..=256 << 20), help_heading = "Work")]
    pub max_payload_size: u64,
    /// What becomes of an event that no route takes.
    #[arg(long, env = "RELAY_UNROUTED", value_name = "WHAT", default_value = "dead-letter", help_heading = "Work")]
    pub unrouted: Unrouted,
    /// How long work in flight may take after a signal to stop.
    #[arg(long, env = "RELAY_SHUTDOWN_TIMEOUT", value_name = "TIME", default_value = "40s", value_parser = shutdown_time,
          help_heading = "Work")]
    pub shutdown_timeout: Duration,
    /// CloudEvents source of events that have none.
    #[arg(
        long,
        env = "RELAY_DEFAULT_SOURCE",
        value_name = "SOURCE",
        default_value = "outbox-relay",
        help_heading = "Work"
    )]
    pub default_source: String,

    /// Attempts after the first; then the event is dead-lettered.
    #[arg(long, env = "EVENT_DEFAULT_MAX_RETRIES", value_name = "COUNT", default_value = "3",
          value_parser = clap::value_parser!(u32).range(0..=1000), help_heading = "Failures")]
    pub max_retries: u32,
    /// Wait before the first retry.
    #[arg(long, env = "EVENT_DEFAULT_BACKOFF_MS", value_name = "TIME", default_value = "1000",
          value_parser = milliseconds(1..=3_600_000), help_heading = "Failures")]
    pub retry_backoff: Duration,
    /// Each further wait is twice the one before, up to an hour.
    #[arg(long, env = "EVENT_EXPONENTIAL_BACKOFF", value_name = "BOOL", default_value = "true", action = ArgAction::Set,
          value_parser = BoolishValueParser::new(), help_heading = "Failures")]
    pub retry_exponential: bool,
    /// Each wait is multiplied by a random factor from 0.5 to 1.5.
    #[arg(long, env = "EVENT_BACKOFF_JITTER", value_name = "BOOL", default_value = "true", action = ArgAction::Set,
          value_parser = BoolishValueParser::new(), help_heading = "Failures")]
    pub retry_jitter: bool,
    /// Longest publish call; what has no answer then is sent again.
    #[arg(long, env = "EVENT_DEFAULT_TIMEOUT", value_name = "TIME", default_value = "30000",
          value_parser = milliseconds(10..=600_000), help_heading = "Failures")]
    pub publish_timeout: Duration,
    /// Failed calls within the time window that pause a destination.
    #[arg(long, env = "EVENT_CIRCUIT_BREAKER_THRESHOLD", value_name = "COUNT", default_value = "5",
          value_parser = clap::value_parser!(u32).range(1..=1000), help_heading = "Failures")]
    pub breaker_threshold: u32,
    /// The time window of these calls.
    #[arg(long, env = "EVENT_CIRCUIT_BREAKER_TIME_WINDOW", value_name = "TIME", default_value = "60000",
          value_parser = milliseconds(1..=86_400_000), help_heading = "Failures")]
    pub breaker_window: Duration,
    /// How long a destination is paused before it is probed.
    #[arg(long, env = "EVENT_CIRCUIT_BREAKER_RECOVERY_TIMEOUT", value_name = "TIME", default_value = "30000",
          value_parser = milliseconds(1..=86_400_000), help_heading = "Failures")]
    pub breaker_recovery: Duration,

    /// redis://, redis-cluster://, redis-sentinel://...?master=NAME; TLS: rediss.
    #[arg(long, env = "REDIS_URL", value_name = "URL", hide_env_values = true, help_heading = "Destination redis")]
    pub redis_url: Option<SecretString>,
    /// File that holds the URL; it is read again at every connection.
    #[arg(long, env = "REDIS_URL_FILE", value_name = "FILE", help_heading = "Destination redis")]
    pub redis_url_file: Option<PathBuf>,
    /// Host, instead of a URL.
    #[arg(long, env = "REDIS_HOST", value_name = "HOST", help_heading = "Destination redis")]
    pub redis_host: Option<String>,
    /// TCP port of the server at REDIS_HOST
    #[arg(long, env = "REDIS_PORT", value_name = "PORT", default_value = "6379", value_parser = port,
          help_heading = "Destination redis")]
    pub redis_port: u16,
    /// Number of the database
    #[arg(long, env = "REDIS_DB", value_name = "NUMBER", default_value = "0",
          value_parser = clap::value_parser!(i64).range(0..), help_heading = "Destination redis")]
    pub redis_db: i64,
    /// ACL user; `default` if none is given
    #[arg(long, env = "REDIS_USERNAME", value_name = "NAME", help_heading = "Destination redis")]
    pub redis_username: Option<String>,
    /// The password. Others can see options: use the variable.
    #[arg(
        long,
        env = "REDIS_PASSWORD",
        value_name = "PASSWORD",
        hide_env_values = true,
        help_heading = "Destination redis"
    )]
    pub redis_password: Option<SecretString>,
    /// File that holds the password; it is read again at every connection.
    #[arg(long, env = "REDIS_PASSWORD_FILE", value_name = "FILE", help_heading = "Destination redis")]
    pub redis_password_file: Option<PathBuf>,
    /// Entries of a stream, or messages on a channel.
    #[arg(
        long,
        env = "RELAY_REDIS_MODE",
        value_name = "MODE",
        default_value = "stream",
        help_heading = "Destination redis"
    )]
    pub redis_mode: RedisMode,
    /// May hold {event_type}, {aggregate_type} and {source}.
    #[arg(
        long,
        env = "RELAY_REDIS_STREAM",
        value_name = "TEMPLATE",
        default_value = "events",
        help_heading = "Destination redis"
    )]
    pub redis_stream: String,
    /// Entries to keep in each stream, about, read or not; otherwise it grows.
    #[arg(long, env = "RELAY_REDIS_MAXLEN", value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..),
          help_heading = "Destination redis")]
    pub redis_maxlen: Option<u64>,
    /// Keep notes in Redis, so that what is published again arrives once.
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
    /// May hold {event_type}, {aggregate_type} and {source}.
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

    /// Name or ARN of the bus; region and credentials are the AWS SDK's own.
    #[arg(
        long,
        env = "AWS_EVENTBRIDGE_BUS_NAME",
        value_name = "BUS",
        help_heading = "Destinations eventbridge and stdout"
    )]
    pub eventbridge_bus_name: Option<String>,
    /// Source of events that have none; otherwise RELAY_DEFAULT_SOURCE.
    #[arg(
        long,
        env = "AWS_EVENTBRIDGE_SOURCE",
        value_name = "SOURCE",
        help_heading = "Destinations eventbridge and stdout"
    )]
    pub eventbridge_source: Option<String>,
    /// What Detail is.
    #[arg(
        long,
        env = "RELAY_EVENTBRIDGE_FORMAT",
        value_name = "FORMAT",
        default_value = "cloudevents",
        help_heading = "Destinations eventbridge and stdout"
    )]
    pub eventbridge_format: Format,
    /// Largest entry and request; on some AWS 256KiB.
    #[arg(long, env = "RELAY_EVENTBRIDGE_MAX_ENTRY_SIZE", value_name = "SIZE", default_value = "1048576",
          value_parser = bytes(1024..=1 << 30), help_heading = "Destinations eventbridge and stdout")]
    pub eventbridge_max_entry_size: u64,

    /// Print each event to standard output as a line of JSON.
    #[arg(long, env = "RELAY_STDOUT", value_name = "BOOL", default_value = "false", action = ArgAction::Set,
          num_args = 0..=1, default_missing_value = "true", require_equals = true,
          value_parser = BoolishValueParser::new(), help_heading = "Destinations eventbridge and stdout")]
    pub stdout: bool,
}

impl Settings {
    /// Returns whether the setting with this id must never be shown whole.
    pub fn is_secret(id: &str) -> bool {
        matches!(id, "database_url" | "redis_url" | "redis_password")
    }

    /// Returns the configuration of the engine.
    pub fn relay(&self) -> RelayConfig {
        let count = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
        RelayConfig {
            lanes: count(self.lanes),
            batch_events: count(self.batch_size),
            batch_bytes: count(self.batch_bytes),
            max_payload: count(self.max_payload_size),
            polling_interval: self.polling_interval,
            unrouted: self.unrouted,
            shutdown_timeout: self.shutdown_timeout,
            sample: self.http_addr != HttpAddress::Off,
        }
    }

    /// Returns the policy of a destination that sets none of its own.
    pub fn policy(&self) -> Policy {
        Policy {
            timeout: self.publish_timeout,
            retry: RetryPolicy {
                max_retries: self.max_retries,
                base: self.retry_backoff,
                exponential: self.retry_exponential,
                jitter: self.retry_jitter,
            },
            breaker: BreakerPolicy {
                threshold: self.breaker_threshold,
                window: self.breaker_window,
                recovery: self.breaker_recovery,
            },
        }
    }
}

/// A command with all settings, for looking up their variables independently of the real command.
#[derive(Parser)]
struct Names {
    #[command(flatten)]
    settings: Settings,
}

/// Returns the variable of the setting with this id.
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

fn milliseconds(range: RangeInclusive<u64>) -> impl Fn(&str) -> Result<Duration, String> + Clone {
    move |text| units::milliseconds(text, range.clone())
}

fn bytes(range: RangeInclusive<u64>) -> impl Fn(&str) -> Result<u64, String> + Clone {
    move |text| units::bytes(text, range.clone())
}

fn days(text: &str) -> Result<Duration, String> {
    const HOUR: Duration = Duration::from_secs(3600);
    const YEAR: Duration = Duration::from_secs(365 * 86_400);
    units::time(text, HOUR..=100 * YEAR, "7d or 36h")
}

fn shutdown_time(text: &str) -> Result<Duration, String> {
    units::time(text, Duration::from_secs(1)..=Duration::from_secs(3600), "40s or 2m")
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

    /// Every setting that is a time or a size, and two ways to write the same value. Only one is given if a plain number
    /// would be ambiguous.
    const UNITS: [(&str, &str, Option<&str>); 11] = [
        ("log_retention", "36h", None),
        ("history_retention", "14d", None),
        ("shutdown_timeout", "2m", None),
        ("polling_interval", "2s", Some("2000")),
        ("batch_bytes", "8MiB", Some("8388608")),
        ("max_payload_size", "4MB", Some("4000000")),
        ("retry_backoff", "2s", Some("2000")),
        ("publish_timeout", "1m", Some("60000")),
        ("breaker_window", "5m", Some("300000")),
        ("breaker_recovery", "500ms", Some("500")),
        ("eventbridge_max_entry_size", "256KiB", Some("262144")),
    ];

    #[test]
    fn every_time_and_size_takes_a_unit_and_a_plain_number_in_the_unit_of_before() {
        let command = Names::command();
        let has_unit = |arg: &&clap::Arg| {
            let name = arg.get_value_names().map(|names| names[0].as_str());
            assert!(!matches!(name, Some("MS" | "BYTES" | "SECONDS")), "{arg} takes no unit");
            matches!(name, Some("TIME" | "SIZE"))
        };
        let mut found: Vec<&str> = command.get_arguments().filter(has_unit).map(|arg| arg.get_id().as_str()).collect();
        let mut listed = UNITS.map(|(id, ..)| id);
        found.sort_unstable();
        listed.sort_unstable();
        assert_eq!(found, listed);

        let parsed = |id: &str, value: &str| {
            let option = format!("--{}={value}", id.replace('_', "-"));
            let names = Names::try_parse_from(["relay", &option]).map_err(|error| error.to_string())?;
            Ok::<String, String>(format!("{:?}", names.settings))
        };
        for (id, with_unit, plain) in UNITS {
            let with_unit = parsed(id, with_unit).expect(id);
            assert_ne!(Ok(&with_unit), parsed("lanes", "3").as_ref(), "{id} is set");
            match plain {
                Some(plain) => assert_eq!(parsed(id, plain), Ok(with_unit), "{id}"),
                None => assert!(parsed(id, "7").is_err(), "{id}"),
            }
            for wrong in ["5 apples", "-1", "", "99999999999999999999"] {
                let error = parsed(id, wrong).expect_err(id);
                assert!(error.contains(&id.replace('_', "-")) && error.contains("such as"), "{error}");
            }
        }
    }
}
