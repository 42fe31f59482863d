//! `--help`, `--version`, and commands that do not exist.

use super::{NOWHERE, file};
use crate::binary::finished;

/// Options that have no default.
const WITHOUT_DEFAULT: [&str; 12] = [
    "--config",
    "--database-url",
    "--database-url-file",
    "--redis-url",
    "--redis-url-file",
    "--redis-host",
    "--redis-username",
    "--redis-password",
    "--redis-password-file",
    "--redis-maxlen",
    "--eventbridge-bus-name",
    "--eventbridge-source",
];

/// The settings of `relay run --help`, each with its whole text in one line.
pub(super) fn options() -> Vec<(String, String)> {
    let help = finished(&["run", "--help"], &[]).exited(0).stdout;
    let mut options: Vec<(String, String)> = Vec::new();
    for line in help.lines() {
        if let Some(option) = line.strip_prefix("  --")
            && let Some((name, variable)) = option.split_once(" [env: ")
        {
            let name = name.split(' ').next().unwrap();
            options.push((format!("--{name}"), format!(" [env: {variable}")));
        } else if let (Some((_, text)), Some(explanation)) = (options.last_mut(), line.strip_prefix("      ")) {
            let (before, variable) = text.rsplit_once(" [env: ").unwrap();
            *text = format!("{before} {} [env: {variable}", explanation.trim());
        }
    }
    options
}

/// The text in `[name: ...]`.
pub(super) fn bracketed<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("[{name}: "))?;
    rest.split(']').next()
}

/// The variable of an option, read from its text.
pub(super) fn variable(text: &str) -> Option<&str> {
    bracketed(text, "env").map(|variable| variable.trim_end_matches('='))
}

#[test]
fn the_version_is_the_crates() {
    for flag in ["--version", "-V"] {
        let version = finished(&[flag], &[]).exited(0).stdout;
        assert_eq!(version, format!("relay {}\n", env!("CARGO_PKG_VERSION")));
    }
}

#[test]
fn help_explains_every_option_with_its_variable_and_its_default() {
    let options = options();
    assert!(options.len() > 35, "{options:?}");
    for (name, text) in &options {
        let words = text.split('[').next().unwrap().split_whitespace().count();
        assert!(words >= 2, "{name} is not explained: {text}");
        assert!(variable(text).is_some(), "{name} has no variable: {text}");
        let has_default = bracketed(text, "default").is_some_and(|default| !default.is_empty());
        assert_eq!(has_default, !WITHOUT_DEFAULT.contains(&name.as_str()), "{name}: {text}");
    }
}

#[test]
fn help_explains_every_command_and_every_exit_code() {
    let help = finished(&["--help"], &[]).exited(0).stdout;
    for command in ["run", "migrate", "check", "emit", "dead-letter", "retry-now", "give-up", "move-owed"] {
        assert!(help.contains(&format!("\n  {command} ")), "{command} is missing in:\n{help}");
        let of_command = finished(&[command, "--help"], &[]).exited(0).stdout;
        assert_eq!(of_command.contains("[env: DATABASE_URL]"), command == "run", "{of_command}");
        assert!(command == "run" || of_command.contains("`relay run --help`"), "{of_command}");
    }
    let words = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for code in ["0 done;", "1 it could not do its work;", "2 wrong usage or configuration;", "3 --once ended with"] {
        assert!(words.contains(code), "{code:?} is missing in:\n{help}");
    }
}

#[test]
fn every_page_of_the_help_is_short_and_shows_the_options_of_its_command_first() {
    for (args, own) in [
        (&["--help"][..], "--once"),
        (&["run", "--help"], "--once"),
        (&["help", "run"], "--once"),
        (&["migrate", "--help"], "--help"),
        (&["check", "--help"], "--json"),
        (&["audit", "--help"], "--destination"),
        (&["emit", "--help"], "--aggregate-id"),
        (&["dead-letter", "--help"], "redrive"),
        (&["dead-letter", "redrive", "--help"], "--payload"),
        (&["give-up", "--help"], "--reason"),
        (&["move-owed", "--help"], "--dry-run"),
        (&["routes", "--help"], "--source"),
        (&["tail", "--help"], "--status"),
        (&["replay", "--help"], "--dry-run"),
        (&["prune", "--help"], "--dry-run"),
    ] {
        for columns in ["80", "120"] {
            let page = finished(args, &[("COLUMNS", columns)]).exited(0).stdout;
            let lines = page.lines().count();
            assert!(lines <= 120, "{args:?} has {lines} lines:\n{page}");
            let widest = page.lines().map(|line| line.chars().count()).max().unwrap();
            assert!(columns != "80" || widest <= 80, "{args:?} is {widest} columns wide:\n{page}");
            let place = |part: &str| page.find(part).unwrap_or(usize::MAX);
            assert!(place(own) < place("[env: ").min(place("ettings:")), "{args:?}:\n{page}");
        }
    }
}

#[test]
fn help_and_version_are_given_whatever_is_wrong_with_the_settings() {
    let broken = file("not TOML");
    let variables = [
        ("RELAY_LANE", "3"),
        ("RELAY_LANES", "many"),
        ("RELAY_CONFIG", broken.path().to_str().unwrap()),
        ("REDIS_URL", "redis://:not-for-you@cache"),
    ];
    for args in [&["--help"][..], &["-h"], &["--version"], &["help"], &["check", "--help"]] {
        let given = finished(args, &variables).exited(0);
        assert!(!given.stdout.is_empty() && !given.stdout.contains("not-for-you"), "{args:?}: {}", given.stdout);
    }
}

#[test]
fn wrong_usage_ends_with_2_and_nothing_on_standard_output() {
    for args in [
        &["--bogus"][..],
        &["publish"],
        &["run", "twice"],
        &["--lanes"],
        &["--lanes", "many"],
        &["--lanes", "0"],
        &["emit"],
        &["emit", "a", "{}", "more"],
        &["check", "--once"],
        &["--once", "migrate"],
        &["--once", "check"],
        &["--once", "emit", "a"],
    ] {
        let refused = finished(args, &[NOWHERE, ("RELAY_STDOUT", "true")]).exited(2);
        assert_eq!(refused.stdout, "", "{args:?}");
        assert!(!refused.stderr.is_empty(), "{args:?}");
    }
}
