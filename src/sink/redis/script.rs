//! The script that runs a chunk of events, and the calls of it.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use redis::{Cmd, Script};

use crate::event::Event;

/// Runs each event's command. A pipeline of bare commands could invert a key: an error on one, success on the next.
///
/// ARGV: the number of shapes; for each the number of its words and the words, an empty one where a value goes; then for
/// each event the number of its key (0: none), its shape, and its values. Answers, for each event, the command's reply, `-`
/// and an error, or nothing where an earlier event of its key failed. Shapes, because what all events share, the names of
/// the fields above all, would else be most of what Redis parses: 13.8 against 9.5 us an event.
pub(super) static SCRIPT: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local shapes, at = {}, 2
for shape = 1, ARGV[1] do
  local words, slots = {}, {}
  for word = 1, ARGV[at] do
    words[word] = ARGV[at + word]
    if words[word] == '' then slots[#slots + 1] = word end
  end
  shapes[tostring(shape)] = { words, slots }
  at = at + ARGV[at] + 1
end
local replies, stopped, n, last = {}, {}, 0, #ARGV
while at < last do
  local key, shape = ARGV[at], shapes[ARGV[at + 1]]
  local words, slots = shape[1], shape[2]
  at = at + 1
  n = n + 1
  if stopped[key] then
    replies[n] = ''
  else
    for slot = 1, #slots do words[slots[slot]] = ARGV[at + slot] end
    local reply = redis.pcall(unpack(words))
    if type(reply) == 'table' then
      replies[n] = '-' .. (reply.err or 'ERR unexpected reply')
      if key ~= '0' then stopped[key] = true end
    else
      replies[n] = tostring(reply)
    end
  end
  at = at + #slots + 1
end
return replies",
    )
});

/// One event's command, split into what others share and what is its own.
#[derive(Default)]
pub(in crate::sink) struct Command {
    shape: Words,
    values: Words,
}

/// Words, one after the other in one buffer.
#[derive(Default, Clone, PartialEq, Eq, Hash)]
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

impl Command {
    /// A word that many events share, never empty: the command, the name of a field.
    pub(in crate::sink) fn word(&mut self, word: impl AsRef<[u8]>) {
        self.shape.push(word.as_ref());
    }

    /// A word of this event's own.
    pub(in crate::sink) fn value(&mut self, value: impl AsRef<[u8]>) {
        self.shape.push(b"");
        self.values.push(value.as_ref());
    }
}

/// How a kind of sink turns events into commands.
pub(in crate::sink) trait Commands: Send + Sync {
    /// Writes the command that publishes `event`.
    fn write(&self, event: &Event, command: &mut Command);

    /// The key that the command writes to, where it writes to one.
    fn key<'a>(&'a self, event: &'a Event) -> Option<std::borrow::Cow<'a, str>>;

    /// Whether all events go to one key, so that a key of the wrong type concerns all of them.
    fn one_key(&self) -> bool;
}

/// One chunk as a call of the script.
pub(super) fn eval(events: &[&Event], chunk: &[usize], commands: &dyn Commands) -> Cmd {
    let keys: HashSet<_> = chunk.iter().filter_map(|&index| commands.key(events[index])).collect();
    let mut cmd = redis::cmd("EVALSHA");
    cmd.arg(SCRIPT.get_hash()).arg(keys.len());
    for key in &keys {
        cmd.arg(key.as_bytes());
    }
    let mut numbers = HashMap::new();
    let mut shapes: Vec<Words> = Vec::new();
    let mut command = Command::default();
    let mut arguments = Words::default();
    for &index in chunk {
        let event = events[index];
        let next = numbers.len() + 1;
        let number = event.key().map_or(0, |key| *numbers.entry(key).or_insert(next));
        command.shape.clear();
        command.values.clear();
        commands.write(event, &mut command);
        let shape = shapes.iter().position(|shape| *shape == command.shape).unwrap_or_else(|| {
            shapes.push(command.shape.clone());
            shapes.len() - 1
        });
        arguments.push(number.to_string().as_bytes());
        arguments.push((shape + 1).to_string().as_bytes());
        command.values.iter().for_each(|value| arguments.push(value));
    }
    cmd.arg(shapes.len());
    for shape in &shapes {
        cmd.arg(shape.ends.len());
        for word in shape.iter() {
            cmd.arg(word);
        }
    }
    for argument in arguments.iter() {
        cmd.arg(argument);
    }
    cmd
}
