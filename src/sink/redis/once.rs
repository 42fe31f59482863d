//! Exactly once: what keeps an event that is published again, after a crash or an answer that was lost, from arriving twice.
//!
//! Beside each stream lies a small hash, its *state*, one for each partition of the outbox: which claim published last
//! (`owner`: its epoch and token), what each chunk of that claim added (fields `1`, `2`, ...: a line with sequence and id of
//! each event, an empty one, and their lines of the script's answer), and what of earlier claims is still unsettled
//! (`carried`). The script of a chunk writes the state together with the stream, so each is as old as the other whatever
//! happens to Redis.
//!
//! 1. A chunk takes over a state whose list is empty, from an earlier epoch. Otherwise it adds nothing, and tells.
//! 2. Then the claim asks the outbox, which answers only while it holds its partitions, for an epoch above the state's and
//!    for what of the listed events still waits. That is carried: published already, and not published again.
//! 3. When the claim is settled, its list is emptied by a *mark*. A mark that is lost costs the next claim step 2.
//!
//! So a claim that lost its partitions, and does not know it, is refused as soon as another has published there.

use std::collections::{HashMap, HashSet};

use redis::{Cmd, Value};
use uuid::Uuid;

use crate::event::{Event, Outcome, SentBefore};
use crate::sink::ClaimContext;
use crate::sink::redis::connection::slot_of;
use crate::sink::redis::script::Commands;
use crate::sink::redis::state_key::{Replaced, state_key};

/// How long the state of a partition in which nothing happens is kept. It must outlast a publish call that was begun before
/// another claim took over, which ends with its timeout.
const STATE_LIFETIME_SECONDS: u32 = 86_400;

/// How far above the claim's own an epoch may be. A failover of the database takes its epochs back by as many settles as it
/// loses; a number that is further away is not a relay's, and would drive the database's own to its end.
const EPOCH_REACH: i64 = 1 << 40;

/// Takes over a state that was looked into, unless it has changed since. KEYS: the state. ARGV: its number of fields and its
/// owner then; the owner from now on; what is carried.
const BEGIN: &str = "
if redis.call('HLEN', KEYS[1]) ~= tonumber(ARGV[1]) or redis.call('HGET', KEYS[1], 'owner') ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'owner', ARGV[3])
if ARGV[4] ~= '' then redis.call('HSET', KEYS[1], 'carried', ARGV[4]) end
return 1";

/// Empties lists that are settled, each unless another claim owns it by now. KEYS: the states. ARGV: the lifetime; for each
/// state its owner, and what is still carried.
const MARK: &str = "
for n = 1, #KEYS do
  local owner, carried = ARGV[2 * n], ARGV[2 * n + 1]
  if redis.call('HGET', KEYS[n], 'owner') == owner then
    redis.call('DEL', KEYS[n])
    redis.call('HSET', KEYS[n], 'owner', owner)
    if carried ~= '' then
      redis.call('HSET', KEYS[n], 'carried', carried)
    else
      redis.call('EXPIRE', KEYS[n], ARGV[1])
    end
  end
end
return redis.status_reply('OK')";

/// The states that a chunk writes to.
#[derive(Default)]
pub(super) struct ChunkStates {
    /// The chunk's number within its claim, by which one that is sent twice is known.
    pub(super) chunk: usize,
    pub(super) keys: Vec<String>,
    /// The state of each of its events, as an index into `keys`.
    pub(super) of: Vec<usize>,
}

/// A state that this claim may not write to before it has looked into it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Dirty {
    pub(super) key: String,
    fields: usize,
    owner: String,
    epoch: i64,
    added: Vec<Added>,
}

/// An event that a state lists, and the reply to it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Added {
    sequence: i64,
    event_id: Uuid,
    reply: String,
}

/// What one publish call knows of the states it writes to.
pub(super) struct Once<'a> {
    claim: &'a ClaimContext<'a>,
    replaced: &'a Replaced,
    chunks: usize,
    states: HashMap<String, State>,
}

