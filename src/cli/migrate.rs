//! `relay migrate`.

use std::process::ExitCode;

use crate::cli::run::explained;
use crate::cli::{database_url, runtime};
use crate::config::settings::Settings;
use crate::outbox::postgres::schema::{SCHEMA_VERSION, migrate as migrate_schema};

pub(super) fn migrate(settings: &Settings) -> anyhow::Result<ExitCode> {
    let url = database_url(settings)?;
    let migrated = runtime(1)?.block_on(migrate_schema(&url)).map_err(explained)?;
    for name in &migrated.applied {
        println!("applied {name}");
    }
    println!("schema version {SCHEMA_VERSION}{}", if migrated.applied.is_empty() { ", nothing to do" } else { "" });
    Ok(ExitCode::SUCCESS)
}
