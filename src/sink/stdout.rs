//! Standard output: one structured-mode CloudEvent a line, to be read or piped.

mod spec;

use std::io;
use std::time::Instant;

use async_trait::async_trait;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::event::{Event, Fault, Outcome, PublishError};
use crate::sink::{Batch, Published, Sink, cloudevent};

pub use spec::Spec;

/// Lines are written as soon as they have so many bytes, so that memory never holds the lines of a whole batch.
const PIECE_BYTES: usize = 1 << 20;

/// The destination. All lanes share its writer.
pub struct StdoutSink {
    source: String,
    /// One writer at a time, so that lines never mix.
    output: Mutex<Output>,
    /// Cancelled when the reader has closed the pipe.
    gone: CancellationToken,
}

struct Output {
    writer: Box<dyn AsyncWrite + Send + Unpin>,
    /// The lines of the last call, and how many bytes of them were written.
    lines: Vec<u8>,
    written: usize,
    /// Whether the last byte written is not the end of a line.
    in_line: bool,
    /// Whether a write failed. It is unknown how much of it arrived, so a line end is written before the next line.
    broken: bool,
}

impl StdoutSink {
    /// Returns a destination that writes to standard output. `source` replaces the source of an event whose source is empty.
    pub fn new(source: String) -> Self {
        Self::with_writer(tokio::io::stdout(), source)
    }

    /// Returns a destination that writes to another writer, such as a pipe.
    pub fn with_writer(writer: impl AsyncWrite + Send + Unpin + 'static, source: String) -> Self {
        let output = Output { writer: Box::new(writer), lines: Vec::new(), written: 0, in_line: false, broken: false };
        Self { source, output: Mutex::new(output), gone: CancellationToken::new() }
    }
}

impl StdoutSink {
    /// Returns the lines of the first of `events`, as many as fit into a piece, and their number.
    fn lines(&self, events: &[&Event]) -> (Vec<u8>, usize) {
        let (mut count, mut bytes) = (0, 0);
        for event in events {
            let more = event.bytes() + 400;
            if count > 0 && bytes + more > PIECE_BYTES {
                break;
            }
            (count, bytes) = (count + 1, bytes + more);
        }
        let mut lines = Vec::with_capacity(bytes);
        for event in &events[..count] {
            cloudevent::push_line(&mut lines, event, &self.source);
        }
        (lines, count)
    }
}

impl Output {
    /// Writes whole lines. A call that is dropped may leave a part of a line, which the next call completes.
    async fn write(&mut self, lines: Vec<u8>) -> io::Result<()> {
        if std::mem::take(&mut self.broken) {
            (self.lines, self.written, self.in_line) = (b"\n".to_vec(), 0, true);
        }
        let written = self.try_write(lines).await;
        self.broken = written.is_err();
        written
    }

    async fn try_write(&mut self, lines: Vec<u8>) -> io::Result<()> {
        let mut rest = self.lines.split_off(self.written);
        let end = if self.in_line { rest.iter().position(|byte| *byte == b'\n').map_or(0, |at| at + 1) } else { 0 };
        rest.truncate(end);
        if rest.is_empty() {
            rest = lines;
        } else {
            rest.extend_from_slice(&lines);
        }
        (self.lines, self.written) = (rest, 0);
        while self.written < self.lines.len() {
            match self.writer.write(&self.lines[self.written..]).await? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => self.written += count,
            }
            self.in_line = self.lines[self.written - 1] != b'\n';
        }
        self.lines = Vec::new(); // the memory of a large event is freed
        self.written = 0;
        self.writer.flush().await
    }
}

/// Returns a reason if writes to standard output succeed but their bytes are lost. If standard output was closed at the start,
/// Rust opens `/dev/null` in its place, for reading and writing. A shell's `>/dev/null` opens it for writing only.
pub fn closed() -> Option<&'static str> {
    let info = std::fs::read_to_string("/proc/self/fdinfo/1").ok()?;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
    let mode = u32::from_str_radix(flags.trim(), 8).ok()? & 3;
    let is_null = std::fs::read_link("/proc/self/fd/1").is_ok_and(|file| file.as_os_str() == "/dev/null");
    match mode {
        0 => Some("standard output is open for reading only: every event would be lost"),
        2 if is_null => Some(
            "standard output is closed: every event would be lost; for that on purpose, write >/dev/null in a shell",
        ),
        _ => None,
    }
}

#[async_trait]
impl Sink for StdoutSink {
    async fn publish(&self, &Batch { events, deadline, .. }: &Batch<'_>) -> Published {
        let mut outcomes = Vec::with_capacity(events.len());
        while outcomes.len() < events.len() && Instant::now() < deadline {
            let (lines, count) = self.lines(&events[outcomes.len()..]);
            let written =
                tokio::time::timeout_at(deadline.into(), async { self.output.lock().await.write(lines).await }).await;
            let outcome = match written {
                Ok(Ok(())) => Outcome::Delivered { message_id: None },
                // Some lines may have been written.
                Ok(Err(error)) => {
                    if error.kind() == io::ErrorKind::BrokenPipe {
                        self.gone.cancel();
                    }
                    Outcome::Failed(
                        PublishError::new(Fault::Misconfigured, "stdout", error.to_string()).of_destination(),
                    )
                }
                Err(_) => {
                    let message = "the reader of standard output did not take the lines in time";
                    Outcome::Failed(PublishError::new(Fault::Unknown, "timeout", message))
                }
            };
            let failed = matches!(outcome, Outcome::Failed(_));
            outcomes.resize(outcomes.len() + count, outcome);
            if failed {
                break;
            }
        }
        outcomes.resize(events.len(), Outcome::Held);
        Published::of(outcomes)
    }

    fn target(&self) -> String {
        "stdout".to_owned()
    }

    async fn check(&self) -> Result<String, PublishError> {
        match closed() {
            Some(reason) => Err(PublishError::new(Fault::Misconfigured, "stdout", reason)),
            None => Ok("one line per event".to_owned()),
        }
    }

    async fn ended(&self) -> String {
        self.gone.cancelled().await;
        "the reader of standard output has gone; what it did not read is pending".to_owned()
    }
}
