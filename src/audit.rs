//! Whether what arrived in a stream is what was emitted: the checker behind `relay audit` and the chaos tests.
//!
//! It is fed with the stream first and the database afterwards, in one snapshot. So a running relay gives no false alarm: an
//! event that is in the stream is, later, either still in the outbox or recorded; one that is recorded as published must be
//! in the stream unless its entry is younger than the reading of the stream.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// How many findings of a kind are listed.
const LISTED: usize = 20;

/// The checksum of a payload: the first half of the SHA-256 of its bytes as consumers receive them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checksum(u128);

impl Checksum {
    /// Of these bytes.
    pub fn of(payload: &[u8]) -> Self {
        Self::from_sha256(ring::digest::digest(&ring::digest::SHA256, payload).as_ref()).expect("a digest has 32 bytes")
    }

    /// Of a digest; `None` where it is none.
    pub fn from_sha256(digest: &[u8]) -> Option<Self> {
        digest.first_chunk().map(|half| Self(u128::from_be_bytes(*half)))
    }
}

/// An entry of the stream, or rather of its text `1700000000000-0` the two numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct EntryId(pub u64, pub u64);

impl std::str::FromStr for EntryId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (time, number) = text.split_once('-').ok_or(())?;
        Ok(Self(time.parse().map_err(|_| ())?, number.parse().map_err(|_| ())?))
    }
}

/// One entry of the stream.
#[derive(Debug, Clone)]
pub struct Entry<'a> {
    /// Where it stands.
    pub id: EntryId,
    /// The event.
    pub event_id: Uuid,
    /// Its id in the outbox.
    pub sequence: i64,
    /// Its ordering key, where it has one.
    pub key: Option<&'a str>,
    /// Of its payload.
    pub checksum: Checksum,
}

/// What the database knows of one event at the audited destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// It is in the outbox, owed to this destination or not routed yet.
    Pending,
    /// The log says it was published, as this entry.
    Published(Option<EntryId>),
    /// It is dead-lettered, and was not put back.
    DeadLetter,
    /// The history keeps its payload; that says nothing about where it is.
    Kept,
}

/// What a producer has promised, one line of JSON of the file of obligations.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Obligation {
    /// The event.
    pub event_id: Uuid,
    /// Its ordering key, as consumers see it; none: no order.
    pub key: Option<String>,
    /// Its place among the events of its key.
    pub sequence: i64,
    /// SHA-256 of its payload as the database prints it, in hexadecimal.
    pub sha256: Option<String>,
    /// Whether its transaction was committed; `None`: the answer to the commit was lost, and both are right.
    pub committed: Option<bool>,
}

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// Committed, or recorded as published, and not in the stream, nor owed, nor dead-lettered.
    Lost,
    /// In the stream, and rolled back, or known to nobody.
    Ghost,
    /// Arrived for the first time after a later event of its key.
    Inversion,
    /// Its payload is another one's.
    Changed,
    /// In the outbox and recorded as published, or in the stream and recorded nowhere, or recorded as another's entry.
    Disagreement,
}

/// What an audit found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Entries in the stream.
    pub entries: u64,
    /// Different events among them.
    pub events: u64,
    /// Entries of events that had arrived before: allowed, unless exactly once is promised.
    pub repeats: u64,
    /// Events still owed.
    pub pending: u64,
    /// Dead letters.
    pub dead_letters: u64,
    /// How often what is wrong.
    pub counts: std::collections::BTreeMap<Finding, u64>,
    /// The first of each, in words.
    pub examples: Vec<String>,
}

impl Report {
    /// How often this was found.
    pub fn count(&self, finding: Finding) -> u64 {
        self.counts.get(&finding).copied().unwrap_or_default()
    }

    /// Nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.counts.is_empty()
    }

    fn add(&mut self, finding: Finding, words: impl FnOnce() -> String) {
        let count = self.counts.entry(finding).or_default();
        *count += 1;
        if *count <= LISTED as u64 {
            self.examples.push(words());
        }
    }
}

#[derive(Debug)]
struct Seen {
    first: EntryId,
    /// Which of all first occurrences it was.
    place: u64,
    sequence: i64,
    checksum: Checksum,
    /// Entries after the first, where there are any: a repeat may be recorded instead of it.
    others: Vec<EntryId>,
    known: bool,
}

