//! `relay replay`.

mod output;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::cli::interrupt::Interrupt;
use crate::cli::run::{explained, stop_when_lost};
use crate::cli::when::{self, Moment};
use crate::cli::{database, runtime};
use crate::config::ConfigError;
use crate::config::destinations::{ConfiguredDestination, destinations};
use crate::config::file::ConfigFile;
use crate::config::settings::Settings;
use crate::event::Event;
use crate::outbox::past::{Extent, Identity, Past, ReplayLock, Selection};
use crate::relay::replay::{PageEnd, Replay};
use output::{Ended, Output};

/// The most events of a page.
const PAGE_EVENTS: usize = 1000;

/// About how many bytes a page has.
const PAGE_BYTES: usize = 4 << 20;

/// The events of the first page, whose size nobody knows.
const FIRST_PAGE_EVENTS: usize = 16;

/// How many sequences one question covers at first. It doubles while few of them fit.
const FIRST_WINDOW: i64 = 10_000;

/// How often it is made sure that this process still has the right to replay.
const LOCK_INTERVAL: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub(super) struct ReplayArgs {
    /// The destination to publish to.
    #[arg(long, value_name = "DESTINATION")]
    to: String,
    /// Events that were published to this destination; without it, those that were published to that of --to.
    #[arg(long, value_name = "DESTINATION")]
    from: Option<String>,
    /// Only what was published since then: 2026-11-29T12:00:00Z, 2026-11-29, or 2h for two hours ago.
    #[arg(long, value_name = "TIME", value_parser = when::moment)]
    since: Option<Moment>,
    /// Only what was published before then.
    #[arg(long, value_name = "TIME", value_parser = when::moment)]
    until: Option<Moment>,
    /// Only events whose type fits this glob, as in order.*
    #[arg(long = "type", value_name = "GLOB")]
    event_type: Option<String>,
    /// Only events of this key, as in order:42.
    #[arg(long)]
    key: Option<String>,
    /// Only the event with this event_id or sequence; may be given several times.
    #[arg(long = "id", value_name = "ID", value_parser = identity)]
    ids: Vec<Identity>,
    /// Only events with a sequence above this one: where a replay that was stopped goes on.
    #[arg(long, value_name = "SEQUENCE")]
    after: Option<i64>,
    /// The most events a second, as in 100/s.
    #[arg(long, value_name = "COUNT/s", value_parser = rate)]
    rate: Option<f64>,
    /// Count the events, and publish none.
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON document instead of text.
    #[arg(long)]
    json: bool,
}

fn identity(text: &str) -> Result<Identity, String> {
    if let Ok(sequence) = text.parse() {
        return Ok(Identity::Sequence(sequence));
    }
    let id =
        text.parse::<Uuid>().map_err(|_| "an id is the UUID of an event, or the number of its sequence".to_owned());
    id.map(Identity::Event)
}

fn rate(text: &str) -> Result<f64, String> {
    let (count, seconds) = match text.split_once('/') {
        None | Some((_, "s")) => (text.trim_end_matches("/s"), 1.0),
        Some((count, "m" | "min")) => (count, 60.0),
        Some(_) => ("", 1.0),
    };
    let count = count.trim().parse::<u32>().ok().filter(|count| (1..=1_000_000).contains(count));
    count
        .map(|count| f64::from(count) / seconds)
        .ok_or_else(|| "a rate is 1/s to 1000000/s, such as 100/s, or 30/m for so many a minute".to_owned())
}

pub(super) fn replay(settings: &Settings, file: &ConfigFile, args: &ReplayArgs) -> anyhow::Result<ExitCode> {
    let database = database(settings)?;
    let destination = destination(settings, file, &args.to)?;
    let runtime = runtime(1)?;
    let ended = runtime.block_on(async {
        let interrupt = Interrupt::handle().context("cannot listen for signals")?;
        let endpoint = destination.open(settings).await?;
        let counted = async {
            let mut past = database.operate().past().await.map_err(explained)?;
            let selection = selection(args, past.now().await.map_err(explained)?)?;
            let lock = if args.dry_run { None } else { Some(lock(past.as_mut()).await?) };
            let extent = extent(past.as_mut(), &selection, args.after).await?;
            anyhow::Ok((past, selection, lock, extent))
        };
        let (mut past, selection, lock, extent) = tokio::select! {
            counted = counted => counted?,
            () = interrupt.comes() => return Ok(interrupt.exit_code()),
        };
        let output = Output::new(&endpoint, &selection, args.rate, args.json);
        if extent.count == 0 {
            return output.nothing(&past.destinations().await.map_err(explained)?, args.after);
        }
        let Some(lock) = lock else { return output.dry_run(&extent) };
        let lost = stop_when_lost(std::slice::from_ref(&endpoint), interrupt.token());
        let replay = Replay::new(endpoint, args.rate, interrupt.token().clone());
        let mut work = Work { past, lock, selection, replay, output, position: extent.first - 1 };
        let ended = work.run(&extent).await;
        let lost = lost.get().cloned();
        work.output.end(ended, work.position, &extent, lost, interrupt.exit_code())
    });
    // Everything is done. A write to a standard output that nobody reads never ends, so it is not waited for.
    runtime.shutdown_background();
    ended
}

