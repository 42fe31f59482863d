//! `relay emit`.

use std::io::Read;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;

use crate::cli::run::explained;
use crate::cli::{database, print, runtime};
use crate::config::ConfigError;
use crate::config::settings::Settings;
use crate::emit::EmitError;
use crate::event::NewEvent;
use crate::outbox::OutboxError;
use crate::outbox::operate::Unemitted;

#[derive(Args)]
pub(super) struct EmitArgs {
    /// What happened, as in order.created.
    event_type: String,
    /// The payload's JSON; - reads it from standard input.
    #[arg(default_value = "{}")]
    payload: String,
    /// First half of the ordering key, as in order.
    #[arg(long, value_name = "TYPE", requires = "aggregate_id")]
    aggregate_type: Option<String>,
    /// Second half of the ordering key, as in 42; without it no order is kept.
    #[arg(long, value_name = "ID")]
    aggregate_id: Option<String>,
    /// The module or service that emits it.
    #[arg(long, default_value = "")]
    source: String,
    /// A header; may be given several times.
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,
    /// Shared by all events of one business operation.
    #[arg(long, value_name = "ID")]
    correlation_id: Option<String>,
    /// What caused it.
    #[arg(long, value_name = "ID")]
    causation_id: Option<String>,
    /// Version of the payload's schema.
    #[arg(long, value_name = "NUMBER", default_value = "1")]
    schema_version: i32,
    /// 0 to 9, 9 first.
    #[arg(long, default_value = "0", value_parser = clap::value_parser!(u8).range(0..=9))]
    priority: u8,
    /// Not before this time from now, as in 90s or 2h.
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    delay: Duration,
}

/// Reads a header.
///
/// # Errors
/// How one is written.
pub(super) fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write it as name=value")?;
    Ok((name.to_owned(), value.to_owned()))
}

pub(super) fn emit(settings: &Settings, args: EmitArgs) -> anyhow::Result<ExitCode> {
    let database = database(settings)?;
    let mut payload = args.payload;
    if payload == "-" {
        payload = String::new();
        std::io::stdin().read_to_string(&mut payload).context("cannot read the payload from standard input")?;
    }
    let mut event = NewEvent::from_json(args.event_type, payload)
        .source(args.source)
        .schema_version(args.schema_version)
        .priority(args.priority)
        .delay(args.delay);
    if let Some(id) = args.aggregate_id {
        event = event.key(args.aggregate_type.unwrap_or_default(), id);
    }
    if let Some(id) = args.correlation_id {
        event = event.correlation_id(id);
    }
    if let Some(id) = args.causation_id {
        event = event.causation_id(id);
    }
    for (name, value) in args.headers {
        event = event.header(name, value);
    }
    let emitted = runtime(1)?.block_on(database.operate().emit(event));
    let event_id = emitted.map_err(|error| match error {
        // Content that is refused counts as wrong usage.
        Unemitted::Refused(reason) => ConfigError::Contradiction(reason).into(),
        Unemitted::Outbox(error) => explained(error),
        Unemitted::Emit(EmitError::Insert(source)) => {
            explained(OutboxError::Query { operation: "emit the event", source, advice: None })
        }
        Unemitted::Emit(error) => error.into(),
    })?;
    print(&format!("{event_id}\n")).with_context(|| format!("event {event_id} was emitted"))?;
    Ok(ExitCode::SUCCESS)
}
