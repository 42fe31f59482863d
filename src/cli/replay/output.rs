//! What `relay replay` says: a progress bar on a terminal, lines of the log elsewhere, and the result.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use crate::cli::{print, when};
use crate::event::{Event, PublishError};
use crate::outbox::past::{Extent, Identity, Selection};
use crate::relay::Endpoint;
use crate::relay::replay::Observer;
use crate::stderr;
use crate::text::shown;

/// How often the log says how far the replay is.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// How many refused events are named.
const NAMED: u64 = 100;

/// The longest text that is shown of an event, in characters.
const MAX_SHOWN_CHARS: usize = 300;

/// Why a replay ended.
pub(super) enum Ended {
    /// Everything was published or refused.
    Done,
    /// A signal came, or the destination is gone for good.
    Stopped,
    /// It could not go on, for this reason.
    Failed(String),
}

/// The output of one replay.
pub(super) struct Output {
    destination: String,
    target: String,
    json: bool,
    /// The options by which the replay goes on, without the place.
    options: String,
    bar: ProgressBar,
    on_terminal: bool,
    begun: Instant,
    logged: Instant,
    count: u64,
    published: u64,
    refused: u64,
}

impl Output {
    pub(super) fn new(endpoint: &Endpoint, selection: &Selection, rate: Option<f64>, json: bool) -> Self {
        let on_terminal = std::io::stderr().is_terminal();
        Self {
            destination: endpoint.name.clone(),
            target: endpoint.sink.target(),
            json,
            options: options(&endpoint.name, selection, rate),
            bar: ProgressBar::hidden(),
            on_terminal,
            begun: Instant::now(),
            logged: Instant::now(),
            count: 0,
            published: 0,
            refused: 0,
        }
    }

    /// Says that nothing is to be replayed, and which destinations the history has.
    pub(super) fn nothing(&self, known: &[String], after: Option<i64>) -> anyhow::Result<ExitCode> {
        if self.json {
            print(&format!("{}\n", json!({ "count": 0, "published": 0, "published_to": known })))?;
            return Ok(ExitCode::SUCCESS);
        }
        let after = after.map(|after| format!(" above sequence {after}")).unwrap_or_default();
        let known: Vec<String> = known.iter().map(|name| shown(name, MAX_SHOWN_CHARS)).collect();
        print(&format!(
            "nothing to replay: no event of event_history fits{after}; it has events that were published to {} (--from)\n",
            known.join(", ")
        ))?;
        Ok(ExitCode::SUCCESS)
    }

