//! The keys of the states beside streams. `once` explains the states.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use crate::sink::redis::connection::slot_of;

/// The most keys that are tried for one state.
const MAX_KEYS: u32 = 10;

/// Returns the key of a state. In a cluster it is in the same slot as its stream.
pub(super) fn state_key(stream: Option<&str>, name: &str) -> String {
    // Channels are not keys. The commands for all of them go to slot 0.
    let Some(stream) = stream else { return format!("relay:{{{}}}:{name}", *SLOT_0) };
    let tagged =
        stream.split_once('{').and_then(|(_, rest)| rest.split_once('}')).is_some_and(|(tag, _)| !tag.is_empty());
    if tagged {
        return format!("{stream}:relay:{name}");
    }
    if !stream.is_empty() && !stream.contains('}') {
        return format!("{{{stream}}}:relay:{name}");
    }
    // The name of this stream cannot be a hash tag. A number in the same slot is used instead.
    format!("{{{}}}{stream}:relay:{name}", number_in(slot_of(stream.as_bytes())))
}

static SLOT_0: LazyLock<u32> = LazyLock::new(|| number_in(0));

/// Returns the lowest number whose slot is `slot`.
fn number_in(slot: u16) -> u32 {
    (0..).find(|number: &u32| slot_of(number.to_string().as_bytes()) == slot).unwrap_or_default()
}

/// Whether this is the key of a state of any outbox and destination. A stream must not have such a name.
pub(super) fn is_state_key(key: &str) -> bool {
    let beside_channels = key.strip_prefix("relay:{").and_then(|rest| rest.split_once("}:")).map(|(_, name)| name);
    beside_channels
        .into_iter()
        .chain(key.match_indices(":relay:").map(|(at, separator)| &key[at + separator.len()..]))
        .any(is_state_name)
}

/// Whether this is `outbox:destination:partition`, with or without the ending `:v2` and so on of a later key of the same state.
/// An outbox is 12 hexadecimal digits, on PostgreSQL followed by the database's oid.
fn is_state_name(name: &str) -> bool {
    let Some((outbox, rest)) = name.split_once(':') else { return false };
    let (random, oid) = outbox.split_once('-').unwrap_or((outbox, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    random.len() == 12
        && random.bytes().all(|byte| byte.is_ascii_hexdigit())
        && digits(oid)
        && rest.rsplit_once(':').is_some_and(|(_, last)| digits(last.trim_start_matches('v')))
}

/// The states whose first key holds something else, with the numbers of the keys that replace it.
#[derive(Default)]
pub(super) struct Replaced(Mutex<HashMap<String, u32>>);

impl Replaced {
    /// Returns the present key of the state whose first key is `key`.
    pub(super) fn current(&self, key: String) -> String {
        let replaced = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match replaced.get(&key) {
            Some(number) => format!("{key}:v{number}"),
            None => key,
        }
    }

    /// Replaces the key `current` by the next one. Returns false if too many keys were tried.
    pub(super) fn replace(&self, current: &str) -> bool {
        let (key, number) = match current.rsplit_once(":v") {
            Some((key, number)) => (key, number.parse().unwrap_or(1)),
            None => (current, 1),
        };
        let mut replaced = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = replaced.entry(key.to_owned()).or_insert(1);
        // Another lane may have replaced it already.
        *last = (*last).max(number + 1);
        *last <= MAX_KEYS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_lies_in_the_slot_of_its_stream() {
        for stream in ["events", "orders:{42}", "{", "}", "{}x", "a}b", "", "a{b", "{a}{b}", "x{}y{z}", "ö{", "}{a}"] {
            assert_eq!(
                slot_of(stream.as_bytes()),
                slot_of(state_key(Some(stream), "o:redis:576").as_bytes()),
                "{stream:?}"
            );
        }
        assert_eq!(state_key(Some("events"), "o:redis:576"), "{events}:relay:o:redis:576");
        assert_eq!(slot_of(state_key(None, "o:redis:576").as_bytes()), 0);
    }

    #[test]
    fn only_keys_of_states_are_taken_for_such() {
        for name in ["0123456789ab-16384:redis:576", "0123456789ab:a:b:0"] {
            for stream in [Some("events"), Some("orders:{42}"), Some("}"), Some("a:relay:b"), None] {
                let key = state_key(stream, name);
                assert!(is_state_key(&key), "{key}");
                assert!(is_state_key(&format!("{key}:v2")), "{key}");
            }
        }
        for stream in
            ["events", "order:relay:started", "a:relay:0123456789ab", "relay:{1}:x", "x:relay:0123456789ab-:r:1"]
        {
            assert!(!is_state_key(stream), "{stream}");
        }
    }

    #[test]
    fn a_state_is_replaced_by_the_next_key_and_not_for_ever() {
        let replaced = Replaced::default();
        let key = || replaced.current("{s}:relay:o:d:1".to_owned());
        assert!(replaced.replace(&key()) && replaced.replace("{s}:relay:o:d:1"));
        assert_eq!(key(), "{s}:relay:o:d:1:v2");
        assert_eq!(replaced.current("{t}:relay:o:d:1".to_owned()), "{t}:relay:o:d:1");
        while replaced.replace(&key()) {}
        assert_eq!(key(), "{s}:relay:o:d:1:v11");
    }
}
