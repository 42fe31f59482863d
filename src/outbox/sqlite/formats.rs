//! Events of a format that this relay does not know: the schema keeps them, and what is behind them, out of the way of claims.
//! See `migrations/sqlite/0011_format.sql`.

use sqlx::sqlite::SqliteConnection;

use crate::outbox::OutboxError;
use crate::outbox::sqlite::answered;

/// How many there are, of which formats, how many wait behind them, and since when.
const COUNT: &str = "
select count(*) filter (where format <> 0), group_concat(distinct case when format <> 0 then format end),
       count(*) filter (where format = 0), min(created_at)
from event_outbox
where status = 'scheduled' and available_at = '9999-12-31 23:59:59'
  and destination in (select distinct destination from event_outbox where format <> 0)
  and (format <> 0 or last_error glob 'format_unknown: behind *')";

/// What there is of them, in words.
pub(super) async fn look(connection: &mut SqliteConnection) -> Result<Option<String>, OutboxError> {
    let (events, formats, behind, since): (i64, Option<String>, i64, Option<String>) =
        answered("look for events of unknown formats", sqlx::query_as(COUNT).fetch_one(connection)).await?;
    Ok((events > 0).then(|| {
        format!(
            "{events} events of format {} wait, which this relay does not know, and {behind} behind them by their keys; the \
             oldest since {}: start a relay of the version that they were made for, or delete them",
            formats.unwrap_or_default(),
            since.unwrap_or_default()
        )
    }))
}
