//! Standard error: whoever does not read it must not hold up the relay.
//!
//! A thread of its own writes the lines, from a queue that never makes anybody wait: when it is full, lines are dropped and
//! counted, and the count is logged as soon as somebody reads again.

use std::io::{self, ErrorKind, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

/// How many lines may wait for the reader.
const QUEUE: usize = 2000;

/// How long the end of the process waits for the reader.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// How often a queue that is full, or a pipe that does not block, is tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);

static QUEUED: OnceLock<SyncSender<Queued>> = OnceLock::new();
static DROPPED: AtomicU64 = AtomicU64::new(0);

enum Queued {
    Line(Vec<u8>),
    /// Answered when all before it is written.
    Flush(SyncSender<()>),
}

fn queue() -> &'static SyncSender<Queued> {
    QUEUED.get_or_init(|| {
        let (sender, receiver) = sync_channel(QUEUE);
        let spawned = std::thread::Builder::new().name("log".to_owned()).spawn(move || write_lines(&receiver));
        if spawned.is_err() {
            // Without its thread the queue has no receiver, and every line is dropped: the relay works all the same.
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
            // Somebody who shares the pipe or the terminal made it so.
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(RETRY_INTERVAL),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Each write is one line of the log, and goes to the queue.
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

/// Writes text to standard error and waits for its reader, not longer than a second.
pub(crate) fn say(text: &str) {
    let deadline = Instant::now() + FLUSH_TIMEOUT;
    send(Queued::Line(format!("{}\n", text.trim_end()).into_bytes()), deadline);
    flush();
}

/// Waits until what was logged is written, not longer than a second.
pub(crate) fn flush() {
    let deadline = Instant::now() + FLUSH_TIMEOUT;
    let (done, written) = sync_channel(1);
    if send(Queued::Flush(done), deadline) {
        // Nobody answers where nobody reads.
        written.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok();
    }
}

/// Returns false where there is no room until the deadline.
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
