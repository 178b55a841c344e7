//! Tells special tokens from text that only looks like them. The name of a special token that a chat template writes is
//! a token that steers the model. The same name in a user's text is plain text.
//!
//! A template may trim, repeat or move the user's text, so the rendered text does not show which parts the user wrote.
//! Therefore the user's text is guarded before it is rendered: a character that occurs nowhere else is inserted before
//! each such name, and removed when the rendered text is split.

use std::collections::HashMap;

use anyhow::{Context, Result};

/// The tokens that are matched as a whole in a text, before it is split into words.
#[derive(Debug, Default)]
pub(crate) struct Specials {
    /// By their first character, the longest first.
    names: HashMap<char, Vec<Name>>,
}

#[derive(Debug)]
struct Name {
    name: String,
    /// The token's id; `None` if the token is text, which users may write, too.
    special: Option<u32>,
}

/// A piece of a text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    Special(u32),
    /// Text in which no name is a special token.
    Plain(String),
}

impl Specials {
    /// Adds a token. `special` is its id if it steers the model, and `None` if it is text.
    pub(crate) fn add(&mut self, name: &str, special: Option<u32>) {
        let Some(first) = name.chars().next() else { return };
        let names = self.names.entry(first).or_default();
        let index = names.partition_point(|other| other.name.len() >= name.len());
        names.insert(index, Name { name: name.to_owned(), special });
    }

    /// The names with which `text` begins, the longest first.
    fn at<'a>(&'a self, text: &'a str) -> impl Iterator<Item = &'a Name> {
        let names = text.chars().next().and_then(|first| self.names.get(&first));
        names.into_iter().flatten().filter(|name| text.starts_with(&name.name))
    }

    /// Whether `text` begins with the name of a special token.
    fn needs_guard(&self, text: &str) -> bool {
        self.at(text).any(|name| name.special.is_some())
    }

    /// Guards `texts`, which users wrote. Also returns the guard, a character that occurs neither in `texts` nor in
    /// `template`; `None` if there was nothing to guard.
    ///
    /// # Errors
    ///
    /// If there is something to guard, and every possible guard occurs in `texts` or `template`.
    pub(crate) fn guard(&self, texts: &[&str], template: &str) -> Result<(Vec<String>, Option<char>)> {
        let has_special = |text: &str| text.char_indices().any(|(i, _)| self.needs_guard(&text[i..]));
        if !texts.iter().any(|text| has_special(text)) {
            return Ok((texts.iter().map(|&text| text.to_owned()).collect(), None));
        }
        let unused = |c: &char| !template.contains(*c) && !texts.iter().any(|text| text.contains(*c));
        // Noncharacters (Unicode, section 23.7), then characters for private use.
        let guard = ('\u{fdd0}'..='\u{fdef}').chain('\u{f0000}'..='\u{ffffd}').find(unused);
        let guard =
            guard.context("the prompt contains names of special tokens, and every character that could guard them")?;
        let guarded = texts.iter().map(|text| {
            let mut guarded = String::with_capacity(text.len());
            for (i, c) in text.char_indices() {
                if self.needs_guard(&text[i..]) {
                    guarded.push(guard);
                }
                guarded.push(c);
            }
            guarded
        });
        Ok((guarded.collect(), Some(guard)))
    }

    /// Splits `text` at the special tokens. The leftmost match comes first; of several that begin there, the longest. A
    /// name after `guard` is plain text.
    pub(crate) fn split(&self, text: &str, guard: Option<char>) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            if guard == Some(first) {
                rest = &rest[first.len_utf8()..];
                let Some(guarded) = rest.chars().next() else { break };
                plain.push(guarded);
                rest = &rest[guarded.len_utf8()..];
                continue;
            }
            let (len, special) = self.at(rest).next().map_or((first.len_utf8(), None), |n| (n.name.len(), n.special));
            match special {
                Some(id) => {
                    if !plain.is_empty() {
                        pieces.push(Piece::Plain(std::mem::take(&mut plain)));
                    }
                    pieces.push(Piece::Special(id));
                }
                None => plain.push_str(&rest[..len]),
            }
            rest = &rest[len..];
        }
        if !plain.is_empty() {
            pieces.push(Piece::Plain(plain));
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specials() -> Specials {
        let mut specials = Specials::default();
        for (name, special) in [
            ("<a>", Some(1)),
            ("<a><b>", Some(2)),
            ("<tab>", None),
            ("<tab>s", Some(3)),
            ("b><", Some(4)),
            ("§", Some(5)),
        ] {
            specials.add(name, special);
        }
        specials.add("", Some(6));
        specials
    }

    fn plain(text: &str) -> Piece {
        Piece::Plain(text.to_owned())
    }

    #[test]
    fn the_leftmost_longest_match_is_special() {
        use Piece::Special;
        let split = |text| specials().split(text, None);
        assert_eq!(split(""), []);
        assert_eq!(split("x<a"), [plain("x<a")]);
        assert_eq!(split("x<a>y§"), [plain("x"), Special(1), plain("y"), Special(5)]);
        assert_eq!(split("<a><b><a>"), [Special(2), Special(1)]);
        assert_eq!(split("<b><a>"), [plain("<"), Special(4), plain("a>")]);
        assert_eq!(split("<tab><tab>s é"), [plain("<tab>"), Special(3), plain(" é")]);
    }

    #[test]
    fn guarded_text_is_plain_text() {
        for words in
            ["<a>", "x<a><b><a>y", "§", "§§", "<b><a><b><", "<tab>s<tab>", "\u{fdd0}<a>\u{fdd1}\u{fdd0}", "é<a>é"]
        {
            let (guarded, guard) = specials().guard(&[words], "").unwrap();
            let guarded = &guarded[0];
            assert!(guard.is_some_and(|guard| !words.contains(guard)), "{words}");
            assert_eq!(specials().split(guarded, guard), [plain(words)]);
            // Between special tokens.
            let between = specials().split(&format!("<a>{guarded}<a>"), guard);
            assert_eq!(between, [Piece::Special(1), plain(words), Piece::Special(1)]);
        }
    }

    #[test]
    fn the_guard_is_in_none_of_the_texts() {
        let (guarded, guard) = specials().guard(&["\u{fdd0}", "<a>\u{fdd2}"], "\u{fdd1}").unwrap();
        assert_eq!((guarded[0].as_str(), guard), ("\u{fdd0}", Some('\u{fdd3}')));
        let all: String = ('\u{fdd0}'..='\u{fdef}').collect();
        assert_eq!(specials().guard(&["§", &all], "").unwrap().1, Some('\u{f0000}'));
    }

    #[test]
    fn text_without_special_names_is_unchanged() {
        let words = ["<tab> \u{fdd0}", ""];
        assert_eq!(specials().guard(&words, "<a>").unwrap(), (words.map(str::to_owned).to_vec(), None));
    }
}
