//! The state of the lane that claims and settles now. Only one lane does so at a time.

use crate::outbox::sqlite::connection::Connected;
use crate::outbox::sqlite::identity::FileId;
use crate::outbox::sqlite::settle::SettleScript;
use crate::outbox::sqlite::traffic::Traffic;

/// The state of the lane whose turn it is to claim and to settle.
#[derive(Debug, Default)]
pub(super) struct Turn {
    pub(super) connection: Option<Connected>,
    /// The file whose schema was checked.
    pub(super) fits: Option<FileId>,
    /// The settles of the last claim that could not be recorded, each with its file.
    pub(super) unsettled: Vec<(SettleScript, FileId)>,
    pub(super) traffic: Traffic,
    /// The last batch had an event that is not small.
    pub(super) large: bool,
}

impl Turn {
    /// Records that the file's schema fits. It is not checked again, so a later migration does not end a running relay.
    pub(super) fn fits(&mut self, file: FileId) {
        self.fits = Some(file);
    }
}
