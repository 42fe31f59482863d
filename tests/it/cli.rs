//! The command line of the built binary: its output and its exit codes.

mod audit;
mod check;
mod colour;
mod destinations;
mod emit;
mod guide;
mod once;
mod routes;
mod run;
mod settings;
mod silence;
mod sources;
mod trouble;
mod usage;

use std::io::Write;

use tempfile::NamedTempFile;

use crate::servers::Database;

/// A database that does not exist. It is enough for settings that are refused before relay connects.
const NOWHERE: (&str, &str) = ("DATABASE_URL", "postgres://nobody@127.0.0.1:1/none");

/// The one destination that needs no server.
const STDOUT: (&str, &str) = ("RELAY_STDOUT", "true");

/// Creates a file with this text.
fn file(text: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

/// Returns the database's URL with another user.
fn url_for(database: &Database, user: &str, password: &str) -> String {
    let (_, place) = database.url().rsplit_once('@').unwrap();
    format!("postgres://{user}:{password}@{place}")
}