#[derive(Default)]
struct State {
    partition: i16,
    /// Where it is not the claim's first.
    epoch: Option<i64>,
    /// Some chunk was added under this claim.
    owned: bool,
    /// A chunk may have been added of which nothing is known.
    unknown: bool,
    carried: Vec<Added>,
}

impl<'a> Once<'a> {
    pub(super) fn new(claim: &'a ClaimContext<'a>, replaced: &'a Replaced) -> Self {
        Self { claim, replaced, chunks: 0, states: HashMap::new() }
    }

    pub(super) fn token(&self) -> u64 {
        self.claim.id.token
    }

    pub(super) fn epoch(&self, key: &str) -> i64 {
        self.states.get(key).and_then(|state| state.epoch).unwrap_or(self.claim.id.epoch)
    }

    fn owner(&self, key: &str) -> String {
        format!("{} {}", self.epoch(key), self.token())
    }

    fn key(&self, event: &Event, commands: &dyn Commands) -> String {
        let ClaimContext { destination, id, .. } = self.claim;
        let beside = commands.key(event);
        let name = format!("{}:{destination}:{}", id.outbox, event.row.partition);
        self.replaced.current(state_key(beside.as_deref(), &name))
    }

    /// A state of this key is of use only if its owner's epoch is at most this.
    pub(super) fn highest_epoch(&self) -> i64 {
        self.claim.id.epoch.saturating_add(EPOCH_REACH)
    }

    /// What lies at this key is no state: another key takes its place. `false`: there have been too many.
    pub(super) fn replace(&self, key: &str) -> bool {
        self.replaced.replace(key)
    }

    /// The states of the next chunk.
    pub(super) fn chunk(&mut self, events: &[&Event], chunk: &[usize], commands: &dyn Commands) -> ChunkStates {
        self.chunks += 1;
        let mut states = ChunkStates { chunk: self.chunks, ..ChunkStates::default() };
        let mut last: Option<(i16, Option<String>, usize)> = None;
        for &index in chunk {
            let event = events[index];
            let beside = commands.key(event);
            // Events of a partition lie side by side, and usually go to one stream.
            if let Some((partition, stream, place)) = &last
                && *partition == event.row.partition
                && stream.as_deref() == beside.as_deref()
            {
                states.of.push(*place);
                continue;
            }
            let key = self.key(event, commands);
            let place = states.keys.iter().position(|known| *known == key).unwrap_or_else(|| {
                self.states.entry(key.clone()).or_default().partition = event.row.partition;
                states.keys.push(key);
                states.keys.len() - 1
            });
            states.of.push(place);
            last = Some((event.row.partition, beside.map(std::borrow::Cow::into_owned), place));
        }
        states
    }

    /// Adds an event to the list of a state.
    pub(super) fn list(list: &mut String, event: &Event) {
        list_event(list, event.row.id, event.event_id);
    }

    /// A chunk was added.
    pub(super) fn added(&mut self, states: &ChunkStates) {
        for key in &states.keys {
            self.states.entry(key.clone()).or_default().owned = true;
        }
    }

    /// Nobody knows whether a chunk was added.
    pub(super) fn lost(&mut self, states: &ChunkStates) {
        for key in &states.keys {
            self.states.entry(key.clone()).or_default().unknown = true;
        }
    }

