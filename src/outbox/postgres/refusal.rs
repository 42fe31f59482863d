//! Says why the database refuses a write, and what undoes that, as a statement that can be typed.

use sqlx::error::ErrorKind;
use sqlx::postgres::{PgConnection, PgDatabaseError};

use crate::outbox::postgres::settle::Suppressed;
use crate::outbox::postgres::sql::Sql;
use crate::outbox::quote::quoted;
use crate::text::shown;

/// The table whose constraint or column refuses a write. For a day partition, the table from which it inherits that.
fn table(error: &PgDatabaseError) -> Option<String> {
    let name = error.table()?;
    let ours = ["event_processing_log", "event_history"];
    let name = ours.into_iter().find(|ours| name.starts_with(ours)).unwrap_or(name);
    let schema = error.schema().map(|schema| format!("{}.", quoted(schema))).unwrap_or_default();
    Some(schema + &quoted(name))
}

/// Returns the statement that undoes the reason. It reads only the fields of the error, never its DETAIL, which may quote a
/// row.
pub(super) fn cure(error: &sqlx::Error) -> Option<String> {
    let error = error.as_database_error()?.try_downcast_ref::<PgDatabaseError>()?;
    let table = table(error);
    match (error.code(), table, error.constraint(), error.column()) {
        ("23502", Some(table), _, Some(column)) => {
            let column = quoted(column);
            Some(format!(
                "drop or correct the column {column} of {table}: alter table {table} alter column {column} drop not null; or give \
                 it a default: alter table {table} alter column {column} set default ..."
            ))
        }
        ("23503" | "23514", Some(table), Some(constraint), _) => {
            let constraint = quoted(constraint);
            Some(format!(
                "drop or correct the constraint {constraint} of {table}: alter table {table} drop constraint {constraint}"
            ))
        }
        _ => None,
    }
}

/// Publications of `event_outbox` with a row filter or a list of columns; servers before 15 know none.
const PUBLICATIONS: &str = "
select pg_catalog.quote_ident(p.pubname::text), r.prrelid::regclass::text
from pg_catalog.pg_publication_rel r join pg_catalog.pg_publication p on p.oid = r.prpubid
where r.prrelid = '{schema}.event_outbox'::regclass::oid and (r.prqual is not null or r.prattrs is not null)
order by 1";

/// Returns the cure if logical replication refuses what settles do to `event_outbox`.
pub(super) async fn cure_of_publication(
    connection: &mut PgConnection,
    sql: Sql,
    error: &sqlx::Error,
) -> Option<String> {
    let error = error.as_database_error()?.try_downcast_ref::<PgDatabaseError>()?;
    match error.code() {
        "55000" => Some(
            "a publication needs what tells the rows of event_outbox apart: alter table event_outbox replica identity default"
                .to_owned(),
        ),
        "42P10" => {
            let publications: Vec<(String, String)> =
                sql.query_as(PUBLICATIONS).persistent(false).fetch_all(connection).await.unwrap_or_default();
            let cures = publications.iter().map(|(name, table)| {
                format!(
                    "publish all of its rows and columns: alter publication {name} drop table {table}; alter publication {name} \
                     add table {table}"
                )
            });
            // This DETAIL speaks of columns, and quotes no row.
            let detail = error.detail().unwrap_or_default();
            Some(std::iter::once(detail.to_owned()).chain(cures).collect::<Vec<_>>().join("; "))
        }
        _ => None,
    }
}

/// Returns why an event cannot be settled, and what undoes that.
pub(super) fn words_and_cure(error: &sqlx::Error) -> String {
    let cure = cure(error).map(|cure| format!("; {cure}")).unwrap_or_default();
    words(error) + &cure
}

/// The most characters that are shown of a message of the database: a trigger of the application may have written it.
const MAX_MESSAGE_CHARS: usize = 500;

/// Returns the reason of such an error, in words. It never reads the DETAIL, which may quote a row.
pub(super) fn words(error: &sqlx::Error) -> String {
    if let Some(suppressed) = suppressed(error) {
        return suppressed.to_string();
    }
    let Some(database) = error.as_database_error() else { return error.to_string() };
    let mut words =
        format!("{} ({})", shown(database.message(), MAX_MESSAGE_CHARS), database.code().unwrap_or_default());
    if let Some(context) = database.downcast_ref::<PgDatabaseError>().r#where()
        && let Some(function) = context.lines().find(|line| line.starts_with("PL/pgSQL function"))
    {
        words.push_str(", in ");
        words.push_str(function);
    }
    words
}

pub(super) fn suppressed(error: &sqlx::Error) -> Option<&Suppressed> {
    match error {
        sqlx::Error::Decode(error) => error.downcast_ref(),
        _ => None,
    }
}

fn sqlstate(error: &sqlx::Error) -> Option<String> {
    error.as_database_error()?.code().map(|code| code.into_owned())
}

/// Returns whether an error is about what was to be written, and not about the server, its disk, its locks or this role's
/// rights.
pub(super) fn is_content(error: &sqlx::Error) -> bool {
    let about_content = |code: String| match code.as_str() {
        "42501" => false,
        // A publication needs a replica identity, which the table lacks.
        "55000" => true,
        // An unsupported feature: it comes from a rule, unless the message is about a cached plan.
        "0A000" => error.as_database_error().is_some_and(|error| !error.message().contains("cached plan")),
        code => ["21", "22", "23", "27", "2F", "38", "39", "42", "44", "54", "P0"].contains(&&code[..2]),
    };
    let decodes = matches!(error, sqlx::Error::ColumnDecode { .. });
    decodes || suppressed(error).is_some() || sqlstate(error).is_some_and(about_content)
}

/// Returns whether the error may come from a column that has another type or another name.
pub(super) fn is_of_types(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::ColumnDecode { .. })
        || sqlstate(error).is_some_and(|code| code.starts_with("42") || code == "22P02")
}

/// Returns whether a table that is kept by day has no partition for now.
pub(super) fn is_missing_day(error: &sqlx::Error) -> bool {
    let Some(error) = error.as_database_error() else { return false };
    // If a CHECK refuses a row, the error has the same kind, but names the constraint.
    error.kind() == ErrorKind::CheckViolation
        && error.constraint().is_none()
        && error.table().is_some_and(|table| ["event_processing_log", "event_history"].contains(&table))
}
