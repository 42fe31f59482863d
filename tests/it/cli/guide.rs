//! README.md and the guide agree with the program: every setting with its default, every destination with its fields.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::usage::{bracketed, options, variable};
use super::{NOWHERE, file};
use crate::binary::finished;

const PREFIXES: [&str; 5] = ["RELAY_", "EVENT_", "DATABASE_", "REDIS_", "AWS_EVENTBRIDGE_"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn page(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// README.md and the chapters, keyed by path.
fn pages() -> BTreeMap<PathBuf, String> {
    let mut folders = vec![root().join("src/guide")];
    let mut paths = vec![root().join("README.md")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { paths.push(path) }
        }
    }
    paths.into_iter().map(|path| (path.clone(), std::fs::read_to_string(path).unwrap())).collect()
}

/// The rows of a page's tables, split into cells.
fn rows(page: &str) -> impl Iterator<Item = Vec<&str>> {
    page.lines().filter_map(|line| {
        let cells = line.strip_prefix("| ")?.strip_suffix('|')?;
        Some(cells.split(" | ").map(str::trim).collect())
    })
}

/// The texts in backticks.
fn codes(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn every_variable_of_the_help_has_a_row_in_the_guide_and_no_page_has_another() {
    let options = options();
    let in_help: BTreeSet<&str> = options.iter().filter_map(|(_, text)| variable(text)).collect();
    let configuration = page("src/guide/configuration.md");
    let with_row: BTreeSet<&str> = rows(&configuration).filter_map(|row| codes(row[0]).next()).collect();
    for variable in &in_help {
        assert!(with_row.contains(variable), "src/guide/configuration.md has no row of {variable}");
    }
    // Variables of destinations have no option. The help lists them after the options.
    let of_destination = "RELAY_DESTINATION_";
    assert!(finished(&["--help"], &[]).exited(0).stdout.contains(&format!("{of_destination}<NAME>")));
    for (path, page) in pages() {
        let words = page.split(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'));
        for word in words.filter(|word| PREFIXES.iter().any(|prefix| word.starts_with(prefix))) {
            let is_ours = in_help.contains(word) || word.starts_with(of_destination);
            assert!(is_ours, "{}: relay has no variable {word}", path.display());
        }
    }
}

#[test]
fn every_row_of_a_variable_ends_with_the_default_of_the_help() {
    let options = options();
    let defaults: BTreeMap<&str, &str> =
        options.iter().filter_map(|(_, text)| Some((variable(text)?, bracketed(text, "default")?))).collect();
    let mut found = BTreeSet::new();
    for (path, page) in pages() {
        for row in rows(&page) {
            let Some((variable, default)) = codes(row[0]).next().and_then(|code| defaults.get_key_value(code)) else {
                continue;
            };
            // The table of fields that stand for variables has no column for the variable, so its rows begin with something
            // else.
            assert_eq!(codes(row.last().unwrap()).next(), Some(*default), "{}: {variable}", path.display());
            found.insert(*variable);
        }
    }
    assert_eq!(found, defaults.keys().copied().collect());
}

#[test]
fn every_type_of_destination_has_a_page_with_its_fields() {
    let refused = |table: &str| {
        let config = file(&format!("[destinations.a]\n{table}"));
        let variables = [NOWHERE, ("RELAY_CONFIG", config.path().to_str().unwrap())];
        finished(&["check"], &variables).exited(2).stderr
    };
    let unknown = refused("type = \"none\"");
    let (_, types) = unknown.trim().rsplit_once("there are ").unwrap();
    let types: Vec<&str> = types.split(", ").collect();
    assert!(types.len() >= 5 && types.contains(&"file"), "{unknown}");
    let overview = page("src/guide/destinations.md");
    for name in types {
        assert!(
            rows(&overview).any(|row| row[0].contains(&format!("[`{name}`]"))),
            "destinations.md has no row of {name}"
        );
        let said = refused(&format!("type = \"{name}\"\nno_such_field = 1"));
        assert!(said.contains("no_such_field"), "{said}");
        let (_, fields) = said.split_once("expected").unwrap_or_default();
        // A password is part of a URL or has a file of its own.
        let fields: BTreeSet<&str> = codes(fields).filter(|field| *field != "password").collect();
        let page = page(&format!("src/guide/destinations/{name}.md"));
        let (_, table) = page.split_once("| field | meaning | default |").unwrap_or_default();
        let (table, _) = table.split_once("\n\n").unwrap_or_default();
        // The last row refers to the fields that every type has.
        let own = rows(table).filter(|row| !row[0].ends_with("..."));
        let in_page: BTreeSet<String> =
            own.flat_map(|row| codes(row[0]).map(str::to_owned).collect::<Vec<_>>()).collect();
        let in_page: BTreeSet<&str> = in_page.iter().map(String::as_str).collect();
        assert_eq!(in_page, fields, "{name}: {said}");
    }
}