    /// Asks the outbox about the events that states list, and returns the calls that take those states over. `None`: the
    /// claim is lost.
    pub(super) async fn look_into(&mut self, dirty: Vec<Dirty>) -> Option<Vec<(String, Cmd)>> {
        let floor = dirty.iter().map(|state| state.epoch).fold(self.claim.id.epoch, i64::max);
        let mut noted = Vec::new();
        for state in &dirty {
            let partition = self.states.get(&state.key).map_or(0, |state| state.partition);
            noted.extend(state.added.iter().map(|added| SentBefore {
                partition,
                id: added.sequence,
                event_id: added.event_id,
            }));
        }
        let renewed = self.claim.check.renew(floor, &noted, self.claim.destination).await?;
        let pending: HashSet<usize> = renewed.pending.into_iter().collect();
        let mut calls = Vec::with_capacity(dirty.len());
        let mut place = 0;
        for seen in dirty {
            let count = seen.added.len();
            let waits = |(offset, added): (usize, Added)| pending.contains(&(place + offset)).then_some(added);
            let carried: Vec<Added> = seen.added.into_iter().enumerate().filter_map(waits).collect();
            place += count;
            let state = self.states.entry(seen.key.clone()).or_default();
            state.epoch = Some(renewed.epoch);
            state.carried = carried;
            let mut call = redis::cmd("EVAL");
            call.arg(BEGIN).arg(1).arg(&seen.key).arg(seen.fields).arg(&seen.owner);
            call.arg(self.owner(&seen.key)).arg(format_added(&self.states[&seen.key].carried));
            calls.push((seen.key, call));
        }
        Some(calls)
    }

    /// A state that was looked into is this claim's: its events that are carried have been delivered before.
    pub(super) fn begun(&mut self, key: &str, events: &[&Event], commands: &dyn Commands) -> Vec<(usize, Outcome)> {
        let Some(state) = self.states.get_mut(key) else { return Vec::new() };
        state.owned = true;
        let carried: HashMap<(i64, Uuid), String> =
            state.carried.iter().map(|added| ((added.sequence, added.event_id), added.reply.clone())).collect();
        let partition = state.partition;
        let delivered = |(index, event): (usize, &&Event)| {
            let reply = carried.get(&(event.row.id, event.event_id))?;
            (event.row.partition == partition && self.key(event, commands) == key)
                .then(|| (index, Outcome::Delivered { message_id: Some(reply.clone()) }))
        };
        events.iter().enumerate().filter_map(delivered).collect()
    }

    /// The calls that empty the lists once `delivered` are settled, one for each slot of a cluster, with that slot.
    pub(super) fn marks<'e>(&self, delivered: impl Iterator<Item = &'e Event>, clustered: bool) -> Vec<(u16, Cmd)> {
        let carries = self.states.values().any(|state| !state.carried.is_empty());
        let delivered: HashSet<(i64, Uuid)> =
            delivered.filter(|_| carries).map(|event| (event.row.id, event.event_id)).collect();
        let mut places: HashMap<u16, Vec<&String>> = HashMap::new();
        for (key, state) in &self.states {
            if state.owned && !state.unknown {
                places.entry(if clustered { slot_of(key.as_bytes()) } else { 0 }).or_default().push(key);
            }
        }
        let call = |keys: Vec<&String>| {
            let mut call = redis::cmd("EVAL");
            call.arg(MARK).arg(keys.len());
            keys.iter().for_each(|key| {
                call.arg(key);
            });
            call.arg(STATE_LIFETIME_SECONDS);
            for key in keys {
                let mut carried = self.states[key].carried.clone();
                carried.retain(|added| !delivered.contains(&(added.sequence, added.event_id)));
                call.arg(self.owner(key)).arg(format_added(&carried));
            }
            call
        };
        places.into_iter().map(|(place, keys)| (place, call(keys))).collect()
    }
}

/// A state that a chunk may not write to: one to be looked into, or the key of what is no state.
pub(super) type Found = Result<Dirty, String>;

/// The states in the answer of a chunk that added nothing; `None` where it is another answer.
pub(super) fn found(answer: &Value, keys: &[String], highest_epoch: i64) -> Option<Vec<Found>> {
    let Value::Array(states) = answer else { return None };
    if states.is_empty() {
        return None;
    }
    states.iter().map(|state| found_state(state, keys, highest_epoch)).collect()
}

fn found_state(state: &Value, keys: &[String], highest_epoch: i64) -> Option<Found> {
    let Value::Array(parts) = state else { return None };
    let [number, fields] = parts.as_slice() else { return None };
    let key = keys.get(text(number)?.parse::<usize>().ok()?.checked_sub(1)?)?.clone();
    let dirty = dirty_state(&key, fields).filter(|dirty| dirty.epoch <= highest_epoch);
    Some(dirty.ok_or(key))
}

