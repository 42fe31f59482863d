//! Commands that work in batches end between two batches when somebody presses Ctrl-C. Those that only show something end at once.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::stderr;

/// The exit codes of programs that SIGINT and SIGTERM have ended, as shells show them.
const INTERRUPTED: u8 = 130;
const TERMINATED: u8 = 143;

/// Becomes interrupted with the first SIGINT or SIGTERM. The second one ends the process at once; then the database rolls back
/// the batch that is not done.
#[derive(Debug, Clone)]
pub(super) struct Interrupt {
    stop: CancellationToken,
    code: Arc<AtomicU8>,
}

impl Interrupt {
    /// Handles these signals from now on.
    ///
    /// # Errors
    /// The handlers cannot be installed.
    pub(super) fn handle() -> std::io::Result<Self> {
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let handled = Self { stop: CancellationToken::new(), code: Arc::new(AtomicU8::new(INTERRUPTED)) };
        let Self { stop, code } = handled.clone();
        tokio::spawn(async move {
            for first in [true, false] {
                let of_signal = tokio::select! {
                    _ = interrupt.recv() => INTERRUPTED,
                    _ = terminate.recv() => TERMINATED,
                };
                code.store(of_signal, Ordering::Relaxed);
                if first {
                    stop.cancel();
                } else {
                    stderr::flush();
                    std::process::exit(of_signal.into());
                }
            }
        });
        Ok(handled)
    }

    /// Lets the first SIGINT or SIGTERM end the process at once from now on, even while it waits for the reader of its output.
    ///
    /// # Errors
    /// The handlers cannot be installed.
    pub(super) fn end_at_once() -> std::io::Result<()> {
        let handled = Self::handle()?;
        tokio::spawn(async move {
            handled.comes().await;
            stderr::flush();
            std::process::exit(handled.code.load(Ordering::Relaxed).into());
        });
        Ok(())
    }

    /// The token that the first signal cancels.
    pub(super) fn token(&self) -> &CancellationToken {
        &self.stop
    }

    /// Returns whether a signal has come.
    pub(super) fn has_come(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// Waits until a signal comes.
    pub(super) async fn comes(&self) {
        self.stop.cancelled().await;
    }

    /// The exit code of a command that a signal has ended.
    pub(super) fn exit_code(&self) -> ExitCode {
        self.code.load(Ordering::Relaxed).into()
    }
}
