//! Events that can be neither settled nor parked, for example because a foreign key refers to a column that parking changes.
//!
//! What became of such an event is written into its row, if the database takes that: the row stays among the pending ones, due
//! at no time, and claims leave it out. If even that is refused, this relay remembers the event, and from time to time tries
//! whether it can be settled. All other events go on, except later ones of the key of an event that is still owed.
//!
//! Claims would read such a row again and again, so they begin behind it, for a second at a time: a row with a lower id may be
//! committed late.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::Row;
use sqlx::postgres::PgConnection;

use crate::event::{Event, RowKey};
use crate::outbox::Claimed;
use crate::outbox::partitions::PENDING;
use crate::outbox::postgres::batch::{Batch, Key, Marked, key};
use crate::outbox::postgres::question::Question;
use crate::outbox::standstill::{self, First, Standstill};

/// How long claims begin behind the rows that are left out.
const PASSED_FOR: Duration = Duration::from_secs(1);

/// How often a remembered event is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// The most events that are remembered. The next run publishes each of them again, so at this number the relay publishes
/// nothing more.
const MOST_REMEMBERED: usize = 10;

/// Writes what became of an event into its row, which keeps its place. `$1` place, `$2` id, `$3` what became of it.
pub(super) const MARK: &str = "
update {schema}.event_outbox set last_error = $3, available_at = 'infinity'
where ctid = $1::text::tid and id = $2 and status = 'pending'
returning last_error = $3 and available_at = 'infinity'";

/// Finds the marked rows. They are at the left of their partitions, because all rows before them are done.
const KEPT: &str = "
select o.id, o.destination, o.last_error as error
from unnest($1::smallint[], $2::bigint[]) b(partition, bound)
cross join lateral (
    select e.id, e.destination, e.last_error, e.available_at from {schema}.event_outbox e
    where e.partition = b.partition and e.id > b.bound
    order by e.partition, e.id limit 10
) o
where o.available_at = 'infinity' and pg_catalog.starts_with(o.last_error, 'settle_failed: ')
order by o.id";

/// An event that could neither be settled nor parked.
#[derive(Debug, Clone)]
pub(super) struct Survivor {
    pub(super) event: Event,
    /// The event was to be tried again, and not to leave the outbox.
    pub(super) still_owed: bool,
}

/// What the lanes of a relay know of events that are left out.
#[derive(Debug, Clone, Default)]
pub(super) struct LeftOut {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// Each with the reason why it cannot be settled.
    remembered: Vec<(Survivor, String)>,
    tried: Option<Instant>,
    /// By partition: up to this id there are only rows that are left out.
    passed: BTreeMap<i16, i64>,
    since: Option<Instant>,
    /// By partition: the keys that are held back, and the id after which each is.
    keys: HashMap<i16, HashMap<Key, i64>>,
}

impl LeftOut {
    /// Returns the ids behind which claims begin.
    pub(super) fn passed(&self) -> BTreeMap<i16, i64> {
        let mut state = self.state();
        if state.since.is_some_and(|since| since.elapsed() >= PASSED_FOR) {
            state.passed.clear();
            state.since = None;
        }
        state.passed.clone()
    }

    /// Returns whether any event is left out.
    pub(super) fn is_any(&self) -> bool {
        let state = self.state();
        !state.passed.is_empty() || !state.remembered.is_empty()
    }

    /// Remembers an event that cannot be marked. Returns false if there are too many.
    pub(super) fn remember(&self, survivor: Survivor, reason: String) -> bool {
        let mut state = self.state();
        state.tried = Some(Instant::now());
        let fits = state.remembered.len() < MOST_REMEMBERED;
        if fits {
            state.remembered.push((survivor, reason));
        }
        fits
    }

    /// Returns all remembered events if there is no room for more: they must be settled before anything is published.
    pub(super) fn too_many(&self) -> Vec<Survivor> {
        let all = self.remembered();
        if all.len() < MOST_REMEMBERED { Vec::new() } else { all }
    }

    fn remembered(&self) -> Vec<Survivor> {
        self.state().remembered.iter().map(|(survivor, _)| survivor.clone()).collect()
    }

