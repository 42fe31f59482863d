//! Proves that advisory locks exclude each other. Some servers that speak PostgreSQL's protocol accept these locks and ignore
//! them. Two relays there would publish the same partition at the same time.

use std::time::Duration;

use sqlx::Executor;
use sqlx::postgres::PgConnection;

use crate::outbox::OutboxError;
use crate::outbox::postgres::connection::{STATEMENT_TIMEOUT, with_timeout};

/// How long to wait for the second session. A pooler with one connection to the server cannot give it one while the first
/// session has a transaction.
const PATIENCE: Duration = Duration::from_secs(3);

/// How many keys to try, because somebody may hold one by chance.
const ATTEMPTS: usize = 3;

/// A session that can hold a lock until its transaction ends.
pub(super) trait LockSession {
    /// Begins a transaction and tries to take the lock for it; returns whether it was free.
    fn try_lock(&mut self, key: i32) -> impl Future<Output = Result<bool, OutboxError>> + Send;

    /// Ends the transaction.
    fn release(&mut self) -> impl Future<Output = Result<(), OutboxError>> + Send;
}

/// Fails if a lock that one session holds is given to the other too. Behind a pooler that cannot give two sessions a
/// transaction at once this remains unknown, which is logged.
pub(super) async fn prove(first: &mut impl LockSession, second: &mut impl LockSession) -> Result<(), OutboxError> {
    for _ in 0..ATTEMPTS {
        let key = fastrand::i32(..);
        let taken = first.try_lock(key).await?;
        let excluded = match tokio::time::timeout(PATIENCE, second.try_lock(key)).await {
            Ok(given) => Some(!given?),
            Err(_) => None,
        };
        first.release().await?;
        match (taken, excluded) {
            (true, Some(true)) => return second.release().await,
            (true, Some(false)) => return Err(OutboxError::LocksDoNotExclude),
            // The second session still waits for its transaction: it is of no use any more.
            (_, None) => {
                tracing::warn!(
                    "not tried whether advisory locks exclude each other: two connections could not be opened at once"
                );
                return Ok(());
            }
            (false, Some(_)) => second.release().await?,
        }
    }
    Err(OutboxError::LocksDoNotExclude)
}

impl LockSession for PgConnection {
    async fn try_lock(&mut self, key: i32) -> Result<bool, OutboxError> {
        with_timeout("try an advisory lock", STATEMENT_TIMEOUT, async {
            self.execute("begin").await?;
            // The class of the lock of `relay migrate`, whose own key is 1.
            sqlx::query_scalar("select pg_catalog.pg_try_advisory_xact_lock(7233173, $1)")
                .persistent(false)
                .bind(key)
                .fetch_one(self)
                .await
        })
        .await
    }

    async fn release(&mut self) -> Result<(), OutboxError> {
        with_timeout("give an advisory lock back", STATEMENT_TIMEOUT, async {
            self.execute("rollback").await.map(drop)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A session of a server that gives these answers.
    struct Fake(Vec<Option<bool>>);

    impl LockSession for Fake {
        async fn try_lock(&mut self, _: i32) -> Result<bool, OutboxError> {
            match self.0.remove(0) {
                Some(answer) => Ok(answer),
                None => std::future::pending().await,
            }
        }

        async fn release(&mut self) -> Result<(), OutboxError> {
            Ok(())
        }
    }

    async fn proven(first: &[Option<bool>], second: &[Option<bool>]) -> Result<(), OutboxError> {
        prove(&mut Fake(first.to_vec()), &mut Fake(second.to_vec())).await
    }

    #[tokio::test]
    async fn f77_locks_that_are_given_twice_are_refused_for_good() {
        let error = proven(&[Some(true)], &[Some(true)]).await.expect_err("refused");
        assert!(error.is_final());
        assert!(error.explain().contains("would publish the same events"), "{}", error.explain());
        let never = [Some(false); ATTEMPTS];
        proven(&never, &never).await.expect_err("refused");
    }

    #[tokio::test]
    async fn f77_locks_that_exclude_are_fine_and_a_key_that_somebody_holds_proves_nothing() {
        proven(&[Some(true)], &[Some(false)]).await.expect("accepted");
        proven(&[Some(false), Some(true)], &[Some(false), Some(false)]).await.expect("accepted");
    }

    #[tokio::test]
    async fn f77_behind_a_pool_of_one_connection_the_proof_gives_up() {
        proven(&[Some(true)], &[None]).await.expect("accepted");
    }
}
