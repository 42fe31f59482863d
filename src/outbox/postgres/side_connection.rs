//! A connection beside those of the lanes, for rare work, because a lane's own connection holds its claim.
//!
//! Its session holds the advisory lock that shows other relays that this one is at work, see `register`.

use sqlx::postgres::PgConnection;

use crate::outbox::error::OutboxError;
use crate::outbox::postgres::connection::{STATEMENT_TIMEOUT, with_timeout};
use crate::outbox::postgres::store::PgOutbox;

/// Takes that lock in a new session, and writes down its pid.
const HOLD: &str = "
update {schema}.event_relay set pid = case when pg_catalog.pg_try_advisory_lock(
    '{schema}.event_outbox'::regclass::oid::int, (2000000::bigint + $1 % 2000000000::bigint)::int
) then pg_catalog.pg_backend_pid() end
where id = $1";

impl PgOutbox {
    /// Runs `query` on the side connection, behind a pooler in a transaction. If it fails, the connection is given up.
    pub(super) async fn on_side_connection<T>(
        &self,
        operation: &'static str,
        query: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, OutboxError> {
        let mut slot = self.side_connection.lock().await;
        self.ask_on(&mut slot, operation, async |connection| {
            self.begin_pooled(connection).await?;
            let answer = query(connection).await?;
            self.commit_pooled(connection).await?;
            Ok(answer)
        })
        .await
    }

    /// The same for a query that begins and ends its own transactions. Returns `None` if the connection is in use.
    pub(super) async fn on_side_connection_unless_busy<T>(
        &self,
        operation: &'static str,
        query: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Option<Result<T, OutboxError>> {
        let mut slot = self.side_connection.try_lock().ok()?;
        Some(self.ask_on(&mut slot, operation, query).await)
    }

    pub(super) async fn ask_on<T>(
        &self,
        slot: &mut Option<PgConnection>,
        operation: &'static str,
        query: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, OutboxError> {
        let mut connection = match slot.take() {
            Some(connection) => connection,
            None => {
                let mut connection = self.connect().await?;
                with_timeout("hold the registration", STATEMENT_TIMEOUT, self.hold_registration(&mut connection))
                    .await?;
                connection
            }
        };
        let answer = with_timeout(operation, STATEMENT_TIMEOUT, query(&mut connection)).await?;
        *slot = Some(connection);
        Ok(answer)
    }

    /// Takes the lock in a new session, if this relay is registered.
    pub(super) async fn hold_registration(&self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        if let Some(member) = self.membership.member().filter(|_| !self.config.pooled) {
            self.sql().query(HOLD).persistent(false).bind(member.id).execute(connection).await?;
        }
        Ok(())
    }
}
