//! Escapes text from files and models before it is shown: no character that controls a terminal may reach it.

use std::io::{self, Write as _};

/// Escapes a text of several lines: all characters that control a terminal, except line ends and tabs.
pub fn lines(text: &str) -> String {
    escaped(&text.replace("\r\n", "\n"), |c| matches!(c, '\n' | '\t'))
}

/// Escapes a name or another text that must stay on one line: line ends and tabs, too.
pub fn line(text: &str) -> String {
    escaped(text, |_| false)
}

/// Prints a message to the standard error. A closed pipe is not an error.
pub fn say(message: &str) {
    let _ = writeln!(io::stderr(), "{}", lines(message));
}

fn escaped(text: &str, allowed: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if controls_terminal(c) && !allowed(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// Whether `c` is a control character (C0 or C1), or changes the direction of the text after it (Unicode, annex 9).
fn controls_terminal(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_that_control_a_terminal_are_escaped() {
        assert_eq!(lines("a\u{1b}[31mb\u{7}\u{8}\0"), "a\\u{1b}[31mb\\u{7}\\u{8}\\u{0}");
        assert_eq!(lines("\u{9b}2J\u{7f}"), "\\u{9b}2J\\u{7f}");
        assert_eq!(lines("a\u{202e}b\u{2066}c\u{2069}"), "a\\u{202e}b\\u{2066}c\\u{2069}");
        assert_eq!(lines("100%\r0"), "100%\\r0");
        assert_eq!(lines("a\tb\r\nc\n"), "a\tb\nc\n");
        assert_eq!(line("a\tb\nc"), "a\\tb\\nc");
    }

    #[test]
    fn other_characters_are_unchanged() {
        let text = "\\u{1b} é 漢字 👨\u{200d}👩 שלום\u{200f}! nai\u{308}ve";
        assert_eq!((lines(text), line(text)), (text.to_owned(), text.to_owned()));
    }
}
