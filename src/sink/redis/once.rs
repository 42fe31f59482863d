//! Exactly once: an event that is published again after a crash or a lost answer arrives once.
//!
//! Beside each stream there is a small hash for each partition of the outbox, its *state* (see `state`). It holds the claim that
//! published last (`owner`: its epoch and token), the events that each chunk of that claim added (fields `1`, `2`, ...), and the
//! events of earlier claims that are still not settled (`already_sent`). The script of a chunk writes the state and the stream
//! together, so that after a crash or a failover of Redis both have the same age.
//!
//! 1. A chunk takes over a state whose list is empty and whose epoch is lower. If it finds any other state of another claim, it
//!    adds nothing and returns that state.
//! 2. Then the claim asks the outbox for an epoch above the state's, and for the listed events that still wait. The outbox
//!    answers only while the claim holds its partitions. The events that still wait were published already, and are not
//!    published again.
//! 3. When the claim is settled, a *clear* empties its list. If a clear is lost, the next claim does step 2.
//!
//! So a claim that has lost its partitions without knowing it is refused as soon as another claim has published there.

use std::collections::{HashMap, HashSet};

use redis::Cmd;
use uuid::Uuid;

use crate::event::{Event, Outcome, SentBefore};
use crate::sink::ClaimContext;
use crate::sink::redis::command::Commands;
use crate::sink::redis::connection::slot_of;
use crate::sink::redis::script::{self, ChunkStates, Settled};
use crate::sink::redis::state::{Added, StateToRecover};
use crate::sink::redis::state_key::{Replaced, state_key};

/// How far an epoch may be above the claim's own. A failover of the database sets its epochs back by the number of settles that
/// it loses. A number that is further away was not written by a relay, and would use up the database's own numbers.
const EPOCH_REACH: i64 = 1 << 40;

/// The states that one publish call writes to, as far as the call knows them.
pub(super) struct Once<'a> {
    claim: &'a ClaimContext<'a>,
    replaced: &'a Replaced,
    chunks: usize,
    states: HashMap<String, State>,
}

#[derive(Default)]
struct State {
    partition: i16,
    /// The epoch of the renewed claim. `None`: the claim was not renewed, and its own epoch counts.
    epoch: Option<i64>,
    /// Whether this claim has written to the state.
    owned: bool,
    /// Whether a chunk may have been added whose answer is not known.
    unknown: bool,
    /// Events that earlier claims published and that still wait.
    already_sent: Vec<Added>,
}

impl<'a> Once<'a> {
    pub(super) fn new(claim: &'a ClaimContext<'a>, replaced: &'a Replaced) -> Self {
        Self { claim, replaced, chunks: 0, states: HashMap::new() }
    }

    fn epoch(&self, key: &str) -> i64 {
        self.states.get(key).and_then(|state| state.epoch).unwrap_or(self.claim.id.epoch)
    }

    fn owner(&self, key: &str) -> String {
        format!("{} {}", self.epoch(key), self.claim.id.token)
    }

    fn key(&self, event: &Event, commands: &dyn Commands) -> String {
        let ClaimContext { destination, id, .. } = self.claim;
        let beside = commands.key(event);
        let name = format!("{}:{destination}:{}", id.outbox, event.row.partition);
        self.replaced.current(state_key(beside.as_deref(), &name))
    }

    /// Returns the highest epoch of an owner. A hash at the key of a state whose epoch is higher does not count as a state.
    pub(super) fn highest_epoch(&self) -> i64 {
        self.claim.id.epoch.saturating_add(EPOCH_REACH)
    }

    /// Moves a state to another key, because this key holds something else. Returns false if too many keys were tried.
    pub(super) fn replace(&self, key: &str) -> bool {
        self.replaced.replace(key)
    }

