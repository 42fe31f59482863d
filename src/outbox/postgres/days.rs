//! The day partitions of the processing log and the history.

use sqlx::postgres::PgConnection;

use crate::outbox::error::OutboxError;
use crate::outbox::postgres::connection::{STATEMENT_TIMEOUT, with_timeout};
use crate::outbox::postgres::store::PgOutbox;

impl PgOutbox {
    /// Adds the partitions of the next seven days.
    pub(super) async fn add_days(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        // A week ahead, because the relay may lack the right to add more, or fail to, for that long.
        let mut parents = vec!["event_processing_log"];
        parents.extend(self.config.usage.history.then_some("event_history"));
        for parent in parents {
            with_timeout("add the day partitions ahead", STATEMENT_TIMEOUT, async {
                self.begin_pooled(connection).await?;
                self.sql()
                    .query("select {schema}.relay_add_days($1, 7)")
                    .persistent(false)
                    .bind(parent)
                    .execute(&mut *connection)
                    .await?;
                self.commit_pooled(connection).await
            })
            .await?;
        }
        Ok(())
    }

    /// Drops the partitions that ended longer ago than their retention.
    pub(super) async fn drop_days(&self, connection: &mut PgConnection) -> Result<(), OutboxError> {
        for (parent, retention) in
            [("event_processing_log", self.config.log_retention), ("event_history", self.config.history_retention)]
        {
            with_timeout("drop the days past their retention", STATEMENT_TIMEOUT, async {
                self.begin_pooled(connection).await?;
                self.sql()
                    .query("select {schema}.relay_drop_days($1, pg_catalog.make_interval(secs => $2))")
                    .persistent(false)
                    .bind(parent)
                    .bind(retention.as_secs_f64())
                    .execute(&mut *connection)
                    .await?;
                self.commit_pooled(connection).await
            })
            .await?;
        }
        Ok(())
    }
}
