//! The operator's door to a PostgreSQL outbox.

use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use sqlx::postgres::PgConnection;
use uuid::Uuid;

use crate::audit::{Audit, EntryId};
use crate::emit::NewEvent;
use crate::outbox::error::OutboxError;
use crate::outbox::mend::Mend;
use crate::outbox::operate::{Check, CheckRequest, Feature, Migrated, Operate, Unemitted};
use crate::outbox::partitions::PENDING;
use crate::outbox::past::Past;
use crate::outbox::pause::PauseOutcome;
use crate::outbox::postgres::connection::{STATEMENT_TIMEOUT, with_timeout};
use crate::outbox::postgres::mend::PgMend;
use crate::outbox::postgres::past::PgPast;
use crate::outbox::postgres::question::Question;
use crate::outbox::postgres::sql::Sql;
use crate::outbox::postgres::store::PgOutbox;
use crate::outbox::postgres::{audit, check, emit, formats, migrate, standstill, status, tally};
use crate::outbox::sample::Sampling;
use crate::outbox::standstill::Standstill;
use crate::outbox::status::{Found, Status, StatusRequest, TallyCount};

impl Operate for PgOutbox {
    fn require(&self, _: Feature) -> Result<(), OutboxError> {
        Ok(())
    }

    fn migrate(&self) -> BoxFuture<'_, Result<Migrated, OutboxError>> {
        migrate::migrate(&self.config.url).boxed()
    }

    fn check<'a>(&'a self, request: CheckRequest<'a>) -> BoxFuture<'a, Vec<Check>> {
        check::check(&self.config.url, self.config.pooled, request).boxed()
    }

    fn emit(&self, event: NewEvent) -> BoxFuture<'_, Result<Uuid, Unemitted>> {
        emit::emit(&self.config.url, self.config.pooled, event).boxed()
    }

    fn mend(&self) -> BoxFuture<'_, Result<Box<dyn Mend>, OutboxError>> {
        async { Ok(Box::new(PgMend::open(&self.config.url, self.config.pooled).await?) as Box<dyn Mend>) }.boxed()
    }

    fn audit<'a>(&'a self, destination: &'a str, audit: &'a mut Audit) -> BoxFuture<'a, Result<EntryId, OutboxError>> {
        audit::read(&self.config.url, destination, audit).boxed()
    }

    fn maintain(&self) -> BoxFuture<'_, Result<(), OutboxError>> {
        async {
            let mut connection = self.connect().await?;
            self.add_days(&mut connection).await?;
            self.look_at_additions(&mut connection).await?;
            self.drop_days(&mut connection).await
        }
        .boxed()
    }

    fn past(&self) -> BoxFuture<'_, Result<Box<dyn Past>, OutboxError>> {
        async { Ok(Box::new(PgPast::open(&self.config.url, self.config.pooled).await?) as Box<dyn Past>) }.boxed()
    }

    fn holders(&self) -> BoxFuture<'_, Result<Vec<String>, OutboxError>> {
        self.on_side_connection("look who holds events", async |connection| {
            standstill::holders(connection, Sql { persistent: false, ..self.sql() }).await
        })
        .boxed()
    }

    fn sample<'a>(&'a self, destinations: &'a [String]) -> BoxFuture<'a, Result<Sampling, OutboxError>> {
        self.take_sample(destinations).boxed()
    }

    fn standstills<'a>(&'a self, destinations: &'a [String]) -> BoxFuture<'a, Result<Vec<Standstill>, OutboxError>> {
        async {
            let (found, brief) = self.look_for_standstills(destinations).await?;
            if self.behind_unknown_format.load(Ordering::Relaxed) {
                let schema = self.sql().schema;
                formats::give_back(&mut self.connect().await?, schema).await?;
            }
            if !brief {
                return Ok(found);
            }
            tokio::time::sleep(standstill::BRIEF).await;
            self.look_for_standstills(destinations).await.map(|(found, _)| found)
        }
        .boxed()
    }

    fn status(&self, request: StatusRequest) -> BoxFuture<'_, Result<Status, OutboxError>> {
        async move { status::read(&mut self.connect().await?, self, request).await }.boxed()
    }

    fn add_tally<'a>(&'a self, counts: &'a [TallyCount]) -> BoxFuture<'a, Result<(), OutboxError>> {
        tally::add(self, counts).boxed()
    }

    fn note_trouble<'a>(&'a self, found: &'a [Found]) -> BoxFuture<'a, Result<(), OutboxError>> {
        tally::note_trouble(self, found).boxed()
    }

    fn pause<'a>(
        &'a self,
        destination: &'a str,
        event_type: Option<&'a str>,
    ) -> BoxFuture<'a, Result<PauseOutcome, OutboxError>> {
        self.pause_destination(destination, event_type).boxed()
    }

    fn resume<'a>(
        &'a self,
        destination: &'a str,
        event_type: Option<&'a str>,
    ) -> BoxFuture<'a, Result<PauseOutcome, OutboxError>> {
        self.resume_destination(destination, event_type).boxed()
    }

    fn claims_ended(&self, at_most: Duration) -> BoxFuture<'_, Result<bool, OutboxError>> {
        self.earlier_claims_ended(at_most).boxed()
    }
}

impl PgOutbox {
    async fn find_standstills(
        &self,
        connection: &mut PgConnection,
        destinations: &[String],
    ) -> Result<(Vec<Standstill>, bool), sqlx::Error> {
        let (sql, publish_timeout) = (Sql { persistent: false, ..self.sql() }, self.config.publish_timeout);
        let bounds = self.bounds.known().0.bounds_of(&(0..PENDING).collect::<Vec<_>>());
        let (memory, history, behind_unknown_format) =
            (&self.memory, self.config.usage.history, &*self.behind_unknown_format);
        let question = Question {
            sql,
            destinations,
            publish_timeout,
            history,
            brief: standstill::BRIEF,
            memory,
            bounds,
            behind_unknown_format,
        };
        let (mut found, brief) = standstill::find(connection, &question).await?;
        found.extend(self.refused_writes.left_out.told());
        Ok((found, brief))
    }

    async fn look_for_standstills(&self, destinations: &[String]) -> Result<(Vec<Standstill>, bool), OutboxError> {
        let operation = "look for what stands still";
        // The side connection may itself wait for the lock that is to be found, and so may a new connection in its place.
        if let Some(Ok(answer)) = self
            .on_side_connection_unless_busy(operation, async |connection| {
                self.find_standstills(connection, destinations).await
            })
            .await
        {
            return Ok(answer);
        }
        let mut connection = self.connect().await?;
        with_timeout(operation, STATEMENT_TIMEOUT, self.find_standstills(&mut connection, destinations)).await
    }
}
