//! Which names in a text are special tokens, and which only look so. The names that a chat template writes stand for
//! tokens that steer the model; the same names in a user's words are words.
//!
//! A template may trim, repeat or move what the user wrote, so that afterwards nobody knows whose words are whose. That
//! is why the user's words are guarded before: a character that occurs nowhere else stands before each such name, and
//! goes when the text is split.

use std::collections::HashMap;

use anyhow::{Context, Result};

/// The tokens that are found whole in a text, before it is cut into words.
#[derive(Debug, Default)]
pub(crate) struct Specials {
    /// By their first character, the longest first.
    names: HashMap<char, Vec<Name>>,
}

#[derive(Debug)]
struct Name {
    name: String,
    /// `None` if it is text, which users may write, too.
    special: Option<u32>,
}

/// A piece of a text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    Special(u32),
    /// In which no name is special.
    Plain(String),
}

impl Specials {
    /// Adds a token: one that steers the model if `special` is its id, otherwise one that is text.
    pub(crate) fn add(&mut self, name: &str, special: Option<u32>) {
        let Some(first) = name.chars().next() else { return };
        let names = self.names.entry(first).or_default();
        let place = names.partition_point(|other| other.name.len() >= name.len());
        names.insert(place, Name { name: name.to_owned(), special });
    }

    /// The names with which `text` begins, the longest first.
    fn at<'a>(&'a self, text: &'a str) -> impl Iterator<Item = &'a Name> {
        let names = text.chars().next().and_then(|first| self.names.get(&first));
        names.into_iter().flatten().filter(|name| text.starts_with(&name.name))
    }

    fn guards(&self, text: &str) -> bool {
        self.at(text).any(|name| name.special.is_some())
    }

    /// Guards what users wrote. Gives back the guard too, if there is anything to guard: a character that neither the
    /// words nor `template` have.
    ///
    /// # Errors
    ///
    /// If they have all characters.
    pub(crate) fn guard<const N: usize>(
        &self,
        words: [&str; N],
        template: &str,
    ) -> Result<([String; N], Option<char>)> {
        let starts = |text: &str| text.char_indices().any(|(i, _)| self.guards(&text[i..]));
        if !words.iter().any(|text| starts(text)) {
            return Ok((words.map(str::to_owned), None));
        }
        let free = |c: &char| !template.contains(*c) && !words.iter().any(|text| text.contains(*c));
        // Of characters that are none (Unicode, section 23.7), and those that mean what two parties agree on.
        let guard = ('\u{fdd0}'..='\u{fdef}').chain('\u{f0000}'..='\u{ffffd}').find(free);
        let guard = guard.context("the prompt has special tokens' names, and every character to guard them with")?;
        let guarded = words.map(|text| {
            let mut guarded = String::with_capacity(text.len());
            for (i, c) in text.char_indices() {
                if self.guards(&text[i..]) {
                    guarded.push(guard);
                }
                guarded.push(c);
            }
            guarded
        });
        Ok((guarded, Some(guard)))
    }

    /// Splits `text` at the special tokens: always the first, and of those that begin there the longest. What follows
    /// `guard` is none.
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
    fn the_first_and_of_those_the_longest_is_special() {
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
    fn words_are_guarded_whatever_they_are() {
        for words in
            ["<a>", "x<a><b><a>y", "§", "§§", "<b><a><b><", "<tab>s<tab>", "\u{fdd0}<a>\u{fdd1}\u{fdd0}", "é<a>é"]
        {
            let ([guarded], guard) = specials().guard([words], "").unwrap();
            assert!(guard.is_some_and(|guard| !words.contains(guard)), "{words}");
            assert_eq!(specials().split(&guarded, guard), [plain(words)]);
            // Between names that are special.
            let between = specials().split(&format!("<a>{guarded}<a>"), guard);
            assert_eq!(between, [Piece::Special(1), plain(words), Piece::Special(1)]);
        }
    }

    #[test]
    fn the_guard_is_in_none_of_the_texts() {
        let (guarded, guard) = specials().guard(["\u{fdd0}", "<a>\u{fdd2}"], "\u{fdd1}").unwrap();
        assert_eq!((guarded[0].as_str(), guard), ("\u{fdd0}", Some('\u{fdd3}')));
        let all: String = ('\u{fdd0}'..='\u{fdef}').collect();
        assert_eq!(specials().guard(["§", &all], "").unwrap().1, Some('\u{f0000}'));
    }

    #[test]
    fn words_without_special_names_stay_as_they_are() {
        let words = ["<tab> \u{fdd0}", ""];
        assert_eq!(specials().guard(words, "<a>").unwrap(), (words.map(str::to_owned), None));
    }
}
