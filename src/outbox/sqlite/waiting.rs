//! Events that wait, as operators change them: a few keys in each transaction.

use std::collections::{BTreeMap, HashMap};

use serde_json::json;
use sqlx::AssertSqlSafe;
use sqlx::sqlite::SqliteConnection;

use crate::outbox::error::OutboxError;
use crate::outbox::mend::{CommandId, Filter, Waiting, WaitingAction, WaitingBatch, WaitingGroup};
use crate::outbox::sqlite::connection::run_query;
use crate::outbox::sqlite::mend::{SqliteMend, bind, note, operator, without_nulls};

/// About how many events a transaction changes: applications wait for its end.
const MOST: usize = 1000;

/// What an event `e` must fulfil: the parameters are those of `Filter`. What cannot be settled is changed only where it is
/// named by its id or by that error: it may have been delivered.
const CONDITION: &str = "
    (?1 is null or e.event_type glob ?1)
    and (?2 is null or e.aggregate_id = ?2 or e.aggregate_type || ':' || e.aggregate_id = ?2)
    and (?3 is null or e.destination = ?3)
    and (?4 is null or e.last_error = ?4 or substr(e.last_error, 1, length(?4) + 1) = ?4 || ':')
    and (?5 is null or e.created_at >= ?5)
    and (?6 is null or e.created_at < ?6)
    and (?7 is null or e.id in (select value from json_each(?7)))
    and ?8 is null
    and case when ?7 is not null or ?4 is 'settle_failed' then e.destination <> '' or e.last_error is not null
        else e.destination <> '' and (e.last_error is null or e.last_error not glob 'settle_failed: *') end";

/// What is tried again must not be due already. Events of another format are not for this relay.
const NOT_DUE: &str = "
    and (e.status = 'scheduled' or e.available_at >= '9999-12-31')
    and e.available_at > strftime('%Y-%m-%d %H:%M:%f', 'now') and ifnull(e.last_error, '') not glob 'format_unknown: *'";

const WAITING: &str = "
select e.row_id, e.destination, case when instr(e.last_error, ':') > 0 then substr(e.last_error, 1, instr(e.last_error, ':') - 1)
    else ifnull(e.last_error, '') end, e.aggregate_type, e.aggregate_id
from event_outbox e where {condition} order by e.id, e.row_id";

const RETRY: &str = "
update event_outbox as e set available_at = strftime('%Y-%m-%d %H:%M:%f', 'now')
where e.row_id in (select value from json_each(?9)) and {condition}";

/// Events of `?1` are due now, or gone: what waits behind them is due too, in its place.
const BEHIND: &str = "
update event_outbox as f set available_at = strftime('%Y-%m-%d %H:%M:%f', 'now')
where f.status = 'scheduled' and f.destination <> '' and f.last_error is null and f.aggregate_id is not null
  and f.available_at > strftime('%Y-%m-%d %H:%M:%f', 'now')
  and exists (
      select 1 from json_each(?1) k
      where k.value ->> 0 = f.destination and k.value ->> 2 = f.aggregate_id
        and ifnull(k.value ->> 1, '') = coalesce(f.aggregate_type, '') and k.value ->> 3 < f.id
  )";

const KEYS: &str = "
select json_group_array(json_array(destination, aggregate_type, aggregate_id, first)) from (
    select e.destination, e.aggregate_type, e.aggregate_id, min(e.id) as first from event_outbox e
    where e.row_id in (select value from json_each(?9)) and e.aggregate_id is not null and {condition}
    group by e.destination, e.aggregate_type, e.aggregate_id
)";

const GIVE_UP: [&str; 3] = [
    "
insert into event_dead_letter (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
    correlation_id, causation_id, schema_version, priority, format, created_at, destination, attempts, error_code, error,
    first_failed_at, failed_at)
select e.id, e.event_id, e.event_type, e.source, e.aggregate_type, e.aggregate_id, e.payload, e.headers, e.correlation_id,
    e.causation_id, e.schema_version, e.priority, e.format, e.created_at, e.destination, max(e.attempts, 1), 'given_up',
    ?10 || coalesce('; before that: ' || e.last_error, ''),
    coalesce(min(e.first_failed_at, strftime('%Y-%m-%d %H:%M:%f', 'now')), strftime('%Y-%m-%d %H:%M:%f', 'now')),
    strftime('%Y-%m-%d %H:%M:%f', 'now')
from event_outbox e where e.row_id in (select value from json_each(?9)) and {condition} order by e.id",
    "
insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, error, duration_ms, worker)
select e.event_id, e.id, e.event_type, e.destination, 'dead_lettered', max(e.attempts, 1), 'given_up: ' || ?10, 0, ?11
from event_outbox e where e.row_id in (select value from json_each(?9)) and {condition}",
    "
delete from event_outbox where row_id in (
    select e.row_id from event_outbox e where e.row_id in (select value from json_each(?9)) and {condition}
)",
];

