//! Checks that a stream contains what was emitted. `relay audit` and the chaos tests use it.
//!
//! It reads the stream, then one snapshot of the database, then the entries that came into the stream meanwhile. So a
//! running relay causes no false alarm: an event of the first reading is later in the outbox or recorded, and an event that is
//! recorded as published was in the stream before, so one of the two readings has it.
//!
//! Memory grows with the number of different events, but not with their payloads, of which only checksums are kept: about 150
//! to 300 bytes for each event and each obligation, and the text of each different key once.

mod input;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};

use serde::Serialize;
use uuid::Uuid;

pub use input::{Checksum, Entry, EntryId, Fact, Obligation};

/// How many findings of each kind are listed.
const LISTED: usize = 20;

/// What can be wrong with an event in a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// The event is committed, or recorded as published, but is not in the stream, nor owed, nor dead-lettered.
    Lost,
    /// The event is in the stream, but was rolled back, or is unknown to the database and the producers.
    Ghost,
    /// The event arrived for the first time after a later event of its key.
    Inversion,
    /// The payload differs from the emitted one.
    Changed,
    /// The event is in two tables at once, recorded twice, in the stream and recorded nowhere, or recorded with another
    /// event's entry.
    Disagreement,
}

/// The result of an audit.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Entries in the stream.
    pub entries: u64,
    /// Different events among the entries.
    pub events: u64,
    /// Entries of events that had arrived before: allowed, unless exactly once is promised.
    pub repeats: u64,
    /// Entries that no relay made, or that `relay replay` made. They are ignored.
    pub foreign: u64,
    /// Events still owed.
    pub pending: u64,
    /// Dead letters.
    pub dead_letters: u64,
    /// The number of findings of each kind.
    pub counts: std::collections::BTreeMap<Finding, u64>,
    /// Descriptions of the first findings of each kind.
    pub examples: Vec<String>,
}

impl Report {
    /// Returns the number of findings of this kind.
    pub fn count(&self, finding: Finding) -> u64 {
        self.counts.get(&finding).copied().unwrap_or_default()
    }

    /// Returns whether there are no findings.
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
    sequence: i64,
    key: Option<u32>,
    checksum: Checksum,
    /// The entries after the first, if there are any. A repeat may be recorded instead of the first entry.
    others: Vec<EntryId>,
    known: bool,
}

/// An audit in progress. Call [`entry`](Self::entry) for every entry, then [`known`](Self::known) for everything in the
/// database, then [`later_entry`](Self::later_entry) for entries that came into the stream meanwhile, then
/// [`obligation`](Self::obligation) for every obligation, if there are any, and at the end [`finish`](Self::finish).
#[derive(Debug, Default)]
pub struct Audit {
    seen: HashMap<Uuid, Seen>,
    later: HashSet<Uuid>,
    keys: HashMap<Box<str>, u32>,
    /// The state of events in the database, as far as it is needed later.
    stated: HashMap<Uuid, Stated>,
    /// Events that are recorded as published, and are not in the first reading.
    missing: Vec<(Option<EntryId>, Uuid, i64)>,
    first_entry: Option<EntryId>,
    has_obligations: bool,
    /// For each key, the promised sequences and the entries at which they arrived.
    promised: HashMap<String, Vec<(i64, EntryId, Uuid)>>,
    report: Report,
}

#[derive(Debug, Default, Clone, Copy)]
struct Stated {
    pending: bool,
    published: bool,
    dead: bool,
    redriven: bool,
}

/// The facts by which an audit judges.
#[derive(Debug, Clone, Copy)]
pub struct Judgement {
    /// The first entry from which on the log is complete. Earlier entries may be older than the log's retention.
    pub recorded_since: EntryId,
    /// How many entries have been trimmed or deleted from the stream.
    pub trimmed: u64,
    /// Whether the sequence gives the order of a key, if no obligations do. It does not if events are delayed, or if those of
    /// a key have several priorities.
    pub in_sequence: bool,
}

impl Audit {
    /// Adds the next entry of the stream, in the stream's order.
    pub fn entry(&mut self, entry: &Entry<'_>) {
        self.report.entries += 1;
        self.first_entry.get_or_insert(entry.id);
        if let Some(seen) = self.seen.get_mut(&entry.event_id) {
            self.report.repeats += 1;
            seen.others.push(entry.id);
            if seen.checksum != entry.checksum {
                self.report.add(Finding::Changed, || format!("changed: {} differs from its repeat", entry.event_id));
            }
            return;
        }
        self.report.events += 1;
        let key = entry.key.map(|key| match self.keys.get(key) {
            Some(number) => *number,
            None => {
                let number = u32::try_from(self.keys.len()).unwrap_or(u32::MAX);
                self.keys.insert(key.into(), number);
                number
            }
        });
        let (first, sequence, checksum) = (entry.id, entry.sequence, entry.checksum);
        self.seen.insert(entry.event_id, Seen { first, sequence, key, checksum, others: Vec::new(), known: false });
    }

    /// Adds an entry of the stream that no relay made, or that `relay replay` made.
    pub fn foreign_entry(&mut self) {
        self.report.foreign += 1;
    }

