//! What undoes the reason for which the database refuses a write, as a statement that can be typed.

use sqlx::postgres::{PgConnection, PgDatabaseError};

use crate::outbox::postgres::sql::Sql;

/// A name as PostgreSQL writes it.
fn quoted(name: &str) -> String {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if name.chars().all(plain) && !name.starts_with(|c: char| c.is_ascii_digit()) {
        name.to_owned()
    } else {
        format!("\"{}\"", name.replace('"', "\"\""))
    }
}

/// The table that has what refuses; of a day, the table that it is a day of, as far as a constraint is inherited from there.
fn table(error: &PgDatabaseError) -> Option<String> {
    let name = error.table()?;
    let ours = ["event_processing_log", "event_history"];
    let name = ours.into_iter().find(|ours| name.starts_with(ours)).unwrap_or(name);
    let schema = error.schema().map(|schema| format!("{}.", quoted(schema))).unwrap_or_default();
    Some(schema + &quoted(name))
}

/// By the fields of the error alone: never its DETAIL, which may quote a row.
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

/// The cure where logical replication refuses what settles do to `event_outbox`.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_quoted_where_it_must_be() {
        assert_eq!(quoted("child_fkey1"), "child_fkey1");
        assert_eq!(quoted("Child \"x\""), "\"Child \"\"x\"\"\"");
        assert_eq!(quoted("1st"), "\"1st\"");
    }
}
