//! Publishes a batch in chunks. Each chunk is one call of the script.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures_util::future::{BoxFuture, join_all};
use redis::{Cmd, Value};

use crate::event::{Event, Fault, Outcome, PublishError};
use crate::sink::drive::{Answer, Requests, drive};
use crate::sink::redis::command::Commands;
use crate::sink::redis::connection::{Connection, slot_of};
use crate::sink::redis::fault::{call_error, concerns_a_key, server_error, wants_new_connection};
use crate::sink::redis::isolate::{is_large, is_lost};
use crate::sink::redis::once::Once;
use crate::sink::redis::script::{self, ChunkStates, PUBLISH};
use crate::sink::redis::state::{Found, StateToRecover, found};
use crate::sink::redis::state_key::is_state_key;
use crate::sink::redis::{IN_FLIGHT_KIB, Redis};
use crate::sink::rounds::{Limits, Rounds};
use crate::sink::{Batch, ClaimContext, Published};
use crate::text::message_id;

/// The limits of a chunk. 100 events keep Redis busy for well under a millisecond. The outcome of a whole chunk is unknown if the
/// connection is lost before its answer.
const LIMITS: Limits = Limits { request_events: 100, request_key_events: 100, request_bytes: 1 << 20, requests: 32 };

/// The limits for one event in flight at a time.
const ONE_BY_ONE: Limits = Limits { request_events: 1, requests: 1, ..LIMITS };

/// An event that is larger than this, in bytes, is published over a separate connection. The limit is that of all calls in
/// flight. A connection's buffer never shrinks below its largest call.
const OWN_CONNECTION_BYTES: usize = IN_FLIGHT_KIB as usize * 1024;

/// About how many bytes a command has besides the event's own: names of fields, ids and times.
const COMMAND_BYTES: usize = 512;

/// The most headers of an event that the script can pass on. Lua unpacks at most about 8,000 values at once.
const MAX_HEADERS: usize = 1000;

impl Redis {
    /// Publishes a batch as [`Sink::publish`](crate::sink::Sink::publish) does. Only with `exactly_once` Redis keeps states of
    /// what was published.
    pub(in crate::sink) async fn publish(
        &self,
        &Batch { events, deadline, claim }: &Batch<'_>,
        exactly_once: bool,
        commands: &dyn Commands,
    ) -> Published {
        let claim = claim.filter(|_| exactly_once);
        let has_own_connection = |event: &&Event| event.bytes() > OWN_CONNECTION_BYTES;
        let published = if self.suspects.are_among(events) || events.iter().any(has_own_connection) {
            self.publish_one_by_one(events, claim.as_ref(), deadline, commands).await
        } else {
            self.publish_within(LIMITS, events, claim.as_ref(), deadline, commands).await
        };
        self.suspects.note(events, &published.outcomes);
        published
    }

    /// Publishes one event at a time, over a connection that no other lane uses. Ends at the first loss.
    async fn publish_one_by_one(
        &self,
        events: &[&Event],
        claim: Option<&ClaimContext<'_>>,
        deadline: Instant,
        commands: &dyn Commands,
    ) -> Published {
        let own = self.with_own_connection();
        let mut published = own.publish_within(ONE_BY_ONE, events, claim, deadline, commands).await;
        if let Some(at) = published.outcomes.iter().position(is_lost)
            && is_large(events[at])
            // Only if Redis answers when nothing is published, this event is the cause of the loss.
            && matches!(tokio::time::timeout_at(deadline.into(), own.check()).await, Ok(Ok(_)))
            && self.suspects.lost_alone(events[at])
        {
            let message = "Redis closes the connection on this event alone: is it larger than its proto-max-bulk-len?";
            published.outcomes[at] = Outcome::Failed(PublishError::new(Fault::Event, "connection_closed", message));
        }
        published
    }

