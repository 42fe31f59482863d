//! The script that runs a chunk of events, and the calls of it.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::LazyLock;

use redis::{Cmd, Script};

use crate::event::Event;
use crate::sink::redis::once::{ChunkStates, Once};

/// Runs each event's command. A pipeline of bare commands could invert a key: an error on one, success on the next.
///
/// KEYS: those that events are written to, then the states (see [`once`](super::once)).
///
/// ARGV: the claim's token; the chunk's number; the number of states, and for each its epoch and the list of its events; the
/// number of shapes; for each, with their number before them, its words, an empty one where a value goes, then the places
/// among them of the values that the events of a run share, then those of each event's own (place 0: nowhere), and at last
/// which of its own values is an event's key (0: none). Then runs of events: shape, state (0: none), number of events, the
/// shared values, and each event's own.
///
/// Answers one text with a line for each event: the command's reply, `-` and an error, or nothing where an earlier event of its
/// key failed. Or, with nothing done, the states that this claim may not write to before it has looked into them, and
/// those that are none. One text
/// is less to take apart than a reply for each event. Shapes and runs, because what events share would else be most of what
/// Redis parses: it costs as much as adding the entry.
pub(super) static SCRIPT: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local token, chunk, count, at = ARGV[1], ARGV[2], tonumber(ARGV[3]), 3
local states, dirty = {}, {}
for n = 1, count do
  local key, epoch, list = KEYS[#KEYS - count + n], ARGV[at + 1], ARGV[at + 2]
  at = at + 2
  local mine = epoch .. ' ' .. token
  local found = redis.pcall('HMGET', key, 'owner', chunk)
  if found.err and string.sub(found.err, 1, 9) ~= 'WRONGTYPE' then return found end
  local owner = found[1]
  local number = owner and tonumber(string.match(owner, '^%d+'))
  if found.err then
    dirty[#dirty + 1] = { tostring(n), 'WRONGTYPE' }
  elseif owner == mine then
    if found[2] then return redis.status_reply('REPEATED') end
  elseif redis.call('HLEN', key) > (owner and 1 or 0) or owner and (not number or number >= tonumber(epoch)) then
    dirty[#dirty + 1] = { tostring(n), redis.call('HGETALL', key) }
  end
  states[n] = { key = key, owner = owner ~= mine and mine, texts = { list } }
end
if #dirty > 0 then return dirty end
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

/// A value of at least so many bytes is not copied into a buffer of its own before it goes into the call.
const LARGE_VALUE: usize = 16 * 1024;

/// One event's command, split into what others share and what is its own.
#[derive(Default)]
pub(in crate::sink) struct Command<'a> {
    shape: Shape,
    shared: Words,
    own: Words,
    /// Large values, by their places among the own words, which are empty there.
    large: Vec<(usize, Cow<'a, [u8]>)>,
}

/// What many events share.
#[derive(Default, Clone, PartialEq, Eq)]
struct Shape {
    words: Words,
    /// At which of the words stand the values that neighbours share, and those of an event's own, counted from 1; 0:
    /// nowhere.
    shared: Vec<usize>,
    own: Vec<usize>,
    /// Which of its own values is the event's key, counted from 1; 0: it has none.
    key: usize,
}

/// Words, one after the other in one buffer.
#[derive(Default, Clone, PartialEq, Eq)]
struct Words {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Words {
    fn push(&mut self, word: &[u8]) {
        self.bytes.extend_from_slice(word);
        self.ends.push(self.bytes.len());
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| &self.bytes[start..*end])
    }
}

impl<'a> Command<'a> {
    /// A word that many events have in common, never empty: the command, the name of a field.
    pub(in crate::sink) fn word(&mut self, word: impl AsRef<[u8]>) {
        self.shape.words.push(word.as_ref());
    }

    /// A value that an event is likely to share with its neighbours.
    pub(in crate::sink) fn shared(&mut self, value: impl AsRef<[u8]>) {
        self.word("");
        self.shape.shared.push(self.shape.words.ends.len());
        self.shared.push(value.as_ref());
    }

    /// A value of the event's own.
    pub(in crate::sink) fn value(&mut self, value: impl AsRef<[u8]>) {
        self.word("");
        self.shape.own.push(self.shape.words.ends.len());
        self.own.push(value.as_ref());
    }

    /// The same, which may be large.
    pub(in crate::sink) fn document(&mut self, value: impl Into<Cow<'a, [u8]>>) {
        let value = value.into();
        if value.len() < LARGE_VALUE {
            self.value(value);
        } else {
            self.large.push((self.own.ends.len(), value));
            self.value("");
        }
    }

    /// The value just given is the event's key, as it is printed: of two keys that print alike one stops with the other.
    pub(in crate::sink) fn was_key(&mut self) {
        self.shape.key = self.shape.own.len();
    }

    /// Sees to it that the script knows the key, where the command does not have it.
    fn finish(&mut self, event: &Event) {
        if self.shape.key == 0
            && let Some(key) = event.key()
        {
            self.shape.own.push(0);
            self.own.push(key.to_string().as_bytes());
            self.was_key();
        }
    }

    /// For the next event; its own values come behind those of the others.
    fn next(&mut self) {
        self.shape.words.clear();
        self.shape.shared.clear();
        self.shape.own.clear();
        self.shape.key = 0;
        self.shared.clear();
    }
}

/// How a kind of sink turns events into commands.
pub(in crate::sink) trait Commands: Send + Sync {
    /// Writes the command that publishes `event`.
    fn write<'a>(&self, event: &'a Event, command: &mut Command<'a>);

    /// The key that the command writes to, where it writes to one.
    fn key<'a>(&'a self, event: &'a Event) -> Option<std::borrow::Cow<'a, str>>;

    /// Whether all events go to one key, so that a key of the wrong type concerns all of them.
    fn one_key(&self) -> bool;
}

/// Events in a row that have more than their shape in common.
struct Run {
    shape: usize,
    /// Counted from 1; 0: none.
    state: usize,
    shared: Words,
    events: usize,
}

/// One chunk as a call of the script.
pub(super) fn eval(
    events: &[&Event],
    chunk: &[usize],
    commands: &dyn Commands,
    once: Option<&Once<'_>>,
    states: &ChunkStates,
) -> Cmd {
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
            Once::list(&mut lists[state - 1], event);
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
    cmd.arg(SCRIPT.get_hash()).arg(keys.len() + states.keys.len());
    for key in &keys {
        cmd.arg(key.as_bytes());
    }
    for key in &states.keys {
        cmd.arg(key.as_bytes());
    }
    cmd.arg(once.map_or(0, Once::token)).arg(states.chunk).arg(states.keys.len());
    for (key, list) in states.keys.iter().zip(&lists) {
        cmd.arg(once.map_or(0, |once| once.epoch(key))).arg(list);
    }
    cmd.arg(shapes.len());
    for shape in &shapes {
        cmd.arg(shape.words.ends.len());
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
