//! How a store was proven to record what is published.

/// The rows that a proof has settled before it was rolled back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ProofRows {
    /// Rows that the proof inserted itself.
    Own,
    /// Existing rows, if there are any, because the table refuses a plain insert. The text is the database's reason.
    Existing(String),
}

impl ProofRows {
    /// Describes the proof in a line of `relay check`.
    pub(super) fn describe(self) -> String {
        match self {
            Self::Own => "all that a relay writes, tried and taken back".to_owned(),
            Self::Existing(why) => format!(
                "tried with the rows that are there and taken back, because a plain insert into event_outbox is refused ({why}): \
                 so will be `relay emit` and a redrive"
            ),
        }
    }
}
