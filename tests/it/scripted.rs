//! A sink whose answer to each event is scripted, so that a test can choose exactly where a crash happens.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use outbox_relay::event::{Event, Fault, Outcome, PublishError};
use outbox_relay::sink::{Batch, Published, Sink};
use tokio::sync::Semaphore;

/// What the sink does with an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Accepts it.
    Accept,
    /// Refuses it because of its content.
    Refuse,
    /// Fails like a destination that is down.
    Unreachable,
    /// Fails like a destination with a wrong configuration.
    Misconfigured,
    /// Accepts it, and loses the answer.
    AcceptThenFail,
    /// Panics. The events before it in the call were accepted.
    Panic,
    /// Never answers, even after the deadline.
    Hang,
}

/// Blocks publish calls until a test lets them go on.
pub(crate) struct Gate {
    entered: Semaphore,
    open: Semaphore,
}

impl Gate {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { entered: Semaphore::new(0), open: Semaphore::new(0) })
    }

    /// Waits until a call is blocked.
    pub(crate) async fn entered(&self) {
        self.entered.acquire().await.unwrap().forget();
    }

    /// Lets this many calls go on.
    pub(crate) fn open(&self, calls: usize) {
        self.open.add_permits(calls);
    }

    pub(crate) async fn pass(&self) {
        self.entered.add_permits(1);
        self.open.acquire().await.unwrap().forget();
    }
}

type Script = Arc<dyn Fn(&Event) -> Act + Send + Sync>;

/// A sink with a scripted answer for each event.
pub(crate) struct ScriptedSink {
    script: Mutex<Script>,
    gate: Mutex<Option<Arc<Gate>>>,
    accepted: Mutex<Vec<Event>>,
    calls: Mutex<Vec<usize>>,
}

impl ScriptedSink {
    pub(crate) fn new(script: impl Fn(&Event) -> Act + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            script: Mutex::new(Arc::new(script)),
            gate: Mutex::new(None),
            accepted: Mutex::new(Vec::new()),
            calls: Mutex::default(),
        })
    }

    pub(crate) fn accepting() -> Arc<Self> {
        Self::new(|_| Act::Accept)
    }

    /// From now on `gate` blocks every call.
    pub(crate) fn hold_at(&self, gate: &Arc<Gate>) {
        *self.gate.lock().unwrap() = Some(Arc::clone(gate));
    }

    pub(crate) fn then(&self, script: impl Fn(&Event) -> Act + Send + Sync + 'static) {
        *self.script.lock().unwrap() = Arc::new(script);
    }

    /// Returns the events that it accepted, in order, with repeats.
    pub(crate) fn accepted(&self) -> Vec<Event> {
        self.accepted.lock().unwrap().clone()
    }

    /// Returns the types of the accepted events, which the tests use as names.
    pub(crate) fn names(&self) -> Vec<String> {
        self.accepted().into_iter().map(|event| event.event_type).collect()
    }

    pub(crate) fn calls(&self) -> usize {
        self.calls.lock().unwrap().len()
    }

    /// Returns the number of events of each call.
    pub(crate) fn sizes(&self) -> Vec<usize> {
        self.calls.lock().unwrap().clone()
    }
}

#[async_trait]
impl Sink for ScriptedSink {
    async fn publish(&self, &Batch { events, .. }: &Batch<'_>) -> Published {
        self.calls.lock().unwrap().push(events.len());
        let gate = self.gate.lock().unwrap().clone();
        if let Some(gate) = gate {
            gate.pass().await;
        }
        let script = Arc::clone(&self.script.lock().unwrap());
        let mut stopped = HashSet::new();
        let mut outcomes = Vec::new();
        for event in events {
            let key = event.key();
            if key.is_some_and(|key| stopped.contains(&key)) {
                outcomes.push(Outcome::Held);
                continue;
            }
            let act = script(event);
            if matches!(act, Act::Accept | Act::AcceptThenFail) {
                self.accepted.lock().unwrap().push((*event).clone());
            }
            let fault = match act {
                Act::Accept => {
                    outcomes.push(Outcome::Delivered { message_id: Some(format!("m{}", event.row.id)) });
                    continue;
                }
                Act::Refuse => Fault::Event,
                Act::Unreachable => Fault::Destination,
                Act::Misconfigured => Fault::Misconfigured,
                Act::AcceptThenFail => Fault::Unknown,
                Act::Panic => panic!("a test asked for this panic"),
                Act::Hang => std::future::pending().await,
            };
            key.map(|key| stopped.insert(key));
            outcomes.push(Outcome::Failed(PublishError::new(fault, "SCRIPTED", format!("{act:?}"))));
        }
        Published::of(outcomes)
    }

    async fn check(&self) -> Result<String, PublishError> {
        Ok("scripted".to_owned())
    }
}
