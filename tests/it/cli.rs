//! The command line, as the built binary: what it says, and the code it ends with.

mod audit;
mod check;
mod colour;
mod destinations;
mod emit;
mod guide;
mod once;
mod run;
mod settings;
mod silence;
mod sources;
mod trouble;
mod usage;

use std::io::Write;

use tempfile::NamedTempFile;

use crate::servers::Database;

/// A database that is not there; enough for what is refused before anybody connects.
const NOWHERE: (&str, &str) = ("DATABASE_URL", "postgres://nobody@127.0.0.1:1/none");

/// The one destination that is always there.
const STDOUT: (&str, &str) = ("RELAY_STDOUT", "true");

/// A file with this text.
fn file(text: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

/// The database's URL for another user.
fn url_for(database: &Database, user: &str, password: &str) -> String {
    let (_, place) = database.url().rsplit_once('@').unwrap();
    format!("postgres://{user}:{password}@{place}")
}
