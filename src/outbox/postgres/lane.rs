//! Claim and settle: how a lane works with the database.
//!
//! A claim is an open transaction that holds one advisory lock per partition it took, and nothing else: no row lock, no
//! transaction id, and between statements no snapshot. So a slow publish delays neither producers nor vacuum. When a lane's
//! connection ends, the server frees its partitions at once: there is no lease that must run out.

mod superseded;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor};

use crate::event::{ClaimId, RenewedClaim, SentBefore};
use crate::failpoint::failpoint;
use crate::outbox::number::milliseconds;
use crate::outbox::partitions::PENDING;
use crate::outbox::postgres::batch::{self, Batch, PartitionRead, Which};
use crate::outbox::postgres::bounds::{BoundsSnapshot, ReadExtent};
use crate::outbox::postgres::connection::{STATEMENT_TIMEOUT, query_failed, with_timeout};
use crate::outbox::postgres::flush::flushed;
use crate::outbox::postgres::formats;
use crate::outbox::postgres::promote;
use crate::outbox::postgres::refusal::{is_content, words_and_cure};
use crate::outbox::postgres::renew;
use crate::outbox::postgres::savepoint::{CHECK_AND_COMMIT, SAVEPOINT};
use crate::outbox::postgres::session::begin;
use crate::outbox::postgres::settle::SettleWriter;
use crate::outbox::postgres::sql::Sql;
use crate::outbox::postgres::store::PgOutbox;
use crate::outbox::postgres::take::{self, HAS_OWED, IS_PENDING_UP_TO, LAST_ID, Peeked, Ranges};
use crate::outbox::records::Records;
use crate::outbox::register::Role;
use crate::outbox::{Claim, ClaimRequest, Deliveries, Lane, NO_DESTINATION, OutboxError, Peek, Promoted};

/// The largest batch that can be configured.
const MAX_ROWS: usize = 10_000;

/// A take without bounds walks over dead rows. Where these are few, it is cheaper than a take that begins at each bound. After
/// a take without bounds that lasts longer than this, there is none for a hundred times as long.
const SHORT_WALK: Duration = Duration::from_millis(1);

/// Where all partitions are deep, a batch takes rows of this many. The fewer partitions a batch has, the more rows it deletes
/// of each page of the table, on which rows of many partitions lie.
const DEEP_PARTITIONS: i16 = 4;

/// If a claim takes longer, the next one asks for fewer events.
const LONG_CLAIM: Duration = Duration::from_secs(3);

/// If a claim times out, the next one asks for this many times fewer events.
const FEWER_AFTER_TIMEOUT: usize = 10;

/// A lane of a PostgreSQL outbox.
pub struct PgLane {
    outbox: PgOutbox,
    connection: Option<PgConnection>,
    begin: String,
    /// How many partitions to take at once. A full batch halves the number, down to a few; a short batch doubles it. So a quiet
    /// system needs one transaction for everything, and a deep backlog has as many in parallel as there are lanes.
    partitions: i16,
    /// The partition that was taken last. The next take begins after it.
    last_taken: i16,
    /// How many rows to read at most. A batch that reaches its limit of bytes lowers this, so that large payloads are not
    /// measured in vain.
    rows: usize,
    /// The last batch had a payload that is not small.
    large: bool,
    /// The time from which on a take may go without bounds again.
    next_walk: Instant,
    /// What the present claim has read. Its settle derives bounds from this.
    read_extent: Option<ReadExtent>,
    /// The number of changes of the register of relays at the last claim.
    changes: i64,
    /// A settle failed, and nothing was written since.
    unproven: bool,
}

impl PgLane {
    pub(super) fn new(outbox: PgOutbox) -> Self {
        let begin = begin(&outbox.config);
        Self {
            outbox,
            connection: None,
            begin,
            partitions: PENDING,
            last_taken: fastrand::i16(0..PENDING),
            rows: MAX_ROWS,
            large: false,
            next_walk: Instant::now(),
            read_extent: None,
            changes: 0,
            unproven: false,
        }
    }