    /// Returns the states that the next chunk writes to.
    pub(super) fn chunk(&mut self, events: &[&Event], chunk: &[usize], commands: &dyn Commands) -> ChunkStates {
        self.chunks += 1;
        let token = self.claim.id.token;
        let mut states = ChunkStates { token, chunk: self.chunks, ..ChunkStates::default() };
        let mut last: Option<(i16, Option<String>, usize)> = None;
        for &index in chunk {
            let event = events[index];
            let beside = commands.key(event);
            // Events of a partition are next to each other in a batch, and usually go to one stream.
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
                states.epochs.push(self.epoch(&key));
                states.keys.push(key);
                states.keys.len() - 1
            });
            states.of.push(place);
            last = Some((event.row.partition, beside.map(std::borrow::Cow::into_owned), place));
        }
        states
    }

    /// Records that a chunk was added.
    pub(super) fn added(&mut self, states: &ChunkStates) {
        for key in &states.keys {
            self.states.entry(key.clone()).or_default().owned = true;
        }
    }

    /// Records that it is not known whether a chunk was added.
    pub(super) fn lost(&mut self, states: &ChunkStates) {
        for key in &states.keys {
            self.states.entry(key.clone()).or_default().unknown = true;
        }
    }

    /// Asks the outbox about the events that states list, and returns the calls that take those states over. `None`: the
    /// claim is lost.
    pub(super) async fn recover(&mut self, states: Vec<StateToRecover>) -> Option<Vec<(String, Cmd)>> {
        let floor = states.iter().map(|state| state.epoch).fold(self.claim.id.epoch, i64::max);
        let mut noted = Vec::new();
        for state in &states {
            let partition = self.states.get(&state.key).map_or(0, |state| state.partition);
            noted.extend(state.added.iter().map(|added| SentBefore {
                partition,
                id: added.sequence,
                event_id: added.event_id,
            }));
        }
        let renewed = self.claim.check.renew(floor, &noted, self.claim.destination).await?;
        let pending: HashSet<usize> = renewed.pending.into_iter().collect();
        let mut calls = Vec::with_capacity(states.len());
        let mut place = 0;
        for mut found in states {
            let added = std::mem::take(&mut found.added);
            let count = added.len();
            let waits = |(offset, added): (usize, Added)| pending.contains(&(place + offset)).then_some(added);
            let already_sent: Vec<Added> = added.into_iter().enumerate().filter_map(waits).collect();
            place += count;
            let state = self.states.entry(found.key.clone()).or_default();
            state.epoch = Some(renewed.epoch);
            state.already_sent = already_sent;
            let call = script::take_over(&found, &self.owner(&found.key), &self.states[&found.key].already_sent);
            calls.push((found.key, call));
        }
        Some(calls)
    }

    /// Records that a state was taken over. Returns the events among `events` that it lists as published already.
    pub(super) fn taken_over(
        &mut self,
        key: &str,
        events: &[&Event],
        commands: &dyn Commands,
    ) -> Vec<(usize, Outcome)> {
        let Some(state) = self.states.get_mut(key) else { return Vec::new() };
        state.owned = true;
        let already_sent: HashMap<(i64, Uuid), String> =
            state.already_sent.iter().map(|added| ((added.sequence, added.event_id), added.reply.clone())).collect();
        let partition = state.partition;
        let delivered = |(index, event): (usize, &&Event)| {
            let reply = already_sent.get(&(event.row.id, event.event_id))?;
            (event.row.partition == partition && self.key(event, commands) == key)
                .then(|| (index, Outcome::Delivered { message_id: Some(reply.clone()) }))
        };
        events.iter().enumerate().filter_map(delivered).collect()
    }

    /// Returns the calls that empty the lists, to be made when `delivered` are settled: one call for each slot of a cluster, with
    /// that slot.
    pub(super) fn clears<'e>(&self, delivered: impl Iterator<Item = &'e Event>, clustered: bool) -> Vec<(u16, Cmd)> {
        let lists_any = self.states.values().any(|state| !state.already_sent.is_empty());
        let delivered: HashSet<(i64, Uuid)> =
            delivered.filter(|_| lists_any).map(|event| (event.row.id, event.event_id)).collect();
        let mut places: HashMap<u16, Vec<Settled<'_>>> = HashMap::new();
        for (key, state) in self.states.iter().filter(|(_, state)| state.owned && !state.unknown) {
            let mut already_sent = state.already_sent.clone();
            already_sent.retain(|added| !delivered.contains(&(added.sequence, added.event_id)));
            let place = if clustered { slot_of(key.as_bytes()) } else { 0 };
            places.entry(place).or_default().push(Settled { key, owner: self.owner(key), already_sent });
        }
        places.into_iter().map(|(place, states)| (place, script::clear(&states))).collect()
    }
}
