//! The file destination: it appends one line of JSON for each event, and renames a full file.

mod spec;

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use time::OffsetDateTime;

use crate::event::{Event, Fault, Outcome, PublishError};
use crate::sink::{Batch, Format, Published, Sink, cloudevent};

pub use spec::Spec;

/// The time between two attempts to get the lock while another writer has it.
const LOCK_INTERVAL: Duration = Duration::from_millis(5);

/// The file to write, and the form and durability of its lines.
#[derive(Debug, Clone)]
pub struct FileConfig {
    /// The file that is appended to. In the same folder are its lock, `<path>.lock`, and the files that were set aside.
    pub path: PathBuf,
    /// Replaces the source of an event whose source is empty.
    pub source: String,
    /// The content of a line.
    pub format: Format,
    /// The size in bytes from which the file is set aside before the next batch. `None`: the size does not matter.
    pub max_size: Option<u64>,
    /// Whether the file is set aside before the first batch of another day, by UTC.
    pub daily: bool,
    /// Whether a batch is on disk before it counts as delivered.
    pub fsync: bool,
}

/// The destination. It opens the file anew for each batch.
pub struct FileSink {
    config: Arc<FileConfig>,
}

impl FileSink {
    /// Returns a sink. No file is opened before the first batch.
    pub fn new(config: FileConfig) -> Self {
        Self { config: Arc::new(config) }
    }

    fn lines(&self, events: &[&Event]) -> Vec<u8> {
        let mut lines = Vec::with_capacity(events.iter().map(|event| event.bytes() + 400).sum());
        for event in events {
            match self.config.format {
                Format::CloudEvents => cloudevent::push_line(&mut lines, event, &self.config.source),
                Format::Payload => {
                    let begin = lines.len();
                    lines.extend_from_slice(event.payload.as_slice());
                    cloudevent::end_line(&mut lines, begin);
                }
            }
        }
        lines
    }
}

#[async_trait]
impl Sink for FileSink {
    async fn publish(&self, &Batch { events, deadline, .. }: &Batch<'_>) -> Published {
        if events.is_empty() || Instant::now() >= deadline {
            return Published::of(vec![Outcome::Held; events.len()]);
        }
        let (lines, config) = (self.lines(events), Arc::clone(&self.config));
        let append = tokio::task::spawn_blocking(move || config.append(&lines, deadline));
        let outcome = match tokio::time::timeout_at(deadline.into(), append).await {
            Ok(Ok(Ok(true))) => Outcome::Delivered { message_id: None },
            Ok(Ok(Ok(false))) => Outcome::Held,
            Ok(Ok(Err(error))) => Outcome::Failed(error),
            Ok(Err(_)) => failed(Fault::Unknown, "file", "the write was broken off".to_owned()),
            Err(_) => failed(Fault::Unknown, "timeout", "the file system did not answer in time".to_owned()),
        };
        Published::of(vec![outcome; events.len()])
    }

    fn place(&self, _: &Event) -> String {
        self.config.path.display().to_string()
    }

    fn target(&self) -> String {
        format!("file {}, format {}", self.config.path.display(), self.config.format)
    }

    async fn check(&self) -> Result<String, PublishError> {
        let config = Arc::clone(&self.config);
        let opened = tokio::task::spawn_blocking(move || {
            config.lock_file()?;
            config.open()?.metadata().map(|found| found.len())
        });
        let said = |error: &io::Error| self.config.error("open", error);
        match opened.await {
            Ok(Ok(bytes)) => Ok(format!("{}, {bytes} bytes, can be written", self.config.path.display())),
            Ok(Err(error)) => Err(said(&error)),
            Err(error) => Err(said(&io::Error::other(error))),
        }
    }
}

fn failed(fault: Fault, code: &str, message: String) -> Outcome {
    Outcome::Failed(PublishError::new(fault, code, message))
}

