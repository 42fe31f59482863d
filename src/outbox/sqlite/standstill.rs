//! Searches for the causes that keep events from moving: one probe for each cause, one statement for each probe.
//!
//! With a write-ahead log, reading never waits; without one, it waits at most for the busy timeout. To add a probe, add a
//! text, a function, and a line in [`PROBES`].

use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use sqlx::sqlite::SqliteConnection;

use crate::outbox::sqlite::question::Question;
use crate::outbox::sqlite::{formats, parked, unconfigured};
use crate::outbox::standstill::{self, Standstill, TAKEN_AFTER};

type Probe =
    for<'a> fn(&'a mut SqliteConnection, &'a Question<'a>) -> BoxFuture<'a, Result<Vec<Standstill>, sqlx::Error>>;

const PROBES: [Probe; 6] = [
    |connection, question| unconfigured::find(connection, question),
    |connection, question| parked::parked(connection, question).boxed(),
    |connection, question| parked::blocked(connection, question).boxed(),
    |connection, _| formats::unknown(connection).boxed(),
    |connection, _| without_priority(connection).boxed(),
    |connection, question| not_taken(connection, question).boxed(),
];

/// Runs all probes. A probe that the database refuses is left out.
pub(super) async fn find(
    connection: &mut SqliteConnection,
    question: &Question<'_>,
) -> Result<Vec<Standstill>, sqlx::Error> {
    let mut found = Vec::new();
    for probe in PROBES {
        match probe(connection, question).await {
            Ok(standstills) => found.extend(standstills),
            Err(sqlx::Error::Database(error)) => {
                tracing::debug!(error = error.message(), "a search for standstills was refused");
            }
            Err(error) => return Err(error),
        }
    }
    question.memory.forget_unseen();
    Ok(found)
}

/// Finds rows that are in no partition, because somebody has allowed NULL in `priority`.
const WITHOUT_PRIORITY: &str = "select count(*), min(id) from event_outbox where partition is null";

async fn without_priority(connection: &mut SqliteConnection) -> Result<Vec<Standstill>, sqlx::Error> {
    let found: (i64, Option<i64>) = sqlx::query_as(WITHOUT_PRIORITY).fetch_one(connection).await?;
    let (count, Some(first)) = found else { return Ok(Vec::new()) };
    let text = format!(
        "{count} events have no priority (NULL) and are not published, the first has id {first}; give them one: update event_outbox \
         set priority = 0 where priority is null;"
    );
    Ok(vec![Standstill::new("priority_missing", text)])
}

/// Reads the event that is to be published next, and for how many seconds it has been due.
const FIRST_EVENT: &str = "
select id, event_type, (julianday('now') - julianday(available_at)) * 86400
from event_outbox where partition < 640 order by partition, id, destination limit 1";

async fn not_taken(connection: &mut SqliteConnection, question: &Question<'_>) -> Result<Vec<Standstill>, sqlx::Error> {
    let first: Option<(i64, String, Option<f64>)> = sqlx::query_as(FIRST_EVENT).fetch_optional(connection).await?;
    let Some((id, event_type, Some(due))) = first else {
        return Ok(Vec::new());
    };
    let (due, patience) =
        (Duration::try_from_secs_f64(due).unwrap_or_default(), question.publish_timeout + TAKEN_AFTER);
    if due < patience || question.memory.seen(&format!("event {id}")) < question.seen_for {
        return Ok(Vec::new());
    }
    let who = question.owner.as_ref().map(|owner| format!("; {owner} must do it")).unwrap_or_default();
    Ok(vec![standstill::not_taken(1, id, &event_type, due, &who)])
}
