//! The savepoint before a settle, which keeps the claim where the settle is refused.

/// Before what may be refused.
pub(super) const SAVEPOINT: &str = "savepoint before_settle";

/// Takes back what followed, and keeps the savepoint.
pub(super) const BACK: &str = "rollback to savepoint before_settle";

/// A deferred constraint would refuse at the end of the transaction, where no savepoint is left. It is checked here; what is
/// written after this is checked by the next such statement, as a whole again.
pub(super) const CHECK_DEFERRED: &str = "set constraints all immediate; set constraints all deferred";

/// The same of a settle for which there is [`SAVEPOINT`], in the text that is sent anyway.
pub(super) const CHECK_AND_COMMIT: &str = "set constraints all immediate; commit";

/// Takes back what followed, and ends the savepoint.
pub(super) const UNDO: &str = "rollback to savepoint before_settle; release savepoint before_settle";

/// Keeps what followed, and ends the savepoint.
pub(super) const KEEP: &str = "release savepoint before_settle";
