//! The built binary, run with no environment variables but those that the test sets.

use std::fs::File;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

/// The longest that a test waits for anything. It is far more than needed, because other tests keep the machine busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// The time between two looks at a condition.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// `relay` with these arguments. Its environment has these variables and `PATH`, and no others.
pub(crate) fn relay(args: &[&str], variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_relay"));
    if ignores_sighup() {
        command = Command::new("env");
        command.args(["--default-signal=HUP", env!("CARGO_BIN_EXE_relay")]);
    }
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.args(args).envs(variables.iter().copied()).stdin(Stdio::null());
    command
}

/// Whether these tests ignore SIGHUP because `nohup` or the like started them. Their child processes ignore it too.
fn ignores_sighup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    u64::from_str_radix(ignored.trim(), 16).unwrap() & 1 == 1
}

/// Runs `relay` to its end; see [`relay`].
pub(crate) fn finished(args: &[&str], variables: &[(&str, &str)]) -> Finished {
    Running::start(relay(args, variables)).finish()
}

/// Publishes everything that is due to standard output. Returns the lines.
pub(crate) fn drain(url: &str) -> Vec<serde_json::Value> {
    let drained = finished(&["--once"], &[("DATABASE_URL", url), ("RELAY_STDOUT", "true")]).exited(0);
    drained.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// `check` says ok on every line. `--once` then publishes an event and leaves nothing in the outbox.
#[track_caller]
pub(crate) fn works(url: &str) {
    let variables = [("DATABASE_URL", url), ("RELAY_STDOUT", "true")];
    finished(&["check"], &variables).exited(0);
    finished(&["emit", "checked"], &variables[..1]).exited(0);
    assert!(drain(url).iter().any(|event| event["type"] == "checked"));
}

/// `--once` and `check` exit with code 1. Both print all these parts: `--once` in its one line, `check` in the line of the
/// first check that fails.
#[track_caller]
pub(crate) fn cannot_work(url: &str, parts: &[&str]) {
    let variables = [("DATABASE_URL", url), ("RELAY_STDOUT", "true"), ("RELAY_LOG", "error")];
    let once = finished(&["--once"], &variables).exited(1);
    let check = finished(&["check"], &variables).exited(1);
    assert_eq!(once.stdout, "");
    let failed: Vec<&str> = check.stdout.lines().filter(|line| line.starts_with("FAIL")).collect();
    assert_eq!(failed.len(), 1, "{}", check.stdout);
    for said in [once.complaint(), failed[0]] {
        for part in parts {
            assert!(said.contains(part), "{part:?} is missing in: {said}");
        }
    }
}

/// A process that has ended, and what it wrote.
#[derive(Debug)]
pub(crate) struct Finished {
    /// The exit code; `None` if a signal killed the process.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Finished {
    /// Fails the test, and shows all that the process wrote, unless it exited with this code.
    #[track_caller]
    pub(crate) fn exited(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// Fails the test unless standard error contains each of these parts.
    #[track_caller]
    pub(crate) fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(part), "{part:?} is missing in:\n{}", self.stderr);
        }
        self
    }

    /// Returns standard error, which must be one line that begins with `relay: `.
    #[track_caller]
    pub(crate) fn complaint(&self) -> &str {
        let line = self
            .stderr
            .strip_prefix("relay: ")
            .unwrap_or_else(|| panic!("standard error does not begin with `relay: `:\n{}", self.stderr));
        assert_eq!(
            line.trim_end_matches('\n').lines().count(),
            1,
            "standard error has several lines:\n{}",
            self.stderr
        );
        line.trim_end()
    }
}

/// A running process. Dropping this value kills it.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    stdout: NamedTempFile,
    stderr: NamedTempFile,
}

impl Running {
    pub(crate) fn start(command: Command) -> Self {
        let stdout = NamedTempFile::new().unwrap();
        // The file is opened a second time, so that reading it does not move the offset at which the process writes.
        let writer = File::create(stdout.path()).unwrap();
        let mut running = Self::start_writing_to(command, writer);
        running.stdout = stdout;
        running
    }

    /// Starts the process with its standard output going to `writer`.
    pub(crate) fn start_writing_to(mut command: Command, writer: impl Into<Stdio>) -> Self {
        let (stdout, stderr) = (NamedTempFile::new().unwrap(), NamedTempFile::new().unwrap());
        command.stdout(writer).stderr(File::create(stderr.path()).unwrap());
        Self { child: command.spawn().unwrap(), stdout, stderr }
    }

    /// Returns what it has written to standard error so far.
    pub(crate) fn log(&self) -> String {
        String::from_utf8(std::fs::read(self.stderr.path()).unwrap()).unwrap()
    }

    /// Returns what it has written to standard output so far.
    pub(crate) fn output(&self) -> String {
        String::from_utf8(std::fs::read(self.stdout.path()).unwrap()).unwrap()
    }

    /// Waits until its log contains this part. Fails the test if the process ends before.
    #[track_caller]
    pub(crate) fn until_log(&mut self, part: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let ended = !self.is_running();
            let log = self.log();
            if log.contains(part) {
                return;
            }
            assert!(!ended, "it ended without {part:?}:\n{log}");
            assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {part:?} in this log:\n{log}");
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal, such as `TERM`.
    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success(), "kill -{name}");
    }

    /// Waits until it ends.
    #[track_caller]
    pub(crate) fn finish(mut self) -> Finished {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() < deadline => std::thread::sleep(LOOK_INTERVAL),
                None => panic!("it did not end within {PATIENCE:?}:\n{}", self.log()),
            }
        };
        Finished { code: status.code(), stdout: self.output(), stderr: self.log() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Killing fails only if the process has ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Waits until the condition holds; fails the test after [`PATIENCE`].
#[track_caller]
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(LOOK_INTERVAL);
    }
}
