//! What both Redis sinks share: a connection that comes back by itself, and publishing in chunks.
//!
//! - `address`: one server, a cluster, or the master that Sentinels name.
//! - `connection`: to any of them.
//! - `alone`: finding the event on which Redis closes the connection.
//! - `script`: a chunk as one call of a script, which stops a key at its first error.
//! - `once`: what keeps an event that is published again from arriving twice.
//! - `state_key`: where its notes lie.
//! - `read`: reading a stream back.
//! - `fault`: whose fault an error is.

mod address;
mod alone;
mod connection;
mod fault;
#[cfg(fuzzing)]
pub mod fuzzing;
mod once;
mod read;
mod script;
pub(in crate::sink) mod spec;
mod state_key;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::{BoxFuture, join_all};
use redis::{Cmd, Value};
use tokio::sync::{Mutex, Semaphore, SemaphorePermit};

use crate::event::{Event, Fault, Outcome, PublishError};
use crate::sink::rounds::{Limits, Rounds};
use crate::sink::{ClaimContext, Published};
use crate::text::message_id;
pub use address::RedisAddress;
use alone::Suspects;
use connection::{Connection, slot_of};
use fault::{call_error, concerns_a_key, connect_error, server_error, wants_new_connection};
use once::{ChunkStates, Dirty, Found, Once};
pub use read::StreamReader;
pub(super) use script::{Command, Commands};
use script::{SCRIPT, eval};
use state_key::{Replaced, is_state_key};

/// A chunk of 100 keeps Redis busy for well under a millisecond, and is what can be unknown after a cut connection.
const LIMITS: Limits = Limits { request_events: 100, request_bytes: 1 << 20, requests: 32 };

/// Kibibytes of chunks in flight from all lanes together. A call is held three times while it is sent: as it is made, as it
/// is packed, and in the connection's buffer.
const IN_FLIGHT_KIB: u32 = 8 * 1024;

/// A connection's buffer keeps the size of the largest call. One that is larger than all that is in flight otherwise goes over
/// a connection of its own.
const OWN_CONNECTION_BYTES: usize = IN_FLIGHT_KIB as usize * 1024;

/// The attributes of an event that a script can pass on: Lua unpacks at most about 8,000 values at once.
const MAX_HEADERS: usize = 1000;

/// A connection to one Redis, or to a cluster, shared by all lanes.
pub(super) struct Redis {
    address: RedisAddress,
    timeout: Duration,
    connection: Mutex<Option<(u64, Connection)>>,
    suspects: Suspects,
    in_flight: Arc<Semaphore>,
    replaced: Arc<Replaced>,
}

impl Redis {
    /// Nothing is connected yet. `timeout` bounds the wait for any one answer.
    pub(super) fn new(address: RedisAddress, timeout: Duration) -> Self {
        let in_flight = Arc::new(Semaphore::new(IN_FLIGHT_KIB as usize));
        Self {
            address,
            timeout,
            connection: Mutex::new(None),
            suspects: Suspects::default(),
            in_flight,
            replaced: Arc::default(),
        }
    }

    /// The same with a connection of its own.
    fn aside(&self) -> Self {
        let (in_flight, replaced) = (Arc::clone(&self.in_flight), Arc::clone(&self.replaced));
        Self { in_flight, replaced, ..Self::new(self.address.clone(), self.timeout) }
    }