impl FileConfig {
    /// Appends whole lines while it holds the lock. Returns false if it did not get the lock until the deadline.
    fn append(&self, lines: &[u8], deadline: Instant) -> Result<bool, PublishError> {
        let opened = |error: io::Error| self.error("open", &error);
        let lock = self.lock_file().map_err(opened)?;
        while let Err(error) = lock.try_lock() {
            match error {
                TryLockError::Error(error) => return Err(self.error("lock", &error)),
                TryLockError::WouldBlock if Instant::now() >= deadline => return Ok(false),
                TryLockError::WouldBlock => std::thread::sleep(LOCK_INTERVAL),
            }
        }
        let mut file = self.open().map_err(opened)?;
        if self.is_full(&file).map_err(opened)? {
            self.set_aside().map_err(|error| self.error("set aside", &error))?;
            file = self.open().map_err(opened)?;
        }
        let begin = file.seek(SeekFrom::End(0)).map_err(opened)?;
        match self.write(&mut file, lines) {
            Ok(()) => Ok(true),
            // No other relay writes meanwhile. Lines that could be removed again were not published.
            Err(error) => Err(match file.set_len(begin) {
                Ok(()) => self.error("write to", &error),
                Err(_) => PublishError { fault: Fault::Unknown, ..self.error("write to", &error) },
            }),
        }
    }

    fn write(&self, file: &mut File, lines: &[u8]) -> io::Result<()> {
        // A crash may have left half a line. Its event is published again.
        if file.metadata()?.len() > 0 {
            let mut last = [0];
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
            if last != *b"\n" {
                file.write_all(b"\n")?;
            }
        }
        file.write_all(lines)?;
        if self.fsync { file.sync_data() } else { Ok(()) }
    }

    fn open(&self) -> io::Result<File> {
        let existed = self.path.exists();
        let file = OpenOptions::new().create(true).read(true).append(true).open(&self.path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(ErrorKind::InvalidInput, "it is no regular file"));
        }
        if !existed && self.fsync {
            self.sync_folder()?;
        }
        Ok(file)
    }

    /// Opens the file that every writer locks. The file of events cannot be locked instead, because it is renamed.
    fn lock_file(&self) -> io::Result<File> {
        OpenOptions::new().create(true).append(true).open(beside(&self.path, "lock"))
    }

    fn is_full(&self, file: &File) -> io::Result<bool> {
        let found = file.metadata()?;
        if found.len() == 0 {
            return Ok(false);
        }
        let is_large = self.max_size.is_some_and(|most| found.len() >= most);
        Ok(is_large || self.daily && day(found.modified()?) != day(SystemTime::now()))
    }

    /// Renames the file: the day on which it was last written, and a number, are added to its name.
    fn set_aside(&self) -> io::Result<()> {
        let day = day(std::fs::metadata(&self.path)?.modified()?);
        let free = (1..).map(|number| beside(&self.path, &format!("{day}.{number}"))).find(|path| !path.exists());
        if let Some(free) = free {
            std::fs::rename(&self.path, free)?;
        }
        if self.fsync { self.sync_folder() } else { Ok(()) }
    }

    /// Syncs the folder, so that a new name in it is on disk.
    fn sync_folder(&self) -> io::Result<()> {
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }

    fn error(&self, what: &str, error: &io::Error) -> PublishError {
        let fault = match error.kind() {
            ErrorKind::NotFound
            | ErrorKind::NotADirectory
            | ErrorKind::IsADirectory
            | ErrorKind::PermissionDenied
            | ErrorKind::ReadOnlyFilesystem
            | ErrorKind::FileTooLarge // at the limit of the process or of the file system
            | ErrorKind::InvalidInput => Fault::Misconfigured,
            _ => Fault::Destination,
        };
        PublishError::new(fault, "file", format!("cannot {what} {}: {error}", self.path.display())).of_destination()
    }
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    name.into()
}

