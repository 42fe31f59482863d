//! Fills the schema into the relay's statements, which name everything that they use with its schema.
//!
//! A role that may create functions in a schema on the search path can define a better match for a function of PostgreSQL than
//! PostgreSQL itself has, such as `format(text, text)`. The relay would run it with its own rights. So each statement names the
//! schema of every function (`pg_catalog.`) and of each table of ours (`{schema}.`, filled in here). Operators are used with
//! operands of exactly their types, so that the match is always PostgreSQL's own. The search path stays as it is, because
//! triggers of the application may need it.
//!
//! `unnest` with several arguments is syntax, and takes no schema.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use sqlx::postgres::{PgArguments, PgConnection, PgRow};
use sqlx::query::{Query, QueryAs, QueryScalar};
use sqlx::{AssertSqlSafe, FromRow, Postgres};

/// The schema of our tables, as an identifier in SQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Schema(&'static str);

impl Schema {
    /// The schema of the first table `event_outbox` on the search path; `None` where there is none.
    pub(super) async fn find(connection: &mut PgConnection) -> Result<Option<Self>, sqlx::Error> {
        let found: Option<String> = sqlx::query_scalar(
            "select (select pg_catalog.quote_ident(n.nspname::text)
                     from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
                     where c.oid = pg_catalog.to_regclass('event_outbox')::oid)",
        )
        .persistent(false)
        .fetch_one(connection)
        .await?;
        Ok(found.map(Self::new))
    }

    /// Returns the schema with this identifier.
    fn new(identifier: String) -> Self {
        static KNOWN: Mutex<Vec<&'static str>> = Mutex::new(Vec::new());
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let known_one = known.iter().find(|known| **known == identifier).copied();
        Self(known_one.unwrap_or_else(|| {
            let identifier = identifier.leak();
            known.push(identifier);
            identifier
        }))
    }

    /// The same for a text that is made for one use.
    pub(super) fn fill_once(self, text: &str) -> AssertSqlSafe<String> {
        // In a literal, a quote in the name is doubled.
        let literal = format!("'{}.", self.0.replace('\'', "''"));
        AssertSqlSafe(text.replace("'{schema}.", &literal).replace("{schema}", self.0))
    }

    /// Returns `text` with this schema filled in. The result is kept for good: there are only as many as statements.
    pub(super) fn fill(self, text: &'static str) -> AssertSqlSafe<&'static str> {
        type Place = (usize, usize, usize);
        static FILLED: LazyLock<Mutex<HashMap<Place, &'static str, foldhash::fast::FixedState>>> =
            LazyLock::new(Mutex::default);
        let place = (self.0.as_ptr() as usize, text.as_ptr() as usize, text.len());
        let mut filled = FILLED.lock().unwrap_or_else(PoisonError::into_inner);
        AssertSqlSafe(filled.entry(place).or_insert_with(|| {
            let AssertSqlSafe(text) = self.fill_once(text);
            text.leak()
        }))
    }
}

impl Default for Schema {
    /// The schema of tables that nobody has moved.
    fn default() -> Self {
        Self("public")
    }
}

/// How a connection's statements are sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sql {
    /// Where our tables are.
    pub(super) schema: Schema,
    /// Whether statements are prepared once, under a name. They are not behind a transaction-pooling proxy.
    pub(super) persistent: bool,
}

impl Sql {
    pub(super) fn query(self, text: &'static str) -> Query<'static, Postgres, PgArguments> {
        sqlx::query(self.schema.fill(text)).persistent(self.persistent)
    }

    pub(super) fn query_as<T>(self, text: &'static str) -> QueryAs<'static, Postgres, T, PgArguments>
    where
        T: for<'r> FromRow<'r, PgRow>,
    {
        sqlx::query_as(self.schema.fill(text)).persistent(self.persistent)
    }

    pub(super) fn query_scalar<T>(self, text: &'static str) -> QueryScalar<'static, Postgres, T, PgArguments>
    where
        (T,): for<'r> FromRow<'r, PgRow>,
    {
        sqlx::query_scalar(self.schema.fill(text)).persistent(self.persistent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_is_filled_in_as_a_name_and_within_a_literal() {
        let schema = Schema::new("\"o'clock\"".to_owned());
        let AssertSqlSafe(text) = schema.fill("select '{schema}.event_outbox'::regclass from {schema}.event_outbox");
        assert_eq!(text, "select '\"o''clock\".event_outbox'::regclass from \"o'clock\".event_outbox");
        assert_eq!(schema, Schema::new("\"o'clock\"".to_owned()));
    }
}
