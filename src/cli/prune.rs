//! `relay prune`.

use std::process::ExitCode;
use std::time::Duration;

use bytesize::ByteSize;
use serde_json::json;

use crate::cli::run::explained;
use crate::cli::{database, print, runtime};
use crate::config::settings::Settings;
use crate::outbox::past::{Expired, Kept};

#[derive(clap::Args)]
pub(super) struct PruneArgs {
    /// Show what would be deleted, and delete nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON document instead of text.
    #[arg(long)]
    json: bool,
}

pub(super) fn prune(settings: &Settings, args: &PruneArgs) -> anyhow::Result<ExitCode> {
    let database = database(settings)?;
    let tables = [(Kept::Log, settings.log_retention), (Kept::History, settings.history_retention)];
    let found = runtime(1)?.block_on(async {
        let mut past = database.operate().past().await.map_err(explained)?;
        let mut found = Vec::new();
        for (kept, retention) in tables {
            let expired = past.expired(kept, retention).await.map_err(explained)?;
            if !args.dry_run && expired.rows + expired.days.len() as u64 > 0 {
                past.prune(kept, retention).await.map_err(explained)?;
            }
            if !args.json {
                print(&text(kept, retention, &expired, args.dry_run))?;
            }
            found.push((kept, retention, expired));
        }
        anyhow::Ok(found)
    })?;
    if args.json {
        let tables: Vec<_> = found
            .iter()
            .map(|(kept, retention, expired)| {
                let Expired { days, rows, bytes } = expired;
                let (table, retention) = (kept.table(), retention.as_secs());
                json!({ "table": table, "retention_seconds": retention, "days": days, "rows": rows, "bytes": bytes })
            })
            .collect();
        print(&format!("{}\n", json!({ "dry_run": args.dry_run, "tables": tables })))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn text(kept: Kept, retention: Duration, expired: &Expired, dry_run: bool) -> String {
    let retention = humantime::format_duration(retention).to_string().replace(' ', "");
    let Expired { days, rows, bytes } = expired;
    let what = match (days.as_slice(), *rows) {
        ([], 0) => "nothing is older".to_owned(),
        ([], rows) => format!("{rows} rows"),
        ([day], rows) => format!("the day {day}, about {rows} rows"),
        ([first, .., last], rows) => format!("{} days from {first} to {last}, about {rows} rows", days.len()),
    };
    let size = match bytes {
        Some(bytes) if *bytes > 0 => format!(", {}", ByteSize::b(*bytes).display().iec()),
        _ => String::new(),
    };
    let done = match (days.is_empty() && *rows == 0, dry_run) {
        (true, _) => "",
        (false, true) => " would be deleted",
        (false, false) => " deleted",
    };
    format!("{}, kept for {retention}: {what}{size}{done}\n", kept.table())
}
