//! The rows that a settle writes, as JSON that SQLite's statements unfold.
//!
//! There is one script with one parameter for each table, however many rows there are. So the write lock is held only for the
//! statements, without switches between threads in between. A record takes effect only if its row still exists, so that a
//! settle may be repeated until it succeeds.

use std::sync::LazyLock;

use serde_json::{Value, json};
use sqlx::query::Query;
use sqlx::sqlite::{SqliteArguments, SqliteConnection};
use sqlx::{AssertSqlSafe, Row, Sqlite};

use crate::outbox::Usage;
use crate::outbox::records::{LogEntry, Owed, Records, parked_error, parked_whole_error};

/// Everything that one settle writes, ready to be sent.
#[derive(Debug, Clone)]
pub(super) struct SettleScript {
    dead_letters: List,
    history: List,
    copies: List,
    log: List,
    published: List,
    moved: List,
    gone: List,
    /// The destination and the duration that all entries of `published` have in common.
    destination: String,
    duration_ms: i32,
}

/// JSON, and the number of rows in it.
#[derive(Debug, Clone)]
struct List {
    json: String,
    count: usize,
}

/// Begins as a writer, because a transaction that begins as a reader cannot wait for another transaction to end.
const BEGIN: &str = "begin immediate;";

/// Writes the records of a settle.
///
/// - A row that is still owed to one destination is changed in place. An event parked uncharged is due at once, or behind the
///   head of its key; a delayed one keeps its own time; one without a delay waits until a person acts.
/// - The events that the first destination took, which are nearly all, come as an object of row and message, which unfolds in
///   a third of the time of a list of lists.
/// - A column that is NULL, where somebody has allowed that, keeps no event out of the dead letters.
/// - A trigger may suppress a write. Then a query fails with a text that begins with [`SUPPRESSED`]. This is checked in the
///   script, because separate queries would take as long again. (The text contains `changes()`, because SQLite would
///   otherwise compute it before it compares.)
const RECORD: &str = "
insert into event_dead_letter (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
    correlation_id, causation_id, schema_version, priority, created_at, destination, attempts, error_code, error,
    first_failed_at, failed_at)
select o.id, ifnull(o.event_id, '00000000-0000-0000-0000-000000000000'), ifnull(o.event_type, ''), ifnull(o.source, ''), o.aggregate_type, o.aggregate_id,
    ifnull(o.payload, 'null'), ifnull(o.headers, '{}'), o.correlation_id, o.causation_id, ifnull(o.schema_version, 1),
    ifnull(o.priority, 0), ifnull(o.created_at, strftime('%Y-%m-%d %H:%M:%f', 'now')), e.value ->> 1, e.value ->> 2,
    e.value ->> 3, e.value ->> 4,
    min(coalesce(o.first_failed_at, '9999'), strftime('%Y-%m-%d %H:%M:%f', 'now')), strftime('%Y-%m-%d %H:%M:%f', 'now')
from json_each($1) e cross join event_outbox o on o.row_id = e.value ->> 0;
{insert on event_dead_letter:$1:$11}

insert into event_history (outbox_id, event_id, event_type, source, aggregate_type, aggregate_id, payload, headers,
    correlation_id, causation_id, schema_version, priority, created_at, destination)
select o.id, o.event_id, o.event_type, o.source, o.aggregate_type, o.aggregate_id, o.payload, o.headers,
    o.correlation_id, o.causation_id, o.schema_version, o.priority, o.created_at, e.value ->> 1
from json_each($2) e cross join event_outbox o on o.row_id = e.value ->> 0;
{insert on event_history:$2:$12}

{copies}

insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, message_id, error,
    duration_ms, worker, processed_at)
select ifnull(o.event_id, '00000000-0000-0000-0000-000000000000'), o.id, ifnull(o.event_type, ''), e.value ->> 1, e.value ->> 2, ifnull(o.attempts, 0) + 1,
    e.value ->> 3, e.value ->> 4,
    e.value ->> 5, $8, (select strftime('%Y-%m-%d %H:%M:%f', 'now'))
