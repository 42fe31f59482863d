//! Remembers the blocked keys that the log has named: each key and cause is named once.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, PoisonError};

use crate::event::{Event, PublishError};

/// The largest number of keys to remember, which is more than are blocked at a time. At this number the memory is cleared,
/// and keys are named anew.
const MAX_REMEMBERED: usize = 100_000;

/// Hashes of destination, code, and key or event.
#[derive(Default)]
pub(super) struct Named(Mutex<HashSet<u64>>);

impl Named {
    /// Returns true the first time it is called with this cause and this key, or this event if it has no key.
    pub(super) fn is_new(&self, event: &Event, destination: &str, error: &PublishError) -> bool {
        let mut hasher = DefaultHasher::new();
        (destination, error.code.as_str()).hash(&mut hasher);
        match event.key() {
            Some(key) => key.hash(&mut hasher),
            None => event.event_id.hash(&mut hasher),
        }
        let mut named = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if named.len() >= MAX_REMEMBERED {
            named.clear();
        }
        named.insert(hasher.finish())
    }
}
