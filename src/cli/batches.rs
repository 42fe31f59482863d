//! Work on many rows in batches, each a transaction of its own: at a bounded rate, and until somebody presses Ctrl-C.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::cli::interrupt::Interrupt;
use crate::outbox::OutboxError;

/// The most rows of a transaction: what producers may wait for, and what is done anew after a crash.
pub(super) const MOST: usize = 1000;

/// How many batches a second there are where a rate is given.
const PER_SECOND: u32 = 5;

/// How often a long command logs how far it is.
const TELL_INTERVAL: Duration = Duration::from_secs(10);

/// What became of a command.
#[derive(Debug, Default)]
pub(super) struct Done {
    /// How many rows were changed.
    pub(super) count: u64,
    /// The exit code, if a signal ended it.
    pub(super) interrupted: Option<ExitCode>,
    /// The error that ended it.
    pub(super) failed: Option<OutboxError>,
}

/// Applies `apply` to `items` in order, at most `most` at a time. `rate`: the most items a second. `what`: what is done, as in
/// "redriven", and with how many rows in all.
///
/// # Errors
/// Signals cannot be handled; nothing was done.
pub(super) async fn run<T>(
    items: &[T],
    most: usize,
    rate: Option<u32>,
    (what, of): (&'static str, u64),
    mut apply: impl AsyncFnMut(&[T]) -> Result<u64, OutboxError>,
) -> std::io::Result<Done> {
    let interrupt = Interrupt::handle()?;
    let mut done = Done::default();
    let (begun, mut told, mut taken) = (Instant::now(), Instant::now(), 0_usize);
    for batch in items.chunks(size(most, rate)) {
        if let Some(rate) = rate {
            let due = begun + Duration::from_secs_f64(taken as f64 / f64::from(rate));
            tokio::select! {
                () = tokio::time::sleep_until(due.into()) => {}
                () = interrupt.comes() => {}
            }
        }
        if interrupt.has_come() {
            done.interrupted = Some(interrupt.exit_code());
            break;
        }
        // A batch that has begun is waited for: it is done whole.
        match apply(batch).await {
            Ok(count) => done.count += count,
            Err(error) => {
                done.failed = Some(error);
                break;
            }
        }
        taken += batch.len();
        if told.elapsed() >= TELL_INTERVAL {
            told = Instant::now();
            tracing::info!(done = done.count, of, "{what} so far");
        }
    }
    Ok(done)
}

/// How many items a batch has.
fn size(most: usize, rate: Option<u32>) -> usize {
    let size = rate.map_or(most, |rate| usize::try_from(rate / PER_SECOND).unwrap_or(most));
    size.clamp(1, most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_makes_batches_small_and_none_is_empty() {
        let sizes = [None, Some(1), Some(4), Some(100), Some(u32::MAX)].map(|rate| size(MOST, rate));
        assert_eq!(sizes, [1000, 1, 1, 20, 1000]);
    }

    #[tokio::test]
    async fn a_rate_is_kept_and_an_error_ends_the_work_with_what_was_done() {
        let items: Vec<u32> = (0..12).collect();
        let begun = Instant::now();
        let done =
            run(&items, MOST, Some(20), ("done", 12), async |batch| Ok(batch.len() as u64)).await.expect("it runs");
        assert_eq!(done.count, 12);
        assert!(begun.elapsed() >= Duration::from_millis(350), "{:?}", begun.elapsed());
        let done = run(&items, MOST, Some(25), ("done", 12), async |batch| match batch {
            [0, ..] => Ok(5),
            _ => Err(OutboxError::Unsupported("no more")),
        });
        let done = done.await.expect("it runs");
        assert_eq!((done.count, done.failed.is_some()), (5, true));
    }
}
