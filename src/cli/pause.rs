//! `relay pause` and `relay resume`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use crate::cli::run::explained;
use crate::cli::{database, print, runtime};
use crate::config::settings::Settings;
use crate::outbox::pause::PauseOutcome;

/// How long `relay pause` waits for batches that were claimed before the pause.
const EARLIER_CLAIMS: Duration = Duration::from_secs(60);

#[derive(Args)]
pub(super) struct PauseArgs {
    /// The name of the destination.
    destination: String,
    /// Only the event types of this glob (* and ?); later events of their keys wait too.
    #[arg(long = "type", value_name = "GLOB")]
    event_type: Option<String>,
}

#[derive(Args)]
pub(super) struct ResumeArgs {
    /// The name of the destination.
    destination: String,
    /// End only the pause that was given this glob. Without it all pauses of the destination end.
    #[arg(long = "type", value_name = "GLOB")]
    event_type: Option<String>,
}

pub(super) fn pause(settings: &Settings, args: &PauseArgs) -> anyhow::Result<ExitCode> {
    let database = database(settings)?;
    let operate = database.operate();
    let PauseArgs { destination, event_type } = args;
    let types = event_type.as_ref().map(|glob| format!(" for the types {glob}")).unwrap_or_default();
    let resume = event_type.as_ref().map(|glob| format!(" --type '{glob}'")).unwrap_or_default();
    runtime(1)?.block_on(async {
        match operate.pause(destination, event_type.as_deref()).await.map_err(explained)? {
            PauseOutcome::Refused(reason) => anyhow::bail!(reason),
            PauseOutcome::Already => print(&format!("{destination} is paused{types} already\n"))?,
            PauseOutcome::Done => {
                let ended = operate.claims_ended(EARLIER_CLAIMS).await.map_err(explained)?;
                let rest = if ended {
                    String::new()
                } else {
                    let after = EARLIER_CLAIMS.as_secs();
                    format!("; a batch that was claimed before is still being published after {after} s")
                };
                print(&format!(
                    "{destination} is paused{types}: its events wait until `relay resume {destination}{resume}`{rest}\n"
                ))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    })
}

pub(super) fn resume(settings: &Settings, args: &ResumeArgs) -> anyhow::Result<ExitCode> {
    let database = database(settings)?;
    let operate = database.operate();
    let ResumeArgs { destination, event_type } = args;
    runtime(1)?.block_on(async {
        match operate.resume(destination, event_type.as_deref()).await.map_err(explained)? {
            PauseOutcome::Refused(reason) => anyhow::bail!(reason),
            PauseOutcome::Done | PauseOutcome::Already => {
                let types = event_type.as_ref().map(|glob| format!(" for the types {glob}")).unwrap_or_default();
                print(&format!("{destination} is resumed{types}\n"))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    })
}
