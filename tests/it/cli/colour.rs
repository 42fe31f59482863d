//! Colours appear only on a terminal, and never with `NO_COLOR` (https://no-color.org).

use std::process::Command;

/// Runs `relay` on a pseudo-terminal. Returns all that it prints there.
fn on_a_terminal(args: &[&str], variables: &[(&str, &str)]) -> String {
    let spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))";
    let mut command = Command::new("python3");
    command.args(["-c", spawn, env!("CARGO_BIN_EXE_relay")]).args(args);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("TERM", "xterm-256color");
    let output = command.envs(variables.iter().copied()).stdin(std::process::Stdio::null()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && !text.is_empty(), "{args:?}: {text}");
    text
}

fn is_coloured(text: &str) -> bool {
    text.contains('\u{1b}')
}

#[test]
fn logs_have_colours_on_a_terminal_unless_no_color_is_set() {
    let off = ("EVENT_SYSTEM_ENABLED", "false");
    for variables in [&[off][..], &[off, ("NO_COLOR", "")]] {
        assert!(is_coloured(&on_a_terminal(&["--once"], variables)), "{variables:?}");
    }
    for value in ["1", "0", "false"] {
        let log = on_a_terminal(&["--once"], &[off, ("NO_COLOR", value)]);
        assert!(log.contains("nothing is published") && !is_coloured(&log), "{value}: {log:?}");
    }
}

#[test]
fn help_and_errors_have_no_colours_with_no_color() {
    for args in [&["--help"][..], &["run", "--help"], &["check", "--help"], &["--version"]] {
        assert!(!is_coloured(&on_a_terminal(args, &[("NO_COLOR", "1")])), "{args:?}");
    }
}