/// Returns what the options choose. `now` is by the database's clock, as are the times of the history.
fn selection(args: &ReplayArgs, now: OffsetDateTime) -> Result<Selection, ConfigError> {
    let now = when::milliseconds(now);
    let (since, until) = (args.since.map(|since| since.at(now)), args.until.map(|until| until.at(now)));
    let until = until.map_or(now, |until| until.min(now));
    if since.is_some_and(|since| since >= until) {
        return Err(ConfigError::Contradiction("--since is not before --until, and not before now".to_owned()));
    }
    Ok(Selection {
        published_to: args.from.as_ref().unwrap_or(&args.to).clone(),
        event_type: args.event_type.clone(),
        key: args.key.clone(),
        ids: args.ids.clone(),
        since,
        until,
    })
}

/// Returns the destination with this name.
fn destination(settings: &Settings, file: &ConfigFile, name: &str) -> anyhow::Result<ConfiguredDestination> {
    let (destinations, _) = destinations(settings, file)?;
    let names: Vec<String> = destinations.iter().map(|destination| destination.name.clone()).collect();
    let found = destinations.into_iter().find(|destination| destination.name == name).ok_or_else(|| {
        ConfigError::Contradiction(format!("there is no destination {name:?}; there are {}", names.join(", ")))
    })?;
    match found.obstacle() {
        Some(reason) => Err(ConfigError::Contradiction(reason.to_owned()).into()),
        None => Ok(found),
    }
}

async fn lock(past: &mut dyn Past) -> anyhow::Result<Box<dyn ReplayLock>> {
    let lock = past.lock_replay().await.map_err(explained)?;
    lock.ok_or_else(|| {
        anyhow::anyhow!("another replay of this database is at work; only one is at a time, so wait for it")
    })
}

/// Measures what is to be replayed.
async fn extent(past: &mut dyn Past, selection: &Selection, after: Option<i64>) -> anyhow::Result<Extent> {
    let history = past.history().await.map_err(explained)?;
    if history.is_empty {
        anyhow::bail!(
            "there is no history: event_history is empty, so nothing can be replayed; with EVENT_HISTORY_ENABLED=true a relay \
             keeps what it publishes from then on"
        );
    }
    if let (Some(begins), Some(since)) = (history.begins, selection.since)
        && since < begins
    {
        let begins = when::shown(begins);
        anyhow::bail!(
            "event_history begins at {begins}, and what was published before is gone (RELAY_HISTORY_RETENTION); \
             --since {begins} replays what there is"
        );
    }
    past.measure(selection, after.unwrap_or(i64::MIN)).await.map_err(explained)
}

/// A replay at work.
struct Work {
    past: Box<dyn Past>,
    lock: Box<dyn ReplayLock>,
    selection: Selection,
    replay: Replay,
    output: Output,
    /// All events with a sequence up to this one are done.
    position: i64,
}

impl Work {
    async fn run(&mut self, extent: &Extent) -> Ended {
        let (mut limit, mut window, mut locked) = (FIRST_PAGE_EVENTS, FIRST_WINDOW, Instant::now());
        self.output.begin(extent.count);
        while self.position < extent.last {
            if locked.elapsed() >= LOCK_INTERVAL {
                if let Err(error) = self.lock.require().await {
                    return Ended::Failed(error.explain());
                }
                locked = Instant::now();
            }
            let up_to = self.position.saturating_add(window).min(extent.last);
            let mut events = match self.past.events(&self.selection, self.position, up_to, limit).await {
                Ok(events) => events,
                Err(error) => return Ended::Failed(error.explain()),
            };
            let is_full = events.len() >= limit;
            let done_up_to = if is_full { whole_sequences(&mut events) } else { up_to };
            if !is_full && events.len() * 4 < limit {
                window = window.saturating_mul(2);
            }
            if !events.is_empty() {
                let bytes: usize = events.iter().map(Event::bytes).sum();
                limit = (PAGE_BYTES / (bytes / events.len()).max(1)).clamp(1, PAGE_EVENTS);
            }
            match self.replay.publish(events, &mut self.output).await {
                PageEnd::Done => self.position = done_up_to,
                PageEnd::Stopped(position) => {
                    self.position = position.max(self.position);
                    return Ended::Stopped;
                }
                PageEnd::Misconfigured(position, error) => {
                    self.position = position.max(self.position);
                    return Ended::Failed(format!("the destination is configured wrongly: {error}"));
                }
            }
            self.output.reached(self.position);
        }
        Ended::Done
    }
}

/// Leaves the events of the last sequence out, of which there may be more, and returns the last one that is left. If all have one
/// sequence, they stay: nobody has so many events of one sequence.
fn whole_sequences(events: &mut Vec<Event>) -> i64 {
    let last = events.last().map_or(0, |event| event.row.id);
    if events.first().is_some_and(|event| event.row.id != last) {
        events.retain(|event| event.row.id != last);
    }
    events.last().map_or(0, |event| event.row.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_count_in_a_second_or_a_minute() {
        assert_eq!(rate("100/s"), Ok(100.0));
        assert_eq!(rate("5"), Ok(5.0));
        assert_eq!(rate("30/m"), Ok(0.5));
        for text in ["", "0/s", "-1/s", "1/h", "many", "1e3/s", "2000000/s"] {
            assert!(rate(text).is_err_and(|reason| reason.contains("100/s")), "{text}");
        }
    }

    #[test]
    fn an_id_is_a_uuid_or_a_sequence() {
        assert_eq!(identity("7"), Ok(Identity::Sequence(7)));
        let id = "0190f5e4-0000-4000-8000-000000000001";
        assert_eq!(identity(id), Ok(Identity::Event(id.parse().expect("a UUID"))));
        assert!(identity("order:42").is_err());
    }
}
