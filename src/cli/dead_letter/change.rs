//! `relay dead-letter redrive`, `discard` and `purge`.

use std::io::{IsTerminal, Read, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::{DiscardArgs, HowMany, PurgeArgs, RedriveArgs};
use crate::cli::batches::{self, Done};
use crate::cli::filter::FilterArgs;
use crate::cli::run::explained;
use crate::cli::waiting::require_destination;
use crate::cli::{database, runtime, tell};
use crate::config::ConfigError;
use crate::config::settings::Settings;
use crate::outbox::mend::{Action, CommandId, Filter, Mend, State};
use crate::text::shown;

use super::look::summary;

/// What a command does, in words.
struct Words {
    /// As in "redrive".
    verb: &'static str,
    /// As in "redriven".
    done: &'static str,
}

const REDRIVE: Words = Words { verb: "redrive", done: "redriven" };
const DISCARD: Words = Words { verb: "discard", done: "discarded" };
const PURGE: Words = Words { verb: "purge", done: "purged" };

pub(super) fn redrive(settings: &Settings, args: &RedriveArgs) -> anyhow::Result<ExitCode> {
    let payload = args.payload.as_deref().map(read_payload).transpose()?;
    if args.to.as_deref() == Some("") {
        return Err(invalid("--to", "the name of a destination").into());
    }
    let action = Action::Redrive { to: args.to.clone(), payload };
    let rate = args.rate.map(|rate| rate.get());
    change(
        settings,
        &Change { action, words: REDRIVE, state: None, rate, ask: false, force: args.force },
        &args.filter,
        &args.how_many,
    )
}

pub(super) fn discard(settings: &Settings, args: DiscardArgs) -> anyhow::Result<ExitCode> {
    let DiscardArgs { reason, all, how_many, filter } = args;
    if reason.trim().is_empty() {
        return Err(invalid("--reason", "why they are not redriven").into());
    }
    if filter.is_empty() && !all {
        let reason = "say which dead letters, such as --id 7 or --error CODE, or --all".to_owned();
        return Err(ConfigError::Contradiction(reason).into());
    }
    let action = Action::Discard { reason };
    change(
        settings,
        &Change { action, words: DISCARD, state: None, rate: None, ask: false, force: false },
        &filter,
        &how_many,
    )
}

pub(super) fn purge(settings: &Settings, args: &PurgeArgs) -> anyhow::Result<ExitCode> {
    let ask = !args.yes && !args.how_many.dry_run;
    if ask && !std::io::stdin().is_terminal() {
        let reason = "purge deletes for good and asks first, and standard input is no terminal: give --yes".to_owned();
        return Err(ConfigError::Contradiction(reason).into());
    }
    let change_ = Change { action: Action::Purge, words: PURGE, state: args.state, rate: None, ask, force: false };
    change(settings, &change_, &args.filter, &args.how_many)
}

fn invalid(setting: &str, reason: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { setting: setting.to_owned(), reason: reason.into() }
}

/// Reads the payload of one that is corrected, which must be JSON. Its text is never shown.
fn read_payload(path: &Path) -> anyhow::Result<String> {
    let text = if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(path)
    };
    let text = text.map_err(|error| invalid("--payload", format!("cannot read {}: {error}", path.display())))?;
    let parsed: Result<serde::de::IgnoredAny, _> = serde_json::from_str(&text);
    match parsed {
        Ok(_) => Ok(text.trim().to_owned()),
        Err(error) => {
            let place = format!("line {} column {}", error.line(), error.column());
            Err(invalid("--payload", format!("{} is not JSON at {place}", path.display())).into())
        }
    }
}

/// One command that changes dead letters.
struct Change {
    action: Action,
    words: Words,
    /// The state that was asked for.
    state: Option<State>,
    /// The most events a second.
    rate: Option<u32>,
    /// A person must agree.
    ask: bool,
    /// Any name is taken for a destination.
    force: bool,
}

