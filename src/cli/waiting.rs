//! `relay retry-now`, `relay give-up` and `relay move-owed`: events that wait.

use std::num::NonZeroU32;
use std::process::ExitCode;

use anyhow::bail;
use clap::Args;

use crate::cli::batches;
use crate::cli::filter::FilterArgs;
use crate::cli::run::explained;
use crate::cli::table::table;
use crate::cli::{database, runtime, tell};
use crate::config::ConfigError;
use crate::config::settings::Settings;
use crate::outbox::mend::{CommandId, Mend, Waiting, WaitingAction, WaitingBatch};

#[derive(Args)]
pub(super) struct RetryArgs {
    #[command(flatten)]
    how_many: HowMany,
    #[command(flatten)]
    filter: FilterArgs,
}

#[derive(Args)]
pub(super) struct GiveUpArgs {
    /// Why; the dead letters tell it.
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Give up all that is owed to any destination: needed where nothing else says which.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    how_many: HowMany,
    #[command(flatten)]
    filter: FilterArgs,
}

#[derive(Args)]
pub(super) struct MoveArgs {
    /// The destination that the events are owed to.
    #[arg(value_name = "FROM")]
    from: String,
    /// The destination that gets them.
    #[arg(value_name = "TO")]
    to: String,
    /// Move them also if no relay has a destination TO.
    #[arg(long)]
    force: bool,
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
    /// Stop after so many, of each key the earliest events first.
    #[arg(long, value_name = "NUMBER")]
    limit: Option<NonZeroU32>,
}

pub(super) fn retry_now(settings: &Settings, args: &RetryArgs) -> anyhow::Result<ExitCode> {
    change(settings, &WaitingAction::Retry, &args.filter, &args.how_many, false)
}

pub(super) fn give_up(settings: &Settings, args: GiveUpArgs) -> anyhow::Result<ExitCode> {
    let GiveUpArgs { reason, all, how_many, filter } = args;
    if filter.is_empty() && !all {
        let reason = "say which events, such as --destination NAME or --id 42, or --all".to_owned();
        return Err(ConfigError::Contradiction(reason).into());
    }
    change(settings, &WaitingAction::GiveUp { reason }, &filter, &how_many, false)
}

pub(super) fn move_owed(settings: &Settings, args: &MoveArgs) -> anyhow::Result<ExitCode> {
    let MoveArgs { from, to, force, how_many, filter } = args;
    let wrong = if from.is_empty() || to.is_empty() || from == to {
        Some("FROM and TO are the names of two destinations")
    } else if filter.destination.as_ref().is_some_and(|destination| destination != from) {
        Some("--destination is another one than FROM; leave it out")
    } else {
        None
    };
    if let Some(reason) = wrong {
        return Err(ConfigError::Contradiction(reason.to_owned()).into());
    }
    let mut filter = filter.clone();
    filter.destination = Some(from.clone());
    change(settings, &WaitingAction::Move { from: from.clone(), to: to.clone() }, &filter, how_many, *force)
}

/// Fails if relays are registered, and none of them has this destination.
pub(super) async fn require_destination(mend: &mut dyn Mend, name: &str) -> anyhow::Result<()> {
    let known = mend.destinations().await.map_err(explained)?;
    if !known.is_empty() && !known.iter().any(|known| known == name) {
        let known = known.join(", ");
        bail!("no relay has a destination {name}; there are: {known}; --force gives them to it all the same");
    }
    Ok(())
}

fn change(
    settings: &Settings,
    action: &WaitingAction,
    filter: &FilterArgs,
    how_many: &HowMany,
    force: bool,
) -> anyhow::Result<ExitCode> {
    let database = database(settings)?;
    runtime(1)?.block_on(async {
        let mut mend = database.operate().mend().await.map_err(explained)?;
        let command = CommandId::new(filter.filter(&mut *mend).await?);
        if let (WaitingAction::Move { to, .. }, false) = (action, force) {
            require_destination(&mut *mend, to).await?;
        }
        let waiting = mend.waiting(action, &command.filter).await.map_err(explained)?;
        let found = waiting.count();
        let named = command.filter.ids.len() as u64;
        if named > found {
            bail!(
                "{found} of the {named} ids wait for a destination as the options say: the others were published, are dead letters, \
                 or are due (select * from event_processing_log where outbox_id = ... tells)"
            );
        }
        let most = how_many.limit.map(|limit| u64::from(limit.get()));
        let count = most.map_or(found, |most| most.min(found));
        if count == 0 {
            return tell(&format!("no event matches; nothing to {}\n", to_do(action)));
        }
        if how_many.dry_run {
            let of = if count < found { format!(" of these {found}") } else { String::new() };
            return tell(&format!("{}\nwould {} {}{of}\n", summary(&waiting), to_do(action), events(count)));
        }
        let mut left = most;
        let done = batches::run(&waiting.batches, 1, None, (what_is_done(action), count), async |batch: &[WaitingBatch]| {
            let [batch] = batch else { return Ok(0) };
            if left == Some(0) {
                return Ok(0);
            }
            let done = mend.apply_waiting(action, &command, batch, left).await?;
            left = left.map(|left| left.saturating_sub(done));
            Ok(done)
        })
        .await?;
        let what = what_is_done(action);
        match (&done.failed, done.interrupted) {
            (Some(error), _) => {
                bail!("{what} {} of {count} events, then: {}; run it again to go on", done.count, error.explain())
            }
            (None, Some(code)) => {
                tell(&format!("{what} {} of {count} events, then stopped; run it again for the rest\n", done.count))?;
                Ok(code)
            }
            (None, None) => tell(&format!("{what} {}{}\n", events(done.count), afterwards(action))),
        }
    })
}

fn events(count: u64) -> String {
    format!("{count} event{}", if count == 1 { "" } else { "s" })
}

fn to_do(action: &WaitingAction) -> &'static str {
    match action {
        WaitingAction::Retry => "retry",
        WaitingAction::GiveUp { .. } => "give up",
        WaitingAction::Move { .. } => "move",
    }
}

fn what_is_done(action: &WaitingAction) -> &'static str {
    match action {
        WaitingAction::Retry => "made due",
        WaitingAction::GiveUp { .. } => "gave up",
        WaitingAction::Move { .. } => "moved",
    }
}

fn afterwards(action: &WaitingAction) -> String {
    match action {
        WaitingAction::Retry => String::new(),
        WaitingAction::GiveUp { .. } => {
            "; they are dead letters now: relay dead-letter list --error given_up".to_owned()
        }
        WaitingAction::Move { from, to } => format!(" from {from} to {to}"),
    }
}

fn summary(waiting: &Waiting) -> String {
    let row = |group: &crate::outbox::mend::WaitingGroup| {
        let error = if group.error_code.is_empty() { "(none)" } else { &group.error_code };
        vec![group.count.to_string(), group.destination.clone(), error.to_owned()]
    };
    table(&["COUNT", "DESTINATION", "ERROR"], &waiting.groups.iter().map(row).collect::<Vec<_>>())
}
