//! Makes foreign text safe for logs and tables: control characters are escaped, and the length is bounded.

/// Returns `text`, cut to `max_chars` characters. Control characters, characters that change the direction of writing and
/// invisible ones are escaped.
pub(crate) fn shown(text: &str, max_chars: usize) -> String {
    let mut shown = String::with_capacity(text.len().min(max_chars));
    let mut count = 0;
    for c in text.chars() {
        let escaped = needs_escape(c).then(|| c.escape_default());
        count += escaped.as_ref().map_or(1, ExactSizeIterator::len);
        if count > max_chars {
            break;
        }
        match escaped {
            Some(escaped) => shown.extend(escaped),
            None => shown.push(c),
        }
    }
    shown
}

fn needs_escape(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
        || matches!(c, '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Returns the id that a destination gave a message, escaped and cut, so that it can be stored.
pub(crate) fn message_id(id: String) -> String {
    const MAX_CHARS: usize = 200;
    if id.len() <= MAX_CHARS && id.bytes().all(|byte| byte.is_ascii_graphic()) { id } else { shown(&id, MAX_CHARS) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_can_forge_a_line_or_turn_its_direction() {
        let text = "a\nb\x1b[31m\u{9b}c\u{202e}d\u{2028}e\u{feff}\u{e0041}\0é\\n";
        let shown = shown(text, 1000);
        assert_eq!(shown, "a\\nb\\u{1b}[31m\\u{9b}c\\u{202e}d\\u{2028}e\\u{feff}\\u{e0041}\\u{0}é\\n");
        assert!(!shown.contains(needs_escape));
    }

    #[test]
    fn text_is_cut_between_its_escapes() {
        assert_eq!(shown("é\0é", 7), "é\\u{0}é");
        assert_eq!(shown("é\0é", 6), "é\\u{0}");
        assert_eq!(shown("é\0é", 5), "é");
        assert_eq!(message_id("x".repeat(300)), "x".repeat(200));
        assert_eq!(message_id("1-0".to_owned()), "1-0");
    }
}
