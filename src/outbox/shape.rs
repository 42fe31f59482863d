//! Describes how the columns of relay's tables differ from the schema: somebody may have renamed a column or changed its
//! type.

use crate::outbox::quote::quoted;

/// An existing column: its table, its name, and its type if that matters.
pub(super) type Column = (String, String, String);

/// Returns the differences to `expected`, which has each table with its columns and their types, `name type, name type`. With
/// `types`, also reports a type that differs, although most work all the same. Each difference comes with the statement that
/// repairs it.
pub(super) fn differences(expected: &[(&str, &str)], columns: &[Column], types: bool) -> Vec<String> {
    let mut told = Vec::new();
    for (table, wanted) in expected {
        let there: Vec<&Column> = columns.iter().filter(|(of, ..)| of == table).collect();
        let wanted: Vec<(&str, &str)> =
            wanted.split(", ").map(|column| column.split_once(' ').unwrap_or((column, ""))).collect();
        let strangers: Vec<&str> = there
            .iter()
            .filter(|(_, name, _)| !wanted.iter().any(|(wanted, _)| wanted == name))
            .map(|(_, name, _)| name.as_str())
            .collect();
        for (name, wanted) in &wanted {
            match there.iter().find(|(_, there, _)| there == name) {
                None => told.push(missing(table, name, &strangers)),
                Some((.., found)) if types && found != wanted => {
                    // The default has the other type too, and PostgreSQL does not convert it.
                    let (drop, set) = if *table == "event_outbox" && *wanted == "jsonb" {
                        (
                            format!("alter column {name} drop default, "),
                            format!(", alter column {name} set default '{{}}'"),
                        )
                    } else {
                        (String::new(), String::new())
                    };
                    told.push(format!(
                        "the column {name} of {table} is of type {found} and was {wanted}: alter table {table} {drop}alter column \
                         {name} type {wanted} using {name}::{wanted}{set}"
                    ));
                }
                Some(_) => {}
            }
        }
    }
    told
}

fn missing(table: &str, name: &str, strangers: &[&str]) -> String {
    let cure = match strangers {
        [] => "restore it from a backup of the schema".to_owned(),
        [stranger] => {
            format!("if it is {stranger} now: alter table {table} rename column {} to {name}", quoted(stranger))
        }
        _ => format!("if it is one of {} now: alter table {table} rename column ... to {name}", strangers.join(", ")),
    };
    format!("{table} has no column {name}; {cure}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns(all: &[(&str, &str)]) -> Vec<Column> {
        all.iter().map(|(name, kind)| ("t".to_owned(), (*name).to_owned(), (*kind).to_owned())).collect()
    }

    #[test]
    fn what_differs_is_told_with_the_statement_that_mends_it() {
        let expected = [("t", "a text, b jsonb")];
        assert!(differences(&expected, &columns(&[("a", "text"), ("b", "jsonb"), ("c", "text")]), true).is_empty());
        let renamed = columns(&[("A", "text"), ("b", "text")]);
        assert_eq!(
            differences(&expected, &renamed, false),
            ["t has no column a; if it is A now: alter table t rename column \"A\" to a"]
        );
        assert_eq!(
            differences(&expected, &renamed, true)[1],
            "the column b of t is of type text and was jsonb: alter table t alter column b type jsonb using b::jsonb"
        );
        assert_eq!(
            differences(&expected, &columns(&[("b", "jsonb")]), true),
            ["t has no column a; restore it from a backup of the schema"]
        );
        let several = differences(&expected, &columns(&[("b", "jsonb"), ("c", "text"), ("d", "text")]), true);
        assert_eq!(several, ["t has no column a; if it is one of c, d now: alter table t rename column ... to a"]);
    }
}