from json_each($4) e cross join event_outbox o on o.row_id = e.value ->> 0;
{insert on event_processing_log:$4:$14}

insert into event_processing_log (event_id, outbox_id, event_type, destination, status, attempt, message_id, duration_ms,
    worker, processed_at)
select o.event_id, o.id, o.event_type, $9, 'published', o.attempts + 1, e.value, $10, $8,
    (select strftime('%Y-%m-%d %H:%M:%f', 'now'))
from json_each($5) e cross join event_outbox o on o.row_id = cast(e.key as integer);
select 1 where changes() <> $15 and changes() <> (
    select count(*) from json_each($5) e cross join event_outbox o on o.row_id = cast(e.key as integer)
) and json_extract('{}', 'suppressed: insert on event_processing_log;' || changes());

update event_outbox_epoch set epoch = epoch + 1;

update event_outbox as o
set status = 'scheduled', destination = coalesce(e.value ->> 1, o.destination),
    attempts = coalesce(e.value ->> 2, o.attempts), last_error = coalesce(e.value ->> 4, o.last_error),
    available_at = {available_at},
    first_failed_at = {first_failed_at}
from json_each($6) e where o.row_id = e.value ->> 0;
{update on event_outbox:$6:$16}
select changes();

delete from event_outbox where row_id in (select value from json_each($7));
select 1 where changes() <> $17 and exists (select 1 from event_outbox where row_id in (select value from json_each($7)))
    and json_extract('{}', 'suppressed: delete on event_outbox;' || changes());
select changes();
";

const AVAILABLE_AT: &str = "coalesce(max(o.available_at, strftime('%Y-%m-%d %H:%M:%f', 'now', case
        when e.value ->> 3 < 0
        -- Between a half and one and a half of it.
        then (abs(random() % 1000) / 1000.0 + 0.5)
            * max(1, min(300, coalesce((julianday('now') - julianday(o.first_failed_at)) * 86400, 0)))
        else e.value ->> 3
    end || ' seconds')),
        '9999-12-31 23:59:59')";

const FIRST_FAILED_AT: &str = "case when e.value ->> 4 is null then o.first_failed_at
         else coalesce(o.first_failed_at, strftime('%Y-%m-%d %H:%M:%f', 'now')) end";

/// Inserts copies with all columns that exist, including those that the application has added.
const COPIES: &str = "
insert into event_outbox (copy_of, {columns}status, destination, attempts, last_error, available_at, first_failed_at)
select o.id, {values}'scheduled', e.value ->> 1, coalesce(e.value ->> 2, o.attempts),
    coalesce(e.value ->> 4, o.last_error), {available_at}, {first_failed_at}
from json_each($3) e cross join event_outbox o on o.row_id = e.value ->> 0
order by o.id;
{insert on event_outbox:$3:$13}";

/// The beginning of the text with which a query fails that finds a suppressed write.
pub(super) const SUPPRESSED: &str = "suppressed: ";

/// The columns that a copy does not take over from its row.
const OWN_COLUMNS: [&str; 8] =
    ["row_id", "copy_of", "status", "destination", "attempts", "last_error", "available_at", "first_failed_at"];

/// The script without copies, which are rare. It is prepared once.
static SETTLE: LazyLock<String> = LazyLock::new(|| format!("{BEGIN}{}commit", script("")));

fn script(copies: &str) -> String {
    let mut script = RECORD
        .replace("{copies}", copies)
        .replace("{available_at}", AVAILABLE_AT)
        .replace("{first_failed_at}", FIRST_FAILED_AT);
    // Compares the number of rows that were written with the number of rows to write.
    for (what, list, count) in [
        ("insert on event_dead_letter", "$1", "$11"),
        ("insert on event_history", "$2", "$12"),
        ("insert on event_outbox", "$3", "$13"),
        ("insert on event_processing_log", "$4", "$14"),
        ("update on event_outbox", "$6", "$16"),
    ] {
        let check = format!(
            "select 1 where changes() <> {count} and changes() <> (
                select count(*) from json_each({list}) e cross join event_outbox o on o.row_id = e.value ->> 0
            ) and json_extract('{{}}', '{SUPPRESSED}{what};' || changes());"
        );
        script = script.replace(&format!("{{{what}:{list}:{count}}}"), &check);
    }
    script
}

