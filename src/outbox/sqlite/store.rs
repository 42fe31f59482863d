//! The store of one file: what its lanes share, and how each connects.

use std::path::Path;
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};

use tokio::sync::Mutex;

use crate::outbox::OutboxConfig;
use crate::outbox::error::OutboxError;
use crate::outbox::register::Membership;
use crate::outbox::sqlite::connection::{Connected, open, path};
use crate::outbox::sqlite::identity::FileId;
use crate::outbox::sqlite::owner::{self, Owner};
use crate::outbox::sqlite::turn::Turn;
use crate::outbox::standstill::Memory;

/// The outbox of one file.
#[derive(Debug, Clone)]
pub struct SqliteOutbox {
    pub(super) config: Arc<OutboxConfig>,
    pub(super) owner: Arc<Owner>,
    pub(super) membership: Membership,
    /// Where the URL led at the last connection.
    pub(super) path: Arc<StdMutex<Option<Arc<Path>>>>,
    /// Held by the lane that has a claim. One at a time is enough: all writes to a file are one after the other anyhow, and
    /// the rows of a claim lie side by side, so that deleting them empties whole pages.
    pub(super) turn: Arc<Mutex<Turn>>,
    pub(super) memory: Memory,
}

impl SqliteOutbox {
    /// Nothing is opened yet.
    pub fn new(config: OutboxConfig) -> Self {
        let (config, memory) = (Arc::new(config), Memory::default());
        let (owner, membership, path, turn) = Default::default();
        Self { config, owner, membership, path, turn, memory }
    }

    /// A connection for a relay's own work.
    pub(super) async fn connect(&self) -> Result<Connected, OutboxError> {
        *self.known_path() = Some(path(&self.config.url)?.into());
        // A file that is replaced meanwhile may be either.
        loop {
            let file = self.file()?;
            let connection = open(&self.config.url).await?;
            if self.file()? == file {
                return Ok(Connected { connection, file });
            }
        }
    }

    /// The connection there is, or a new one where there is none, or where it leads to a file that was replaced.
    pub(super) async fn connect_unless(&self, connection: Option<Connected>) -> Result<Connected, OutboxError> {
        let file = self.file()?;
        match connection {
            Some(connection) if connection.file == file => Ok(connection),
            _ => self.connect().await,
        }
    }

    /// Which file is at the path now.
    pub(super) fn file(&self) -> Result<FileId, OutboxError> {
        owner::file_id(&self.path()?)
    }

    /// Where the file is.
    pub(super) fn path(&self) -> Result<Arc<Path>, OutboxError> {
        let mut known = self.known_path();
        match &*known {
            Some(known) => Ok(Arc::clone(known)),
            None => Ok(Arc::clone(known.insert(path(&self.config.url)?.into()))),
        }
    }

    pub(super) fn known_path(&self) -> MutexGuard<'_, Option<Arc<Path>>> {
        self.path.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this relay is the one that works on the file; becomes it where no other is.
    pub(super) fn owns(&self) -> Result<bool, OutboxError> {
        self.owner.owns(&self.config.worker, &self.path()?)
    }
}
