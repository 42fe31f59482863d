//! `relay audit`.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::audit::{Audit, Finding, Judgement, Obligation, Report};
use crate::cli::run::explained;
use crate::cli::{database, print, runtime};
use crate::config::ConfigError;
use crate::config::destinations::destinations;
use crate::config::file::ConfigFile;
use crate::config::settings::Settings;
use crate::event::PublishError;
use crate::outbox::operate::Feature;
use crate::sink::redis::StreamReader;

#[derive(clap::Args)]
pub(super) struct AuditArgs {
    /// The destination whose stream is audited; may be left out where only one is a stream of a fixed name.
    #[arg(long, value_name = "NAME")]
    destination: Option<String>,
    /// What the producers have promised: one JSON object a line with `event_id`, `key`, `sequence`, `sha256`, `committed`.
    #[arg(long, value_name = "FILE")]
    obligations: Option<PathBuf>,
    /// Fail where an event arrived more than once, too.
    #[arg(long)]
    exactly_once: bool,
    /// Do not judge the order by the sequence: where events are delayed, or those of a key have several priorities.
    #[arg(long)]
    any_order: bool,
    /// Print one JSON document instead of text.
    #[arg(long)]
    json: bool,
}

pub(super) fn audit(settings: &Settings, file: &ConfigFile, args: &AuditArgs) -> anyhow::Result<ExitCode> {
    let store = database(settings)?.operate();
    store.require(Feature::Audit).map_err(|error| ConfigError::Contradiction(error.explain()))?;
    let (destinations, _) = destinations(settings, file)?;
    let mut streams: Vec<_> = destinations
        .iter()
        .filter(|destination| args.destination.as_ref().is_none_or(|name| *name == destination.name))
        .filter_map(|destination| Some((&destination.name, destination.fixed_stream()?)))
        .collect();
    let (Some((name, (address, stream))), true) = (streams.pop(), streams.is_empty()) else {
        let reason = "name one destination that is a stream of a fixed name, by --destination".to_owned();
        return Err(ConfigError::Contradiction(reason).into());
    };
    let obligations = args.obligations.as_deref().map(read_obligations).transpose()?.unwrap_or_default();
    let report = runtime(1)?.block_on(async {
        let unreadable = |error: PublishError| anyhow::anyhow!("{error}");
        let mut audit = Audit::default();
        let mut reader = StreamReader::open(&address, &stream).await.map_err(unreadable)?;
        let first = reader.read(|entry| match entry {
            Some(entry) => audit.entry(entry),
            None => audit.foreign_entry(),
        });
        first.await.map_err(unreadable)?;
        let recorded_since = store.audit(name, &mut audit).await.map_err(explained)?;
        let later = reader.read(|entry| entry.into_iter().for_each(|entry| audit.later_entry(entry.event_id)));
        later.await.map_err(unreadable)?;
        let trimmed = reader.trimmed().await.map_err(unreadable)?;
        for obligation in &obligations {
            audit.obligation(obligation);
        }
        anyhow::Ok(audit.finish(Judgement { recorded_since, trimmed, in_sequence: !args.any_order }))
    })?;
    let repeated = args.exactly_once && report.repeats > 0;
    if args.json {
        print(&format!("{}\n", serde_json::to_string(&report)?))?;
    } else {
        print(&text(&report))?;
    }
    Ok(if report.is_clean() && !repeated { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn read_obligations(path: &Path) -> Result<Vec<Obligation>, ConfigError> {
    let invalid = |reason: String| ConfigError::Invalid { setting: "--obligations".to_owned(), reason };
    let file = File::open(path).map_err(|error| invalid(format!("cannot open {}: {error}", path.display())))?;
    let line = |(number, line): (usize, std::io::Result<String>)| {
        let place = |error: String| invalid(format!("{}, line {}: {error}", path.display(), number + 1));
        serde_json::from_str(&line.map_err(|error| place(error.to_string()))?).map_err(|error| place(error.to_string()))
    };
    BufReader::new(file).lines().enumerate().map(line).collect()
}

fn text(report: &Report) -> String {
    let mut text = format!(
        "{} entries of {} events, {} repeats, {} entries of others or of replays; {} still owed, {} dead letters\n",
        report.entries, report.events, report.repeats, report.foreign, report.pending, report.dead_letters
    );
    for (finding, words) in [
        (Finding::Lost, "lost"),
        (Finding::Ghost, "ghosts"),
        (Finding::Inversion, "inversions"),
        (Finding::Changed, "changed"),
        (Finding::Disagreement, "disagreements of the log"),
    ] {
        text.push_str(&format!("{:6} {words}\n", report.count(finding)));
    }
    for example in &report.examples {
        text.push_str(&format!("       {example}\n"));
    }
    text
}
