//! Of several relays on one file, one works.
//!
//! It holds an exclusive lock on a file of its own beside the database, `app.db-relay`: SQLite's locks are all taken, and
//! a lock of the operating system is gone the moment its holder is, however that dies. There is no lease to wait for,
//! and no clock that could be wrong. SQLite files are used from one host only, and so is this.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::outbox::OutboxError;

/// A relay's share in the lock.
#[derive(Debug, Default)]
pub(super) struct Owner {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
enum State {
    /// Not opened yet.
    #[default]
    New,
    /// Open, and another relay's.
    Standby(File),
    /// Ours, until the file is closed.
    Owner(File),
}

impl Owner {
    /// Whether this relay holds the lock; takes it where it is free. `database` is asked where that lies.
    pub(super) fn owns(&self, database: impl Fn() -> Result<PathBuf, OutboxError>) -> Result<bool, OutboxError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, standing_by) = match std::mem::take(&mut *state) {
            State::Owner(file) => {
                *state = State::Owner(file);
                return Ok(true);
            }
            State::Standby(file) => (file, true),
            State::New => (open(database()?)?, false),
        };
        match file.try_lock() {
            Ok(()) => {
                if standing_by {
                    tracing::info!("the other relay on this file is gone; this one works now");
                }
                *state = State::Owner(file);
                Ok(true)
            }
            Err(TryLockError::WouldBlock) => {
                if !standing_by {
                    tracing::info!("another relay works on this file; standing by");
                }
                *state = State::Standby(file);
                Ok(false)
            }
            Err(TryLockError::Error(error)) => {
                Err(OutboxError::File { operation: "lock the relay's file beside the database", source: error })
            }
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        if let State::Owner(file) = self.state.get_mut().unwrap_or_else(PoisonError::into_inner) {
            // Closing would be enough, but for a program that this process is starting: until it runs, it has the file too.
            drop(file.unlock());
        }
    }
}

/// The lock file of a database, wherever a symbolic link leads.
fn open(database: PathBuf) -> Result<File, OutboxError> {
    let opened = database.canonicalize().and_then(|database| {
        let mut path = database.into_os_string();
        path.push("-relay");
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
    });
    opened.map_err(|source| OutboxError::File { operation: "open the relay's file beside the database", source })
}
