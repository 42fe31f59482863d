//! Cuts the content of events out of what destinations answer, before it is logged or stored.

use std::collections::{HashMap, HashSet};

use crate::event::{Event, Outcome, PublishError};

/// The shortest run of an event's content that is cut out of a message, in bytes.
const RUN: usize = 8;

/// The text that replaces the content.
const CUT: &str = "[cut]";

/// The relay's own codes for calls that failed before anything of an event was sent. Their messages hold no content.
const NOTHING_SENT: [&str; 4] = ["connect", "connection_failed", "no_credentials", "timeout"];

/// Destinations echo what they refuse. This cuts the payloads and the values of headers of `events`, which were sent in the
/// same call, out of the messages of failed outcomes.
pub(super) fn cut_content(events: &[&Event], outcomes: &mut [Outcome]) {
    let mut messages: HashMap<String, String> = HashMap::new();
    for outcome in outcomes.iter() {
        if let Outcome::Failed(error) = outcome
            && may_echo(error)
        {
            messages.entry(error.message.clone()).or_default();
        }
    }
    let wanted: Runs = messages.keys().flat_map(|message| runs(message.as_bytes())).collect();
    let mut found = HashSet::new();
    for event in events {
        let values = event.headers.iter().map(|(_, value)| value.as_bytes());
        for content in values.chain([event.payload.as_slice()]) {
            found.extend(runs(content).filter(|run| wanted.contains(*run)));
        }
    }
    if found.is_empty() {
        return;
    }
    for (message, cut) in &mut messages {
        *cut = without(message, &found, events);
    }
    for outcome in outcomes {
        if let Outcome::Failed(error) = outcome
            && may_echo(error)
            && let Some(cut) = messages.get(&error.message)
        {
            error.message.clone_from(cut);
        }
    }
}

fn may_echo(error: &PublishError) -> bool {
    !NOTHING_SENT.contains(&error.code.as_str())
}

/// Returns every run of [`RUN`] bytes as a number.
fn runs(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.windows(RUN).map(|run| run.iter().fold(0, |number, &byte| number << 8 | u64::from(byte)))
}

/// A set of runs that answers fast for a run that is not in it.
struct Runs {
    bits: Vec<u64>,
    runs: HashSet<u64>,
}

impl Runs {
    fn bit(run: u64) -> (usize, u64) {
        let hash = run.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
        (usize::try_from(hash / 64).unwrap_or_default(), 1 << (hash % 64))
    }

    fn contains(&self, run: u64) -> bool {
        let (word, bit) = Self::bit(run);
        self.bits[word] & bit != 0 && self.runs.contains(&run)
    }
}

impl FromIterator<u64> for Runs {
    fn from_iter<T: IntoIterator<Item = u64>>(runs: T) -> Self {
        let runs: HashSet<u64> = runs.into_iter().collect();
        let mut bits = vec![0; 1024];
        for &run in &runs {
            let (word, bit) = Self::bit(run);
            bits[word] |= bit;
        }
        Self { bits, runs }
    }
}

/// Returns `message` without the runs in `found`. Runs that are a part of an event's type, key or source stay.
fn without(message: &str, found: &HashSet<u64>, events: &[&Event]) -> String {
    let mut covered = vec![false; message.len()];
    for (start, run) in runs(message.as_bytes()).enumerate() {
        if found.contains(&run) {
            covered[start..start + RUN].fill(true);
        }
    }
    // A character is cut as a whole.
    let characters = message.char_indices().map(|(at, c)| (c, covered[at..at + c.len_utf8()].contains(&true)));
    let (mut kept, mut cut) = (String::with_capacity(message.len()), String::new());
    for (c, is_cut) in characters.chain([('\0', false)]) {
        if is_cut {
            cut.push(c);
            continue;
        }
        if !cut.is_empty() {
            kept.push_str(if is_public(&cut, events) { &cut } else { CUT });
            cut.clear();
        }
        kept.push(c);
    }
    kept.pop(); // the '\0' that ended the last run
    kept
}

fn is_public(text: &str, events: &[&Event]) -> bool {
    events.iter().any(|event| {
        let key = [&event.aggregate_type, &event.aggregate_id].into_iter().flatten();
        [&event.event_type, &event.source].into_iter().chain(key).any(|public| public.contains(text))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Fault;
    use crate::event::testing::keyed;

    fn echoed(message: &str) -> String {
        let mut event = keyed(1, "customer-4711");
        event.payload = br#"{"card": "4111111111111111", "of": "customer-4711", "name": "Gr\u00fc\u00dfe"}"#.to_vec();
        event.headers = vec![("cookie".to_owned(), "session=ÄÖÜäöü".to_owned())];
        let mut outcomes = vec![
            Outcome::Failed(PublishError::new(Fault::Event, "BAD", message)),
            Outcome::Held,
            Outcome::Failed(PublishError::new(Fault::Event, "connect", message)),
        ];
        cut_content(&[&keyed(0, "other"), &event], &mut outcomes);
        let Outcome::Failed(untouched) = &outcomes[2] else { panic!("{outcomes:?}") };
        assert_eq!(untouched.message, message);
        let Outcome::Failed(error) = &outcomes[0] else { panic!("{outcomes:?}") };
        error.message.clone()
    }

    #[test]
    fn what_a_destination_echoes_of_an_event_is_cut_out() {
        assert_eq!(echoed("bad value 4111111111111111 in it"), "bad value [cut] in it");
        assert_eq!(echoed(r#"{"card": "4111111111111111", "#), "[cut]");
        assert_eq!(echoed("bad 41111111"), "bad [cut]");
        assert_eq!(echoed("cookie session=ÄÖÜä?"), "cookie [cut]?");
        assert_eq!(echoed("bad 4111111"), "bad 4111111", "seven are too few to tell");
        assert_eq!(echoed("the stream of customer-4711"), "the stream of customer-4711", "a key is no content");
        assert_eq!(echoed(""), "");
    }
}
