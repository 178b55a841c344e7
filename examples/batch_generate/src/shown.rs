//! What comes from files and models, as people see it: a terminal obeys some characters, and none of them gets there.

use std::io::{self, Write as _};

/// Text of several lines: all characters that a terminal would obey are escaped, except ends of lines and tabs.
pub(crate) fn lines(text: &str) -> String {
    escaped(&text.replace("\r\n", "\n"), |c| matches!(c, '\n' | '\t'))
}

/// The same for a name or another text that must stay in its line.
pub(crate) fn line(text: &str) -> String {
    escaped(text, |_| false)
}

/// A message for people. A reader of it who has gone is no failure.
pub fn say(message: &str) {
    let _ = writeln!(io::stderr(), "{}", lines(message));
}

fn escaped(text: &str, harmless: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if obeyed(c) && !harmless(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// Control characters of both kinds, and those that turn the direction of what follows (Unicode, annex 9).
fn obeyed(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_escaped() {
        assert_eq!(lines("a\u{1b}[31mb\u{7}\u{8}\0"), "a\\u{1b}[31mb\\u{7}\\u{8}\\u{0}");
        assert_eq!(lines("\u{9b}2J\u{7f}"), "\\u{9b}2J\\u{7f}");
        assert_eq!(lines("a\u{202e}b\u{2066}c\u{2069}"), "a\\u{202e}b\\u{2066}c\\u{2069}");
        assert_eq!(lines("100%\r0"), "100%\\r0");
        assert_eq!(lines("a\tb\r\nc\n"), "a\tb\nc\n");
        assert_eq!(line("a\tb\nc"), "a\\tb\\nc");
    }

    #[test]
    fn all_else_stays() {
        let text = "\\u{1b} é 漢字 👨\u{200d}👩 שלום\u{200f}! nai\u{308}ve";
        assert_eq!((lines(text), line(text)), (text.to_owned(), text.to_owned()));
    }
}
