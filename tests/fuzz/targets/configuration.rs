//! The configuration file: any content becomes settings, destinations and routes, or an error.
#![no_main]

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::LazyLock;

use clap::{CommandFactory, FromArgMatches, Parser};
use libfuzzer_sys::fuzz_target;
use outbox_relay::config::destinations::destinations;
use outbox_relay::config::settings::Settings;
use outbox_relay::config::{in_force, prepare};

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    settings: Settings,
}

static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = if PathBuf::from("/dev/shm").is_dir() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
    folder.join(format!("outbox-relay-fuzz-{}.toml", std::process::id()))
});

fuzz_target!(|data: &[u8]| {
    // Settings of secrets in files would open any path that the input names.
    if data.windows(4).any(|word| word.eq_ignore_ascii_case(b"file")) {
        return;
    }
    std::fs::write(&*FILE, data).expect("the file can be written");
    run();
    std::fs::remove_file(&*FILE).expect("it is there");
});

fn run() {
    let args: Vec<OsString> = ["relay".into(), "--config".into(), FILE.clone().into()].into();
    let (mut command, file) = match prepare(Line::command(), &args) {
        Ok(prepared) => prepared,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let matches = match command.try_get_matches_from_mut(&args) {
        Ok(matches) => matches,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let line = Line::from_arg_matches(&matches).expect("the parsed settings are valid");
    in_force(&command, &matches, &file);
    drop(line.settings.relay());
    match destinations(&line.settings, &file) {
        Ok((places, _)) => assert!(!places.is_empty()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