/// `None`: it is no state.
fn dirty_state(key: &str, fields: &Value) -> Option<Dirty> {
    // The error of a key of another type is no list.
    let Value::Array(fields) = fields else { return None };
    let (mut owner, mut added) = (None, Vec::new());
    for field in fields.chunks_exact(2) {
        match text(&field[0])? {
            "owner" => owner = Some(text(&field[1])?.to_owned()),
            _ => added.append(&mut parse_added(text(&field[1])?)?),
        }
    }
    let owner = owner?;
    let epoch = owner.split(' ').next()?.parse().ok()?;
    Some(Dirty { key: key.to_owned(), fields: fields.len() / 2, owner, epoch, added })
}

fn parse_added(text: &str) -> Option<Vec<Added>> {
    let (events, replies) = text.split_once("\n\n")?;
    let (events, replies): (Vec<_>, Vec<_>) = (events.split('\n').collect(), replies.split('\n').collect());
    if events.len() != replies.len() {
        return None;
    }
    let added = events.into_iter().zip(replies).filter(|(_, reply)| !reply.is_empty() && !reply.starts_with('-'));
    added
        .map(|(event, reply)| {
            let (sequence, event_id) = event.split_once(' ')?;
            Some(Added { sequence: sequence.parse().ok()?, event_id: event_id.parse().ok()?, reply: reply.to_owned() })
        })
        .collect()
}

/// What [`parse_added`] reads; nothing for nothing.
fn format_added(added: &[Added]) -> String {
    if added.is_empty() {
        return String::new();
    }
    let mut text = String::new();
    added.iter().for_each(|added| list_event(&mut text, added.sequence, added.event_id));
    added.iter().for_each(|added| text.extend(["\n", &added.reply]));
    text
}

fn list_event(list: &mut String, sequence: i64, event_id: Uuid) {
    list.extend([&sequence.to_string(), " ", event_id.hyphenated().encode_lower(&mut Uuid::encode_buffer()), "\n"]);
}

fn text(value: &Value) -> Option<&str> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_with_anything_unexpected_in_it_is_no_state() {
        let bulk = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let state = |fields: &[&str]| {
            Value::Array(vec![Value::Array(vec![
                bulk("1"),
                Value::Array(fields.iter().map(|field| bulk(field)).collect()),
            ])])
        };
        let keys = ["k".to_owned()];
        let id = Uuid::from_u128(7);
        let line = format!("12 {id}\n13 {id}\n\n1-0\n");
        let added = Added { sequence: 12, event_id: id, reply: "1-0".to_owned() };
        let found = |value: &Value| found(value, &keys, 100);
        let dirty =
            Dirty { key: "k".to_owned(), fields: 2, owner: "3 4".to_owned(), epoch: 3, added: vec![added.clone()] };
        assert_eq!(found(&state(&["owner", "3 4", "1", &line])), Some(vec![Ok(dirty)]));
        let both = [Added { sequence: -1, event_id: id, reply: "2-0".to_owned() }, added.clone()];
        assert_eq!(parse_added(&format_added(&both)), Some(both.to_vec()));
        let no_state = Some(vec![Err("k".to_owned())]);
        assert_eq!(found(&state(&["1", &line])), no_state);
        assert_eq!(found(&state(&["owner", "x", "1", &line])), no_state);
        assert_eq!(found(&state(&["owner", "101 4"])), no_state, "its epoch is out of reach");
        assert_eq!(found(&state(&["owner", "3 4", "1", "12 x\n\n1-0"])), no_state);
        assert_eq!(found(&state(&["owner", "3 4", "1", &format!("12 {id}\n\n1-0\n2-0")])), no_state);
        assert_eq!(found(&Value::Array(vec![Value::Array(vec![bulk("1"), bulk("WRONGTYPE ...")])])), no_state);
        assert_eq!(found(&Value::Array(vec![bulk("1-0")])), None);
        assert_eq!(found(&Value::Nil), None);
    }
}
