//! Ensures that only one of several relays on a file works.
//!
//! The relay that works holds an exclusive lock on a file beside the database, `app.db-relay`, and another on the database
//! file itself, see `identity`. SQLite's own locks are all in use. The operating system releases a lock the moment its holder
//! ends, for whatever reason. So there is no lease to wait for, and no clock that could be wrong. SQLite files are used from
//! one host only, and so are these locks.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::outbox::OutboxError;
use crate::outbox::sqlite::identity::{FileId, FileLock};

/// A relay's access to the locks.
#[derive(Debug, Default)]
pub(super) struct Owner {
    state: Mutex<Option<Share>>,
}

/// The files that are locked, or are to be locked.
#[derive(Debug)]
struct Share {
    database: FileId,
    /// The lock file beside the database.
    beside: File,
    beside_locked: bool,
    itself: Option<FileLock>,
    /// The log already says that another relay works.
    standing_by: bool,
}

impl Owner {
    /// Returns whether this relay holds the locks. Takes them if they are free, and writes `worker` into the lock file.
    /// `path` is the path of the database.
    pub(super) fn owns(&self, worker: &str, path: &Path) -> Result<bool, OutboxError> {
        let database = file_id(path)?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(share) = state.as_ref().filter(|share| share.database == database)
            && share.itself.is_some()
        {
            return Ok(true);
        }
        let mut share = match state.take() {
            Some(share) if share.database == database => share,
            before => {
                if before.is_some() {
                    tracing::warn!(
                        file = %path.display(),
                        "the database file was replaced by another one; this relay goes on with that"
                    );
                }
                drop(before);
                Share::new(path, database)?
            }
        };
        let owns = share.try_lock(worker, path);
        *state = Some(share);
        owns
    }
}

impl Owner {
    /// Returns whether another relay worked on the file when this one last tried to.
    pub(super) fn is_standing_by(&self) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.as_ref().is_some_and(|share| share.standing_by)
    }
}

impl Share {
    fn new(path: &Path, database: FileId) -> Result<Self, OutboxError> {
        Ok(Self { database, beside: open(path)?, beside_locked: false, itself: None, standing_by: false })
    }

    fn try_lock(&mut self, worker: &str, path: &Path) -> Result<bool, OutboxError> {
        if !self.beside_locked {
            match self.beside.try_lock() {
                Ok(()) => self.beside_locked = true,
                Err(TryLockError::WouldBlock) => {
                    return Ok(self.stand_by("another relay works on this file; standing by"));
                }
                Err(TryLockError::Error(source)) => {
                    return Err(OutboxError::File { operation: "lock the relay's file beside the database", source });
                }
            }
        }
        self.itself = FileLock::try_new(path, self.database)
            .map_err(|source| OutboxError::File { operation: "lock the database file", source })?;
        if self.itself.is_none() {
            return Ok(self.stand_by("another relay works on this file, which has two names; standing by"));
        }
        // The note serves only people: the lock is what counts.
        if let Err(error) = note(&self.beside, worker) {
            tracing::debug!(%error, "the relay's file does not say who has locked it");
        }
        if std::mem::take(&mut self.standing_by) {
            tracing::info!("the other relay on this file is gone; this one works now");
        }
        Ok(true)
    }

    fn stand_by(&mut self, why: &str) -> bool {
        if !std::mem::replace(&mut self.standing_by, true) {
            tracing::info!("{why}");
        }
        false
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.beside_locked {
            // Closing would suffice, except that a program which this process is starting also has the file open until it
            // runs.
            drop(self.beside.unlock());
        }
    }
}

/// Returns the identity of the file at `path`.
pub(super) fn file_id(path: &Path) -> Result<FileId, OutboxError> {
    FileId::of(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => OutboxError::NoFile { file: path.display().to_string() },
        _ => OutboxError::File { operation: "look at the database file", source },
    })
}

/// Returns who holds the lock, as text for people, or `None` if nobody does. Creates no file.
pub(super) fn holder(database: &Path) -> Result<Option<String>, OutboxError> {
    if lock_path(database).is_ok_and(|path| !path.exists()) {
        return Ok(None);
    }
    let mut file = open(database)?;
    match file.try_lock_shared() {
        Ok(()) => Ok(None), // given back with the file
        Err(_) => {
            let mut noted = String::new();
            let known = file.read_to_string(&mut noted).is_ok() && !noted.trim().is_empty();
            let holder = if known { noted.trim() } else { "one that did not note its name" };
            Ok(Some(format!("the relay that works on this file ({holder})")))
        }
    }
}

fn note(mut file: &File, worker: &str) -> std::io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    let now = time::OffsetDateTime::now_utc();
    let (hour, minute, second) = now.to_hms();
    writeln!(file, "{worker}, since {} {hour:02}:{minute:02}:{second:02}Z", now.date())
}

/// Returns the path of a database's lock file. Symbolic links are resolved.
fn lock_path(database: &Path) -> std::io::Result<PathBuf> {
    let mut path = database.canonicalize()?.into_os_string();
    path.push("-relay");
    Ok(path.into())
}

fn open(database: &Path) -> Result<File, OutboxError> {
    let opened = lock_path(database)
        .and_then(|path| OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path));
    opened.map_err(|source| OutboxError::File { operation: "open the relay's file beside the database", source })
}
