//! What operators do with dead letters: look at them, put them back, discard them, delete them; and with events that wait: try
//! them again now, give them up, move them to another destination.
//!
//! A command first chooses, and then works in batches, each in a transaction of its own. So a batch is done whole or not at all,
//! and a command that was stopped goes on where it is run again. Each command leaves one row in `event_operator_action`.

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::outbox::error::OutboxError;

/// Which dead letters or events a command is about. Every field that is set must fit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// A glob over the event type: `*` matches any characters, `?` matches any one character.
    pub event_type: Option<String>,
    /// The second half of the key, or both halves with a colon between them, as logs show a key.
    pub key: Option<String>,
    /// The name of the destination. Empty: no route took the event.
    pub destination: Option<String>,
    /// The code of the error.
    pub error: Option<String>,
    /// The earliest time.
    pub since: Option<OffsetDateTime>,
    /// The time before which it must have been.
    pub until: Option<OffsetDateTime>,
    /// If not empty: the ids.
    pub ids: Vec<i64>,
    /// The state of dead letters. `None`: what the command is usually about.
    pub state: Option<State>,
}

/// What became of a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Neither redriven nor discarded.
    Open,
    /// Put back into the outbox.
    Redriven,
    /// Marked as not to be redriven.
    Discarded,
    /// Redriven or discarded.
    Closed,
    /// Any of these.
    All,
}

impl State {
    /// The name in a filter, as in `open`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Redriven => "redriven",
            Self::Discarded => "discarded",
            Self::Closed => "closed",
            Self::All => "all",
        }
    }
}

impl Filter {
    /// Returns whether nothing is left out.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns the filter as the audit table keeps it, and as the functions of the database take it.
    pub fn to_json(&self) -> Value {
        let mut fields = Map::new();
        let texts = [
            ("type", &self.event_type),
            ("key", &self.key),
            ("destination", &self.destination),
            ("error", &self.error),
        ];
        for (name, text) in texts {
            if let Some(text) = text {
                fields.insert(name.to_owned(), json!(text));
            }
        }
        for (name, time) in [("since", self.since), ("until", self.until)] {
            if let Some(time) = time.and_then(|time| time.format(&Rfc3339).ok()) {
                fields.insert(name.to_owned(), json!(time));
            }
        }
        match &self.ids[..] {
            [] => {}
            [id] => drop(fields.insert("id".to_owned(), json!(id))),
            ids => drop(fields.insert("id".to_owned(), json!(ids))),
        }
        if let Some(state) = self.state {
            fields.insert("state".to_owned(), json!(state.name()));
        }
        Value::Object(fields)
    }
}

/// A dead letter, without its content. Times are UTC, as RFC 3339.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeadLetter {
    /// The id of the dead letter.
    pub id: i64,
    /// The id that the event had in the outbox; consumers see it as `sequence`.
    pub outbox_id: i64,
    /// The identity of the event.
    pub event_id: String,
    /// What happened.
    pub event_type: String,
    /// The first half of the key.
    pub aggregate_type: Option<String>,
    /// The second half of the key. `None`: the event has no key.
    pub aggregate_id: Option<String>,
    /// The destination that it could not be delivered to. Empty: no route took the event.
    pub destination: String,
    /// How many attempts were charged.
    pub attempts: i32,
    /// The code of the last failure.
    pub error_code: String,
    /// The message of the last failure.
    pub error: String,
    /// When the event was emitted.
    pub created_at: String,
    /// When the first attempt failed.
    pub first_failed_at: String,
    /// When the last attempt failed.
    pub failed_at: String,
    /// When it was put back.
    pub redriven_at: Option<String>,
    /// Who put it back.
    pub redriven_by: Option<String>,
    /// The destination that it was put back for, if that is another one.
    pub redriven_to: Option<String>,
    /// When it was discarded.
    pub discarded_at: Option<String>,
    /// Who discarded it.
    pub discarded_by: Option<String>,
    /// Why it was discarded.
    pub discard_reason: Option<String>,
    /// How often the event was redriven before it failed this time.
    pub redrives: i64,
}