/// An event that is owed to both is owed once. What failed at the one begins anew at the other.
const MOVE: [&str; 2] = [
    "
delete from event_outbox where row_id in (
    select e.row_id from event_outbox e
    where e.row_id in (select value from json_each(?9)) and {condition} and exists (
        select 1 from event_outbox o
        where o.partition in (e.partition % 640, e.partition % 640 + 640) and o.id = e.id and o.destination = ?10
    )
)",
    "
update event_outbox as e
set destination = ?10,
    attempts = case when e.first_failed_at is null then e.attempts else 0 end,
    available_at = case when e.first_failed_at is null then e.available_at
        else min(e.available_at, strftime('%Y-%m-%d %H:%M:%f', 'now')) end,
    last_error = case when e.first_failed_at is null then e.last_error end,
    first_failed_at = null
where e.row_id in (select value from json_each(?9)) and {condition}",
];

fn statement(text: &str, action: &WaitingAction) -> String {
    let more = if matches!(action, WaitingAction::Retry) { NOT_DUE } else { "" };
    text.replace("{condition}", &format!("{CONDITION}{more}"))
}

type Row = (i64, String, String, Option<String>, Option<String>);

/// Returns batches in which each key is whole.
pub(super) async fn waiting(
    connection: &mut SqliteConnection,
    action: &WaitingAction,
    filter: &Filter,
) -> Result<Waiting, OutboxError> {
    let query = sqlx::query_as(AssertSqlSafe(statement(WAITING, action))).persistent(false);
    let rows: Vec<Row> = run_query("count the events that wait", bind(query, filter).fetch_all(connection)).await?;
    let mut groups = BTreeMap::<(String, String), u64>::new();
    // The rows of each key, in the order of the first of them.
    let mut keys: Vec<Vec<i64>> = Vec::new();
    let mut places: HashMap<(String, Option<String>, String), usize> = HashMap::new();
    for (row_id, destination, error_code, aggregate_type, aggregate_id) in rows {
        *groups.entry((destination.clone(), error_code)).or_default() += 1;
        let place = aggregate_id.map(|id| *places.entry((destination, aggregate_type, id)).or_insert(keys.len()));
        match place.and_then(|place| keys.get_mut(place)) {
            Some(key) => key.push(row_id),
            None => keys.push(vec![row_id]),
        }
    }
    let mut batches: Vec<WaitingBatch> = Vec::new();
    for key in keys {
        match batches.last_mut() {
            Some(batch) if batch.places.len() < MOST => batch.places.extend(key),
            _ => batches.push(WaitingBatch { places: key, count: 0 }),
        }
    }
    for batch in &mut batches {
        batch.count = batch.places.len() as u64;
    }
    let group = |((destination, error_code), count)| WaitingGroup { destination, error_code, count };
    Ok(Waiting { batches, groups: groups.into_iter().map(group).collect() })
}

/// Changes the events of one batch.
pub(super) async fn apply(
    mend: &mut SqliteMend,
    action: &WaitingAction,
    command: &CommandId,
    batch: &WaitingBatch,
    most: Option<u64>,
) -> Result<u64, OutboxError> {
    let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
    let rows = json!(batch.places[..batch.places.len().min(most)]).to_string();
    let (arguments, details) = match action {
        WaitingAction::Retry => (vec![], json!({})),
        WaitingAction::GiveUp { reason } => {
            let reason = reason.as_deref().map(str::trim).filter(|reason| !reason.is_empty());
            let words = reason.map_or("given up by hand".to_owned(), |reason| format!("given up by hand: {reason}"));
            (vec![words, operator()], json!({"reason": reason}))
        }
        WaitingAction::Move { to, .. } => (vec![to.clone()], json!({"to": to})),
    };
    let statements: &[&str] = match action {
        WaitingAction::Retry => &[RETRY],
        WaitingAction::GiveUp { .. } => &GIVE_UP,
        WaitingAction::Move { .. } => &MOVE,
    };
    mend.transaction(action.name(), async |connection| {
        let keys = sqlx::query_scalar(AssertSqlSafe(statement(KEYS, action))).persistent(false);
        let keys: String = bind(keys, &command.filter).bind(&rows).fetch_one(&mut *connection).await?;
        let mut count = 0;
        for text in statements {
            let mut query =
                bind(sqlx::query(AssertSqlSafe(statement(text, action))).persistent(false), &command.filter);
            query = query.bind(&rows);
            // Each statement has only the parameters that it names.
            for (argument, name) in arguments.iter().zip(["?10", "?11"]) {
                if text.contains(name) {
                    query = query.bind(argument);
                }
            }
            let rows = query.execute(&mut *connection).await?.rows_affected();
            count = if matches!(action, WaitingAction::Move { .. }) { count + rows } else { rows };
        }
        if !matches!(action, WaitingAction::Move { .. }) && count > 0 {
            sqlx::query(BEHIND).bind(keys).execute(&mut *connection).await?;
        }
        note(connection, command, action.name(), without_nulls(details), count).await?;
        Ok(count)
    })
    .await
}
