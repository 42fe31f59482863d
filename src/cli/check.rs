//! `relay check`.

use std::fmt::Write;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;

use crate::cli::{database, print, runtime};
use crate::config::ConfigError;
use crate::config::destinations::{destinations, longest_timeout};
use crate::config::file::ConfigFile;
use crate::config::settings::Settings;
use crate::outbox::standstill::is_blocked_at;
use crate::outbox::{Check, CheckRequest, Usage};
use crate::relay::{Endpoint, configuration};
use crate::text::shown;

/// The longest line of the output, in characters.
const MAX_LINE_CHARS: usize = 4000;

/// How long a destination may take to answer. It is short, because a person waits.
const CHECK_TIMEOUT: Duration = Duration::from_secs(15);

pub(super) fn check(
    settings: &Settings,
    file: &ConfigFile,
    in_force: &[(String, String, &'static str)],
    json: bool,
) -> anyhow::Result<ExitCode> {
    let database = database(settings)?;
    let (destinations, router) = destinations(settings, file)?;
    let usage = Usage { several_destinations: destinations.len() > 1, history: settings.history };
    let checks = runtime(1)?.block_on(async {
        let names: Vec<_> = destinations.iter().map(|destination| destination.name.clone()).collect();
        let publish_timeout = longest_timeout(&destinations);
        let mut endpoints = Vec::new();
        for destination in destinations {
            endpoints.push(destination.open(settings).await?);
        }
        let configuration = configuration(&endpoints, &router, settings.relay().unrouted);
        let lanes = settings.relay().lanes;
        let request =
            CheckRequest { destinations: &names, publish_timeout, usage, lanes, configuration: &configuration };
        let mut checks = database.operate().check(request).await;
        for Endpoint { name, sink, .. } in endpoints {
            let result = match tokio::time::timeout(CHECK_TIMEOUT, sink.check()).await {
                Ok(result) => result.map_err(|error| error.to_string()),
                Err(_) => {
                    Err(format!("no answer within {} s; is it up, and is its address right?", CHECK_TIMEOUT.as_secs()))
                }
            };
            // A destination that fails takes no other events either, and its events should not be dead-lettered.
            if result.is_err() {
                checks.retain(|check| !matches!(&check.result, Err(text) if is_blocked_at(text, &name)));
            }
            checks.push(Check { subject: format!("destination {name}"), result });
        }
        Ok::<_, ConfigError>(checks)
    })?;
    if json {
        let settings: serde_json::Map<_, _> = in_force
            .iter()
            .map(|(name, value, from)| (name.clone(), json!({ "value": value, "from": from })))
            .collect();
        let checks: Vec<_> = checks
            .iter()
            .map(|check| match &check.result {
                Ok(found) => json!({ "subject": check.subject, "ok": true, "found": found }),
                Err(problem) => json!({ "subject": check.subject, "ok": false, "problem": problem }),
            })
            .collect();
        print(&format!("{}\n", json!({ "settings": settings, "checks": checks })))?;
    } else {
        let mut text = String::new();
        let width = in_force.iter().map(|(name, ..)| name.len()).max().unwrap_or_default();
        for (name, value, from) in in_force {
            writeln!(text, "{name:width$}  {}  ({from})", shown(value, MAX_LINE_CHARS))?;
        }
        writeln!(text)?;
        for check in &checks {
            let (word, said) = match &check.result {
                Ok(found) => ("ok  ", found),
                Err(problem) => ("FAIL", problem),
            };
            writeln!(text, "{word}  {}: {}", shown(&check.subject, MAX_LINE_CHARS), shown(said, MAX_LINE_CHARS))?;
        }
        print(&text)?;
    }
    let failed = checks.iter().any(|check| check.result.is_err());
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
