//! Standard output: one structured-mode CloudEvent a line, for looking and for pipes.

use std::io;
use std::time::Instant;

use async_trait::async_trait;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Mutex;

use crate::event::{Event, Fault, Outcome, PublishError};
use crate::sink::{Sink, cloudevent};

/// Lines are written as soon as there are so many bytes of them: beside the events, no second copy of a batch is held.
const PIECE_BYTES: usize = 1 << 20;

/// See the module.
pub struct StdoutSink {
    source: String,
    /// One writer at a time, so that lines never mix.
    output: Mutex<Output>,
}

struct Output {
    writer: Box<dyn AsyncWrite + Send + Unpin>,
    /// What the last call was to write, and how much of it was.
    lines: Vec<u8>,
    written: usize,
    /// The last byte written is not the end of a line.
    in_line: bool,
}

impl StdoutSink {
    /// `source` stands in for an event's empty source.
    pub fn new(source: String) -> Self {
        Self::with_writer(tokio::io::stdout(), source)
    }

    /// The same to another writer, such as a pipe.
    pub fn with_writer(writer: impl AsyncWrite + Send + Unpin + 'static, source: String) -> Self {
        let output = Output { writer: Box::new(writer), lines: Vec::new(), written: 0, in_line: false };
        Self { source, output: Mutex::new(output) }
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
            let begin = lines.len();
            cloudevent::push_json(&mut lines, event, &self.source);
            // A store that keeps text keeps a payload's line ends, which JSON has between its tokens only.
            lines[begin..].iter_mut().filter(|byte| matches!(byte, b'\n' | b'\r')).for_each(|byte| *byte = b' ');
            lines.push(b'\n');
        }
        (lines, count)
    }
}

impl Output {
    /// Writes whole lines. A call that is dropped half-way may leave half a line, which the next one completes.
    async fn write(&mut self, lines: Vec<u8>) -> io::Result<()> {
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

#[async_trait]
impl Sink for StdoutSink {
    async fn publish(&self, events: &[&Event], deadline: Instant) -> Vec<Outcome> {
        if Instant::now() >= deadline {
            return vec![Outcome::Held; events.len()];
        }
        let mut outcomes = Vec::with_capacity(events.len());
        while outcomes.len() < events.len() && Instant::now() < deadline {
            let (lines, count) = self.lines(&events[outcomes.len()..]);
            let written =
                tokio::time::timeout_at(deadline.into(), async { self.output.lock().await.write(lines).await }).await;
            let outcome = match written {
                Ok(Ok(())) => Outcome::Delivered { message_id: None },
                // A reader that is gone does not come back; some lines may have reached it.
                Ok(Err(error)) => Outcome::Failed(PublishError::new(Fault::Misconfigured, "stdout", error.to_string())),
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
        outcomes
    }

    async fn check(&self) -> Result<String, PublishError> {
        Ok("one line per event".to_owned())
    }
}