impl SettleScript {
    pub(super) fn new(records: &Records<'_>) -> Self {
        // One call included everything that a destination took, so its entries have these values in common.
        let first = records.log.iter().find(|entry| entry.status == "published");
        let common = first.map_or(("", 0), |first| (first.destination, first.duration_ms));
        let (published, log): (Vec<_>, Vec<_>) = records
            .log
            .iter()
            .partition(|entry| entry.status == "published" && (entry.destination, entry.duration_ms) == common);
        let owed = |owed: &Owed<'_>| {
            json!([owed.event.row.locator, owed.destination, owed.attempts, owed.delay_seconds, owed.error])
        };
        Self {
            dead_letters: list(&records.dead_letters, |dead| {
                json!([dead.event.row.locator, dead.destination, dead.attempts, dead.error.code, dead.error.message])
            }),
            history: list(&records.history, |kept| json!([kept.event.row.locator, kept.destination])),
            copies: list(&records.copies, owed),
            log: list(&log, |e| {
                json!([e.event.row.locator, e.destination, e.status, e.message_id, e.error, e.duration_ms])
            }),
            published: object(&published),
            moved: list(&records.moved, owed),
            gone: list(&records.gone, |event| event.row.locator.into()),
            destination: common.0.to_owned(),
            duration_ms: common.1,
        }
    }

    /// Returns a script that writes each kind of record, each for the next of these rows in turn. It is to be rolled back.
    pub(super) fn proof(rows: &[i64], usage: Usage) -> Self {
        let mut proof = Self::new(&Records::default());
        let every = |place: usize| rows.iter().skip(place).step_by(4).copied();
        let all = || rows.iter().copied();
        proof.destination = "proof".to_owned();
        proof.published = List {
            json: Value::from_iter(every(0).map(|row| (row.to_string(), Value::Null))).to_string(),
            count: every(0).count(),
        };
        if usage.history {
            proof.history = every(0).map(|row| json!([row, "proof"])).collect();
        }
        proof.dead_letters = every(1).map(|row| json!([row, "proof", 1, "proof", "proof"])).collect();
        let entry = |(row, status)| json!([row, "proof", status, Value::Null, "proof", 0]);
        proof.log =
            every(1).map(|row| (row, "dead_lettered")).chain(every(2).map(|row| (row, "failed"))).map(entry).collect();
        proof.gone = every(0).chain(every(1)).map(Value::from).collect();
        proof.moved = every(2).chain(every(3)).map(|row| json!([row, "proof", 1, 0, "proof"])).collect();
        if usage.several_destinations {
            proof.copies = every(3).map(|row| json!([row, "proof 2", 1, 0, "proof"])).collect();
        }
        // With fewer than four rows, the deletes are tried on all of them.
        if rows.len() < 4 {
            proof = Self { gone: all().map(Value::from).collect(), ..Self::new(&Records::default()) };
        }
        proof
    }

    /// Returns whether there is nothing to write.
    pub(super) fn is_empty(&self) -> bool {
        self.rows() == 0
    }

    /// Returns how many rows of the outbox are settled.
    pub(super) fn rows(&self) -> usize {
        self.gone.count + self.moved.count
    }

    /// Writes everything in one transaction. After an error the transaction may be open.
    pub(super) async fn write(&self, connection: &mut SqliteConnection, worker: &str) -> Result<(), sqlx::Error> {
        let settled = if self.copies.count == 0 {
            self.run(connection, sqlx::query(SETTLE.as_str()), worker).await?
        } else {
            let script = format!("{BEGIN}{}commit", self.script(connection).await?);
            self.run(connection, sqlx::query(AssertSqlSafe(script)).persistent(false), worker).await?
        };
        if settled != self.rows() {
            let expected = self.rows();
            tracing::warn!(
                expected,
                settled,
                "someone else deleted rows of event_outbox while they were being published"
            );
        }
        Ok(())
    }

    /// Writes everything within an open transaction.
    pub(super) async fn write_within(
        &self,
        connection: &mut SqliteConnection,
        worker: &str,
    ) -> Result<(), sqlx::Error> {
        let script = self.script(connection).await?;
        self.run(connection, sqlx::query(AssertSqlSafe(script)).persistent(false), worker).await.map(drop)
    }

    /// Runs a script. Returns how many of the rows still existed.
    async fn run(
        &self,
        connection: &mut SqliteConnection,
        query: Query<'_, Sqlite, SqliteArguments>,
        worker: &str,
    ) -> Result<usize, sqlx::Error> {
        let count = |list: &List| i64::try_from(list.count).unwrap_or(i64::MAX);
        let lists =
            [&self.dead_letters, &self.history, &self.copies, &self.log, &self.published, &self.moved, &self.gone];
        let query = lists.iter().fold(query, |query, list| query.bind(list.json.clone()));
        let query = query.bind(worker.to_owned()).bind(self.destination.clone()).bind(self.duration_ms);
        let query = lists.iter().fold(query, |query, list| query.bind(count(list)));
        let answers = query.fetch_all(connection).await?; // to the end: fetching one answer would leave the commit out
        let counts = answers.iter().map(|row| row.try_get::<i64, _>(0)).collect::<Result<Vec<_>, _>>()?;
        Ok(usize::try_from(counts.iter().sum::<i64>()).unwrap_or_default())
    }

    async fn script(&self, connection: &mut SqliteConnection) -> Result<String, sqlx::Error> {
        if self.copies.count == 0 {
            return Ok(script(""));
        }
        // Generated columns cannot be written.
        let columns: Vec<String> =
            sqlx::query_scalar("select name from pragma_table_xinfo('event_outbox') where hidden = 0")
                .persistent(false)
                .fetch_all(connection)
                .await?;
        let taken_over = columns.iter().filter(|name| !OWN_COLUMNS.contains(&name.as_str()));
        let quoted: Vec<String> = taken_over.map(|name| format!("\"{}\"", name.replace('"', "\"\""))).collect();
        let names = quoted.iter().map(|name| format!("{name}, ")).collect::<String>();
        let values = quoted.iter().map(|name| format!("o.{name}, ")).collect::<String>();
        Ok(script(&COPIES.replace("{columns}", &names).replace("{values}", &values)))
    }

    /// Returns the rows of the outbox that the script settles.
    fn row_ids(&self) -> Result<Vec<i64>, sqlx::Error> {
        let moved = self.moved.values()?;
        let gone = self.gone.values()?;
        Ok(moved.iter().map(row_id).chain(gone.iter().map(row_id)).collect())
    }

    /// Splits the script into two halves, by rows.
    pub(super) fn halves(&self) -> Result<[Self; 2], sqlx::Error> {
        let mut rows = self.row_ids()?;
        rows.sort_unstable();
        let (first, second) = rows.split_at(rows.len() / 2);
        Ok([self.part(first)?, self.part(second)?])
    }

    /// Returns the part of the script for these rows.
    fn part(&self, rows: &[i64]) -> Result<Self, sqlx::Error> {
        let of = |list: &List| list.part(rows);
        Ok(Self {
            dead_letters: of(&self.dead_letters)?,
            history: of(&self.history)?,
            copies: of(&self.copies)?,
            log: of(&self.log)?,
            published: of(&self.published)?,
            moved: of(&self.moved)?,
            gone: of(&self.gone)?,
            destination: self.destination.clone(),
            duration_ms: self.duration_ms,
        })
    }

    /// For the script of one row: returns what to write if it cannot be settled because of `reason`, and what to write if
    /// that fails too. See `Records::parked` and `Records::parked_whole`.
    pub(super) fn parked(&self, reason: &str) -> Result<[Self; 2], sqlx::Error> {
        let Some(row) = self.row_ids()?.first().copied() else { return Ok([self.clone(), self.clone()]) };
        let (log, text) = (self.log.values()?, |value: &Value, index: usize| value[index].as_str().map(str::to_owned));
        let done = log.iter().filter(|entry| entry[2] != "failed").map(|entry| {
            let (status, error) = (text(entry, 2).unwrap_or_default(), text(entry, 4));
            (text(entry, 1).unwrap_or_default(), status, error)
        });
        let first = (self.published.count > 0).then(|| (self.destination.clone(), "published".to_owned(), None));
        let done: Vec<(String, String, Option<String>)> = first.into_iter().chain(done).collect();
        let parked = done.iter().map(|(destination, status, error)| {
            json!([row, destination, Value::Null, Value::Null, parked_error(status, error.as_deref(), reason)])
        });
        let mut owed: Vec<Value> = parked.collect();
        for mut value in self.moved.values()?.into_iter().chain(self.copies.values()?) {
            if let Some(error) = text(&value, 4) {
                (value[3], value[4]) = (Value::Null, parked_error("failed", Some(&error), reason).into());
            }
            owed.push(value);
        }
        let copies = owed.split_off(1.min(owed.len()));
        let delivered = done.iter().filter(|(_, status, _)| status == "published");
        let delivered: Vec<&str> = delivered.map(|(destination, ..)| destination.as_str()).collect();
        let still_owed = self.moved.count > 0;
        // A null destination keeps the row's own.
        let whole =
            json!([row, Value::Null, Value::Null, Value::Null, parked_whole_error(&delivered, still_owed, reason)]);
        let only = |moved: Vec<Value>, copies: Vec<Value>| Self {
            moved: List::from_iter(moved),
            copies: List::from_iter(copies),
            ..Self::new(&Records::default())
        };
        Ok([only(owed, copies), only(vec![whole], Vec::new())])
    }
}

