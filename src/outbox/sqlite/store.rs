//! The store of one file: the state that its lanes share, and their connections.

use std::path::Path;
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};
use std::time::Instant;

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
    /// The path that the URL named at the last connection.
    pub(super) path: Arc<StdMutex<Option<Arc<Path>>>>,
    /// Locked by the lane that has a claim. One lane at a time is enough: all writes to a file are sequential anyway, and the
    /// rows of a claim are adjacent, so that deleting them empties whole pages.
    pub(super) turn: Arc<Mutex<Turn>>,
    pub(super) memory: Memory,
}

impl SqliteOutbox {
    /// Creates the outbox. Nothing is opened yet.
    pub fn new(config: OutboxConfig) -> Self {
        let (config, memory) = (Arc::new(config), Memory::default());
        let (owner, membership, path, turn) = Default::default();
        Self { config, owner, membership, path, turn, memory }
    }

    /// Opens a connection for the relay's own work.
    pub(super) async fn connect(&self) -> Result<Connected, OutboxError> {
        *self.known_path() = Some(path(&self.config.url)?.into());
        // If the file is replaced meanwhile, the connection may be to either file.
        loop {
            let file = self.file()?;
            let connection = open(&self.config.url).await?;
            if self.file()? == file {
                return Ok(Connected { connection, file });
            }
        }
    }

    /// Returns the given connection. If there is none, or its file was replaced, opens a new one.
    pub(super) async fn connect_unless(&self, connection: Option<Connected>) -> Result<Connected, OutboxError> {
        let file = self.file()?;
        match connection {
            Some(connection) if connection.file == file => Ok(connection),
            _ => self.connect().await,
        }
    }

    /// Returns the identity of the file that is at the path now.
    pub(super) fn file(&self) -> Result<FileId, OutboxError> {
        owner::file_id(&self.path()?)
    }

    /// Returns the path of the file.
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

    /// Reads the register and the pauses if the number of their changes is another one.
    pub(super) async fn learn(&self, changes: i64) -> Result<(), OutboxError> {
        if self.membership.role_at(changes).is_none() {
            self.membership.look(self, Instant::now()).await?;
        }
        Ok(())
    }

    /// Returns whether this relay works on the file. Takes over the work if no other relay does it.
    pub(super) fn owns(&self) -> Result<bool, OutboxError> {
        self.owner.owns(&self.config.worker, &self.path()?)
    }
}
