//! Identifies a file by device and inode, whatever its name.
//!
//! A file may have several names (hard links, a mount of the file itself in a container), and a name may come to refer to
//! another file (a restore, a reset). So besides the lock on a file beside the database, a relay holds a lock on the database
//! file itself: `flock`, which on Linux does not interact with the locks that SQLite takes.
//!
//! - When a process closes any descriptor of a file, it releases all locks of SQLite's kind that it holds on the file,
//!   including those of an application in the same process. So a descriptor that was opened here stays open until the file
//!   has no name left.
//! - On a network file system `flock` may be a lock of SQLite's kind, and may exclude SQLite itself. There it is not used.

use std::fs::{File, Metadata, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The identity of a file, different for each file that exists now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// Returns the identity of the file at `path`.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        std::fs::metadata(path).map(|metadata| Self::from(&metadata))
    }
}

impl From<&Metadata> for FileId {
    fn from(metadata: &Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }
}

/// A descriptor that stays open.
struct OpenDescriptor {
    id: FileId,
    file: File,
    /// A relay of this process holds the lock. Relays of one process share the descriptor, so the lock alone would not
    /// exclude them.
    held: bool,
}

static KEPT: Mutex<Vec<OpenDescriptor>> = Mutex::new(Vec::new());

fn kept() -> MutexGuard<'static, Vec<OpenDescriptor>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The lock on the database file itself. It is released when the value is dropped.
#[derive(Debug)]
pub(super) struct FileLock(FileId);

impl FileLock {
    /// Locks the file `id`, which is at `path`. Returns `None` if another relay has the lock.
    pub(super) fn try_new(path: &Path, id: FileId) -> io::Result<Option<Self>> {
        let mut kept = kept();
        // A file without a name cannot be opened any more, so closing it harms no process.
        kept.retain(|kept| kept.held || kept.file.metadata().map_or(true, |metadata| metadata.nlink() > 0));
        if !kept.iter().any(|kept| kept.id == id) {
            let file = File::open(path)?;
            let id = FileId::from(&file.metadata()?);
            // The descriptor stays open, even if the file is not the expected one.
            kept.push(OpenDescriptor { id, file, held: false });
        }
        let Some(kept) = kept.iter_mut().find(|kept| kept.id == id) else {
            return Err(io::Error::other("the file is just being replaced"));
        };
        if kept.held {
            return Ok(None);
        }
        if is_local(id.device) {
            match kept.file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                // Then the lock on the file beside the database must suffice, as on a network file system.
                Err(TryLockError::Error(error)) => tracing::debug!(%error, "the database file itself cannot be locked"),
            }
        }
        kept.held = true;
        Ok(Some(Self(id)))
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        if let Some(kept) = kept().iter_mut().find(|kept| kept.id == self.0 && kept.held) {
            kept.held = false;
            drop(kept.file.unlock());
        }
    }
}

/// Returns whether `flock` on this device is known to be independent of SQLite's locks. Linux lists its mounts with their
/// devices. A device that is not listed (a subvolume) is local.
fn is_local(device: u64) -> bool {
    if !cfg!(target_os = "linux") {
        return false;
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    is_local_by(&mounts, device)
}

fn is_local_by(mounts: &str, device: u64) -> bool {
    let major = (device >> 8 & 0xfff) | (device >> 32 & !0xfff);
    let minor = (device & 0xff) | (device >> 12 & 0xffff_ff00);
    let device = format!("{major}:{minor}");
    let network = ["nfs", "cifs", "smb", "9p", "afs", "ceph", "lustre", "gfs", "ocfs", "fuse.sshfs", "fuse.gluster"];
    !mounts.lines().any(|line| {
        let kind = line.split(" - ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or_default();
        line.split(' ').nth(2) == Some(device.as_str()) && network.iter().any(|network| kind.starts_with(network))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_file_system_is_known_by_its_device() {
        let mounts = "36 35 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n\
                      90 36 0:52 / /mnt/share rw,relatime shared:50 - nfs4 server:/ rw,vers=4.2\n";
        assert!(is_local_by(mounts, 8 << 8 | 1));
        assert!(!is_local_by(mounts, 52));
        assert!(is_local_by(mounts, 53));
    }

    #[test]
    fn of_two_names_of_a_file_one_is_locked() {
        let folder = tempfile::tempdir().expect("a folder");
        let (one, other) = (folder.path().join("one"), folder.path().join("other"));
        std::fs::write(&one, "").expect("a file");
        std::fs::hard_link(&one, &other).expect("a second name");
        let lock = |path: &Path| FileLock::try_new(path, FileId::of(path).expect("it is there")).expect("a lock");
        let held = lock(&one);
        assert!(held.is_some());
        assert!(lock(&other).is_none());
        assert!(matches!(File::open(&other).expect("open").try_lock(), Err(TryLockError::WouldBlock)));
        drop(held);
        assert!(lock(&other).is_some());
    }
}
