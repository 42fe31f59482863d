//! Decides which verdict follows from a sink's outcome, and when a charged event is retried.
//!
//! Sinks only classify; [`RetryPolicy::judge`] is the one place that decides. Randomness is passed in.

use std::time::Duration;

use backoff::ExponentialBackoff;
use backoff::backoff::Backoff;

use crate::event::{Fault, Outcome, Verdict, Wait};

/// The longest wait between two attempts, so that an event that may be retried for days is retried hourly.
const MAX_DELAY: Duration = Duration::from_secs(3600);

/// Doubles `first` `times` times, up to `longest`.
pub(crate) fn doubled(first: Duration, times: u32, longest: Duration) -> Duration {
    first.saturating_mul(1u32.checked_shl(times).unwrap_or(u32::MAX)).min(longest)
}

/// How often a charged event is retried, and after which waits.
#[derive(Debug, Clone, PartialEq)]
pub struct RetryPolicy {
    /// The number of attempts after the first.
    pub max_retries: u32,
    /// The wait before the first retry.
    pub base: Duration,
    /// Whether each further wait is twice the one before, up to an hour.
    pub exponential: bool,
    /// Whether a wait is spread between half and one and a half of itself, so that events that failed together do not
    /// come back together.
    pub jitter: bool,
}

impl RetryPolicy {
    /// Returns the verdict on one event's outcome at one destination. `attempts` is the number of attempts charged before;
    /// `random` is in `[0, 1)`.
    ///
    /// [`Outcome::Held`] and every uncharged failure wait in place. The caller, who knows the other destinations, decides
    /// whether such a row must make room for others.
    pub fn judge(&self, outcome: Outcome, attempts: i32, random: f64) -> Verdict {
        match outcome {
            Outcome::Delivered { message_id } => Verdict::Published { message_id },
            Outcome::Held => Verdict::Wait(Wait::InPlace),
            Outcome::Failed(error) => match error.fault {
                Fault::Destination | Fault::Misconfigured | Fault::Unknown => Verdict::Wait(Wait::InPlace),
                Fault::Unfit => Verdict::DeadLetter { error },
                Fault::Event => {
                    let retries = u32::try_from(attempts).unwrap_or_default();
                    if retries >= self.max_retries {
                        Verdict::DeadLetter { error }
                    } else {
                        Verdict::Retry { delay: self.delay(retries, random), error }
                    }
                }
            },
        }
    }

    /// Returns the wait after a failed attempt that had `retries` retries before it.
    pub fn delay(&self, retries: u32, random: f64) -> Duration {
        let mut schedule = ExponentialBackoff {
            current_interval: self.base,
            initial_interval: self.base,
            randomization_factor: 0.0,
            multiplier: if self.exponential { 2.0 } else { 1.0 },
            max_interval: MAX_DELAY.max(self.base),
            // The default gives up after 15 minutes, but `max_retries` decides how often to retry.
            max_elapsed_time: None,
            ..ExponentialBackoff::default()
        };
        // The schedule never shrinks and is capped, so its later steps need not be computed.
        let steps = retries.min(64);
        let wait = (0..=steps).filter_map(|_| schedule.next_backoff()).last().unwrap_or(self.base);
        if self.jitter { wait.mul_f64(0.5 + random) } else { wait }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::PublishError;

    fn policy() -> RetryPolicy {
        RetryPolicy { max_retries: 3, base: Duration::from_secs(1), exponential: true, jitter: false }
    }

    fn failed(fault: Fault) -> Outcome {
        Outcome::Failed(PublishError::new(fault, "CODE", "text"))
    }

    #[test]
    fn waits_double_up_to_an_hour() {
        let seconds: Vec<u64> = (0..14).map(|retries| policy().delay(retries, 0.9).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3600, 3600]);
        assert_eq!(policy().delay(u32::MAX, 0.0).as_secs(), 3600);
    }

    #[test]
    fn a_linear_policy_waits_the_same_each_time() {
        let policy = RetryPolicy { exponential: false, ..policy() };
        assert!((0..5).all(|retries| policy.delay(retries, 0.0) == Duration::from_secs(1)));
    }

    #[test]
    fn jitter_spreads_a_wait_between_half_and_one_and_a_half() {
        let policy = RetryPolicy { jitter: true, ..policy() };
        assert_eq!(policy.delay(1, 0.0), Duration::from_secs(1));
        assert_eq!(policy.delay(1, 0.5), Duration::from_secs(2));
        assert!(policy.delay(1, 0.999_999) < Duration::from_secs(3));
    }

    #[test]
    fn only_the_event_at_fault_is_charged() {
        for fault in [Fault::Destination, Fault::Misconfigured, Fault::Unknown] {
            assert_eq!(policy().judge(failed(fault), 99, 0.0), Verdict::Wait(Wait::InPlace), "{fault:?}");
        }
        assert_eq!(policy().judge(Outcome::Held, 99, 0.0), Verdict::Wait(Wait::InPlace));
        assert!(matches!(policy().judge(failed(Fault::Unfit), 0, 0.0), Verdict::DeadLetter { .. }));
    }

    #[test]
    fn an_event_is_given_up_after_its_last_retry() {
        for attempts in 0..3 {
            assert!(matches!(policy().judge(failed(Fault::Event), attempts, 0.0), Verdict::Retry { .. }));
        }
        assert!(matches!(policy().judge(failed(Fault::Event), 3, 0.0), Verdict::DeadLetter { .. }));
        let never = RetryPolicy { max_retries: 0, ..policy() };
        assert!(matches!(never.judge(failed(Fault::Event), 0, 0.0), Verdict::DeadLetter { .. }));
    }
}
