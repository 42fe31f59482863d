//! The scripts that Redis runs, and their calls: one publishes a chunk, one takes over a state, and one clears states.
//!
//! [`once`](super::once) explains the states.

use std::collections::HashSet;
use std::sync::LazyLock;

use redis::{Cmd, Script};

use crate::event::Event;
use crate::sink::redis::command::{Command, Commands, Shape, Words};
use crate::sink::redis::state::{Added, StateToRecover, format_added, list_event};

/// The seconds after which the state of an idle partition is deleted. It must outlast a publish call that began before another
/// claim took over. Such a call ends with its timeout of at most ten minutes.
const STATE_LIFETIME_SECONDS: u32 = 86_400;

/// Runs each event's command. A pipeline of commands could break the order of a key: one fails, and the next succeeds.
///
/// KEYS: the keys that events are written to, then the states (see [`once`](super::once)).
///
/// ARGV: the claim's token; the chunk's number; the number of states, and for each its epoch and the list of its events; the
/// number of shapes; for each shape three lists, each with its length before it: the words, where an empty word stands for a
/// value; the places of the values that the events of a run share; the places of each event's own values (place 0: nowhere);
/// and after the lists the number of the own value that is the event's key (0: none). Then runs of events: shape, state
/// (0: none), number of events, the shared values, and each event's own values.
///
/// The answer is one text with a line for each event: the command's reply, `-` and an error, or nothing if an earlier event of
/// its key failed. One text takes less time to read than a reply for each event. If the claim may not write to some of the
/// states, nothing is done, and the answer is the list of those: states to recover, and keys that hold no state.
///
/// Shapes and runs exist because Redis would otherwise mostly parse what events share, which takes as long as adding the
/// entries.
pub(super) static PUBLISH: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local token, chunk, count, at = ARGV[1], ARGV[2], tonumber(ARGV[3]), 3
local states, to_recover = {}, {}
for n = 1, count do
  local key, epoch, list = KEYS[#KEYS - count + n], ARGV[at + 1], ARGV[at + 2]
  at = at + 2
  local mine = epoch .. ' ' .. token
  local found = redis.pcall('HMGET', key, 'owner', chunk)
  if found.err and string.sub(found.err, 1, 9) ~= 'WRONGTYPE' then return found end
  local owner = found[1]
  local number = owner and tonumber(string.match(owner, '^%d+'))
  if found.err then
    to_recover[#to_recover + 1] = { tostring(n), 'WRONGTYPE' }
  elseif owner == mine then
    if found[2] then return redis.status_reply('REPEATED') end
  elseif redis.call('HLEN', key) > (owner and 1 or 0) or owner and (not number or number >= tonumber(epoch)) then
    to_recover[#to_recover + 1] = { tostring(n), redis.call('HGETALL', key) }
  end
  states[n] = { key = key, owner = owner ~= mine and mine, texts = { list } }
end
if #to_recover > 0 then return to_recover end
for n = 1, count do
  local state = states[n]
  if state.owner then
    local taken = redis.pcall('HSET', state.key, 'owner', state.owner)
    if type(taken) == 'table' then return taken end
    redis.call('PERSIST', state.key)
  end
end
local function numbers()
  local list = {}
  at = at + 1
  for n = 1, ARGV[at] do list[n] = ARGV[at + n] end
  at = at + #list
  return list
end
local shapes = {}
at = at + 1
for n = 1, ARGV[at] do
  local shape = { words = numbers(), shared = numbers(), own = numbers() }
  for place, word in ipairs(shape.shared) do shape.shared[place] = tonumber(word) end
  for place, word in ipairs(shape.own) do shape.own[place] = tonumber(word) end
  at = at + 1
  shape.key = tonumber(ARGV[at])
  shapes[n] = shape
end
local pcall, unpack, type = redis.pcall, unpack, type
local replies, n, stopped, failed, last = {}, 0, {}, false, #ARGV
while at < last do
  local shape, state, events = shapes[tonumber(ARGV[at + 1])], states[tonumber(ARGV[at + 2])], tonumber(ARGV[at + 3])
  local words, shared, own, key = shape.words, shape.shared, shape.own, shape.key
  local width, first = #own, n + 1
  at = at + 3
  for place = 1, #shared do words[shared[place]] = ARGV[at + place] end
  at = at + #shared
  for _ = 1, events do
    n = n + 1
    if failed and key > 0 and stopped[ARGV[at + key]] then
      replies[n] = ''
    else
      for place = 1, width do words[own[place]] = ARGV[at + place] end
      local reply = pcall(unpack(words))
      if type(reply) == 'table' then
        replies[n] = '-' .. string.gsub(reply.err or 'ERR unexpected reply', '[\r\n]', ' ')
        failed = true
        if key > 0 then stopped[ARGV[at + key]] = true end
      else
        replies[n] = tostring(reply)
      end
    end
    at = at + width
  end
  if state then state.texts[#state.texts + 1] = table.concat(replies, '\n', first, n) end
end
for n = 1, count do
  local state = states[n]
  redis.call('HSET', state.key, chunk, table.concat(state.texts, '\n'))
end
return table.concat(replies, '\n')",
    )
});

/// Takes over a state, unless it has changed since it was read. KEYS: the state. ARGV: its number of fields and its owner when
/// it was read; the new owner; the list of events that earlier claims published and that still wait.
const TAKE_OVER: &str = "
if redis.call('HLEN', KEYS[1]) ~= tonumber(ARGV[1]) or redis.call('HGET', KEYS[1], 'owner') ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'owner', ARGV[3])
if ARGV[4] ~= '' then redis.call('HSET', KEYS[1], 'already_sent', ARGV[4]) end
return 1";

