//! `relay dead-letter`.

mod change;
mod look;

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::cli::filter::FilterArgs;
use crate::config::settings::Settings;
use crate::outbox::mend::State;

/// What is done with dead letters.
#[derive(Subcommand)]
pub(super) enum DeadLetterCommand {
    /// List them, the newest first; by default those that are neither redriven nor discarded.
    List(ListArgs),
    /// Show one with all that is known of it.
    Show(ShowArgs),
    /// Put them back into the outbox, the earliest event first, owed to the destination that they failed at.
    Redrive(Box<RedriveArgs>),
    /// Mark those that are not to be redriven. They stay, outside `list` and the summary.
    Discard(DiscardArgs),
    /// Delete those that were redriven or discarded. Asks first.
    Purge(PurgeArgs),
}

#[derive(Args)]
pub(super) struct ListArgs {
    /// Count them by destination and error instead.
    #[arg(long)]
    summary: bool,
    /// List those in this state.
    #[arg(long, value_name = "STATE", value_enum)]
    state: Option<State>,
    /// List at most so many.
    #[arg(long, value_name = "NUMBER", default_value = "50")]
    limit: NonZeroU32,
    /// Print one JSON document instead of text.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    filter: FilterArgs,
}

#[derive(Args)]
pub(super) struct ShowArgs {
    /// The id that `list` shows.
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    id: i64,
    /// Print the payload and the headers' values too.
    #[arg(long)]
    payload: bool,
    /// Print one JSON document instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct RedriveArgs {
    /// Give them to this destination instead.
    #[arg(long, value_name = "NAME")]
    to: Option<String>,
    /// Do so also if no relay has that destination.
    #[arg(long, requires = "to")]
    force: bool,
    /// Redrive one with another payload: the JSON in this file; - is standard input.
    #[arg(long, value_name = "FILE", requires = "ids")]
    payload: Option<PathBuf>,
    /// Redrive at most so many events a second.
    #[arg(long, value_name = "NUMBER")]
    rate: Option<NonZeroU32>,
    #[command(flatten)]
    how_many: HowMany,
    #[command(flatten)]
    filter: FilterArgs,
}

#[derive(Args)]
pub(super) struct DiscardArgs {
    /// Why they are not redriven.
    #[arg(long, value_name = "TEXT")]
    reason: String,
    /// Discard all that are open: needed where nothing else says which.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    how_many: HowMany,
    #[command(flatten)]
    filter: FilterArgs,
}

#[derive(Args)]
pub(super) struct PurgeArgs {
    /// Delete those in this state; `open` and `all` delete events that nobody has received.
    #[arg(long, value_name = "STATE", value_enum)]
    state: Option<State>,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    how_many: HowMany,
    #[command(flatten)]
    filter: FilterArgs,
}

#[derive(Args)]
struct HowMany {
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// Stop after so many, the earliest events first.
    #[arg(long, value_name = "NUMBER")]
    limit: Option<NonZeroU32>,
}

impl HowMany {
    /// The most that are chosen.
    fn most(&self) -> i64 {
        self.limit.map_or(i64::MAX, |limit| i64::from(limit.get()))
    }
}

pub(super) fn dead_letter(settings: &Settings, command: DeadLetterCommand) -> anyhow::Result<ExitCode> {
    match command {
        DeadLetterCommand::List(args) => look::list(settings, &args),
        DeadLetterCommand::Show(args) => look::show(settings, &args),
        DeadLetterCommand::Redrive(args) => change::redrive(settings, &args),
        DeadLetterCommand::Discard(args) => change::discard(settings, args),
        DeadLetterCommand::Purge(args) => change::purge(settings, &args),
    }
}
