//! The savepoint before a settle, which keeps the claim if the settle is refused.

/// Sets the savepoint, before a write that may be refused.
pub(super) const SAVEPOINT: &str = "savepoint before_settle";

/// Rolls back what followed, and keeps the savepoint.
pub(super) const BACK: &str = "rollback to savepoint before_settle";

/// Checks deferred constraints, which would otherwise refuse at the end of the transaction, where no savepoint is left. What is
/// written after this is checked by the next such statement, as a whole again.
pub(super) const CHECK_DEFERRED: &str = "set constraints all immediate; set constraints all deferred";

/// The same for a settle with a [`SAVEPOINT`], in one text with its commit.
pub(super) const CHECK_AND_COMMIT: &str = "set constraints all immediate; commit";

/// Rolls back what followed, and ends the savepoint.
pub(super) const UNDO: &str = "rollback to savepoint before_settle; release savepoint before_settle";

/// Keeps what followed, and ends the savepoint.
pub(super) const KEEP: &str = "release savepoint before_settle";
