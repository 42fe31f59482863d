//! The input of an audit: entries of the stream, facts from the database, and promises of producers.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The checksum of a payload: the first half of the SHA-256 of its bytes as consumers receive them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checksum(u128);

impl Checksum {
    /// Returns the checksum of these bytes.
    pub fn of(payload: &[u8]) -> Self {
        Self::from_sha256(ring::digest::digest(&ring::digest::SHA256, payload).as_ref()).expect("a digest has 32 bytes")
    }

    /// Returns the checksum of a digest, or `None` if the digest is too short.
    pub fn from_sha256(digest: &[u8]) -> Option<Self> {
        digest.first_chunk().map(|half| Self(u128::from_be_bytes(*half)))
    }
}

/// The id of an entry of the stream: the two numbers of its text `1700000000000-0`.
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
    /// The id of the entry.
    pub id: EntryId,
    /// The event.
    pub event_id: Uuid,
    /// The event's id in the outbox.
    pub sequence: i64,
    /// The ordering key of the event, if it has one.
    pub key: Option<&'a str>,
    /// The checksum of its payload.
    pub checksum: Checksum,
}

/// A fact from the database about one event at the audited destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fact {
    /// The event is in the outbox, owed to this destination or not routed yet.
    Pending,
    /// The log says that the event was published as this entry.
    Published(Option<EntryId>),
    /// The event is dead-lettered, and was not put back.
    DeadLetter,
    /// The event was dead-lettered and put back. It may come after later events of its key.
    Redriven,
    /// The history has its payload. This says nothing about where the event is.
    Kept,
}

/// A promise of a producer: one line of JSON in the file of obligations.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Obligation {
    /// The event.
    pub event_id: Uuid,
    /// Its ordering key, as consumers see it. `None` if its order does not matter.
    pub key: Option<String>,
    /// Its position among the events of its key.
    pub sequence: i64,
    /// SHA-256 of its payload as the database prints it, in hexadecimal.
    pub sha256: Option<String>,
    /// Whether its transaction was committed. `None` if the answer to the commit was lost, so that both are allowed.
    pub committed: Option<bool>,
}

impl Obligation {
    /// Returns the checksum of the payload, or `None` if `sha256` is missing or not a digest.
    pub(super) fn checksum(&self) -> Option<Checksum> {
        let text = self.sha256.as_deref()?;
        let bytes: Option<Vec<u8>> =
            (0..text.len()).step_by(2).map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok()).collect();
        Checksum::from_sha256(&bytes?)
    }
}
