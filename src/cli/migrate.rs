//! `relay migrate`.

use std::process::ExitCode;

use crate::cli::run::explained;
use crate::cli::{database, print, runtime};
use crate::config::settings::Settings;

pub(super) fn migrate(settings: &Settings) -> anyhow::Result<ExitCode> {
    let database = database(settings)?;
    let migrated = runtime(1)?.block_on(database.operate().migrate()).map_err(explained)?;
    let mut applied: String = migrated.applied.iter().map(|name| format!("applied {name}\n")).collect();
    if let Some(schema) = &migrated.mended {
        applied.push_str(&format!("made the functions anew for schema {schema}\n"));
    }
    let rest = if migrated.to > migrated.known {
        format!("; this relay knows up to {}, and can work with it: nothing to do", migrated.known)
    } else if migrated.applied.is_empty() && migrated.mended.is_none() {
        ", nothing to do".to_owned()
    } else {
        String::new()
    };
    print(&format!("{applied}schema version {}{rest}\n", migrated.to))?;
    Ok(ExitCode::SUCCESS)
}
