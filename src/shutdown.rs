//! Stopping: the first signal lets what is in flight be settled, the second ends the process at once.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::stderr;

/// A token that is cancelled by the first SIGTERM, SIGINT or SIGHUP. `nohup` starts a program with SIGHUP ignored, and so it
/// stays.
///
/// # Errors
/// The signal handlers cannot be installed.
pub fn on_signal() -> std::io::Result<CancellationToken> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
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

/// Whether this process was started with the signal ignored. To be asked before a handler is installed.
fn ignores(signal: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
    mask >> (signal.as_raw_value() - 1) & 1 == 1
}