/// See the module. First every [`entry`](Self::entry), then every [`known`](Self::known), then every
/// [`obligation`](Self::obligation) or none, then [`finish`](Self::finish).
#[derive(Debug, Default)]
pub struct Audit {
    seen: HashMap<Uuid, Seen>,
    /// The highest sequence of each key so far.
    keys: HashMap<Box<str>, i64>,
    /// What the database says, where it matters later.
    stated: HashMap<Uuid, Stated>,
    first_entry: Option<EntryId>,
    last_entry: Option<EntryId>,
    has_obligations: bool,
    /// By key, the last sequence promised and the place it took.
    promised: HashMap<String, Vec<(i64, u64, Uuid)>>,
    report: Report,
}

#[derive(Debug, Default, Clone, Copy)]
struct Stated {
    pending: bool,
    published: bool,
    dead: bool,
}

impl Audit {
    /// The next entry of the stream, in its order. Where obligations follow, they decide about the order, otherwise the
    /// sequence does.
    pub fn entry(&mut self, entry: &Entry<'_>) {
        self.report.entries += 1;
        self.first_entry.get_or_insert(entry.id);
        self.last_entry = Some(entry.id);
        if let Some(seen) = self.seen.get_mut(&entry.event_id) {
            self.report.repeats += 1;
            seen.others.push(entry.id);
            if seen.checksum != entry.checksum {
                self.report.add(Finding::Changed, || format!("changed: {} differs from its repeat", entry.event_id));
            }
            return;
        }
        let place = self.report.events;
        self.report.events += 1;
        let (first, sequence, checksum) = (entry.id, entry.sequence, entry.checksum);
        let seen = Seen { first, place, sequence, checksum, others: Vec::new(), known: false };
        self.seen.insert(entry.event_id, seen);
        if let Some(key) = entry.key {
            match self.keys.get_mut(key) {
                Some(last) if *last > sequence => {
                    let last = *last;
                    self.report.add(Finding::Inversion, || {
                        format!(
                            "inversion: {} of key {key:?} has sequence {sequence} and came after {last}",
                            entry.event_id
                        )
                    });
                }
                Some(last) => *last = sequence,
                None => {
                    self.keys.insert(key.into(), sequence);
                }
            }
        }
    }

    /// Something the database knows; `checksum` where it has the payload.
    pub fn known(&mut self, event_id: Uuid, sequence: i64, known: Known, checksum: Option<Checksum>) {
        let seen = self.seen.get_mut(&event_id);
        let arrived = seen.is_some();
        let recorded_elsewhere = match (&seen, known) {
            (Some(seen), Known::Published(Some(entry))) => seen.first != entry && !seen.others.contains(&entry),
            _ => false,
        };
        if let Some(seen) = seen {
            seen.known |= known != Known::Kept;
            if checksum.is_some_and(|checksum| checksum != seen.checksum) {
                self.report.add(Finding::Changed, || {
                    format!("changed: the payload of {event_id} (sequence {sequence}) is not what arrived")
                });
            }
            if seen.sequence != sequence {
                let arrived_as = seen.sequence;
                self.report.add(Finding::Disagreement, || {
                    format!("disagreement: {event_id} is {sequence} in the database and {arrived_as} in the stream")
                });
            }
        }
        match known {
            Known::Pending => self.report.pending += 1,
            Known::DeadLetter => self.report.dead_letters += 1,
            Known::Published(entry) => {
                // What was trimmed cannot be looked for, and what came later was not read.
                let in_reach = entry.is_some_and(|entry| {
                    self.first_entry.is_some_and(|first| entry >= first)
                        && self.last_entry.is_some_and(|last| entry <= last)
                });
                if in_reach && !arrived {
                    self.report.add(Finding::Lost, || {
                        format!("lost: {event_id} (sequence {sequence}) is recorded as published and not in the stream")
                    });
                }
                if in_reach && recorded_elsewhere {
                    self.report.add(Finding::Disagreement, || {
                        format!(
                            "disagreement: {event_id} (sequence {sequence}) is recorded as an entry that is not its own"
                        )
                    });
                }
            }
            Known::Kept => return,
        }
        let stated = self.stated.entry(event_id).or_default();
        stated.pending |= known == Known::Pending;
        stated.dead |= known == Known::DeadLetter;
        stated.published |= matches!(known, Known::Published(_));
        if stated.pending && (stated.published || stated.dead) {
            self.report.add(Finding::Disagreement, || {
                format!("disagreement: {event_id} (sequence {sequence}) is in the outbox and recorded as done")
            });
        }
    }