    /// Adds a fact from the database. `checksum` is `None` if the database does not have the payload there.
    pub fn known(&mut self, event_id: Uuid, sequence: i64, known: Fact, checksum: Option<Checksum>) {
        match self.seen.get_mut(&event_id) {
            Some(seen) => {
                seen.known |= !matches!(known, Fact::Kept | Fact::Redriven);
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
                if let Fact::Published(Some(entry)) = known
                    && self.first_entry.is_some_and(|first| entry >= first)
                    && seen.first != entry
                    && !seen.others.contains(&entry)
                {
                    self.report.add(Finding::Disagreement, || {
                        format!("disagreement: {event_id} (sequence {sequence}) is recorded as an entry not its own")
                    });
                }
            }
            None => {
                if let Fact::Published(entry) = known {
                    self.missing.push((entry, event_id, sequence));
                }
            }
        }
        let stated = self.stated.entry(event_id).or_default();
        let twice = stated.published && matches!(known, Fact::Published(_));
        match known {
            Fact::Pending => {
                self.report.pending += 1;
                stated.pending = true;
            }
            Fact::DeadLetter => {
                self.report.dead_letters += 1;
                stated.dead = true;
            }
            Fact::Published(_) => stated.published = true,
            Fact::Redriven => stated.redriven = true,
            Fact::Kept => return,
        }
        if twice || u8::from(stated.pending) + u8::from(stated.dead) + u8::from(stated.published) > 1 {
            self.report.add(Finding::Disagreement, || {
                format!("disagreement: {event_id} (sequence {sequence}) is recorded twice, or in two tables")
            });
        }
    }

    /// Adds an entry that came after the first reading.
    pub fn later_entry(&mut self, event_id: Uuid) {
        self.later.insert(event_id);
    }

    /// Adds a promise of a producer.
    pub fn obligation(&mut self, promised: &Obligation) {
        self.has_obligations = true;
        let id = promised.event_id;
        let stated = self.stated.get(&id).copied().unwrap_or_default();
        let Some(seen) = self.seen.get_mut(&id) else {
            // An event that is recorded as published is checked by its entry.
            let somewhere = stated.pending || stated.dead || stated.published || self.later.contains(&id);
            if promised.committed == Some(true) && !somewhere {
                self.report.add(Finding::Lost, || format!("lost: {id} was committed and is nowhere"));
            }
            return;
        };
        if promised.committed == Some(false) {
            self.report.add(Finding::Ghost, || format!("ghost: {id} was rolled back and has arrived"));
            return;
        }
        if promised.checksum().is_some_and(|checksum| checksum != seen.checksum) {
            self.report.add(Finding::Changed, || format!("changed: the payload of {id} is not what was emitted"));
        }
        if let Some(key) = &promised.key
            && !stated.redriven
        {
            self.promised.entry(key.clone()).or_default().push((promised.sequence, seen.first, id));
        }
        if !seen.known {
            self.report
                .add(Finding::Disagreement, || format!("disagreement: {id} has arrived and is recorded nowhere"));
        }
        seen.known = true;
    }

    /// Ends the audit and returns what it found.
    pub fn finish(mut self, judgement: Judgement) -> Report {
        self.find_losses(judgement.trimmed);
        for (id, seen) in &self.seen {
            if !seen.known && (self.has_obligations || seen.first >= judgement.recorded_since) {
                let sequence = seen.sequence;
                self.report.add(Finding::Ghost, || {
                    format!("ghost: {id} (sequence {sequence}) arrived and is known to nobody")
                });
            }
        }
        if self.has_obligations {
            // The order that producers promised takes precedence over the sequence.
            let promised = std::mem::take(&mut self.promised);
            promised.into_iter().for_each(|(key, arrived)| self.find_inversions(&key, arrived));
        } else if judgement.in_sequence {
            let mut keys: HashMap<u32, Vec<(i64, EntryId, Uuid)>> = HashMap::new();
            for (id, seen) in &self.seen {
                if let Some(key) = seen.key
                    && !self.stated.get(id).is_some_and(|stated| stated.redriven)
                {
                    keys.entry(key).or_default().push((seen.sequence, seen.first, *id));
                }
            }
            let names: HashMap<u32, Box<str>> = self.keys.drain().map(|(name, number)| (number, name)).collect();
            keys.into_iter().for_each(|(key, arrived)| self.find_inversions(&names[&key], arrived));
        }
        self.report.examples.sort();
        self.report
    }

    /// An event that is recorded as published was in the stream before it was recorded. If it is in neither reading, it was
    /// trimmed from the stream's beginning, or lost.
    fn find_losses(&mut self, trimmed: u64) {
        self.missing.retain(|(_, id, _)| !self.later.contains(id));
        self.missing.sort_unstable();
        let mut excused = trimmed;
        for (entry, id, sequence) in std::mem::take(&mut self.missing) {
            let before = entry.zip(self.first_entry).is_none_or(|(entry, first)| entry < first);
            if before && excused > 0 {
                excused -= 1;
                continue;
            }
            self.report.add(Finding::Lost, || {
                format!("lost: {id} (sequence {sequence}) is recorded as published and not in the stream")
            });
        }
    }

    fn find_inversions(&mut self, key: &str, mut arrived: Vec<(i64, EntryId, Uuid)>) {
        arrived.sort_unstable_by_key(|(_, place, _)| *place);
        let mut highest = None;
        for (sequence, _, id) in arrived {
            if let Some(before) = highest.filter(|highest| sequence < *highest) {
                self.report.add(Finding::Inversion, || {
                    format!("inversion: {id}, number {sequence} of key {key:?}, came after number {before}")
                });
            }
            highest = highest.max(Some(sequence));
        }
    }
}