impl DeadLetter {
    /// What became of it.
    pub fn state(&self) -> State {
        match (&self.redriven_at, &self.discarded_at) {
            (Some(_), _) => State::Redriven,
            (None, Some(_)) => State::Discarded,
            (None, None) => State::Open,
        }
    }
}

/// The content of a dead letter.
#[derive(Debug, Clone, Deserialize)]
pub struct Content {
    /// The application that emitted the event.
    pub source: String,
    /// The payload's JSON, as the database prints it.
    pub payload: String,
    /// The headers: a JSON object.
    pub headers: String,
    /// An id that all events of one business operation share.
    pub correlation_id: Option<String>,
    /// The id of what caused the event.
    pub causation_id: Option<String>,
    /// The version of the payload's schema.
    pub schema_version: i32,
    /// 0 to 9.
    pub priority: i32,
}

/// A dead letter with its content and its past.
#[derive(Debug, Clone)]
pub struct WholeDeadLetter {
    /// The dead letter.
    pub letter: DeadLetter,
    /// What it holds.
    pub content: Content,
    /// The other dead letters of the same event, the oldest first.
    pub others: Vec<DeadLetter>,
}

/// Dead letters that failed in the same way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Group {
    /// The destination.
    pub destination: String,
    /// The code of the error.
    pub error_code: String,
    /// How many there are.
    pub count: i64,
    /// How many event types these have.
    pub types: i64,
    /// When the first of them failed, as RFC 3339.
    pub first_failed_at: String,
    /// When the last of them failed, as RFC 3339.
    pub last_failed_at: String,
    /// The message of one of them.
    pub error: String,
}

/// What is done with dead letters.
#[derive(Debug, Clone)]
pub enum Action {
    /// They are put back into the outbox, the earliest event first.
    Redrive {
        /// The destination, if it is not the one that they failed at.
        to: Option<String>,
        /// Another payload, for one that is corrected: JSON.
        payload: Option<String>,
    },
    /// They are marked, and stay.
    Discard {
        /// Why they are not redriven.
        reason: String,
    },
    /// They are deleted.
    Purge,
}

impl Action {
    /// The state of the dead letters that this is done with, if neither a state nor an id is given.
    pub fn usual_state(&self) -> State {
        match self {
            Self::Redrive { .. } | Self::Discard { .. } => State::Open,
            Self::Purge => State::Closed,
        }
    }
}

/// One command, which may take several transactions.
#[derive(Debug, Clone)]
pub struct CommandId {
    /// Its id in the audit table.
    pub id: Uuid,
    /// What it is about.
    pub filter: Filter,
}

impl CommandId {
    /// Creates the id of a command that is about to begin.
    pub fn new(filter: Filter) -> Self {
        Self { id: Uuid::new_v4(), filter }
    }
}

/// What is done with events that wait. Events are chosen by the id in the outbox, and by when they were emitted.
#[derive(Debug, Clone)]
pub enum WaitingAction {
    /// They are due now, and so are the later events of their keys.
    Retry,
    /// They become dead letters, and the later events of their keys go on.
    GiveUp {
        /// Why, in words.
        reason: Option<String>,
    },
    /// They are owed to another destination, in the order of their keys.
    Move {
        /// The destination that they are owed to. The filter names it too.
        from: String,
        /// The destination that gets them.
        to: String,
    },
}

impl WaitingAction {
    /// The name in the audit table.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Retry => "retry_now",
            Self::GiveUp { .. } => "give_up",
            Self::Move { .. } => "move_owed",
        }
    }
}

/// Events that are changed in one transaction. All events of a key are in the same batch.
#[derive(Debug, Clone)]
pub struct WaitingBatch {
    /// Where they are, as the store has it.
    pub places: Vec<i64>,
    /// How many they are.
    pub count: u64,
}

/// Events that wait for the same destination after the same error.
#[derive(Debug, Clone, Serialize)]
pub struct WaitingGroup {
    /// The destination.
    pub destination: String,
    /// The code of the last error. Empty: none; they wait behind others, or for their destination.
    pub error_code: String,
    /// How many they are.
    pub count: u64,
}