    /// What a producer promised.
    pub fn obligation(&mut self, promised: &Obligation) {
        if !self.has_obligations {
            self.has_obligations = true;
            // The producers' own order is the better judge of it.
            self.report.counts.remove(&Finding::Inversion);
            self.report.examples.retain(|example| !example.starts_with("inversion"));
        }
        let id = promised.event_id;
        let stated = self.stated.get(&id).copied().unwrap_or_default();
        let Some(seen) = self.seen.get_mut(&id) else {
            if promised.committed == Some(true) && !stated.pending && !stated.dead {
                self.report.add(Finding::Lost, || format!("lost: {id} was committed and is nowhere"));
            }
            return;
        };
        if promised.committed == Some(false) {
            self.report.add(Finding::Ghost, || format!("ghost: {id} was rolled back and has arrived"));
            return;
        }
        let digest = promised.sha256.as_deref().and_then(hexadecimal);
        if digest.is_some_and(|digest| Checksum::from_sha256(&digest) != Some(seen.checksum)) {
            self.report.add(Finding::Changed, || format!("changed: the payload of {id} is not what was emitted"));
        }
        if let Some(key) = &promised.key {
            self.promised.entry(key.clone()).or_default().push((promised.sequence, seen.place, id));
        }
        if !seen.known {
            self.report
                .add(Finding::Disagreement, || format!("disagreement: {id} has arrived and is recorded nowhere"));
        }
        seen.known = true;
    }

    /// The verdict. `recorded_since`: entries before it may be older than what the log still has.
    pub fn finish(mut self, recorded_since: EntryId) -> Report {
        for (id, seen) in &self.seen {
            if !seen.known && (self.has_obligations || seen.first >= recorded_since) {
                let sequence = seen.sequence;
                self.report.add(Finding::Ghost, || {
                    format!("ghost: {id} (sequence {sequence}) arrived and is known to nobody")
                });
            }
        }
        for (key, mut arrived) in self.promised {
            arrived.sort_unstable();
            let mut last = None;
            for (sequence, place, id) in arrived {
                if last.is_some_and(|last| place < last) {
                    self.report.add(Finding::Inversion, || {
                        format!("inversion: {id} is number {sequence} of key {key:?} and came before an earlier one")
                    });
                }
                last = last.max(Some(place));
            }
        }
        self.report.examples.sort();
        self.report
    }
}