impl List {
    fn values(&self) -> Result<Vec<Value>, sqlx::Error> {
        match serde_json::from_str(&self.json).map_err(|error| sqlx::Error::Decode(error.into()))? {
            Value::Array(values) => Ok(values),
            _ => Ok(Vec::new()),
        }
    }

    /// Returns the part of the list for these rows, which are sorted.
    fn part(&self, rows: &[i64]) -> Result<Self, sqlx::Error> {
        let of = |row: i64| rows.binary_search(&row).is_ok();
        Ok(match serde_json::from_str(&self.json).map_err(|error| sqlx::Error::Decode(error.into()))? {
            Value::Object(messages) => {
                let messages = messages.into_iter().filter(|(row, _)| row.parse().is_ok_and(of));
                let messages: serde_json::Map<_, _> = messages.collect();
                Self { count: messages.len(), json: Value::Object(messages).to_string() }
            }
            Value::Array(values) => values.into_iter().filter(|value| of(row_id(value))).collect(),
            _ => self.clone(),
        })
    }
}

impl FromIterator<Value> for List {
    fn from_iter<I: IntoIterator<Item = Value>>(values: I) -> Self {
        let values: Vec<Value> = values.into_iter().collect();
        Self { count: values.len(), json: Value::Array(values).to_string() }
    }
}

/// Returns the row that a value belongs to.
fn row_id(value: &Value) -> i64 {
    value.as_i64().or_else(|| value[0].as_i64()).unwrap_or_default()
}

fn list<T>(records: &[T], row: impl Fn(&T) -> Value) -> List {
    List { json: Value::from_iter(records.iter().map(row)).to_string(), count: records.len() }
}

/// Lists the message of each row.
fn object(entries: &[&LogEntry<'_>]) -> List {
    let message = |entry: &&LogEntry<'_>| (entry.event.row.locator.to_string(), json!(entry.message_id));
    List { json: Value::from_iter(entries.iter().map(message)).to_string(), count: entries.len() }
}
