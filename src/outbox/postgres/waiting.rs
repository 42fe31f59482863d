//! Events that wait, as operators change them: one partition in each transaction, by functions of the schema.

use std::collections::BTreeMap;

use crate::outbox::error::OutboxError;
use crate::outbox::mend::{CommandId, Filter, Waiting, WaitingAction, WaitingBatch, WaitingGroup};
use crate::outbox::postgres::mend::{LONG_TRANSACTION_TIMEOUT, PgMend};

const COUNT: &str = "select in_partition, destination, error, events from {schema}.count_waiting($1, $2::text::jsonb)";

const RETRY: &str = "select {schema}.retry_waiting($1::text::jsonb, $2::integer, $3::bigint, $4::text::uuid)";

const GIVE_UP: &str =
    "select {schema}.give_up_waiting($1::text::jsonb, $5::text, $2::integer, $3::bigint, $4::text::uuid)";

const MOVE: &str =
    "select {schema}.move_waiting($5::text, $6::text, $1::text::jsonb, $2::integer, $3::bigint, $4::text::uuid)";

/// Returns one batch for each partition.
pub(super) async fn waiting(
    mend: &mut PgMend,
    action: &WaitingAction,
    filter: &Filter,
) -> Result<Waiting, OutboxError> {
    let rows: Vec<(i32, String, String, i64)> = mend
        .transaction("count the events that wait", async |connection, sql| {
            let query = sql.query_as(COUNT).bind(action.name()).bind(filter.to_json().to_string());
            query.fetch_all(connection).await
        })
        .await?;
    let (mut partitions, mut groups) = (BTreeMap::<i32, u64>::new(), BTreeMap::<(String, String), u64>::new());
    for (partition, destination, error_code, count) in rows {
        let count = u64::try_from(count).unwrap_or_default();
        *partitions.entry(partition).or_default() += count;
        *groups.entry((destination, error_code)).or_default() += count;
    }
    let batch = |(partition, count): (i32, u64)| WaitingBatch { places: vec![partition.into()], count };
    let group = |((destination, error_code), count)| WaitingGroup { destination, error_code, count };
    Ok(Waiting {
        batches: partitions.into_iter().map(batch).collect(),
        groups: groups.into_iter().map(group).collect(),
    })
}

/// Changes the events of one partition.
pub(super) async fn apply(
    mend: &mut PgMend,
    action: &WaitingAction,
    command: &CommandId,
    batch: &WaitingBatch,
    most: Option<u64>,
) -> Result<u64, OutboxError> {
    let partition = batch.places.first().and_then(|place| i32::try_from(*place).ok());
    let most = most.map(|most| i64::try_from(most).unwrap_or(i64::MAX));
    let (operation, text) = match action {
        WaitingAction::Retry => ("make events due", RETRY),
        WaitingAction::GiveUp { .. } => ("give events up", GIVE_UP),
        WaitingAction::Move { .. } => ("move events", MOVE),
    };
    mend.timed_transaction(operation, LONG_TRANSACTION_TIMEOUT, async |connection, sql| {
        let query = sql.query_scalar(text).bind(command.filter.to_json().to_string());
        let query = query.bind(partition).bind(most).bind(command.id.to_string());
        let query = match action {
            WaitingAction::Retry => query,
            WaitingAction::GiveUp { reason } => query.bind(reason.clone()),
            WaitingAction::Move { from, to } => query.bind(from.clone()).bind(to.clone()),
        };
        let done: i64 = query.fetch_one(connection).await?;
        Ok(u64::try_from(done).unwrap_or_default())
    })
    .await
}