    /// Returns the connection. If it was in doubt whether writes work, that has been proven.
    async fn ready(&mut self) -> Result<PgConnection, OutboxError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                // This may be another server, whose ids start lower.
                self.outbox.bounds.forget();
                let mut connection = self.outbox.connect().await?;
                with_timeout("name the relay of a lane", STATEMENT_TIMEOUT, self.outbox.name_lane(&mut connection))
                    .await?;
                connection
            }
        };
        if self.unproven || self.outbox.refused_writes.is_set() {
            self.outbox.prove(&mut connection, &self.begin).await?;
            self.unproven = false;
        }
        self.outbox.try_kept(&mut connection, &self.begin).await?;
        Ok(connection)
    }

    /// Runs one query.
    async fn ask<T>(
        &mut self,
        operation: &'static str,
        query: impl AsyncFnOnce(Sql, &mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, OutboxError> {
        let mut connection = self.ready().await?;
        let answer = with_timeout(operation, STATEMENT_TIMEOUT, async {
            self.outbox.begin_pooled(&mut connection).await?;
            let answer = query(self.outbox.sql(), &mut connection).await?;
            self.outbox.commit_pooled(&mut connection).await?;
            Ok(answer)
        })
        .await?;
        self.connection = Some(connection);
        Ok(answer)
    }

    async fn try_claim(
        &mut self,
        connection: &mut PgConnection,
        request: ClaimRequest<'_>,
    ) -> Result<Claim, sqlx::Error> {
        loop {
            if let Some(claim) = self.claim_once(connection, request).await? {
                return Ok(claim);
            }
        }
    }

    /// Returns `None` if all events that were found were set aside or left out: then the claim must be tried again.
    async fn claim_once(
        &mut self,
        connection: &mut PgConnection,
        request: ClaimRequest<'_>,
    ) -> Result<Option<Claim>, sqlx::Error> {
        let sql = self.outbox.sql();
        connection.execute(AssertSqlSafe(self.begin.clone())).await?;
        let limit = self.rows.min(request.max_events);
        let most = i16::try_from(limit).unwrap_or(PENDING).min(self.partitions);
        let kept = &self.outbox.refused_writes.left_out.clone();
        let passed = kept.passed();
        let (taken, mut known) = self.take(connection, most, &passed).await?;
        let Some(&last) = taken.last() else {
            let (pending, drawn) = take::any(connection, sql, Ranges::all(&known.bounds)).await?;
            connection.execute("commit").await?;
            if self.outbox.bounds.drew(&drawn) || pending {
                return Ok(Some(Claim::Busy));
            }
            if passed.is_empty() {
                self.outbox.bounds.empty(&known);
            }
            return Ok(Some(Claim::Empty));
        };
        self.last_taken = last;
        // Each partition gives the same share, so a batch is full as soon as one of them has more to give.
        let share = limit / taken.len();
        let limits = (limit, share);
        let bounds = known.bounds_of(&taken);
        let begun = Instant::now();
        let which = Which::All { among_dead: self.outbox.walks.are_long() };
        let mut batch =
            batch::read(connection, sql, &mut self.large, (&taken, &bounds), limits, request, which).await?;
        if let Some(reinsertions) = batch.reinsertions
            && reinsertions != known.reinsertions
        {
            // Since then an event was put back, maybe below a bound.
            known = self.outbox.bounds.at(reinsertions);
            let bounds = vec![i64::MIN; taken.len()];
            batch = batch::read(connection, sql, &mut self.large, (&taken, &bounds), limits, request, which).await?;
        }
        self.changes = batch.changes;
        batch.sort();
        let left_out = kept.leave_out(&mut batch, &passed);
        let Batch { claimed, given, bytes, cut, epoch, last: last_read, .. } = batch;
        if formats::set_aside(connection, sql, &claimed).await? || claimed.is_empty() && !left_out.is_empty() {
            connection.execute("commit").await?;
            return Ok(None);
        }
        let out_of_bytes = bytes >= request.max_bytes;
        let full = out_of_bytes || given.values().any(|given| given.events == share);
        let count = i16::try_from(taken.len()).unwrap_or(PENDING);
        // Where only some partitions are deep, the others use little of their shares, so a batch of several would be small.
        let deep = given.values().filter(|given| given.events == share).count() == taken.len();
        let least = if deep { DEEP_PARTITIONS } else { 1 };
        self.partitions = if full { (count / 2).max(least) } else { self.partitions * 2 }.min(PENDING);
        self.rows = match begun.elapsed() {
            // Whatever took so long, the next claim asks for half as much of it.
            took if took > LONG_CLAIM && !claimed.is_empty() => limit.min(claimed.len()) / 2,
            _ if out_of_bytes => claimed.len() * request.max_bytes / bytes.max(1),
            _ => self.rows * 2,
        }
        .clamp(1, MAX_ROWS);
        let Some(epoch) = epoch else {
            connection.execute("commit").await?;
            return Ok(Some(Claim::Busy)); // the last owner settled between our two statements
        };
        if let Some(last) = last_read
            && cut
        {
            self.last_taken = last; // the partitions after it gave nothing
        }
        // Nothing is known of a partition that lies beyond the limit of bytes. A partition in which events are left out is not
        // empty.
        let stays = |partition: &i16| left_out.contains(partition) || passed.contains_key(partition);
        let read = taken.iter().filter(|partition| (!cut || given.contains_key(partition)) && !stays(partition));
        let reached = read.map(|&partition| {
            let more = |given: &&PartitionRead| cut || given.events == share;
            (partition, given.get(&partition).filter(more).map(|given| given.last_id))
        });
        self.read_extent = Some(known.read_extent(reached, claimed.len()));
        let claim_id = ClaimId { outbox: self.outbox.id(connection).await?, epoch, token: fastrand::u64(..) };
        Ok(Some(Claim::Batch { claimed, full, claim_id }))
    }

    /// Searches for rows that the bounds hide, if such a search is due.
    async fn search(&self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        let bounds = &self.outbox.bounds;
        if let Some(searched) = bounds.to_search() {
            let begun = Instant::now();
            let found = take::hidden(connection, self.outbox.sql(), &searched).await?;
            bounds.searched(&found, found.len() == searched.len(), begun.elapsed());
        }
        Ok(())
    }

    /// Takes at most `most` partitions. Also returns the bounds by which to read them.
    async fn take(
        &mut self,
        connection: &mut PgConnection,
        most: i16,
        passed: &BTreeMap<i16, i64>,
    ) -> Result<(Vec<i16>, BoundsSnapshot), sqlx::Error> {
        self.search(connection).await?;
        let (sql, bounds) = (self.outbox.sql(), &self.outbox.bounds);
        let (mut known, ask) = bounds.known();
        if ask {
            let (reinsertions, writers) = take::writers(connection, sql).await?;
            known = bounds.wrote(reinsertions, writers);
        }
        loop {
            known = known.behind(passed);
            let begun = Instant::now();
            let walk = self.next_walk <= begun;
            let ranges = Ranges::after(self.last_taken, if walk { passed } else { &known.bounds });
            let (taken, reinsertions) = take::take(connection, sql, ranges, most).await?;
            if walk && begun.elapsed() > SHORT_WALK {
                self.next_walk = begun + 100 * begun.elapsed();
            }
            let moved = known.reinsertions != reinsertions;
            if moved {
                known = bounds.at(reinsertions);
            }
            // A row that was moved may lie below a bound that held until now.
            if !moved || !taken.is_empty() {
                return Ok((taken, known.behind(passed)));
            }
        }
    }

    /// Writes all records and commits. After an error nothing is written; if `wary`, the claim survives the error.
    async fn try_settle(
        &mut self,
        connection: &mut PgConnection,
        deliveries: &Deliveries<'_>,
        wary: bool,
    ) -> Result<(), sqlx::Error> {
        let config = &self.outbox.config;
        let records = Records::new(deliveries.by_event(), config.usage.history);
        let mut commit = "commit";
        if !records.is_empty() && wary {
            connection.execute(SAVEPOINT).await?;
            commit = CHECK_AND_COMMIT;
        }
        let settled = SettleWriter::new(connection, self.outbox.sql(), &config.worker).write(&records).await?;
        if settled != records.rows() {
            tracing::warn!(
                expected = records.rows(),
                gone = settled,
                "someone else deleted rows of event_outbox while they were being published"
            );
        }
        failpoint("before_commit").map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
        connection.execute(commit).await?;
        self.outbox.bounds.settled(self.read_extent.take(), settled);
        failpoint("committed").map_err(|error| sqlx::Error::Decode(Box::new(error)))
    }
}

impl Lane for PgLane {
    async fn claim(&mut self, request: ClaimRequest<'_>) -> Result<Claim, OutboxError> {
        if self.outbox.refused_writes.is_salvaging() {
            return Ok(Claim::Busy);
        }
        if self.outbox.membership.role() != Role::Routes
            && let Some(claim) = self.claim_left(request).await?
        {
            return Ok(claim);
        }
        let (mut connection, mut claim) = loop {
            let mut connection = self.ready().await?;
            let rows = self.rows.min(request.max_events);
            match with_timeout("claim events", STATEMENT_TIMEOUT, self.try_claim(&mut connection, request)).await {
                // The same claim would fail again: some events are too large, or their text is too long.
                Err(error) if rows > 1 && error.is_timeout() => {
                    self.rows = (rows / FEWER_AFTER_TIMEOUT).max(1);
                    tracing::warn!(
                        rows,
                        next = self.rows,
                        "reading events took too long; the next claim asks for fewer"
                    );
                }
                claim => break (connection, claim?),
            }
        };
        failpoint("claimed")?;
        if matches!(claim, Claim::Batch { .. })
            && (self.outbox.refused_writes.is_salvaging() || self.outbox.refused_writes.is_set())
        {
            // Another lane may have published these events. It lost their claim to a refused settle, and is about to take them
            // again.
            self.read_extent = None;
            with_timeout("give a claim up", STATEMENT_TIMEOUT, connection.execute("commit")).await?;
            self.connection = Some(connection);
            return Ok(Claim::Busy);
        }
        if matches!(claim, Claim::Batch { .. }) && self.outbox.role_at(self.changes).await? != Role::Routes {
            with_timeout("give a claim up", STATEMENT_TIMEOUT, connection.execute("commit")).await?;
            (self.read_extent, claim) = (None, Claim::Superseded);
        }
        if self.outbox.config.ghost_barrier
            && matches!(claim, Claim::Batch { .. })
            && !with_timeout("ask whether commits are flushed", STATEMENT_TIMEOUT, flushed(&mut connection)).await?
        {
            self.outbox.flush().await?;
        }
        self.connection = Some(connection);
        Ok(claim)
    }

    async fn renew(
        &mut self,
        floor: i64,
        noted: &[SentBefore],
        destination: &str,
    ) -> Result<RenewedClaim, OutboxError> {
        let lost = || query_failed("renew the claim", sqlx::Error::WorkerCrashed);
        // Only the claim's own connection can renew it: if the claim is lost, so is this transaction. It is put back only if it
        // answers.
        let mut connection = self.connection.take().ok_or_else(lost)?;
        let renewed = renew::renew(&mut connection, self.outbox.sql(), floor, noted, destination);
        let renewed = with_timeout("renew the claim", STATEMENT_TIMEOUT, renewed).await?;
        self.connection = Some(connection);
        Ok(renewed)
    }

    async fn settle(&mut self, deliveries: &Deliveries<'_>) -> Result<(), OutboxError> {
        self.unproven = true;
        failpoint("before_settle")?;
        let lost = || query_failed("settle", sqlx::Error::WorkerCrashed);
        let mut connection = self.connection.take().ok_or_else(lost)?;
        let wary = self.outbox.refused_writes.is_wary();
        let settle = self.try_settle(&mut connection, deliveries, wary);
        let settled = tokio::time::timeout(2 * STATEMENT_TIMEOUT, settle).await;
        match settled {
            Err(_) => return Err(OutboxError::TimedOut { operation: "settle", after: 2 * STATEMENT_TIMEOUT }),
            Ok(Ok(())) => {}
            Ok(Err(error)) if is_content(&error) => {
                self.read_extent = None;
                let _salvaging = self.outbox.refused_writes.salvaging();
                self.outbox.salvage(&mut connection, &self.begin, wary, deliveries, error).await?;
            }
            Ok(Err(error)) => return Err(query_failed("settle", error)),
        }
        self.unproven = false;
        self.connection = Some(connection);
        Ok(())
    }

    async fn promote(&mut self, destinations: &[&str], max_events: usize) -> Result<Promoted, OutboxError> {
        if self.outbox.membership.role() != Role::Routes {
            self.outbox.membership.set_ready(destinations);
            return Ok(Promoted { count: 0, next_due: None }); // see `claim_left`
        }
        let mut connection = self.ready().await?;
        let destinations: Vec<&str> = std::iter::once(NO_DESTINATION).chain(destinations.iter().copied()).collect();
        let (sql, walks) = (self.outbox.sql(), &self.outbox.walks);
        let promotion = with_timeout("promote scheduled events", STATEMENT_TIMEOUT, async {
            // The relay's settings decide its plan: by the statistics of a deep backlog it would read all of that to find a few
            // due rows.
            connection.execute(AssertSqlSafe(self.begin.clone())).await?;
            let promotion = promote::promote(&mut connection, sql, walks, &destinations, max_events).await?;
            connection.execute("commit").await?;
            Ok(promotion)
        })
        .await;
        let promotion = match promotion {
            Err(OutboxError::Query { source, .. }) if is_content(&source) => {
                with_timeout("end a promotion", STATEMENT_TIMEOUT, connection.execute("rollback")).await?;
                self.outbox.prove(&mut connection, &self.begin).await?;
                with_timeout("promote scheduled events", STATEMENT_TIMEOUT, async {
                    connection.execute(AssertSqlSafe(self.begin.clone())).await?;
                    let reason = words_and_cure(&source);
                    let promotion = promote::promote_each(&mut connection, sql, &destinations, &reason).await?;
                    connection.execute("commit").await?;
                    Ok(promotion)
                })
                .await?
            }
            promotion => promotion?,
        };
        if promotion.swallowed > 0 {
            // Something in the database swallows updates: of all rows, which stops the relay, or of some.
            self.outbox.prove(&mut connection, &self.begin).await?;
            self.outbox.refused_writes.warn_of_promotions(promotion.swallowed);
        }
        if let Some(changes) = promotion.changes {
            self.outbox.role_at(changes).await?;
        }
        self.connection = Some(connection);
        Ok(Promoted { count: promotion.promoted, next_due: promotion.next_due_ms.map(milliseconds) })
    }

    async fn peek(&mut self, destinations: &[&str]) -> Result<Peek, OutboxError> {
        let mut connection = self.ready().await?;
        let destinations: Vec<&str> = std::iter::once(NO_DESTINATION).chain(destinations.iter().copied()).collect();
        let passed = self.outbox.refused_writes.left_out.passed();
        let (known, Peeked { mut pending, next_due_ms, reinsertions, drawn }) =
            with_timeout("ask whether there are events", STATEMENT_TIMEOUT, async {
                self.outbox.begin_pooled(&mut connection).await?;
                self.search(&mut connection).await?;
                let known = self.outbox.bounds.known().0.behind(&passed);
                let ranges = Ranges::all(&known.bounds);
                let found = take::peek(&mut connection, self.outbox.sql(), ranges, &destinations).await?;
                self.outbox.commit_pooled(&mut connection).await?;
                Ok((known, found))
            })
            .await?;
        if self.outbox.bounds.drew(&drawn) || known.reinsertions != reinsertions {
            // There may be events below a bound that held until now. The next claim finds them.
            self.outbox.bounds.at(reinsertions);
            pending = true;
        } else if !pending && passed.is_empty() {
            self.outbox.bounds.empty(&known);
        }
        self.connection = Some(connection);
        Ok(Peek { pending, next_due: next_due_ms.map(milliseconds) })
    }

    async fn has_owed(&mut self) -> Result<bool, OutboxError> {
        let owed =
            async |sql: Sql, connection: &mut PgConnection| sql.query_scalar(HAS_OWED).fetch_one(connection).await;
        let owed: bool = self.ask("look for events still owed", owed).await?;
        Ok(owed || self.outbox.refused_writes.left_out.is_any())
    }

    async fn last_id(&mut self) -> Result<Option<i64>, OutboxError> {
        self.ask("look for the last event", async |sql, connection| {
            sql.query_scalar(LAST_ID).fetch_one(connection).await
        })
        .await
    }

    async fn is_pending_up_to(&mut self, id: i64) -> Result<bool, OutboxError> {
        self.ask("look whether others are done", async |sql, connection| {
            sql.query_scalar(IS_PENDING_UP_TO).bind(id).fetch_one(connection).await
        })
        .await
    }
}