fn change(settings: &Settings, change: &Change, filter: &FilterArgs, how_many: &HowMany) -> anyhow::Result<ExitCode> {
    let Change { action, words, .. } = change;
    let database = database(settings)?;
    runtime(1)?.block_on(async {
        let mut mend = database.operate().mend().await.map_err(explained)?;
        let mut command = CommandId::new(filter.filter(&mut *mend).await?);
        command.filter.state = change.state;
        if let (Action::Redrive { to: Some(to), .. }, false) = (action, change.force) {
            require_destination(&mut *mend, to).await?;
        }
        require_fit(&mut *mend, action, &command.filter.ids).await?;
        let mut choice = command.filter.clone();
        if choice.ids.is_empty() && choice.state.is_none() {
            choice.state = Some(action.usual_state());
        }
        let ids = mend.choose(&choice, how_many.most()).await.map_err(explained)?;
        let count = ids.len();
        if count == 0 {
            return tell(&format!("no dead letter matches; nothing to {}\n", words.verb));
        }
        if matches!(action, Action::Redrive { payload: Some(_), .. }) && count > 1 {
            return Err(invalid("--payload", "it is for one dead letter: give one --id").into());
        }
        if how_many.dry_run || change.ask {
            tell(&would(&mut *mend, words, &choice, count).await?)?;
        }
        if how_many.dry_run {
            return Ok(ExitCode::SUCCESS);
        }
        if change.ask && !agreed(words, count)? {
            bail!("nothing was {}", words.done);
        }
        let done =
            batches::run(&ids, batches::MOST, change.rate, (words.done, count as u64), async |batch: &[i64]| {
                mend.apply(action, &command, batch).await
            })
            .await?;
        finish(words, &done, count)
    })
}

/// Says what became of the command, and returns its exit code.
fn finish(words: &Words, done: &Done, count: usize) -> anyhow::Result<ExitCode> {
    let (verb, past) = (words.verb, words.done);
    match &done.failed {
        Some(error) => bail!("{past} {} of {count}, then: {}; run it again to go on", done.count, error.explain()),
        None if done.interrupted.is_some() => {
            tell(&format!(
                "{past} {} of {count} dead letters, then stopped; run it again to {verb} the rest\n",
                done.count
            ))?;
        }
        None => {
            tell(&format!("{past} {} dead letter{}\n", done.count, if done.count == 1 { "" } else { "s" }))?;
        }
    }
    Ok(done.interrupted.unwrap_or(ExitCode::SUCCESS))
}

/// Fails if an id that was given is unknown, or names a dead letter with which this cannot be done.
async fn require_fit(mend: &mut dyn Mend, action: &Action, ids: &[i64]) -> anyhow::Result<()> {
    for chunk in ids.chunks(1000) {
        let filter = Filter { ids: chunk.to_vec(), ..Filter::default() };
        let found = mend.dead_letters(&filter, i64::MAX).await.map_err(explained)?;
        if let Some(id) = chunk.iter().find(|id| !found.iter().any(|letter| letter.id == **id)) {
            bail!("there is no dead letter {id}");
        }
        for letter in found {
            let by =
                |who: &Option<String>| who.as_deref().map(|who| format!(" by {}", shown(who, 100))).unwrap_or_default();
            match (action, &letter.redriven_at, &letter.discarded_at) {
                (Action::Redrive { .. } | Action::Discard { .. }, Some(at), _) => {
                    bail!("dead letter {} has been redriven already, at {at}{}", letter.id, by(&letter.redriven_by))
                }
                (Action::Discard { .. }, None, Some(at)) => {
                    bail!("dead letter {} has been discarded already, at {at}{}", letter.id, by(&letter.discarded_by))
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// Says what would be done.
async fn would(mend: &mut dyn Mend, words: &Words, choice: &Filter, count: usize) -> anyhow::Result<String> {
    let now = mend.now().await.map_err(explained)?;
    let groups = mend.groups(choice).await.map_err(explained)?;
    let all: i64 = groups.iter().map(|group| group.count).sum();
    let of =
        if i64::try_from(count).is_ok_and(|count| count < all) { format!(" of these {all}") } else { String::new() };
    let letters = if count == 1 { "letter" } else { "letters" };
    Ok(format!("{}\nwould {} {count} dead {letters}{of}\n", summary(now, &groups), words.verb))
}

/// Asks a person.
fn agreed(words: &Words, count: usize) -> anyhow::Result<bool> {
    let mut error = std::io::stderr();
    write!(error, "{} {count} for good? [y/N] ", words.verb).and_then(|()| error.flush()).context("cannot ask")?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).context("cannot read the answer")?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}
