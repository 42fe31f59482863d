//! Claims of a relay that another configuration has superseded: they take events that are owed to destinations which that
//! configuration lacks.

use std::collections::BTreeMap;

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor};

use crate::event::ClaimId;
use crate::outbox::number::to_i64;
use crate::outbox::postgres::batch::{self, Batch, Which};
use crate::outbox::postgres::connection::{STATEMENT_TIMEOUT, with_timeout};
use crate::outbox::postgres::lane::PgLane;
use crate::outbox::postgres::register::CHANGES;
use crate::outbox::postgres::sql::Sql;
use crate::outbox::postgres::take;
use crate::outbox::register::Role;
use crate::outbox::{Claim, ClaimRequest, OutboxError};

impl PgLane {
    /// Claims for a relay that is superseded. Returns `None` if it no longer is.
    pub(super) async fn claim_left(&mut self, request: ClaimRequest<'_>) -> Result<Option<Claim>, OutboxError> {
        let look =
            async |sql: Sql, connection: &mut PgConnection| sql.query_scalar(CHANGES).fetch_one(connection).await;
        let changes = self.ask("ask whether this relay routes", look).await?;
        let Role::Superseded { left } = self.outbox.role_at(changes).await? else { return Ok(None) };
        let left = self.outbox.membership.ready(&left);
        if left.is_empty() {
            return Ok(Some(Claim::Superseded));
        }
        let request = ClaimRequest { destinations: &left, ..request };
        let mut connection = self.ready().await?;
        let claim =
            with_timeout("claim events", STATEMENT_TIMEOUT, self.try_claim_left(&mut connection, request)).await?;
        self.connection = Some(connection);
        Ok(Some(claim))
    }

    /// Claims the events that are owed to the destinations of the request. Its transaction writes before they are published;
    /// that is rare.
    async fn try_claim_left(
        &mut self,
        connection: &mut PgConnection,
        request: ClaimRequest<'_>,
    ) -> Result<Claim, sqlx::Error> {
        let sql = self.outbox.sql();
        connection.execute(AssertSqlSafe(self.begin.clone())).await?;
        let limit = request.max_events;
        let taken = take::take_left(connection, sql, request.destinations, to_i64(limit)).await?;
        if taken.is_empty() {
            connection.execute("commit").await?;
            return Ok(Claim::Superseded);
        }
        let share = (limit / taken.len()).max(1);
        let limits = (limit, share);
        let bounds = vec![i64::MIN; taken.len()];
        let mut batch =
            batch::read(connection, sql, &mut self.large, (&taken, &bounds), limits, request, Which::Owed).await?;
        batch.sort();
        // Events that are left out keep their places, as do those that a relay that routes has passed.
        self.outbox.refused_writes.left_out.leave_out(&mut batch, &BTreeMap::new());
        let Batch { claimed, given, bytes, epoch, .. } = batch;
        let Some(epoch) = epoch.filter(|_| !claimed.is_empty()) else {
            connection.execute("commit").await?;
            return Ok(Claim::Superseded);
        };
        let full = bytes >= request.max_bytes || given.values().any(|given| given.events == share);
        let claim_id = ClaimId { outbox: self.outbox.id(connection).await?, epoch, token: fastrand::u64(..) };
        Ok(Claim::Batch { claimed, full, claim_id })
    }
}
