//! Measures the longest time in which the stream got no new entry.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::STREAM;

/// Reads the stream's length until it is dropped.
pub(super) struct Watcher {
    stop: Arc<AtomicBool>,
    longest_ms: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<()>,
}

impl Watcher {
    pub(super) fn start(redis_direct: &str) -> Self {
        let (stop, longest_ms) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stopped, longest, url) = (Arc::clone(&stop), Arc::clone(&longest_ms), redis_direct.to_owned());
        let thread = std::thread::spawn(move || {
            let client = redis::Client::open(url).unwrap();
            let (mut last, mut since) = (0, Instant::now());
            while !stopped.load(Ordering::SeqCst) {
                let length: Option<u64> =
                    client.get_connection_with_timeout(Duration::from_millis(100)).ok().and_then(|mut connection| {
                        connection.set_read_timeout(Some(Duration::from_millis(100))).ok()?;
                        redis::cmd("XLEN").arg(STREAM).query(&mut connection).ok()
                    });
                if length.is_some_and(|length| length != last) {
                    longest.fetch_max(u64::try_from(since.elapsed().as_millis()).unwrap(), Ordering::SeqCst);
                    (last, since) = (length.unwrap_or_default(), Instant::now());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Self { stop, longest_ms, thread }
    }

    pub(super) fn longest(self) -> Duration {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap();
        Duration::from_millis(self.longest_ms.load(Ordering::SeqCst))
    }
}