    /// Publishes `events` in chunks within `limits`.
    async fn publish_within(
        &self,
        limits: Limits,
        events: &[&Event],
        claim: Option<&ClaimContext<'_>>,
        deadline: Instant,
        commands: &dyn Commands,
    ) -> Published {
        if Instant::now() >= deadline {
            return Published::of(vec![Outcome::Held; events.len()]);
        }
        // Another lane may be connecting. The timeout includes the wait for it.
        let connected = tokio::time::timeout_at(deadline.into(), self.connection()).await;
        let in_time = |_| {
            Err(PublishError::new(Fault::Destination, "connect", "no connection to Redis in time").of_destination())
        };
        let (number, connection) = match connected.unwrap_or_else(in_time) {
            Ok(connected) => connected,
            Err(error) => return Published::of(vec![Outcome::Failed(error); events.len()]),
        };
        let once = claim.map(|claim| Once::new(claim, &self.replaced));
        let mut chunks = Chunks {
            redis: self,
            connection,
            events,
            commands,
            once,
            deadline,
            one_key_a_call: commands.one_key(),
            lost: false,
        };
        let outcomes = drive(events, limits, deadline, &mut chunks).await;
        let wants_other = |error: &PublishError| !error.fault.charges_event() && wants_new_connection(error);
        if chunks.lost || outcomes.iter().any(|outcome| matches!(outcome, Outcome::Failed(error) if wants_other(error)))
        {
            self.give_up(number).await;
        }
        let Chunks { connection, once, .. } = chunks;
        let after_settle = once.and_then(|once| clear(connection, &once, events, &outcomes, self.timeout));
        Published { outcomes, after_settle }
    }
}

/// One publish call.
struct Chunks<'a> {
    redis: &'a Redis,
    connection: Connection,
    events: &'a [&'a Event],
    commands: &'a dyn Commands,
    once: Option<Once<'a>>,
    deadline: Instant,
    /// Whether each call writes to one key, so that an error that concerns a key concerns all events of the call.
    one_key_a_call: bool,
    /// Whether taking over a state has shown that the connection must be replaced.
    lost: bool,
}

/// One chunk: the states that it writes to, and its result.
struct Chunk {
    states: ChunkStates,
    became: Became,
}

enum Became {
    /// Nothing was added.
    Nothing,
    /// The chunk was added.
    Added,
    /// The chunk may have been added.
    Unknown,
    /// Nothing was added, because these states must be recovered first.
    Recover(Vec<StateToRecover>),
    /// Nothing was added, because Redis refused one of the keys.
    RefusedForAKey,
}

impl Requests for Chunks<'_> {
    type Request = Chunk;

    fn size(&mut self, index: usize) -> Result<usize, PublishError> {
        match refusal(self.events[index], self.commands) {
            Some(error) => Err(error),
            None => Ok(self.events[index].bytes() + COMMAND_BYTES),
        }
    }

    /// Returns the slot in a cluster, and 0 elsewhere.
    fn place(&self, index: usize) -> u16 {
        if self.connection.has_slots() { slot(self.events[index], self.commands) } else { 0 }
    }

    fn prepare(&mut self, members: &[usize]) -> Chunk {
        let states = match &mut self.once {
            Some(once) => once.chunk(self.events, members, self.commands),
            None => ChunkStates::default(),
        };
        Chunk { states, became: Became::Nothing }
    }

    async fn send(&self, chunk: &mut Chunk, members: &[usize], bytes: usize) -> Answer {
        let Some(_room) = self.redis.room(bytes, self.deadline).await else {
            return Answer::Each(vec![Outcome::Held; members.len()]);
        };
        let (became, answer) = match self.run(&chunk.states, members).await {
            Ok(ScriptAnswer::Replies(replies)) => {
                let outcomes = replies.split('\n').map(|reply| outcome(reply, self.commands.one_key())).collect();
                (Became::Added, Answer::Each(outcomes))
            }
            Ok(ScriptAnswer::States(states)) => {
                let (to_recover, others): (Vec<_>, Vec<_>) = states.into_iter().partition(Result::is_ok);
                let mut foreign = others.into_iter().filter_map(Result::err);
                let answer = match &self.once {
                    Some(once) => foreign.find_map(|key| move_state(once, key)).map_or(Answer::Again, Answer::Whole),
                    None => Answer::Again,
                };
                (Became::Recover(to_recover.into_iter().flatten().collect()), answer)
            }
            // Sent again with one key in each call, the events of the other keys are published.
            Err(error) if !self.one_key_a_call && concerns_a_key(&error, self.connection.has_slots()) => {
                (Became::RefusedForAKey, Answer::Again)
            }
            Err(error) if error.fault == Fault::Unknown => (Became::Unknown, Answer::Whole(error)),
            Err(error) => (Became::Nothing, Answer::Whole(error)),
        };
        chunk.became = became;
        answer
    }

    async fn after_round(&mut self, chunks: Vec<Chunk>, rounds: &mut Rounds<'_>) {
        let mut to_recover: HashMap<String, StateToRecover> = HashMap::new();
        let mut refused_for_a_key = false;
        for Chunk { states, became } in chunks {
            match (became, &mut self.once) {
                (Became::Added, Some(once)) => once.added(&states),
                (Became::Unknown, Some(once)) => once.lost(&states),
                (Became::Recover(found), _) => {
                    to_recover.extend(found.into_iter().map(|state| (state.key.clone(), state)))
                }
                (Became::RefusedForAKey, _) => refused_for_a_key = true,
                _ => {}
            }
        }
        if refused_for_a_key {
            self.one_key_a_call = true;
            let mut numbers = HashMap::new();
            rounds.move_to_places(|index| {
                let next = u16::try_from(numbers.len()).unwrap_or(u16::MAX);
                *numbers.entry(self.commands.key(self.events[index])).or_insert(next)
            });
        }
        if to_recover.is_empty() || rounds.has_ended() {
            return;
        }
        match self.take_over(to_recover).await {
            Ok(delivered) => delivered.into_iter().for_each(|(index, outcome)| rounds.answer(index, outcome)),
            Err(error) => {
                rounds.end();
                self.lost |= error.is_some_and(|error| wants_new_connection(&error));
            }
        }
    }
}