/// Returns the day of a time, by UTC, such as 2026-01-31.
fn day(time: SystemTime) -> String {
    OffsetDateTime::from(time).date().to_string()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::event::testing::event;

    struct Folder(PathBuf);

    impl Folder {
        fn new() -> Self {
            let folder =
                std::env::temp_dir().join(format!("outbox-relay-{}-{}", std::process::id(), fastrand::u64(..)));
            std::fs::create_dir(&folder).unwrap();
            Self(folder)
        }

        fn config(&self) -> FileConfig {
            let path = self.0.join("events.jsonl");
            FileConfig {
                path,
                source: "s".to_owned(),
                format: Format::Payload,
                max_size: None,
                daily: false,
                fsync: true,
            }
        }

        /// Returns the name and the number of lines of each file except the lock, sorted by name.
        fn files(&self) -> Vec<(String, usize)> {
            let entries = std::fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path());
            let mut files: Vec<_> = entries
                .map(|path| {
                    let lines = std::fs::read_to_string(&path).unwrap().lines().count();
                    (path.file_name().unwrap().to_string_lossy().into_owned(), lines)
                })
                .filter(|(name, _)| !name.ends_with(".lock"))
                .collect();
            files.sort();
            files
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).unwrap();
        }
    }

    async fn publish(config: &FileConfig, count: i64) -> Vec<Outcome> {
        let events: Vec<Event> = (0..count).map(event).collect();
        let refs: Vec<&Event> = events.iter().collect();
        let deadline = Instant::now() + Duration::from_secs(60);
        FileSink::new(config.clone()).publish(&Batch::new(&refs, deadline)).await.outcomes
    }

    fn is_delivered(outcomes: &[Outcome]) -> bool {
        outcomes.iter().all(|outcome| matches!(outcome, Outcome::Delivered { .. }))
    }

    #[tokio::test]
    async fn a_full_file_is_set_aside_before_the_next_batch() {
        let folder = Folder::new();
        let config = FileConfig { max_size: Some(1), ..folder.config() };
        for _ in 0..3 {
            assert!(is_delivered(&publish(&config, 2).await));
        }
        let today = day(SystemTime::now());
        let aside = |number: u32| (format!("events.jsonl.{today}.{number}"), 2);
        assert_eq!(folder.files(), [("events.jsonl".to_owned(), 2), aside(1), aside(2)]);
    }

    #[tokio::test]
    async fn a_file_of_another_day_is_set_aside_with_its_day() {
        let folder = Folder::new();
        let config = FileConfig { daily: true, fsync: false, ..folder.config() };
        publish(&config, 1).await;
        publish(&config, 1).await;
        let file = OpenOptions::new().append(true).open(&config.path).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(86_400)).unwrap();
        publish(&config, 3).await;
        let files = [("events.jsonl".to_owned(), 3), ("events.jsonl.1970-01-02.1".to_owned(), 2)];
        assert_eq!(folder.files(), files);
    }

    #[tokio::test]
    async fn half_a_line_stays_apart_from_the_next() {
        let folder = Folder::new();
        let config = folder.config();
        std::fs::write(&config.path, "{\"half").unwrap();
        assert!(is_delivered(&publish(&config, 1).await));
        let text = std::fs::read_to_string(&config.path).unwrap();
        assert_eq!((text.lines().count(), text.lines().next()), (2, Some("{\"half")));
    }

    #[tokio::test]
    async fn who_has_the_lock_is_waited_for_until_the_deadline() {
        let folder = Folder::new();
        let config = folder.config();
        let lock = config.lock_file().unwrap();
        lock.lock().unwrap();
        let held = config.append(b"{}\n", Instant::now() + Duration::from_millis(50));
        assert!(!held.unwrap() && !config.path.exists());
        let waiting = tokio::spawn({
            let config = config.clone();
            async move { publish(&config, 1).await }
        });
        lock.unlock().unwrap();
        assert!(is_delivered(&waiting.await.unwrap()));
    }

    #[tokio::test]
    async fn what_cannot_be_written_to_is_a_misconfiguration_and_charges_nobody() {
        let folder = Folder::new();
        let no_folder = FileConfig { path: folder.0.join("none/events.jsonl"), ..folder.config() };
        let is_folder = FileConfig { path: folder.0.clone(), ..folder.config() };
        for config in [no_folder, is_folder] {
            let outcomes = publish(&config, 1).await;
            assert!(
                matches!(&outcomes[0], Outcome::Failed(error) if error.fault == Fault::Misconfigured),
                "{outcomes:?}"
            );
            assert!(FileSink::new(config).check().await.is_err());
        }
        drop(std::fs::remove_file(beside(&folder.0, "lock")));
        // A device is not a regular file, and is refused.
        let full = FileConfig { path: PathBuf::from("/dev/full"), fsync: false, ..folder.config() };
        let error = full.open().unwrap_err();
        assert!(error.to_string().contains("no regular file"), "{error}");
    }
}
