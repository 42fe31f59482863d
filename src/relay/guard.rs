//! Guards. Each reverts a state when it is dropped, whether its owner returned, failed, panicked or was cancelled.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::outbox::{Armed, OutboxError, Wakeup};
use crate::relay::shared::Shared;

/// Counts a lane as busy from before its claim until after its settle.
pub(super) struct Busy {
    shared: Arc<Shared>,
    /// The lane holds a claim. When the claim ends, other lanes may go on.
    claimed: bool,
}

impl Busy {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        shared.busy.fetch_add(1, Ordering::SeqCst);
        Self { shared, claimed: false }
    }

    /// From now on the lane holds a claim.
    pub(super) fn claimed(&mut self) {
        self.claimed = true;
        self.shared.claims.fetch_add(1, Ordering::SeqCst);
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.shared.busy.fetch_sub(1, Ordering::SeqCst);
        if self.claimed {
            self.shared.claims.fetch_sub(1, Ordering::SeqCst);
            self.shared.settled.notify_one();
        }
    }
}

/// Adds to a number while the value lives.
pub(super) struct Counted<'a> {
    number: &'a AtomicUsize,
    by: usize,
}

impl<'a> Counted<'a> {
    pub(super) fn new(number: &'a AtomicUsize, by: usize) -> Self {
        number.fetch_add(by, Ordering::SeqCst);
        Self { number, by }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.number.fetch_sub(self.by, Ordering::SeqCst);
    }
}

/// A wake-up that may be armed. While it is armed, every producer pays for it. If [`Self::disarm`] did not finish, the
/// wake-up is replaced by a new one: the connection of the old one is closed, which disarms it, and the relay can sleep
/// again.
pub(super) struct ArmedWakeup<'a, W, N: Fn() -> Option<W>> {
    wakeup: &'a mut W,
    renew: N,
    may_be_armed: bool,
}

impl<'a, W: Wakeup, N: Fn() -> Option<W>> ArmedWakeup<'a, W, N> {
    /// Creates the guard, not armed yet; `renew` makes another wake-up.
    pub(super) fn new(wakeup: &'a mut W, renew: N) -> Self {
        Self { wakeup, renew, may_be_armed: false }
    }

    /// See [`Wakeup::arm`].
    pub(super) async fn arm(&mut self) -> Result<Armed, OutboxError> {
        self.may_be_armed = true;
        let armed = self.wakeup.arm().await;
        self.may_be_armed = matches!(armed, Ok(Armed::Yes | Armed::Standby));
        armed
    }

    /// The wake-up to wait with.
    pub(super) fn wakeup(&mut self) -> &mut W {
        self.wakeup
    }

    /// See [`Wakeup::disarm`]. An error means that the connection was lost, which disarms too.
    pub(super) async fn disarm(mut self) {
        if let Err(error) = self.wakeup.disarm().await {
            tracing::debug!(error = error.explain(), "the connection that wakes this relay was lost");
        }
        self.may_be_armed = false;
    }
}

impl<W, N: Fn() -> Option<W>> Drop for ArmedWakeup<'_, W, N> {
    fn drop(&mut self) {
        if self.may_be_armed
            && let Some(another) = (self.renew)()
        {
            *self.wakeup = another;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::panic::AssertUnwindSafe;
    use std::time::Duration;

    use futures_util::FutureExt;

    use super::*;
    use crate::relay::shared::Ending;

    /// The number tells one wake-up from the next.
    #[derive(Debug, PartialEq)]
    struct Fake {
        number: u32,
        armed: Armed,
    }

    impl Wakeup for Fake {
        async fn arm(&mut self) -> Result<Armed, OutboxError> {
            Ok(self.armed)
        }

        async fn wait(&mut self, _: Duration) -> Result<bool, OutboxError> {
            std::future::pending().await
        }

        async fn disarm(&mut self) -> Result<(), OutboxError> {
            self.armed = Armed::No;
            Ok(())
        }
    }

    const NEXT: fn() -> Option<Fake> = || Some(Fake { number: 2, armed: Armed::No });

    #[tokio::test]
    async fn a_wake_up_that_was_disarmed_stays() {
        for armed in [Armed::Yes, Armed::Standby, Armed::No] {
            let mut wakeup = Fake { number: 1, armed };
            let mut guard = ArmedWakeup::new(&mut wakeup, NEXT);
            guard.arm().await.unwrap();
            guard.disarm().await;
            assert_eq!(wakeup, Fake { number: 1, armed: Armed::No });
        }
    }

    #[tokio::test]
    async fn a_wake_up_is_replaced_where_its_sleep_is_cancelled_or_panics() {
        let mut wakeup = Fake { number: 1, armed: Armed::Yes };
        let sleep = async {
            let mut guard = ArmedWakeup::new(&mut wakeup, NEXT);
            guard.arm().await.unwrap();
            guard.wakeup().wait(Duration::MAX).await.unwrap();
        };
        assert!(tokio::time::timeout(Duration::from_millis(1), sleep).await.is_err());
        assert_eq!(wakeup.number, 2);

        let mut wakeup = Fake { number: 1, armed: Armed::Standby };
        let sleep = async {
            let mut guard = ArmedWakeup::new(&mut wakeup, NEXT);
            guard.arm().await.unwrap();
            panic!("as a bug would");
        };
        assert!(AssertUnwindSafe(sleep).catch_unwind().await.is_err());
        assert_eq!(wakeup.number, 2);
    }

    #[test]
    fn a_lane_that_panics_is_not_busy_any_more_and_its_claim_is_over() {
        let shared = Arc::new(Shared::new(Ending::Stop));
        let panicked = std::panic::catch_unwind(AssertUnwindSafe(|| {
            let mut busy = Busy::new(Arc::clone(&shared));
            busy.claimed();
            assert_eq!((shared.busy.load(Ordering::SeqCst), shared.claims.load(Ordering::SeqCst)), (1, 1));
            panic!("as a bug would");
        }));
        assert!(panicked.is_err());
        assert_eq!((shared.busy.load(Ordering::SeqCst), shared.claims.load(Ordering::SeqCst)), (0, 0));
        assert!(shared.settled.notified().now_or_never().is_some(), "other lanes go on");
    }
}