impl Chunks<'_> {
    /// Runs one chunk.
    async fn run(&self, states: &ChunkStates, members: &[usize]) -> Result<ScriptAnswer, PublishError> {
        let call = script::publish(self.events, members, self.commands, states);
        let slot = slot(self.events[members[0]], self.commands);
        let value = match send(self.connection.clone(), &call, slot, self.deadline).await {
            // The server has lost its scripts, and ran nothing.
            Err(error) if error.code == "NOSCRIPT" => {
                let mut connection = self.connection.clone();
                let loaded = tokio::time::timeout_at(self.deadline.into(), connection.load(&PUBLISH)).await;
                loaded.map_err(|_| no_answer())?.map_err(call_error)?;
                send(connection, &call, slot, self.deadline).await?
            }
            answer => answer?,
        };
        answer(value, &states.keys, self.once.as_ref().map_or(i64::MAX, Once::highest_epoch), members.len())
    }

    /// Takes over the states that other claims have left. Returns the events that they list as published already.
    ///
    /// # Errors
    /// A call of Redis failed. `None`: the claim is lost.
    async fn take_over(
        &mut self,
        states: HashMap<String, StateToRecover>,
    ) -> Result<Vec<(usize, Outcome)>, Option<PublishError>> {
        let Some(once) = &mut self.once else { return Ok(Vec::new()) };
        let calls = once.recover(states.into_values().collect()).await.ok_or(None)?;
        let mut delivered = Vec::new();
        for (key, call) in calls {
            match send(self.connection.clone(), &call, slot_of(key.as_bytes()), self.deadline).await.map_err(Some)? {
                Value::Int(1) => delivered.extend(once.taken_over(&key, self.events, self.commands)),
                // The state has changed since it was read. The next chunk is refused again and returns the state again.
                Value::Int(0) => {}
                _ => return Err(Some(unexpected_reply())),
            }
        }
        Ok(delivered)
    }
}

/// Returns a future that clears the states, to be run when `outcomes` are settled. `None`: there is nothing to clear.
fn clear(
    connection: Connection,
    once: &Once<'_>,
    events: &[&Event],
    outcomes: &[Outcome],
    timeout: Duration,
) -> Option<BoxFuture<'static, ()>> {
    let delivered = events.iter().zip(outcomes).filter(|(_, outcome)| matches!(outcome, Outcome::Delivered { .. }));
    let clears = once.clears(delivered.map(|(event, _)| *event), connection.has_slots());
    if clears.is_empty() {
        return None;
    }
    Some(Box::pin(async move {
        let calls = clears
            .iter()
            .map(async |(slot, clear)| send(connection.clone(), clear, *slot, Instant::now() + timeout).await);
        for error in join_all(calls).await.into_iter().filter_map(Result::err) {
            tracing::debug!(%error, "Redis did not clear what is settled; the next claim asks the outbox about it");
        }
    }))
}

