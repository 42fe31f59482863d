//! The Redis command that publishes one event, split into the parts that events share and the event's own arguments.

use std::borrow::Cow;

use crate::event::Event;

/// The number of bytes from which an argument is written into the call without a copy in between.
const LARGE_VALUE: usize = 16 * 1024;

/// The command of the event that is being written, and the own arguments of all events so far.
#[derive(Default)]
pub(in crate::sink) struct Command<'a> {
    pub(super) shape: Shape,
    pub(super) shared: Words,
    pub(super) own: Words,
    /// The large arguments, each with its index in `own`, where an empty word stands for it.
    pub(super) large: Vec<(usize, Cow<'a, [u8]>)>,
}

/// The part of a command that many events share: the literals, and the places of the other arguments.
#[derive(Default, Clone, PartialEq, Eq)]
pub(super) struct Shape {
    /// The literals. An empty word stands for another argument.
    pub(super) words: Words,
    /// The places of the shared arguments among the words, counted from 1.
    pub(super) shared: Vec<usize>,
    /// The places of the event's own arguments, counted from 1. 0: the argument is not a part of the command.
    pub(super) own: Vec<usize>,
    /// The number of the own argument that is the event's key, counted from 1. 0: the event has no key.
    pub(super) key: usize,
}

/// Words in one buffer, one after the other.
#[derive(Default, Clone, PartialEq, Eq)]
pub(super) struct Words {
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

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| &self.bytes[start..*end])
    }
}

impl<'a> Command<'a> {
    /// Adds an argument that is the same for many events and never empty: the name of the command or of a field.
    pub(in crate::sink) fn literal(&mut self, word: impl AsRef<[u8]>) {
        self.shape.words.push(word.as_ref());
    }

    /// Adds an argument that is probably the same for the next event.
    pub(in crate::sink) fn shared_arg(&mut self, value: impl AsRef<[u8]>) {
        self.literal("");
        self.shape.shared.push(self.shape.words.ends.len());
        self.shared.push(value.as_ref());
    }

    /// Adds an argument that is the event's own.
    pub(in crate::sink) fn own_arg(&mut self, value: impl AsRef<[u8]>) {
        self.literal("");
        self.shape.own.push(self.shape.words.ends.len());
        self.own.push(value.as_ref());
    }

    /// Adds an argument that is the event's own and may be large.
    pub(in crate::sink) fn document(&mut self, value: impl Into<Cow<'a, [u8]>>) {
        let value = value.into();
        if value.len() < LARGE_VALUE {
            self.own_arg(value);
        } else {
            self.large.push((self.own.ends.len(), value));
            self.own_arg("");
        }
    }

    /// Marks the last argument as the event's key in printed form. If two keys have the same printed form, both stop when one
    /// fails.
    pub(in crate::sink) fn mark_key(&mut self) {
        self.shape.key = self.shape.own.len();
    }

    /// Adds the event's key for the script if the command does not contain it.
    pub(super) fn finish(&mut self, event: &Event) {
        if self.shape.key == 0
            && let Some(key) = event.key()
        {
            self.shape.own.push(0);
            self.own.push(key.to_string().as_bytes());
            self.mark_key();
        }
    }

    /// Begins the command of the next event. Its own arguments are added after those of the events before.
    pub(super) fn next(&mut self) {
        self.shape.words.clear();
        self.shape.shared.clear();
        self.shape.own.clear();
        self.shape.key = 0;
        self.shared.clear();
    }
}

/// The commands of a kind of destination.
pub(in crate::sink) trait Commands: Send + Sync {
    /// Writes the command that publishes `event`.
    fn write<'a>(&self, event: &'a Event, command: &mut Command<'a>);

    /// Returns the Redis key that the command writes to, if it writes to one.
    fn key<'a>(&'a self, event: &'a Event) -> Option<Cow<'a, str>>;

    /// Whether all events go to one key or channel, so that a key of the wrong type concerns all of them.
    fn one_key(&self) -> bool;
}
