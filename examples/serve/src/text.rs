//! The text of an answer as its tokens come, and where it stops.

use anyhow::Result;
use inference::tokenizer::{DecodeStream, Tokenizer};

/// The text of one answer.
#[derive(Debug)]
pub struct Text<'a> {
    stream: Option<DecodeStream<'a>>,
    stops: Stops,
}

impl<'a> Text<'a> {
    /// No text yet. It ends before the first of `stops` that occurs in it.
    pub fn new(tokenizer: &'a Tokenizer, stops: Vec<String>) -> Self {
        Self { stream: Some(tokenizer.stream()), stops: Stops::new(stops) }
    }

    /// The text that a token makes certain, and whether the answer stops there.
    ///
    /// # Errors
    ///
    /// If the tokenizer fails.
    pub fn push(&mut self, token: u32) -> Result<(String, bool)> {
        match &mut self.stream {
            Some(stream) => Ok(self.stops.push(&stream.push(token)?)),
            None => Ok((String::new(), false)),
        }
    }

    /// The rest of the text, and whether it contains a stop.
    ///
    /// # Errors
    ///
    /// If the tokenizer fails.
    pub fn finish(&mut self) -> Result<(String, bool)> {
        let last = self.stream.take().map_or_else(|| Ok(String::new()), DecodeStream::finish)?;
        let (mut text, stopped) = self.stops.push(&last);
        if !stopped {
            text.push_str(&self.stops.held);
        }
        self.stops.held.clear();
        Ok((text, stopped))
    }
}

/// Finds the first of several strings in a text that comes in pieces.
#[derive(Debug)]
struct Stops {
    stops: Vec<String>,
    /// The end of the text so far: it may be the beginning of a stop.
    held: String,
}

impl Stops {
    fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), held: String::new() }
    }

    /// Adds text. Returns what is certain not to be part of a stop, and whether a stop was found.
    fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            let mut text = std::mem::take(&mut self.held);
            text.truncate(at);
            return (text, true);
        }
        let may_begin = |&at: &usize| {
            let rest = self.held.get(at..);
            rest.is_some_and(|rest| self.stops.iter().any(|stop| stop.starts_with(rest)))
        };
        let certain = (0..self.held.len()).find(may_begin).unwrap_or(self.held.len());
        let held = self.held.split_off(certain);
        (std::mem::replace(&mut self.held, held), false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text that comes out for pieces of every size, and whether it was stopped.
    fn stopped(text: &str, stops: &[&str]) -> (String, bool) {
        let characters: Vec<String> = text.chars().map(String::from).collect();
        let results = (1..=characters.len()).map(|size| {
            let mut found = Stops::new(stops.iter().map(|&stop| stop.to_owned()).collect());
            let mut out = String::new();
            for piece in characters.chunks(size) {
                let (certain, stop) = found.push(&piece.concat());
                out += &certain;
                if stop {
                    return (out, true);
                }
            }
            (out + &found.held, false)
        });
        let results: Vec<_> = results.collect();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{results:?}");
        results[0].clone()
    }

    #[test]
    fn text_ends_before_the_first_stop_in_pieces_of_any_size() {
        let out = |text: &str, found| (text.to_owned(), found);
        assert_eq!(stopped("one two", &[]), out("one two", false));
        assert_eq!(stopped("one two three", &["two", "thr"]), out("one ", true));
        assert_eq!(stopped("aab", &["ab"]), out("a", true));
        assert_eq!(stopped("ababac", &["abac", "zz"]), out("ab", true));
        assert_eq!(stopped("naïve é", &["é"]), out("naïve ", true));
        assert_eq!(stopped("almost sto", &["stop"]), out("almost sto", false));
        assert_eq!(stopped("x", &[""]), out("x", false));
    }
}