/// Returns an error if the event cannot be sent at all.
fn refusal(event: &Event, commands: &dyn Commands) -> Option<PublishError> {
    let count = event.headers.len();
    if count > MAX_HEADERS {
        let message = format!("the event has {count} headers, a Redis destination takes {MAX_HEADERS}");
        return Some(PublishError::new(Fault::Unfit, "too_many_headers", message));
    }
    // Such a stream would have the key of a state, and no event of that partition could be published.
    let is_reserved = !commands.one_key() && commands.key(event).is_some_and(|key| is_state_key(&key));
    is_reserved.then(|| {
        let message = "the template makes a name of this event that the relay keeps for its own notes beside streams";
        PublishError::new(Fault::Unfit, "reserved_name", message)
    })
}

/// Moves a state whose key holds something else. Returns an error if too many keys were tried.
fn move_state(once: &Once<'_>, key: String) -> Option<PublishError> {
    if once.replace(&key) {
        tracing::warn!(
            key,
            "this Redis key holds something else than the relay's notes; they go on under a new key, and what lies there stays"
        );
        return None;
    }
    let message =
        format!("{key:?} and the keys before it hold something else than the relay's notes: rename or delete them");
    Some(PublishError::new(Fault::Misconfigured, "no_state", message))
}

/// Returns the slot of a cluster that an event's command goes to.
fn slot(event: &Event, commands: &dyn Commands) -> u16 {
    // A message on a channel reaches every node from any node. All are sent to one node, so that they keep their order.
    commands.key(event).map_or(0, |key| slot_of(key.as_bytes()))
}

/// The answer of the script.
pub(super) enum ScriptAnswer {
    /// The replies, one line for each event.
    Replies(String),
    /// Nothing was done, because these states must be recovered or moved first.
    States(Vec<Found>),
}

/// Reads the script's answer to a chunk of `event_count` events. `keys` are the keys of its states.
pub(super) fn answer(
    value: Value,
    keys: &[String],
    highest_epoch: i64,
    event_count: usize,
) -> Result<ScriptAnswer, PublishError> {
    if let Some(found) = found(&value, keys, highest_epoch) {
        return Ok(ScriptAnswer::States(found));
    }
    let Value::BulkString(replies) = value else { return Err(unexpected_reply()) };
    let replies = String::from_utf8_lossy(&replies).into_owned();
    if replies.bytes().filter(|byte| *byte == b'\n').count() + 1 == event_count {
        Ok(ScriptAnswer::Replies(replies))
    } else {
        Err(unexpected_reply())
    }
}

/// Sends one call and returns its answer.
async fn send(mut connection: Connection, call: &Cmd, slot: u16, deadline: Instant) -> Result<Value, PublishError> {
    match tokio::time::timeout_at(deadline.into(), connection.call(call, slot)).await {
        Ok(answer) => answer.map_err(call_error),
        Err(_) => Err(no_answer()),
    }
}

fn no_answer() -> PublishError {
    PublishError::new(Fault::Unknown, "timeout", "no answer from Redis in time")
}

fn unexpected_reply() -> PublishError {
    let message = "Redis answered the script with something else than its replies";
    PublishError::new(Fault::Unknown, "unexpected_reply", message)
}

/// Reads one event's own reply.
pub(super) fn outcome(reply: &str, one_key: bool) -> Outcome {
    match reply.strip_prefix('-') {
        Some(error) => Outcome::Failed(server_error(error, one_key)),
        None if reply.is_empty() => Outcome::Held,
        None => Outcome::Delivered { message_id: Some(message_id(reply.to_owned())) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_delivered_only_by_its_own_reply() {
        assert_eq!(outcome("1700000000000-0", true), Outcome::Delivered { message_id: Some("1700000000000-0".into()) });
        assert_eq!(outcome("", true), Outcome::Held);
        assert!(matches!(outcome("-OOM no", true), Outcome::Failed(_)));
    }
}
