//! Quotes names and texts for statements.

/// Returns a name, quoted if necessary.
pub(super) fn quoted(name: &str) -> String {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if !name.is_empty() && name.chars().all(plain) && !name.starts_with(|c: char| c.is_ascii_digit()) {
        name.to_owned()
    } else {
        format!("\"{}\"", name.replace('"', "\"\""))
    }
}

/// Returns a text as an SQL literal.
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