    /// Returns the events to try again now. The caller must try them.
    pub(super) fn to_try(&self) -> Vec<Survivor> {
        let mut state = self.state();
        if state.remembered.is_empty() || state.tried.is_some_and(|tried| tried.elapsed() < TRY_AGAIN) {
            return Vec::new();
        }
        state.tried = Some(Instant::now());
        drop(state);
        self.remembered()
    }

    /// Forgets an event that can be settled now, so that it is published.
    pub(super) fn forget(&self, survivor: &Survivor) {
        self.state().remembered.retain(|(other, _)| !is_same(&other.event.row, &survivor.event.row));
    }

    /// Removes the events that are left out from a batch, which is sorted and was read behind `passed`. Returns their
    /// partitions.
    pub(super) fn leave_out(&self, batch: &mut Batch, passed: &BTreeMap<i16, i64>) -> BTreeSet<i16> {
        let mut state = self.state();
        let mut out: Vec<(i16, i64)> = Vec::new();
        if batch.marked.is_empty() && state.remembered.is_empty() && state.keys.is_empty() {
            return BTreeSet::new();
        }
        let State { remembered, keys, .. } = &mut *state;
        keys.retain(|partition, _| passed.contains_key(partition) || !batch.given.contains_key(partition));
        let mut hold = |row: &RowKey, key: Key| {
            let from = keys.entry(row.partition).or_default().entry(key).or_insert(row.id);
            *from = (*from).min(row.id);
        };
        for Marked { row, holds } in batch.marked.drain(..) {
            out.push((row.partition, row.id));
            holds.into_iter().for_each(|key| hold(&row, key));
        }
        for (Survivor { event, still_owed }, _) in remembered.iter() {
            key(event).filter(|_| *still_owed).into_iter().for_each(|key| hold(&event.row, key));
        }
        batch.claimed.retain(|Claimed { event, .. }| {
            let RowKey { partition, id, .. } = event.row;
            let is_remembered = remembered.iter().any(|(survivor, _)| is_same(&survivor.event.row, &event.row));
            let is_behind = || {
                let held = keys.get(&partition).zip(key(event));
                held.is_some_and(|(held, key)| held.get(&key).is_some_and(|from| *from < id))
            };
            let stays = !is_remembered && !is_behind();
            if !stays {
                out.push((partition, id));
            }
            stays
        });
        for &(partition, id) in &out {
            let first = batch.claimed.iter().find(|claimed| claimed.event.row.partition == partition);
            if first.is_none_or(|first| id < first.event.row.id) {
                let passed = state.passed.entry(partition).or_insert(id);
                *passed = (*passed).max(id);
                state.since.get_or_insert_with(Instant::now);
            }
        }
        out.into_iter().map(|(partition, _)| partition).collect()
    }

    /// Returns the remembered events as a standstill, for people.
    pub(super) fn told(&self) -> Option<Standstill> {
        let state = self.state();
        let (first, error) = state.remembered.first()?;
        let RowKey { id, destination, .. } = first.event.row.clone();
        let first = First { id, destination, error: error.clone() };
        Some(standstill::remembered(state.remembered.len(), &first))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Finds the events that are marked in their rows.
pub(super) async fn find(
    connection: &mut PgConnection,
    question: &Question<'_>,
) -> Result<Vec<Standstill>, sqlx::Error> {
    let partitions: Vec<i16> = (0..PENDING).collect();
    let rows = question.sql.query(KEPT).bind(partitions).bind(&question.bounds).fetch_all(connection).await?;
    let Some(row) = rows.first() else { return Ok(Vec::new()) };
    let first =
        First { id: row.try_get("id")?, destination: row.try_get("destination")?, error: row.try_get("error")? };
    Ok(vec![standstill::kept(rows.len(), &first)])
}

/// Returns whether both are the same row, whatever its place is by now.
fn is_same(one: &RowKey, other: &RowKey) -> bool {
    (one.partition, one.id, &one.destination) == (other.partition, other.id, &other.destination)
}
