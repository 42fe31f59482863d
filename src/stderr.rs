//! Writes to standard error without blocking the relay when nobody reads the other end.
//!
//! A separate thread writes the lines from a queue, and no caller waits for the queue. When the queue is full, lines are
//! dropped and counted. The count is logged as soon as lines can be written again.

use std::io::{self, ErrorKind, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

/// The most lines that wait in the queue.
const QUEUE: usize = 2000;

/// The longest time that the end of the process waits until all lines are written.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// The time after which a full queue or a full non-blocking pipe is tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);

static QUEUED: OnceLock<SyncSender<Queued>> = OnceLock::new();
/// The lines that were dropped since the log last said so, and before that.
static DROPPED: AtomicU64 = AtomicU64::new(0);
static DROPPED_BEFORE: AtomicU64 = AtomicU64::new(0);

enum Queued {
    Line(Vec<u8>),
    /// Answered when all lines before it are written.
    Flush(SyncSender<()>),
}

fn queue() -> &'static SyncSender<Queued> {
    QUEUED.get_or_init(|| {
        let (sender, receiver) = sync_channel(QUEUE);
        let spawned = std::thread::Builder::new().name("log".to_owned()).spawn(move || write_lines(&receiver));
        if spawned.is_err() {
            // Without its thread the queue has no receiver, and every line is dropped. The relay still works.
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
        sender
    })
}

fn write_lines(lines: &Receiver<Queued>) {
    for queued in lines {
        match queued {
            Queued::Flush(done) => drop(done.send(())),
            Queued::Line(line) => {
                if write_line(&line).is_err() {
                    DROPPED.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                let dropped = DROPPED.swap(0, Ordering::Relaxed);
                if dropped > 0 {
                    DROPPED_BEFORE.fetch_add(dropped, Ordering::Relaxed);
                    tracing::warn!(lines = dropped, "lines of this log were dropped: standard error was not read");
                }
            }
        }
    }
}

fn write_line(mut line: &[u8]) -> io::Result<()> {
    let mut stderr = io::stderr();
    while !line.is_empty() {
        match stderr.write(line) {
            Ok(count) => line = &line[count..],
            // Another process that shares the pipe or the terminal has made it non-blocking.
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(RETRY_INTERVAL),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A writer for the log. Each write is one line and goes to the queue.
pub(crate) struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if queue().try_send(Queued::Line(line.to_vec())).is_err() {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes text to standard error and waits until it is written, at most a second.
pub(crate) fn say(text: &str) {
    let deadline = Instant::now() + FLUSH_TIMEOUT;
    send(Queued::Line(format!("{}\n", text.trim_end()).into_bytes()), deadline);
    flush();
}

/// Returns how many lines were dropped since the process began.
pub(crate) fn dropped() -> u64 {
    DROPPED_BEFORE.load(Ordering::Relaxed) + DROPPED.load(Ordering::Relaxed)
}

/// Waits until all logged lines are written, at most a second.
pub(crate) fn flush() {
    let deadline = Instant::now() + FLUSH_TIMEOUT;
    let (done, written) = sync_channel(1);
    if send(Queued::Flush(done), deadline) {
        // No answer comes if nobody reads standard error.
        written.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok();
    }
}

/// Puts an entry into the queue. Returns false if the queue has no room until the deadline.
fn send(mut queued: Queued, deadline: Instant) -> bool {
    loop {
        match queue().try_send(queued) {
            Ok(()) => return true,
            Err(TrySendError::Full(back)) if Instant::now() < deadline => queued = back,
            Err(_) => return false,
        }
        std::thread::sleep(RETRY_INTERVAL);
    }
}
