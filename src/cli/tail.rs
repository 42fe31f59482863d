//! `relay tail`.

use std::io::{ErrorKind, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::ValueEnum;

use crate::cli::interrupt::Interrupt;
use crate::cli::run::explained;
use crate::cli::when::{self, Moment};
use crate::cli::{database, runtime};
use crate::config::settings::Settings;
use crate::outbox::past::{LogFilter, LogLine};
use crate::text::shown;

/// The longest text of one field, in characters.
const MAX_FIELD_CHARS: usize = 600;

/// How often the log is read while it has nothing new.
const INTERVAL: Duration = Duration::from_secs(1);

/// The log is read for at most one of so many parts of the time. A day that was made before the migration time_indexes has no index on time,
/// and may take long to read.
const SHARE: u32 = 10;

#[derive(clap::Args)]
pub(super) struct TailArgs {
    /// Only events whose type fits this glob, as in order.*
    #[arg(long = "type", value_name = "GLOB")]
    event_type: Option<String>,
    /// Only at this destination.
    #[arg(long, value_name = "NAME")]
    destination: Option<String>,
    /// Only events of this key, as in order:42. Published ones are found by event_history.
    #[arg(long)]
    key: Option<String>,
    /// Only what ended so.
    #[arg(long)]
    status: Option<Status>,
    /// Begin with what was recorded since then: 5m for five minutes ago, or a time.
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = when::moment)]
    since: Moment,
    /// Print each row as a line of JSON.
    #[arg(long)]
    json: bool,
}

/// How a delivery ended.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Status {
    Published,
    Failed,
    DeadLettered,
    Duplicate,
    Dropped,
}

impl Status {
    /// The name in the log.
    fn name(self) -> &'static str {
        match self {
            Self::Published => "published",
            Self::Failed => "failed",
            Self::DeadLettered => "dead_lettered",
            Self::Duplicate => "duplicate",
            Self::Dropped => "dropped",
        }
    }
}

pub(super) fn tail(settings: &Settings, args: TailArgs) -> anyhow::Result<ExitCode> {
    let database = database(settings)?;
    let filter = LogFilter {
        event_type: args.event_type,
        key: args.key,
        destination: args.destination,
        status: args.status.map(|status| status.name().to_owned()),
    };
    runtime(1)?.block_on(async {
        Interrupt::end_at_once().context("cannot listen for signals")?;
        let mut past = database.operate().past().await.map_err(explained)?;
        if filter.key.is_some() && past.history().await.map_err(explained)?.is_empty {
            tracing::warn!(
                "event_history is empty, so published events of a key are not found; EVENT_HISTORY_ENABLED=true fills it"
            );
        }
        let now = past.now().await.map_err(explained)?;
        past.follow(args.since.at(now)).await.map_err(explained)?;
        loop {
            let begun = Instant::now();
            let page = past.log(&filter).await.map_err(explained)?;
            let took = begun.elapsed();
            let mut output = std::io::stdout().lock();
            for line in &page.lines {
                let text = if args.json { serde_json::to_string(line)? } else { text(line) };
                match writeln!(output, "{text}") {
                    // Its reader has seen enough.
                    Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
                    written => written.context("cannot write to standard output")?,
                }
            }
            match output.flush() {
                Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
                flushed => flushed.context("cannot write to standard output")?,
            }
            drop(output);
            if !page.full {
                tokio::time::sleep(INTERVAL.max(took * SHARE)).await;
            }
        }
    })
}

fn text(line: &LogLine) -> String {
    let shown = |text: &str| shown(text, MAX_FIELD_CHARS);
    let mut text = format!(
        "{}  {:13}  {}  {}  sequence {}  {}",
        line.processed_at,
        line.status,
        if line.destination.is_empty() { "-".to_owned() } else { shown(&line.destination) },
        shown(&line.event_type),
        line.sequence,
        line.event_id,
    );
    if line.attempt > 1 {
        text.push_str(&format!("  attempt {}", line.attempt));
    }
    if let Some(id) = &line.message_id {
        text.push_str(&format!("  {}", shown(id)));
    }
    match &line.error {
        Some(error) => text.push_str(&format!("  {}", shown(error))),
        None => text.push_str(&format!("  {} ms", line.duration_ms)),
    }
    text
}
