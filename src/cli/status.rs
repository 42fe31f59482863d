//! `relay status`.

mod view;

use std::io::{ErrorKind, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;

use crate::cli::interrupt::Interrupt;
use crate::cli::run::explained;
use crate::cli::{database, runtime};
use crate::config::settings::Settings;
use crate::outbox::status::StatusRequest;

/// How often `--watch` asks.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// The width of what is not a terminal, in columns.
const WIDTH: usize = 100;

/// Moves to the upper left corner of a terminal and clears what is below.
const CLEAR: &str = "\x1b[H\x1b[2J\x1b[3J";

#[derive(Args)]
pub(super) struct StatusArgs {
    /// Print one JSON document instead of text. It has the blocked keys only with --keys.
    #[arg(long, conflicts_with = "watch")]
    json: bool,
    /// Show it anew every 2 s, until Ctrl-C.
    #[arg(long)]
    watch: bool,
    /// Also list the keys that wait for an event that failed: what blocks each, since when, why, and how many events wait.
    #[arg(long)]
    keys: bool,
}

pub(super) fn status(settings: &Settings, args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let database = database(settings)?;
    let request = StatusRequest { keys: args.keys };
    let operate = database.operate();
    runtime(1)?.block_on(async {
        if args.watch {
            // A shell lets what it starts in the background ignore Ctrl-C.
            Interrupt::end_at_once().context("cannot listen for signals")?;
        }
        loop {
            let read = operate.status(request).await;
            let text = match read {
                Ok(status) if args.json => serde_json::to_string_pretty(&status)? + "\n",
                Ok(status) => view::text(&status, width(), args.keys),
                // The database may be back soon.
                Err(error) if args.watch => format!("{}\n", error.explain()),
                Err(error) => return Err(explained(error)),
            };
            let clear = if args.watch && std::io::stdout().is_terminal() { CLEAR } else { "" };
            if !written(&format!("{clear}{text}"))? {
                return Ok(ExitCode::SUCCESS);
            }
            if !args.watch {
                return Ok(ExitCode::SUCCESS);
            }
            if clear.is_empty() && !written("\n")? {
                return Ok(ExitCode::SUCCESS);
            }
            tokio::time::sleep(WATCH_INTERVAL).await;
        }
    })
}

/// Writes to standard output. Returns false if its reader has gone, as `head` does when it has enough.
fn written(text: &str) -> anyhow::Result<bool> {
    let mut output = std::io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        written => written.map(|()| true).context("cannot write to standard output"),
    }
}

/// The columns of the terminal, or those that `COLUMNS` gives.
fn width() -> usize {
    let set = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let terminal = || terminal_size::terminal_size().map(|(terminal_size::Width(columns), _)| usize::from(columns));
    set.or_else(terminal).filter(|columns| *columns > 0).unwrap_or(WIDTH)
}
