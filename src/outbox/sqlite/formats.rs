//! Finds events of a format that this relay does not know. The schema keeps them, and the events behind them, out of claims.
//! See `migrations/sqlite/0011_format.sql`.

use sqlx::sqlite::SqliteConnection;

use crate::outbox::{Standstill, standstill};

/// Reads how many such events there are, their formats, how many events wait behind them, and since when.
const COUNT: &str = "
select count(*) filter (where format <> 0), group_concat(distinct case when format <> 0 then format end),
       count(*) filter (where format = 0), min(created_at)
from event_outbox
where status = 'scheduled' and available_at = '9999-12-31 23:59:59'
  and destination in (select distinct destination from event_outbox where format <> 0)
  and (format <> 0 or last_error glob 'format_unknown: behind *')";

/// Returns the standstill about such events, if there are any.
pub(super) async fn unknown(connection: &mut SqliteConnection) -> Result<Vec<Standstill>, sqlx::Error> {
    let (events, formats, behind, since): (i64, Option<String>, i64, Option<String>) =
        sqlx::query_as(COUNT).fetch_one(connection).await?;
    let told = || {
        // `group_concat` with `distinct` accepts no separator.
        let (formats, since) = (formats.unwrap_or_default().replace(',', ", "), since.unwrap_or_default());
        standstill::unknown_formats(events, &formats, behind, &since)
    };
    Ok((events > 0).then(told).into_iter().collect())
}