    /// Says what would be replayed.
    pub(super) fn dry_run(&self, extent: &Extent) -> anyhow::Result<ExitCode> {
        let (from, to) = (extent.from.map(when::shown), extent.to.map(when::shown));
        if self.json {
            let (first, last) = (extent.first, extent.last);
            let document = json!({
                "dry_run": true, "to": self.destination, "count": extent.count, "first_sequence": first, "last_sequence": last,
                "first_published_at": from, "last_published_at": to,
            });
            print(&format!("{document}\n"))?;
        } else {
            print(&format!(
                "{} would be published to {} ({}): sequences {} to {}, first published from {} to {}\n",
                events(extent.count),
                self.destination,
                shown(&self.target, MAX_SHOWN_CHARS),
                extent.first,
                extent.last,
                from.unwrap_or_default(),
                to.unwrap_or_default()
            ))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    pub(super) fn begin(&mut self, count: u64) {
        self.count = count;
        if self.on_terminal {
            self.bar = ProgressBar::with_draw_target(Some(count), ProgressDrawTarget::stderr());
            let style = "{bar:30} {human_pos} of {human_len} events, {per_sec}, {eta} left";
            if let Ok(style) = ProgressStyle::with_template(style) {
                self.bar.set_style(style);
            }
        }
        if self.target.ends_with("format payload") {
            self.say(
                "this destination gets the payload alone, so its consumers cannot tell a replayed event from a new one",
            );
        }
    }

    /// Says how far the replay is, where no bar does.
    pub(super) fn reached(&mut self, position: i64) {
        if !self.on_terminal && self.logged.elapsed() >= LOG_INTERVAL {
            self.logged = Instant::now();
            tracing::info!(published = self.published, of = self.count, sequence = position, "replaying");
        }
    }

    fn say(&self, text: &str) {
        if self.on_terminal { self.bar.println(text) } else { tracing::warn!("{text}") }
    }

    /// Says how the replay ended, and how it goes on. `lost`: why nothing can be published to the destination any more. `signal`:
    /// the exit code where a signal ended it.
    pub(super) fn end(
        &self,
        ended: Ended,
        position: i64,
        extent: &Extent,
        lost: Option<String>,
        signal: ExitCode,
    ) -> anyhow::Result<ExitCode> {
        self.bar.finish_and_clear();
        let is_done = matches!(ended, Ended::Done);
        let word = match &ended {
            Ended::Done => "done",
            Ended::Stopped => "stopped",
            Ended::Failed(_) => "failed",
        };
        let mut summary = format!(
            "{} of {} published to {} in {}",
            self.published,
            events(extent.count),
            self.destination,
            humantime::format_duration(Duration::from_secs(self.begun.elapsed().as_secs()))
        );
        if self.refused > 0 {
            summary.push_str(&format!(", {} refused and left out", self.refused));
        }
        let go_on = format!("relay replay {} --after {position}", self.options);
        let summary = if self.json {
            let document = json!({
                "ended": word, "to": self.destination, "count": extent.count, "published": self.published, "refused": self.refused,
                "position": position, "go_on": (!is_done).then_some(&go_on),
            });
            document.to_string()
        } else {
            summary
        };
        // The events of the destination `stdout` are there.
        if self.target == "stdout" {
            stderr::say(&summary)
        } else {
            print(&format!("{summary}\n"))?
        }
        let (reason, code) = match (ended, lost) {
            (Ended::Done, _) if self.refused == 0 => return Ok(ExitCode::SUCCESS),
            (Ended::Done, _) => return Ok(ExitCode::FAILURE),
            (Ended::Failed(reason), _) => (reason, ExitCode::FAILURE),
            (Ended::Stopped, Some(reason)) => (reason, ExitCode::FAILURE),
            (Ended::Stopped, None) => ("stopped".to_owned(), signal),
        };
        stderr::say(&format!(
            "relay: {reason}; to go on after sequence {position} (some later events may be published once more): {go_on}"
        ));
        Ok(code)
    }
}

impl Observer for Output {
    fn published(&mut self, count: u64) {
        self.published += count;
        self.bar.inc(count);
    }

    fn refused(&mut self, event: &Event, error: &PublishError) {
        self.refused += 1;
        self.bar.inc(1);
        if self.refused <= NAMED {
            let event_type = shown(&event.event_type, MAX_SHOWN_CHARS);
            let (sequence, id) = (event.row.id, event.event_id);
            self.say(&format!("refused and left out: {event_type}, sequence {sequence}, event_id {id}: {error}"));
        }
    }

    fn waits(&mut self, error: &PublishError) {
        self.say(&format!("{} does not take events, and the replay waits for it: {error}", self.destination));
    }
}

fn events(count: u64) -> String {
    if count == 1 { "1 event".to_owned() } else { format!("{count} events") }
}

/// Returns the options of the command that goes on. Times are given as moments, because "an hour ago" will be another one.
fn options(to: &str, selection: &Selection, rate: Option<f64>) -> String {
    let mut options = vec![("--to", to.to_owned())];
    if selection.published_to != to {
        options.push(("--from", selection.published_to.clone()));
    }
    options.extend(selection.since.map(|since| ("--since", when::shown(since))));
    options.push(("--until", when::shown(selection.until)));
    options.extend(selection.event_type.clone().map(|glob| ("--type", glob)));
    options.extend(selection.key.clone().map(|key| ("--key", key)));
    options.extend(selection.ids.iter().map(|id| match id {
        Identity::Event(id) => ("--id", id.to_string()),
        Identity::Sequence(sequence) => ("--id", sequence.to_string()),
    }));
    options.extend(rate.map(|rate| {
        ("--rate", if rate.fract() == 0.0 { format!("{rate}/s") } else { format!("{}/m", (rate * 60.0).round()) })
    }));
    options.into_iter().map(|(name, value)| format!("{name} {}", quoted(&value))).collect::<Vec<_>>().join(" ")
}

/// Returns a word as a shell takes it.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.:/@+,".contains(c);
    let word = shown(word, MAX_SHOWN_CHARS);
    if !word.is_empty() && word.chars().all(is_plain) { word } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;

    use super::*;

    #[test]
    fn the_command_that_goes_on_names_everything_that_was_chosen() {
        let selection = Selection {
            published_to: "b".to_owned(),
            event_type: Some("order.*".to_owned()),
            key: Some("o'clock:1".to_owned()),
            ids: vec![Identity::Sequence(7)],
            since: Some(OffsetDateTime::UNIX_EPOCH),
            until: OffsetDateTime::UNIX_EPOCH + time::Duration::seconds(1),
        };
        assert_eq!(
            options("a", &selection, Some(0.5)),
            "--to a --from b --since 1970-01-01T00:00:00Z --until 1970-01-01T00:00:01Z --type 'order.*' --key 'o'\\''clock:1' \
             --id 7 --rate 30/m"
        );
    }
}