/// Empties the lists of states that are settled, except those that another claim owns by now. KEYS: the states. ARGV: the
/// lifetime in seconds; for each state its owner, and the list of events that earlier claims published and that still wait.
const CLEAR: &str = "
for n = 1, #KEYS do
  local owner, already_sent = ARGV[2 * n], ARGV[2 * n + 1]
  if redis.call('HGET', KEYS[n], 'owner') == owner then
    redis.call('DEL', KEYS[n])
    redis.call('HSET', KEYS[n], 'owner', owner)
    if already_sent ~= '' then
      redis.call('HSET', KEYS[n], 'already_sent', already_sent)
    else
      redis.call('EXPIRE', KEYS[n], ARGV[1])
    end
  end
end
return redis.status_reply('OK')";

/// The states that a chunk writes to. There are none if the batch belongs to no claim.
#[derive(Default)]
pub(super) struct ChunkStates {
    /// The claim's token.
    pub(super) token: u64,
    /// The chunk's number within its claim. By it a chunk that is sent twice is recognised.
    pub(super) chunk: usize,
    pub(super) keys: Vec<String>,
    /// The claim's epoch at each of `keys`.
    pub(super) epochs: Vec<i64>,
    /// The state of each event of the chunk, as an index into `keys`.
    pub(super) of: Vec<usize>,
}

/// Events in a row with the same shape, state and shared arguments.
struct Run {
    shape: usize,
    /// The number of the state, counted from 1. 0: no state.
    state: usize,
    shared: Words,
    events: usize,
}

/// Returns the call that publishes one chunk.
pub(super) fn publish(events: &[&Event], chunk: &[usize], commands: &dyn Commands, states: &ChunkStates) -> Cmd {
    let mut shapes: Vec<Shape> = Vec::new();
    let mut runs: Vec<Run> = Vec::new();
    let mut lists = vec![String::new(); states.keys.len()];
    let mut command = Command::default();
    for (place, &index) in chunk.iter().enumerate() {
        let event = events[index];
        command.next();
        commands.write(event, &mut command);
        command.finish(event);
        let state = states.of.get(place).map_or(0, |state| state + 1);
        if state > 0 {
            list_event(&mut lists[state - 1], event.row.id, event.event_id);
        }
        match runs.last_mut() {
            Some(run) if run.state == state && run.shared == command.shared && shapes[run.shape] == command.shape => {
                run.events += 1;
            }
            _ => {
                let shape = shapes.iter().position(|shape| *shape == command.shape).unwrap_or_else(|| {
                    shapes.push(command.shape.clone());
                    shapes.len() - 1
                });
                runs.push(Run { shape, state, shared: command.shared.clone(), events: 1 });
            }
        }
    }
    let mut cmd = redis::cmd("EVALSHA");
    let different = if commands.one_key() { 1 } else { chunk.len() };
    let keys: HashSet<_> = chunk.iter().take(different).filter_map(|&index| commands.key(events[index])).collect();
    cmd.arg(PUBLISH.get_hash()).arg(keys.len() + states.keys.len());
    for key in &keys {
        cmd.arg(key.as_bytes());
    }
    for key in &states.keys {
        cmd.arg(key.as_bytes());
    }
    cmd.arg(states.token).arg(states.chunk).arg(states.keys.len());
    for (epoch, list) in states.epochs.iter().zip(&lists) {
        cmd.arg(epoch).arg(list);
    }
    cmd.arg(shapes.len());
    for shape in &shapes {
        cmd.arg(shape.words.len());
        shape.words.iter().for_each(|word| {
            cmd.arg(word);
        });
        cmd.arg(shape.shared.len()).arg(&shape.shared).arg(shape.own.len()).arg(&shape.own).arg(shape.key);
    }
    let mut own = command.own.iter().enumerate();
    let mut large = command.large.into_iter().peekable();
    for run in &runs {
        cmd.arg(run.shape + 1).arg(run.state).arg(run.events);
        run.shared.iter().for_each(|value| {
            cmd.arg(value);
        });
        own.by_ref().take(run.events * shapes[run.shape].own.len()).for_each(|(place, value)| {
            match large.next_if(|(at, _)| *at == place) {
                Some((_, document)) => cmd.arg(&*document),
                None => cmd.arg(value),
            };
        });
    }
    cmd
}

/// Returns a call of the publishing script that publishes nothing, to check that the user may run it.
pub(super) fn publish_nothing() -> Cmd {
    let mut cmd = redis::cmd("EVALSHA");
    cmd.arg(PUBLISH.get_hash()).arg(0).arg(0).arg(0).arg(0).arg(0); // no key, no claim, no state, no shape
    cmd
}

/// Returns the call that takes over a state for `owner`.
pub(super) fn take_over(state: &StateToRecover, owner: &str, already_sent: &[Added]) -> Cmd {
    let mut cmd = redis::cmd("EVAL");
    cmd.arg(TAKE_OVER).arg(1).arg(&state.key).arg(state.fields).arg(&state.owner);
    cmd.arg(owner).arg(format_added(already_sent));
    cmd
}

/// A state that is settled.
pub(super) struct Settled<'a> {
    pub(super) key: &'a str,
    pub(super) owner: String,
    /// The events that earlier claims published and that still wait.
    pub(super) already_sent: Vec<Added>,
}

/// Returns the call that clears states.
pub(super) fn clear(states: &[Settled<'_>]) -> Cmd {
    let mut cmd = redis::cmd("EVAL");
    cmd.arg(CLEAR).arg(states.len());
    for Settled { key, .. } in states {
        cmd.arg(key);
    }
    cmd.arg(STATE_LIFETIME_SECONDS);
    for Settled { owner, already_sent, .. } in states {
        cmd.arg(owner).arg(format_added(already_sent));
    }
    cmd
}
