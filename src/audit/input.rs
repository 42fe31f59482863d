//! What an audit is fed with: entries of the stream, what the database knows, and what producers have promised.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

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
    /// It was dead-lettered and put back: it may come after later events of its key.
    Redriven,
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

impl Obligation {
    /// Of the payload; `None` where `sha256` is missing or no digest.
    pub(super) fn checksum(&self) -> Option<Checksum> {
        let text = self.sha256.as_deref()?;
        let bytes: Option<Vec<u8>> =
            (0..text.len()).step_by(2).map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok()).collect();
        Checksum::from_sha256(&bytes?)
    }
}