fn hexadecimal(text: &str) -> Option<Vec<u8>> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG_AGO: EntryId = EntryId(0, 0);

    fn id(sequence: i64) -> Uuid {
        Uuid::from_u128(sequence.unsigned_abs().into())
    }

    fn entry(place: u64, sequence: i64) -> Entry<'static> {
        let checksum = Checksum::of(sequence.to_string().as_bytes());
        Entry { id: EntryId(1000, place), event_id: id(sequence), sequence, key: Some("k"), checksum }
    }

    fn promise(sequence: i64) -> Obligation {
        let digest = ring::digest::digest(&ring::digest::SHA256, sequence.to_string().as_bytes());
        let sha256 = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        Obligation {
            event_id: id(sequence),
            key: Some("k".into()),
            sequence,
            sha256: Some(sha256),
            committed: Some(true),
        }
    }

    /// Events 1 to 5, all in order, published and recorded; with these changes.
    fn audit(
        change_entries: impl FnOnce(&mut Vec<Entry<'static>>),
        change_known: impl FnOnce(&mut Vec<(i64, Known)>),
        change_promises: impl FnOnce(&mut Vec<Obligation>),
    ) -> Report {
        let mut entries: Vec<Entry<'_>> =
            (1..=5).map(|sequence: i64| entry(sequence.unsigned_abs(), sequence)).collect();
        let mut known: Vec<(i64, Known)> = (1..=5)
            .map(|sequence: i64| (sequence, Known::Published(Some(EntryId(1000, sequence.unsigned_abs())))))
            .collect();
        let mut promises: Vec<Obligation> = (1..=5).map(promise).collect();
        change_entries(&mut entries);
        change_known(&mut known);
        change_promises(&mut promises);
        let mut audit = Audit::default();
        entries.iter().for_each(|entry| audit.entry(entry));
        known.into_iter().for_each(|(sequence, known)| audit.known(id(sequence), sequence, known, None));
        promises.iter().for_each(|promise| audit.obligation(promise));
        audit.finish(LONG_AGO)
    }

    fn nothing<T>(_: &mut T) {}

    fn only(report: &Report, finding: Finding) {
        assert_eq!(report.counts.iter().collect::<Vec<_>>(), [(&finding, &1)], "{report:?}");
    }

    #[test]
    fn what_is_right_is_clean() {
        let report = audit(nothing, nothing, nothing);
        assert!(report.is_clean(), "{report:?}");
        assert_eq!((report.entries, report.events, report.repeats), (5, 5, 0));
        assert!(audit(nothing, nothing, Vec::clear).is_clean());
        assert!(audit(nothing, nothing, |promises| promises[2].committed = None).is_clean());
    }

    #[test]
    fn a_loss_is_found() {
        // Gone from everywhere; the producer knows.
        let report =
            audit(|entries| drop(entries.remove(2)), |known| *known = [&known[..2], &known[3..]].concat(), nothing);
        only(&report, Finding::Lost);
        // Recorded as published, and not there; the log knows.
        only(&audit(|entries| drop(entries.remove(2)), nothing, Vec::clear), Finding::Lost);
    }

    #[test]
    fn what_is_owed_or_dead_lettered_is_not_lost() {
        for state in [Known::Pending, Known::DeadLetter] {
            let report = audit(|entries| drop(entries.remove(2)), |known| known[2].1 = state, nothing);
            assert!(report.is_clean(), "{report:?}");
        }
    }

    #[test]
    fn an_inversion_is_found_with_and_without_the_producers() {
        let swap = |entries: &mut Vec<Entry<'static>>| {
            entries.swap(1, 2);
            (entries[1].id, entries[2].id) = (entries[2].id, entries[1].id);
        };
        let swap_known = |known: &mut Vec<(i64, Known)>| (known[1].1, known[2].1) = (known[2].1, known[1].1);
        only(&audit(swap, swap_known, nothing), Finding::Inversion);
        only(&audit(swap, swap_known, Vec::clear), Finding::Inversion);
    }

    #[test]
    fn a_repeat_is_counted_and_is_no_inversion() {
        let report = audit(|entries| entries.push(entry(9, 2)), nothing, nothing);
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(report.repeats, 1);
    }

    #[test]
    fn a_ghost_is_found() {
        only(&audit(nothing, nothing, |promises| promises[3].committed = Some(false)), Finding::Ghost);
        only(&audit(nothing, |known| known.truncate(4), Vec::clear), Finding::Ghost);
    }

    #[test]
    fn a_changed_byte_is_found() {
        only(&audit(|entries| entries[4].checksum = Checksum::of(b"6"), nothing, nothing), Finding::Changed);
        let mut audit = Audit::default();
        audit.entry(&entry(1, 1));
        audit.known(id(1), 1, Known::Published(Some(EntryId(1000, 1))), Some(Checksum::of(b"2")));
        only(&audit.finish(LONG_AGO), Finding::Changed);
    }

    #[test]
    fn a_log_that_does_not_agree_is_found() {
        // Arrived, recorded nowhere.
        only(&audit(nothing, |known| known.truncate(4), nothing), Finding::Disagreement);
        // Still owed, and recorded.
        only(&audit(nothing, |known| known.push((3, Known::Pending)), nothing), Finding::Disagreement);
        // Recorded as somebody else's entry.
        let report = audit(nothing, |known| known[0].1 = Known::Published(Some(EntryId(1000, 2))), nothing);
        only(&report, Finding::Disagreement);
    }

    #[test]
    fn what_was_trimmed_or_came_later_is_not_missed() {
        let report = audit(|entries| drop(entries.drain(..2)), nothing, Vec::clear);
        assert!(report.is_clean(), "{report:?}");
        let report = audit(|entries| entries.truncate(3), nothing, Vec::clear);
        assert!(report.is_clean(), "{report:?}");
    }
}
