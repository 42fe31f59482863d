//! `relay audit`.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;

use crate::audit::{Audit, Finding, Obligation, Report};
use crate::cli::run::explained;
use crate::cli::{database, runtime};
use crate::config::ConfigError;
use crate::config::destinations::destinations;
use crate::config::file::ConfigFile;
use crate::config::settings::Settings;
use crate::outbox::database::Kind;
use crate::outbox::postgres;
use crate::sink::redis::read_entries;

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
    /// Print one JSON document instead of text.
    #[arg(long)]
    json: bool,
}

pub(super) fn audit(settings: &Settings, file: &ConfigFile, args: &AuditArgs) -> anyhow::Result<ExitCode> {
    let database = database(settings)?;
    if database.kind() != Kind::Postgres {
        let reason = "relay audit reads PostgreSQL; DATABASE_URL names a SQLite file".to_owned();
        return Err(ConfigError::Contradiction(reason).into());
    }
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
    let report = runtime(1)?.block_on(async {
        let mut audit = Audit::default();
        read_entries(address, stream, |entry| audit.entry(entry)).await.map_err(|error| anyhow::anyhow!("{error}"))?;
        let since = postgres::audit::read(database.url(), name, &mut audit).await.map_err(explained)?;
        if let Some(path) = &args.obligations {
            obligations(path, &mut audit)?;
        }
        anyhow::Ok(audit.finish(since))
    })?;
    let repeated = args.exactly_once && report.repeats > 0;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print(&report);
    }
    Ok(if report.is_clean() && !repeated { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn obligations(path: &Path, audit: &mut Audit) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let place = || format!("{}, line {}", path.display(), number + 1);
        let obligation: Obligation = serde_json::from_str(&line.with_context(place)?).with_context(place)?;
        audit.obligation(&obligation);
    }
    Ok(())
}

fn print(report: &Report) {
    println!(
        "{} entries of {} events, {} repeats; {} still owed, {} dead letters",
        report.entries, report.events, report.repeats, report.pending, report.dead_letters
    );
    for (finding, words) in [
        (Finding::Lost, "lost"),
        (Finding::Ghost, "ghosts"),
        (Finding::Inversion, "inversions"),
        (Finding::Changed, "changed"),
        (Finding::Disagreement, "disagreements of the log"),
    ] {
        println!("{:6} {words}", report.count(finding));
    }
    for example in &report.examples {
        println!("       {example}");
    }
}
