//! Names and texts as they stand in a statement.

/// A name, in quotes where it needs them.
pub(super) fn quoted(name: &str) -> String {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if !name.is_empty() && name.chars().all(plain) && !name.starts_with(|c: char| c.is_ascii_digit()) {
        name.to_owned()
    } else {
        format!("\"{}\"", name.replace('"', "\"\""))
    }
}

/// A text as a literal in SQL.
pub(super) fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
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
