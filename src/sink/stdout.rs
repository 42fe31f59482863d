//! Standard output: one structured-mode CloudEvent a line, for looking and for pipes.

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

/// Lines are written as soon as there are so many bytes of them: beside the events, no second copy of a batch is held.
const PIECE_BYTES: usize = 1 << 20;

/// See the module.
pub struct StdoutSink {
    source: String,
    /// One writer at a time, so that lines never mix.
    output: Mutex<Output>,
    /// Cancelled when the reader is gone.
    gone: CancellationToken,
}

struct Output {
    writer: Box<dyn AsyncWrite + Send + Unpin>,
    /// What the last call was to write, and how much of it was.
    lines: Vec<u8>,
    written: usize,
    /// The last byte written is not the end of a line.
    in_line: bool,
    /// A write failed, and nobody knows how much of it arrived: the next line begins on a new one.
    broken: bool,
}

impl StdoutSink {
    /// `source` stands in for an event's empty source.
    pub fn new(source: String) -> Self {
        Self::with_writer(tokio::io::stdout(), source)
    }

    /// The same to another writer, such as a pipe.
    pub fn with_writer(writer: impl AsyncWrite + Send + Unpin + 'static, source: String) -> Self {
        let output = Output { writer: Box::new(writer), lines: Vec::new(), written: 0, in_line: false, broken: false };
        Self { source, output: Mutex::new(output), gone: CancellationToken::new() }
    }
}

impl StdoutSink {
    /// The lines of the first of `events`, and of how many.
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
    /// Writes whole lines. A call that is dropped half-way may leave half a line, which the next one completes.
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
        self.lines = Vec::new(); // a large event must not take its memory for ever
        self.written = 0;
        self.writer.flush().await
    }
}

/// Why what is written to standard output is lost, and the write a success all the same. Where it was closed, Rust opens
/// `/dev/null` in its place, for reading too, which a shell's `>/dev/null` does not.
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
                // Some lines may have reached it.
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
        "whoever read standard output is gone; what it did not get is pending".to_owned()
    }
}
