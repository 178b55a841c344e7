//! Shows answers while they are generated: one streams, the others have a line each that says how far they are.
//!
//! Answers are written in their order, so what streams is the first one that is not complete. On a terminal the line
//! that is not complete, and the lines of the other answers, are drawn again after each step.

use std::io::{self, IsTerminal as _, Write};

use anyhow::Result;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::report::title;
use inference::engine::Progress;
use inference::shown::lines;
use inference::tokenizer::{DecodeStream, Tokenizer};

/// The most lines of other answers.
const OTHERS: usize = 8;

/// What is shown during generation.
#[derive(Debug)]
pub(crate) struct Live<'a> {
    tokenizer: &'a Tokenizer,
    /// The prompt of each answer.
    prompts: Vec<&'a str>,
    /// The answer that streams, and its tokens that are decoded already.
    answer: usize,
    decoded: usize,
    stream: Option<DecodeStream<'a>>,
    text: Trimmed,
    screen: Screen,
}

impl<'a> Live<'a> {
    /// For answers to `prompts`, with at most `most` tokens together, from a pool of `units`.
    pub(crate) fn new(tokenizer: &'a Tokenizer, prompts: Vec<&'a str>, most: usize, units: usize) -> Result<Self> {
        let screen = Screen::new(most, units)?;
        Ok(Self { tokenizer, prompts, answer: 0, decoded: 0, stream: None, text: Trimmed::default(), screen })
    }

    /// Shows what has changed.
    pub(crate) fn update(&mut self, progress: &Progress<'_>) -> Result<()> {
        let mut answers = progress.answers().enumerate().skip(self.answer);
        let mut others = Vec::new();
        // All that are complete, and the first that is not.
        for (_, (tokens, finished)) in answers.by_ref() {
            if self.decoded < tokens.len() || finished {
                self.show(tokens, finished)?;
            }
            if !finished {
                break;
            }
        }
        for (i, (tokens, finished)) in answers {
            if !finished && !tokens.is_empty() && others.len() < OTHERS {
                others.push(format!("{} {} tokens", title(i, self.prompts[i], 48), tokens.len()));
            }
        }
        self.screen.progress(progress, others);
        Ok(())
    }

    fn show(&mut self, tokens: &[u32], finished: bool) -> Result<()> {
        if self.stream.is_none() {
            self.screen.write(&format!("{}\n", title(self.answer, self.prompts[self.answer], 90)));
        }
        let stream = self.stream.get_or_insert_with(|| self.tokenizer.stream());
        let mut text = String::new();
        for &token in &tokens[self.decoded..] {
            text += &self.text.push(&stream.push(token)?);
        }
        self.decoded = tokens.len();
        if finished {
            if let Some(stream) = self.stream.take() {
                text += &self.text.push(&stream.finish()?);
            }
            text += "\n\n";
            self.text = Trimmed::default();
            self.answer += 1;
            self.decoded = 0;
        }
        self.screen.write(&text);
        Ok(())
    }

    /// Removes everything but the answers from the screen.
    pub(crate) fn finish(self) {
        self.screen.clear();
    }
}

/// A text without the white space at its beginning and end, piece by piece, escaped for a terminal.
#[derive(Debug, Default)]
struct Trimmed {
    begun: bool,
    /// White space that belongs to the text only if more follows.
    held: String,
}

impl Trimmed {
    /// What can be shown after this piece.
    fn push(&mut self, piece: &str) -> String {
        let mut all = std::mem::take(&mut self.held) + piece;
        if !self.begun {
            all = all.trim_start().to_owned();
        }
        let end = all.trim_end().len();
        self.begun |= end > 0;
        self.held = all.split_off(end);
        lines(&all)
    }
}

/// Where answers are written, and lines that are drawn again and again.
#[derive(Debug)]
struct Screen {
    /// Nothing is drawn if the standard error is not a terminal.
    all: MultiProgress,
    /// The line of the answer that is not complete, if answers go to the same terminal: nothing else may be there while
    /// lines are drawn.
    line: Option<(ProgressBar, String)>,
    others: Vec<ProgressBar>,
    bar: ProgressBar,
    units: usize,
}

impl Screen {
    fn new(most: usize, units: usize) -> Result<Self> {
        let all = MultiProgress::new();
        let plain = ProgressStyle::with_template("{msg}")?;
        let same = io::stdout().is_terminal() && io::stderr().is_terminal();
        let line = same.then(|| (all.add(ProgressBar::no_length().with_style(plain)), String::new()));
        let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len} tokens, {msg}")?;
        let bar = all.add(ProgressBar::new(most as u64).with_style(style));
        Ok(Self { all, line, others: Vec::new(), bar, units })
    }

    fn write(&mut self, text: &str) {
        let Some((bar, line)) = &mut self.line else {
            // A reader that closes the pipe early is not an error.
            let mut out = io::stdout();
            let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
            return;
        };
        *line += text;
        if let Some(end) = line.rfind('\n') {
            let complete: String = line.drain(..=end).collect();
            self.all.suspend(|| {
                let _ = io::stdout().write_all(complete.as_bytes());
            });
        }
        bar.set_message(line.clone());
    }

    fn progress(&mut self, p: &Progress<'_>, others: Vec<String>) {
        while self.others.len() > others.len() {
            self.others.pop().iter().for_each(|bar| self.all.remove(bar));
        }
        while self.others.len() < others.len() {
            let Ok(style) = ProgressStyle::with_template("  {wide_msg}") else { break };
            self.others.push(self.all.insert_before(&self.bar, ProgressBar::no_length().with_style(style)));
        }
        for (bar, line) in self.others.iter().zip(others) {
            bar.set_message(line);
        }
        self.bar.set_position(p.generated as u64);
        self.bar.set_message(format!(
            "{} running, {} waiting, {} done, {}/{} blocks",
            p.running, p.waiting, p.finished, p.in_use, self.units
        ));
    }

    fn clear(mut self) {
        // An answer that an error cut off.
        if self.line.as_ref().is_some_and(|(_, line)| !line.is_empty()) {
            self.write("\n");
        }
        let _ = self.all.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::Trimmed;

    #[test]
    fn pieces_add_up_to_the_trimmed_and_escaped_text() {
        for text in ["", " \n", "one", "\n a\r\nb  c\t\n", "a\u{1b}[2J\r\n\r\n x ", "\u{3000}é \u{a0}"] {
            let characters: Vec<String> = text.chars().map(String::from).collect();
            for size in [1, 2, 3] {
                let mut trimmed = Trimmed::default();
                let shown: String = characters.chunks(size).map(|piece| trimmed.push(&piece.concat())).collect();
                assert_eq!(shown, inference::shown::lines(text.trim()), "{text:?} in pieces of {size}");
            }
        }
    }
}