    /// Waits until a call of so many bytes may be in flight; `None`: not before the deadline.
    async fn room(&self, bytes: usize, deadline: Instant) -> Option<SemaphorePermit<'_>> {
        let kib = u32::try_from(bytes / 1024 + 1).map_or(IN_FLIGHT_KIB, |kib| kib.min(IN_FLIGHT_KIB));
        tokio::time::timeout_at(deadline.into(), self.in_flight.acquire_many(kib)).await.ok()?.ok()
    }

    /// The connection and its number, by which it can be given up.
    async fn connection(&self) -> Result<(u64, Connection), PublishError> {
        let mut current = self.connection.lock().await;
        if let Some((number, connection)) = current.as_ref() {
            return Ok((*number, connection.clone()));
        }
        let mut connection = Connection::open(&self.address, self.timeout).await?;
        connection.load(&SCRIPT).await.map_err(connect_error)?;
        let connected = (fastrand::u64(..), connection);
        *current = Some(connected.clone());
        Ok(connected)
    }

    /// Gives a connection up, unless another lane has replaced it already.
    async fn give_up(&self, number: u64) {
        let mut current = self.connection.lock().await;
        if current.as_ref().is_some_and(|(current, _)| *current == number) {
            *current = None;
        }
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
        let mut rounds = Rounds::new(events);
        if Instant::now() >= deadline {
            return Published::of(rounds.into_outcomes());
        }
        // Also the wait for a lane that is just connecting.
        let connected = tokio::time::timeout_at(deadline.into(), self.connection()).await;
        let in_time = |_| {
            Err(PublishError::new(Fault::Destination, "connect", "no connection to Redis in time").of_destination())
        };
        let (number, connection) = match connected.unwrap_or_else(in_time) {
            Ok(connected) => connected,
            Err(error) => return Published::of(vec![Outcome::Failed(error); events.len()]),
        };
        // As if it were oversize, an event that is not to be sent rides alone: its turn comes when the earlier events of
        // its key have their answers.
        let size = |index: usize| match refusal(events[index], commands) {
            Some(_) => limits.request_bytes + 1,
            None => events[index].bytes() + 512,
        };
        if connection.has_slots() {
            rounds = rounds.at_places(|index| place(events[index], commands));
        }
        let mut once = claim.map(|claim| Once::new(claim, &self.replaced));
        let (mut lost, mut one_key_a_call) = (false, false);
        while Instant::now() < deadline {
            let chunks = rounds.next(limits, size);
            if chunks.is_empty() {
                break;
            }
            let states: Vec<ChunkStates> = match &mut once {
                Some(once) => chunks.iter().map(|chunk| once.chunk(events, chunk, commands)).collect(),
                None => chunks.iter().map(|_| ChunkStates::default()).collect(),
            };
            let answers = join_all(chunks.iter().zip(&states).map(async |(chunk, states)| {
                match refusal(events[chunk[0]], commands) {
                    Some(error) => Err(error),
                    None => {
                        let bytes = chunk.iter().map(|&index| size(index)).sum();
                        let Some(_room) = self.room(bytes, deadline).await else { return Ok(Answer::Unsent) };
                        let call = eval(events, chunk, commands, once.as_ref(), states);
                        let reach = once.as_ref().map_or(i64::MAX, Once::highest_epoch);
                        let expected = (states, reach, chunk.len());
                        run(connection.clone(), call, place(events[chunk[0]], commands), expected, deadline).await
                    }
                }
            }))
            .await;
            let mut dirty: HashMap<String, Dirty> = HashMap::new();
            // Several calls of one round may be refused because of a key.
            let had_one_key = one_key_a_call || commands.one_key();
            for ((chunk, states), answer) in chunks.iter().zip(&states).zip(answers) {
                let outcomes = match answer {
                    Ok(Answer::Replies(replies)) => {
                        if let Some(once) = &mut once {
                            once.added(states);
                        }
                        replies.split('\n').map(|reply| outcome(reply, commands.one_key())).collect()
                    }
                    Ok(Answer::Unsent) => vec![Outcome::Held; chunk.len()],
                    Ok(Answer::States(found)) => {
                        let (dirty_ones, others): (Vec<_>, Vec<_>) = found.into_iter().partition(Result::is_ok);
                        dirty.extend(dirty_ones.into_iter().flatten().map(|state| (state.key.clone(), state)));
                        let foreign = others.into_iter().filter_map(Result::err);
                        match once.as_ref().and_then(|once| foreign.filter_map(|key| no_state(once, key)).next()) {
                            // The events are sent once more, with another state.
                            None => continue,
                            Some(error) => vec![Outcome::Failed(error); chunk.len()],
                        }
                    }
                    // Nothing was done, because of one key. With each key in calls of its own the others go on.
                    Err(error) if !had_one_key && concerns_a_key(&error, connection.has_slots()) => {
                        one_key_a_call = true;
                        continue;
                    }
                    Err(error) => {
                        if error.fault == Fault::Unknown
                            && let Some(once) = &mut once
                        {
                            once.lost(states);
                        }
                        vec![Outcome::Failed(error); chunk.len()]
                    }
                };
                for (&index, outcome) in chunk.iter().zip(outcomes) {
                    if let Outcome::Failed(error) = &outcome
                        && !error.fault.charges_event()
                    {
                        rounds.end();
                        lost |= wants_new_connection(error);
                    }
                    rounds.answer(index, outcome);
                }
            }
            if one_key_a_call && !had_one_key {
                let mut numbers = HashMap::new();
                rounds.move_to_places(|index| {
                    let next = u16::try_from(numbers.len()).unwrap_or(u16::MAX);
                    *numbers.entry(commands.key(events[index])).or_insert(next)
                });
            }
            if let Some(once) = &mut once
                && !dirty.is_empty()
                && !rounds.has_ended()
            {
                match take_over(&connection, once, dirty, events, commands, deadline).await {
                    Ok(delivered) => {
                        delivered.into_iter().for_each(|(index, outcome)| rounds.answer(index, outcome));
                    }
                    Err(error) => {
                        rounds.end();
                        lost |= error.is_some_and(|error| wants_new_connection(&error));
                    }
                }
            }
        }
        if lost {
            self.give_up(number).await;
        }
        let outcomes = rounds.into_outcomes();
        let after_settle = once.and_then(|once| forget(connection, &once, events, &outcomes, self.timeout));
        Published { outcomes, after_settle }
    }
}

