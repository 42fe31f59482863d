//! `relay migrate`.

use std::process::ExitCode;

use crate::cli::run::explained;
use crate::cli::{database, runtime};
use crate::config::settings::Settings;

pub(super) fn migrate(settings: &Settings) -> anyhow::Result<ExitCode> {
    let database = database(settings)?;
    let migrated = runtime(1)?.block_on(database.migrate()).map_err(explained)?;
    for name in &migrated.applied {
        println!("applied {name}");
    }
    println!("schema version {}{}", migrated.to, if migrated.applied.is_empty() { ", nothing to do" } else { "" });
    Ok(ExitCode::SUCCESS)
}