/// What an action would change.
#[derive(Debug, Clone, Default)]
pub struct Waiting {
    /// The batches, in the order in which they are to be changed.
    pub batches: Vec<WaitingBatch>,
    /// How many events, by destination and error.
    pub groups: Vec<WaitingGroup>,
}

impl Waiting {
    /// How many events there are.
    pub fn count(&self) -> u64 {
        self.batches.iter().map(|batch| batch.count).sum()
    }
}

/// A connection of an operator's command.
pub trait Mend: Send {
    /// Returns the time by the database's clock.
    ///
    /// # Errors
    /// The database cannot be asked.
    fn now(&mut self) -> BoxFuture<'_, Result<OffsetDateTime, OutboxError>>;

    /// Returns at most `limit` dead letters, the newest first.
    ///
    /// # Errors
    /// They cannot be read.
    fn dead_letters<'a>(
        &'a mut self,
        filter: &'a Filter,
        limit: i64,
    ) -> BoxFuture<'a, Result<Vec<DeadLetter>, OutboxError>>;

    /// Returns how many dead letters there are for each destination and error, the most first.
    ///
    /// # Errors
    /// They cannot be read.
    fn groups<'a>(&'a mut self, filter: &'a Filter) -> BoxFuture<'a, Result<Vec<Group>, OutboxError>>;

    /// Returns the dead letter with this id, if there is one.
    ///
    /// # Errors
    /// It cannot be read.
    fn dead_letter(&mut self, id: i64) -> BoxFuture<'_, Result<Option<WholeDeadLetter>, OutboxError>>;

    /// Returns the ids of at most `limit` dead letters, in the order in which their events were emitted.
    ///
    /// # Errors
    /// They cannot be read.
    fn choose<'a>(&'a mut self, filter: &'a Filter, limit: i64) -> BoxFuture<'a, Result<Vec<i64>, OutboxError>>;

    /// Does this with those of `ids` for which the filter still holds, in one transaction. Returns how many those were.
    ///
    /// # Errors
    /// Nothing was done.
    fn apply<'a>(
        &'a mut self,
        action: &'a Action,
        command: &'a CommandId,
        ids: &'a [i64],
    ) -> BoxFuture<'a, Result<u64, OutboxError>>;

    /// Returns the events that wait, and that `action` would change.
    ///
    /// # Errors
    /// They cannot be counted.
    fn waiting<'a>(
        &'a mut self,
        action: &'a WaitingAction,
        filter: &'a Filter,
    ) -> BoxFuture<'a, Result<Waiting, OutboxError>>;

    /// Does this with those events of `batch` for which the filter still holds, in one transaction: with `most` events, the
    /// earliest. Returns how many those were.
    ///
    /// # Errors
    /// Nothing was done.
    fn apply_waiting<'a>(
        &'a mut self,
        action: &'a WaitingAction,
        command: &'a CommandId,
        batch: &'a WaitingBatch,
        most: Option<u64>,
    ) -> BoxFuture<'a, Result<u64, OutboxError>>;

    /// Returns the names of the destinations of all relays that are registered.
    ///
    /// # Errors
    /// They cannot be read.
    fn destinations(&mut self) -> BoxFuture<'_, Result<Vec<String>, OutboxError>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_kept_with_what_is_set_only() {
        assert_eq!(Filter::default().to_json(), json!({}));
        let filter = Filter {
            event_type: Some("order.*".to_owned()),
            destination: Some(String::new()),
            since: Some(OffsetDateTime::UNIX_EPOCH),
            ids: vec![7],
            state: Some(State::Closed),
            ..Filter::default()
        };
        let expected =
            json!({"type": "order.*", "destination": "", "since": "1970-01-01T00:00:00Z", "id": 7, "state": "closed"});
        assert_eq!(filter.to_json(), expected);
        assert!(!filter.is_empty());
        assert_eq!(Filter { ids: vec![7, 8], ..Filter::default() }.to_json(), json!({"id": [7, 8]}));
    }
}
