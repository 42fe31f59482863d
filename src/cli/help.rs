//! The pages of `--help`: each command shows its own options, and `relay run` also shows the settings that all commands
//! share.

use clap::builder::PossibleValue;
use clap::{Arg, Command};

/// The width of the settings, in characters.
const WIDTH: usize = 80;

/// The indentation of a setting's explanation, in characters.
const INDENT: usize = 6;

/// The text about settings on the pages of the other commands.
const ELSEWHERE: &str = "\
The settings that `relay run --help` lists, such as --log, work here too.";

/// Returns the command line with its pages of help. Settings are left out of a page where they would hide a command's own
/// options.
pub(super) fn with_pages(command: Command) -> Command {
    let settings = settings(&command);
    let names: Vec<String> = command.get_subcommands().map(|command| command.get_name().to_owned()).collect();
    let command = command.mut_args(|arg| if is_setting(&arg) { arg.hide(true) } else { arg });
    names.iter().fold(command, |command, name| {
        command.mut_subcommand(name, |command| {
            if name == "run" { command.after_help(settings.clone()) } else { command.after_help(ELSEWHERE) }
        })
    })
}

/// Returns whether an argument is a setting, which also has a variable.
fn is_setting(arg: &Arg) -> bool {
    arg.get_env().is_some()
}

/// Lists the settings by heading, each with its option, its variable and its explanation.
fn settings(command: &Command) -> String {
    let mut page = "\
Settings: each is an option, a variable, or a line of the file of --config with
_ for -. An option wins over a variable, and a variable over the file.
TIME is 500ms, 30s or 5m, SIZE 64KiB or 4MB; plain numbers are ms and bytes."
        .to_owned();
    let mut heading = None;
    for arg in command.get_arguments().filter(|arg| is_setting(arg)) {
        if arg.get_help_heading() != heading {
            heading = arg.get_help_heading();
            page.push_str(&format!("\n\n{}:", heading.unwrap_or_default()));
        }
        let text = |text: Option<&str>| text.unwrap_or_default().to_owned();
        let value = arg.get_value_names().and_then(|names| names.first()).map(|name| format!(" {name}"));
        let variable = arg.get_env().and_then(|name| name.to_str());
        let mut head = format!("  --{}{} [env: {}]", text(arg.get_long()), text(value.as_deref()), text(variable));
        let mut explanation = explanation(arg);
        if let Some(default) = arg.get_default_values().first() {
            let default = format!(" [default: {}]", default.to_string_lossy());
            if head.len() + default.len() <= WIDTH { &mut head } else { &mut explanation }.push_str(&default);
        }
        page.push_str(&format!("\n{head}"));
        for line in wrapped(&explanation) {
            page.push_str(&format!("\n{:INDENT$}{line}", ""));
        }
    }
    page
}

/// Explains a setting, and lists its values if they are few.
fn explanation(arg: &Arg) -> String {
    let mut text = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let values: Vec<PossibleValue> = arg.get_possible_values();
    let is_choice = arg.get_value_names().is_some_and(|names| names[0] != "BOOL");
    if is_choice && !values.is_empty() {
        let names: Vec<&str> = values.iter().map(PossibleValue::get_name).collect();
        text.push_str(&format!(" [one of: {}]", names.join(", ")));
    }
    text
}

/// Wraps a text between words. Text in brackets is not broken.
fn wrapped(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut in_brackets = false;
    let mut words: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match words.last_mut() {
            Some(last) if in_brackets => last.extend([" ", word]),
            _ => words.push(word.to_owned()),
        }
        in_brackets = (in_brackets || word.starts_with('[')) && !word.ends_with(']');
    }
    for word in words {
        match lines.last_mut() {
            Some(line) if INDENT + line.len() + 1 + word.len() <= WIDTH => line.extend([" ", &word]),
            _ => lines.push(word),
        }
    }
    lines
}
