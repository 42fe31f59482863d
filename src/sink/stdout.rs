//! Standard output: one structured-mode CloudEvent a line, for looking and for pipes.

use std::time::Instant;

use async_trait::async_trait;
use tokio::io::{AsyncWriteExt, Stdout};
use tokio::sync::Mutex;

use crate::event::{Event, Fault, Outcome, PublishError};
use crate::sink::{Sink, cloudevent};

/// See the module.
pub struct StdoutSink {
    source: String,
    stdout: Mutex<Stdout>,
}

impl StdoutSink {
    /// `source` stands in for an event's empty source.
    pub fn new(source: String) -> Self {
        Self { source, stdout: Mutex::new(tokio::io::stdout()) }
    }
}

#[async_trait]
impl Sink for StdoutSink {
    async fn publish(&self, events: &[&Event], deadline: Instant) -> Vec<Outcome> {
        let mut lines = Vec::with_capacity(events.iter().map(|event| event.payload.len() + 400).sum());
        for event in events {
            lines.extend_from_slice(&cloudevent::json(event, &self.source));
            lines.push(b'\n');
        }
        // One writer at a time, so that lines never mix.
        let written = tokio::time::timeout_at(deadline.into(), async {
            let mut stdout = self.stdout.lock().await;
            stdout.write_all(&lines).await?;
            stdout.flush().await
        })
        .await;
        let error = match written {
            Ok(Ok(())) => return vec![Outcome::Delivered { message_id: None }; events.len()],
            // A reader that is gone does not come back; some lines may have reached it.
            Ok(Err(error)) => PublishError::new(Fault::Misconfigured, "stdout", error.to_string()),
            Err(_) => PublishError::new(
                Fault::Unknown,
                "timeout",
                "the reader of standard output did not take the lines in time",
            ),
        };
        vec![Outcome::Failed(error); events.len()]
    }

    async fn check(&self) -> Result<String, PublishError> {
        Ok("one line per event".to_owned())
    }
}
