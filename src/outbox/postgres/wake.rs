//! Sleeps until a producer commits, by the advisory lock of `migrations/postgres/0005_wake_up.sql`, which the trigger of
//! `0010_cheaper_inserts.sql` tries.

use std::time::Duration;

use sqlx::postgres::{PgListener, PgPoolOptions};

use crate::failpoint::failpoint;
use crate::outbox::postgres::connection::{
    CONNECT_TIMEOUT, NO_IDLE_LIMIT, STATEMENT_TIMEOUT, connect_options, query_failed, with_timeout,
};
use crate::outbox::postgres::store::PgOutbox;
use crate::outbox::{Armed, OutboxError, Wakeup};

/// A connection of its own that listens, and holds the sleepers' lock.
pub struct PgWakeup {
    outbox: PgOutbox,
    listener: Option<PgListener>,
    /// Whether this session holds the sleepers' lock.
    armed: bool,
}

impl PgWakeup {
    pub(super) fn new(outbox: PgOutbox) -> Self {
        Self { outbox, listener: None, armed: false }
    }

    async fn listen(&self) -> Result<PgListener, OutboxError> {
        let options = connect_options(&self.outbox.config.url, false)?;
        // Only with a pool, here of one connection, does sqlx let a listener have options of its own.
        let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(CONNECT_TIMEOUT).connect_lazy_with(options);
        with_timeout("listen for new events", CONNECT_TIMEOUT + STATEMENT_TIMEOUT, async {
            let mut listener = PgListener::connect_with(&pool).await?;
            listener.eager_reconnect(false);
            listener.listen("event_outbox").await?;
            sqlx::query(NO_IDLE_LIMIT).execute(&mut listener).await?;
            Ok(listener)
        })
        .await
    }

    async fn try_arm(&self, listener: &mut PgListener) -> Result<Armed, OutboxError> {
        let (locked, held): (bool, bool) = with_timeout("ask to be woken", STATEMENT_TIMEOUT, async {
            // The second column is read only if the first is false: then an exclusive holder is another sleeper. A prepared
            // transaction (no pid) that has inserted holds the lock until somebody decides it, so it is not waited for in short
            // steps.
            self.outbox.sql().query_as(
                "with attempt as materialized (select pg_catalog.pg_try_advisory_lock('{schema}.event_outbox'::regclass::oid::int, -1) as locked)
                 select locked, case when locked then false else exists (
                     select from pg_catalog.pg_locks
                     where locktype = 'advisory' and (mode = 'ExclusiveLock' or pid is null) and granted
                       and database = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
                       and classid = '{schema}.event_outbox'::regclass::oid and objid = ((1::bigint << 32) - 1)::oid and objsubid = 2
                 ) end
                 from attempt",
            )
            .fetch_one(listener)
            .await
        })
        .await?;
        Ok(match (locked, held) {
            (true, _) => Armed::Yes,
            (false, true) => Armed::Standby,
            (false, false) => Armed::No,
        })
    }
}

impl Wakeup for PgWakeup {
    async fn arm(&mut self) -> Result<Armed, OutboxError> {
        failpoint("arm")?;
        let mut listener = match self.listener.take() {
            Some(listener) => listener,
            None => {
                self.armed = false;
                self.listen().await?
            }
        };
        // Earlier notifications are dropped, because the poll that follows finds their events.
        while listener.next_buffered().is_some() {}
        // The lock is counted: if it were taken twice, it would still be held after it is released once.
        let armed = if self.armed { Armed::Yes } else { self.try_arm(&mut listener).await? };
        self.listener = Some(listener);
        self.armed = armed == Armed::Yes;
        Ok(armed)
    }

    async fn wait(&mut self, at_most: Duration) -> Result<bool, OutboxError> {
        let Some(listener) = &mut self.listener else { return Ok(true) };
        match tokio::time::timeout(at_most, listener.try_recv()).await {
            Err(_) => Ok(false),
            Ok(Ok(Some(_))) => Ok(true),
            Ok(lost) => {
                self.listener = None;
                self.armed = false;
                let source =
                    lost.err().unwrap_or_else(|| std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
                Err(query_failed("wait for new events", source))
            }
        }
    }

    async fn disarm(&mut self) -> Result<(), OutboxError> {
        let Some(mut listener) = self.listener.take() else { return Ok(()) };
        if std::mem::take(&mut self.armed) {
            with_timeout("stop waiting for new events", STATEMENT_TIMEOUT, async {
                self.outbox
                    .sql()
                    .query("select pg_catalog.pg_advisory_unlock('{schema}.event_outbox'::regclass::oid::int, -1)")
                    .execute(&mut listener)
                    .await
            })
            .await?;
        }
        self.listener = Some(listener);
        Ok(())
    }
}
