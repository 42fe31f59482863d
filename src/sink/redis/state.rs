//! The content of the state beside a stream, as text and as values. [`once`](super::once) explains the states.
//!
//! A state is a hash. Its field `owner` holds the epoch and the token of the claim that published last. Every other field is a
//! list of events: a line with sequence and id of each event, an empty line, and a line with the reply to each of them.

use redis::Value;
use uuid::Uuid;

/// A state that this claim may not write to before it has asked the outbox about the events that the state lists.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct StateToRecover {
    pub(super) key: String,
    pub(super) fields: usize,
    pub(super) owner: String,
    pub(super) epoch: i64,
    pub(super) added: Vec<Added>,
}

/// An event that a state lists, and the reply to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Added {
    pub(super) sequence: i64,
    pub(super) event_id: Uuid,
    pub(super) reply: String,
}

/// A state that a chunk may not write to: one to recover, or the key of something that is no state.
pub(super) type Found = Result<StateToRecover, String>;

/// Returns the states in the answer to a chunk that added nothing. `None`: the answer is another one. A hash whose epoch is above
/// `highest_epoch` is no state.
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
    let state = state_to_recover(&key, fields).filter(|state| state.epoch <= highest_epoch);
    Some(state.ok_or(key))
}

/// Reads a state. `None`: no relay wrote it.
fn state_to_recover(key: &str, fields: &Value) -> Option<StateToRecover> {
    // For a key of another type the answer holds an error instead of a list.
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
    Some(StateToRecover { key: key.to_owned(), fields: fields.len() / 2, owner, epoch, added })
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

/// Returns the text that [`parse_added`] reads. It is empty if nothing was added.
pub(super) fn format_added(added: &[Added]) -> String {
    if added.is_empty() {
        return String::new();
    }
    let mut text = String::new();
    added.iter().for_each(|added| list_event(&mut text, added.sequence, added.event_id));
    added.iter().for_each(|added| text.extend(["\n", &added.reply]));
    text
}

/// Adds an event's line to the list of a state.
pub(super) fn list_event(list: &mut String, sequence: i64, event_id: Uuid) {
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
        let to_recover = StateToRecover {
            key: "k".to_owned(),
            fields: 2,
            owner: "3 4".to_owned(),
            epoch: 3,
            added: vec![added.clone()],
        };
        assert_eq!(found(&state(&["owner", "3 4", "1", &line])), Some(vec![Ok(to_recover)]));
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
