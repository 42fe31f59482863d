//! What the lane needs that claims and settles now. One does at a time.

use crate::outbox::sqlite::connection::Connected;
use crate::outbox::sqlite::identity::FileId;
use crate::outbox::sqlite::settle::SettleScript;
use crate::outbox::sqlite::traffic::Traffic;

/// What the lane needs whose turn it is to claim and to settle.
#[derive(Debug, Default)]
pub(super) struct Turn {
    pub(super) connection: Option<Connected>,
    /// The file that was found to fit.
    pub(super) fits: Option<FileId>,
    /// What could not be recorded of the last claim, and in which file it belongs.
    pub(super) unsettled: Vec<(SettleScript, FileId)>,
    pub(super) traffic: Traffic,
    /// Whether a row may be parked that stands for all its destinations, and holds back its key at each; `None`: not looked yet.
    pub(super) parked_whole: Option<bool>,
    /// The last batch had an event that is not small.
    pub(super) large: bool,
}

impl Turn {
    /// The file was found to fit: a later migration does not end a relay that runs.
    pub(super) fn fits(&mut self, file: FileId) {
        (self.fits, self.parked_whole) = (Some(file), None);
    }
}
