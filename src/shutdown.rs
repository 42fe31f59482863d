//! Handles signals. The first signal stops the relay, which settles what is in flight. The second ends the process at once.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::stderr;

/// The signal for a file that has reached the limit of its size (`ulimit -f`). The number is that of every Linux except MIPS.
const SIGXFSZ: i32 = 25;

/// The signal for a process that has used up its soft limit of CPU time (`ulimit -t`). At the hard limit it is killed.
const SIGXCPU: i32 = 24;

/// Makes a write to a file at the limit of its size fail instead of killing the process. If the process were killed, the next
/// relay would take it for a crash caused by the event that was being written. To be called before anything is written. The
/// effect lasts until the process ends.
///
/// # Errors
/// The signal handler cannot be installed.
pub fn outlive_file_size_limit() -> std::io::Result<()> {
    // A handler needs a runtime when it is installed, and stays after the runtime has ended.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async { signal(SignalKind::from_raw(SIGXFSZ)).map(drop) })
}

/// Returns a token that is cancelled by the first SIGTERM, SIGINT, SIGHUP or SIGXCPU. If the process was started with SIGHUP
/// ignored, as by `nohup`, SIGHUP stays ignored.
///
/// # Errors
/// The signal handlers cannot be installed.
pub fn on_signal() -> std::io::Result<CancellationToken> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut out_of_time = signal(SignalKind::from_raw(SIGXCPU))?;
    let mut hangup = if ignores(SignalKind::hangup()) { None } else { Some(signal(SignalKind::hangup())?) };
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    tokio::spawn(async move {
        for first in [true, false] {
            let hung_up = async {
                match &mut hangup {
                    Some(hangup) => hangup.recv().await,
                    None => std::future::pending().await,
                }
            };
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
                _ = hung_up => "SIGHUP",
                // The kernel sends it again with every second of CPU time, so only the first one counts.
                _ = out_of_time.recv(), if first => "SIGXCPU",
            };
            if first {
                tracing::info!(signal = name, "stopping: settling what is in flight; a second signal ends it at once");
                stopped.cancel();
            } else {
                tracing::warn!(signal = name, "ended at once; what was in flight is still pending");
                stderr::flush();
                std::process::exit(1);
            }
        }
    });
    Ok(stop)
}

/// Whether this process was started with the signal ignored. To be called before a handler is installed.
fn ignores(signal: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
    mask >> (signal.as_raw_value() - 1) & 1 == 1
}