/// Takes over the states that other claims have left behind. Returns the events among `events` that are delivered already.
///
/// # Errors
/// Redis did not do it; `None`: the claim is lost.
async fn take_over(
    connection: &Connection,
    once: &mut Once<'_>,
    dirty: HashMap<String, Dirty>,
    events: &[&Event],
    commands: &dyn Commands,
    deadline: Instant,
) -> Result<Vec<(usize, Outcome)>, Option<PublishError>> {
    let calls = once.look_into(dirty.into_values().collect()).await.ok_or(None)?;
    let mut delivered = Vec::new();
    for (key, call) in calls {
        match send(connection.clone(), &call, slot_of(key.as_bytes()), deadline).await.map_err(Some)? {
            Value::Int(1) => delivered.extend(once.begun(&key, events, commands)),
            // It has changed since: its chunks are refused once more, and looked into anew.
            Value::Int(0) => {}
            _ => return Err(Some(unexpected_reply())),
        }
    }
    Ok(delivered)
}

/// What empties the lists of states, to be done when `outcomes` are settled.
fn forget(
    connection: Connection,
    once: &Once<'_>,
    events: &[&Event],
    outcomes: &[Outcome],
    timeout: Duration,
) -> Option<BoxFuture<'static, ()>> {
    let delivered = events.iter().zip(outcomes).filter(|(_, outcome)| matches!(outcome, Outcome::Delivered { .. }));
    let marks = once.marks(delivered.map(|(event, _)| *event), connection.has_slots());
    if marks.is_empty() {
        return None;
    }
    Some(Box::pin(async move {
        for answer in join_all(
            marks
                .iter()
                .map(async |(place, mark)| send(connection.clone(), mark, *place, Instant::now() + timeout).await),
        )
        .await
        {
            if let Err(error) = answer {
                tracing::debug!(%error, "Redis was not told of a settle; the next claim finds out by itself");
            }
        }
    }))
}

