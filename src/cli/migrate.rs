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
    if let Some(schema) = &migrated.mended {
        println!("made the functions anew for schema {schema}");
    }
    let rest = if migrated.to > migrated.known {
        format!("; this relay knows up to {}, and can work with it: nothing to do", migrated.known)
    } else if migrated.applied.is_empty() && migrated.mended.is_none() {
        ", nothing to do".to_owned()
    } else {
        String::new()
    };
    println!("schema version {}{rest}", migrated.to);
    Ok(ExitCode::SUCCESS)
}
