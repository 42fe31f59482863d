//! The operator's part of a SQLite outbox.

use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, ready};
use uuid::Uuid;

use crate::audit::{Audit, EntryId};
use crate::emit::NewEvent;
use crate::outbox::error::OutboxError;
use crate::outbox::mend::Mend;
use crate::outbox::operate::{Check, CheckRequest, Feature, Migrated, Operate, Unemitted};
use crate::outbox::past::Past;
use crate::outbox::pause::PauseOutcome;
use crate::outbox::sample::Sampling;
use crate::outbox::sqlite::connection::run_query;
use crate::outbox::sqlite::mend::SqliteMend;
use crate::outbox::sqlite::past::SqlitePast;
use crate::outbox::sqlite::question::Question;
use crate::outbox::sqlite::store::SqliteOutbox;
use crate::outbox::sqlite::{check, emit, migrate, owner, retention, sample, standstill};
use crate::outbox::standstill::{Standstill, TAKEN_AFTER};
use crate::outbox::status::{Found, Status, StatusRequest, TallyCount};

impl Operate for SqliteOutbox {
    fn require(&self, feature: Feature) -> Result<(), OutboxError> {
        Err(OutboxError::Unsupported(match feature {
            Feature::GhostBarrier => {
                "RELAY_GHOST_BARRIER is for PostgreSQL, and DATABASE_URL names a SQLite file; unset it"
            }
            Feature::Audit => "relay audit reads PostgreSQL; DATABASE_URL names a SQLite file",
        }))
    }

    fn migrate(&self) -> BoxFuture<'_, Result<Migrated, OutboxError>> {
        migrate::migrate(&self.config.url).boxed()
    }

    fn check<'a>(&'a self, request: CheckRequest<'a>) -> BoxFuture<'a, Vec<Check>> {
        check::check(&self.config.url, request).boxed()
    }

    fn emit(&self, event: NewEvent) -> BoxFuture<'_, Result<Uuid, Unemitted>> {
        emit::emit(&self.config.url, event).boxed()
    }

    fn mend(&self) -> BoxFuture<'_, Result<Box<dyn Mend>, OutboxError>> {
        async { Ok(Box::new(SqliteMend::open(&self.config.url).await?) as Box<dyn Mend>) }.boxed()
    }

    fn audit<'a>(&'a self, _: &'a str, _: &'a mut Audit) -> BoxFuture<'a, Result<EntryId, OutboxError>> {
        ready(self.require(Feature::Audit).map(|()| EntryId(0, 0))).boxed()
    }

    fn maintain(&self) -> BoxFuture<'_, Result<(), OutboxError>> {
        async {
            if !self.owns()? {
                return Ok(()); // the relay that works does it
            }
            let mut connection = self.connect().await?;
            let (log, history) = (self.config.log_retention, self.config.history_retention);
            retention::forget(&mut connection, "event_processing_log", "processed_at", log).await?;
            retention::forget(&mut connection, "event_history", "published_at", history).await
        }
        .boxed()
    }

    fn past(&self) -> BoxFuture<'_, Result<Box<dyn Past>, OutboxError>> {
        async { Ok(Box::new(SqlitePast::open(&self.config.url).await?) as Box<dyn Past>) }.boxed()
    }

    fn holders(&self) -> BoxFuture<'_, Result<Vec<String>, OutboxError>> {
        ready(self.holder().map(|holder| holder.into_iter().collect())).boxed()
    }

    fn sample<'a>(&'a self, destinations: &'a [String]) -> BoxFuture<'a, Result<Sampling, OutboxError>> {
        async {
            if !self.owns()? {
                return Ok(Sampling::ByAnother);
            }
            let mut connection = self.connect().await?;
            run_query("sample the figures of the outbox", sample::take(&mut connection, destinations))
                .await
                .map(Sampling::Taken)
        }
        .boxed()
    }

    fn standstills<'a>(&'a self, destinations: &'a [String]) -> BoxFuture<'a, Result<Vec<Standstill>, OutboxError>> {
        async {
            let mut connection = self.connect().await?;
            let owner = if self.owns()? { None } else { self.holder()? };
            let (publish_timeout, memory) = (self.config.publish_timeout, &self.memory);
            let seen_for = publish_timeout + TAKEN_AFTER;
            let question = Question { destinations, publish_timeout, memory, owner, seen_for };
            run_query("look for what stands still", standstill::find(&mut connection, &question)).await
        }
        .boxed()
    }

    fn status(&self, request: StatusRequest) -> BoxFuture<'_, Result<Status, OutboxError>> {
        self.read_status(request).boxed()
    }

    fn add_tally<'a>(&'a self, counts: &'a [TallyCount]) -> BoxFuture<'a, Result<(), OutboxError>> {
        self.write_tally(counts).boxed()
    }

    fn note_trouble<'a>(&'a self, found: &'a [Found]) -> BoxFuture<'a, Result<(), OutboxError>> {
        self.write_trouble(found).boxed()
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

    fn claims_ended(&self, _: Duration) -> BoxFuture<'_, Result<bool, OutboxError>> {
        ready(Ok(true)).boxed() // a claim leaves no trace in the file
    }
}

impl SqliteOutbox {
    /// Returns the relay that works on the file, as text for people.
    pub(super) fn holder(&self) -> Result<Option<String>, OutboxError> {
        owner::holder(&self.path()?)
    }
}