/// Why an event cannot be sent at all.
fn refusal(event: &Event, commands: &dyn Commands) -> Option<PublishError> {
    let count = event.headers.len();
    if count > MAX_HEADERS {
        let message = format!("the event has {count} headers, a Redis destination takes {MAX_HEADERS}");
        return Some(PublishError::new(Fault::Unfit, "too_many_headers", message));
    }
    // As a stream it would take the place of the state, and keep every event of that partition from being published.
    let is_reserved = !commands.one_key() && commands.key(event).is_some_and(|key| is_state_key(&key));
    is_reserved.then(|| {
        let message = "the template makes a name of this event that the relay keeps for its own notes beside streams";
        PublishError::new(Fault::Unfit, "reserved_name", message)
    })
}

/// Replaces a state whose key holds something else. Returns an error where that does not help any more.
fn no_state(once: &Once<'_>, key: String) -> Option<PublishError> {
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

/// The slot of a cluster that an event's command goes to.
fn place(event: &Event, commands: &dyn Commands) -> u16 {
    // Messages on channels reach every node from any; all from one, so that they keep their order.
    commands.key(event).map_or(0, |key| slot_of(key.as_bytes()))
}

/// What the script answered.
enum Answer {
    /// A line for each event.
    Replies(String),
    /// It was not asked: there was no room before the deadline.
    Unsent,
    /// Nothing was done: these states are to be looked into or replaced first.
    States(Vec<Found>),
}

/// Runs one chunk.
async fn run(
    mut connection: Connection,
    command: Cmd,
    place: u16,
    (states, highest_epoch, event_count): (&ChunkStates, i64, usize),
    deadline: Instant,
) -> Result<Answer, PublishError> {
    let value = match send(connection.clone(), &command, place, deadline).await {
        // The server forgot its scripts and ran nothing.
        Err(error) if error.code == "NOSCRIPT" => {
            let loaded = tokio::time::timeout_at(deadline.into(), connection.load(&SCRIPT)).await;
            loaded.map_err(|_| no_answer())?.map_err(call_error)?;
            send(connection, &command, place, deadline).await?
        }
        answer => answer?,
    };
    answer(value, &states.keys, highest_epoch, event_count)
}

/// What the script answered to a chunk of so many events, with states of these keys.
fn answer(value: Value, keys: &[String], highest_epoch: i64, event_count: usize) -> Result<Answer, PublishError> {
    if let Some(found) = once::found(&value, keys, highest_epoch) {
        return Ok(Answer::States(found));
    }
    let Value::BulkString(replies) = value else { return Err(unexpected_reply()) };
    let replies = String::from_utf8_lossy(&replies).into_owned();
    if replies.split('\n').count() == event_count { Ok(Answer::Replies(replies)) } else { Err(unexpected_reply()) }
}

/// One call and its answer.
async fn send(mut connection: Connection, command: &Cmd, place: u16, deadline: Instant) -> Result<Value, PublishError> {
    match tokio::time::timeout_at(deadline.into(), connection.call(command, place)).await {
        Ok(answer) => answer.map_err(call_error),
        Err(_) => Err(no_answer()),
    }
}

fn no_answer() -> PublishError {
    PublishError::new(Fault::Unknown, "timeout", "no answer from Redis in time")
}

fn unexpected_reply() -> PublishError {
    PublishError::new(
        Fault::Unknown,
        "unexpected_reply",
        "Redis answered the script with something else than its replies",
    )
}

/// One event's own reply.
fn outcome(reply: &str, one_key: bool) -> Outcome {
    match reply.strip_prefix('-') {
        Some(error) => Outcome::Failed(server_error(error, one_key)),
        None if reply.is_empty() => Outcome::Held,
        None => Outcome::Delivered { message_id: Some(message_id(reply.to_owned())) },
    }
}

impl Redis {
    /// Connects, and tries the script with no event. Returns the address, without secrets.
    pub(super) async fn check(&self) -> Result<String, PublishError> {
        let (number, mut connection) = self.connection().await?;
        let mut probe = redis::cmd("EVALSHA");
        probe.arg(SCRIPT.get_hash()).arg(0).arg(0).arg(0).arg(0).arg(0); // no key, no claim, no state, no shape
        if let Err(error) = connection.call(&probe, 0).await {
            self.give_up(number).await;
            return Err(call_error(error));
        }
        let target = self.address.target()?;
        let eviction = self.eviction().await.map(|policy| format!(", {policy}")).unwrap_or_default();
        Ok(format!("{target}, {}{eviction}", target.encryption()))
    }

    /// What there is to be said about the keys that Redis may evict; nothing where it may not be asked.
    async fn eviction(&self) -> Option<String> {
        let (_, mut connection) = self.connection().await.ok()?;
        let info: String =
            redis::from_redis_value(connection.call(redis::cmd("INFO").arg("memory"), 0).await.ok()?).ok()?;
        let policy = info.lines().find_map(|line| line.strip_prefix("maxmemory_policy:"))?.trim();
        policy.starts_with("allkeys-").then(|| {
            format!(
                "warning: with maxmemory-policy {policy} Redis may evict the stream itself, read or not; set noeviction"
            )
        })
    }

    /// Tries commands that change nothing, each because the user may lack the right to run it on this key.
    pub(super) async fn probe(&self, key: &str, commands: &[&[&str]]) -> Result<(), PublishError> {
        let (_, mut connection) = self.connection().await?;
        for (name, rest) in commands.iter().filter_map(|command| command.split_first()) {
            let mut command = redis::cmd(name);
            command.arg(key).arg(rest);
            if let Err(error) = connection.call(&command, slot_of(key.as_bytes())).await {
                let error = call_error(error);
                // "ERR" is the command itself, which was given nothing that it can use.
                if error.code != "ERR" || error.fault != Fault::Destination {
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Tries what the script does with the states beside a stream.
    pub(super) async fn probe_states(&self, stream: &str) -> Result<(), PublishError> {
        let commands: [&[&str]; 8] = [
            &["HMGET", "owner", "0"],
            &["HGET", "owner"],
            &["HLEN"],
            &["HGETALL"],
            &["HSET", "a", "b", "c"],
            &["DEL"],
            &["PERSIST"],
            &["EXPIRE", "x"],
        ];
        self.probe(&state_key::state_key(Some(stream), "check"), &commands).await
    }

    /// Whether the user may publish to this channel, where Redis tells. Nothing can be tried: it would reach subscribers.
    pub(super) async fn may_publish(&self, channel: &str) -> Result<(), PublishError> {
        let (_, mut connection) = self.connection().await?;
        let Ok(user) = connection.call(redis::cmd("ACL").arg("WHOAMI"), 0).await else { return Ok(()) };
        let Ok(user) = redis::from_redis_value::<String>(user) else { return Ok(()) };
        let mut dry_run = redis::cmd("ACL");
        dry_run.arg("DRYRUN").arg(user).arg("PUBLISH").arg(channel).arg("");
        match connection.call(&dry_run, 0).await.map(redis::from_redis_value::<String>) {
            Ok(Ok(answer)) if answer != "OK" => Err(PublishError::new(Fault::Misconfigured, "NOPERM", answer)),
            _ => Ok(()),
        }
    }

    /// The type of a key, as Redis names it; `none` where there is no such key.
    pub(super) async fn key_type(&self, key: &str) -> Result<String, PublishError> {
        let (_, mut connection) = self.connection().await?;
        let answer = connection.call(redis::cmd("TYPE").arg(key), slot_of(key.as_bytes())).await;
        answer.and_then(|kind| Ok(redis::from_redis_value(kind)?)).map_err(call_error)
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
