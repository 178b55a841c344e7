//! The thread that steps the engine. Everything else is asynchronous, and never waits for it but in a queue.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use inference::engine::{
    Answer, Engine, Event, FinishReason, LanguageModel, Limits, Logprobs, Request, RequestOptions,
};
use inference::tokenizer::Tokenizer;
use paged_attention::{KvCache, Tier};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedSender;

use crate::metrics;
use crate::text::Text;

/// How often a thread with nothing to do looks whether clients have gone.
const IDLE: Duration = Duration::from_millis(100);

/// A request for the engine.
#[derive(Debug)]
pub struct Job {
    /// The prompt, which was checked.
    pub request: Request,
    /// How it is answered.
    pub options: RequestOptions,
    /// Answers end before any of these texts.
    pub stop: Vec<String>,
    /// The number of its first answer, for the client.
    pub first_choice: usize,
    /// Where what happens is sent. It is unbounded: an answer has as many pieces as tokens, which are bounded. If nobody
    /// receives any more, the request is cancelled.
    pub replies: UnboundedSender<Reply>,
    /// When it came.
    pub since: Instant,
    /// When it is given up.
    pub deadline: Instant,
    /// Its place in the queue, which is free as soon as it runs.
    pub place: OwnedSemaphorePermit,
}

/// What has happened to an answer.
#[derive(Debug)]
pub enum Reply {
    /// It has grown.
    Piece {
        /// Which answer.
        choice: usize,
        /// The new text; empty as long as the next token may change it.
        text: String,
        /// The tokens since the last piece, with their log probabilities, if these are wanted.
        logprobs: Vec<(u32, Logprobs)>,
    },
    /// It is complete.
    Finished {
        /// Which answer.
        choice: usize,
        /// `stop` or `length`.
        reason: &'static str,
        /// Tokens that were generated.
        tokens: usize,
        /// Tokens of the prompt that were in the cache.
        cached_tokens: usize,
    },
    /// There will be no complete answer.
    Failed(Failure),
}

/// Why there is no complete answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The time was up.
    Deadline,
    /// The server stops.
    Stopping,
    /// The model failed.
    Model(String),
}

/// The handle of the thread. When all are dropped, the thread finishes what runs and ends.
#[derive(Debug, Clone)]
pub struct Worker {
    jobs: Sender<Message>,
}

enum Message {
    Job(Box<Job>),
    /// Give up what runs at this time.
    StopBy(Instant),
}

/// What the thread works with.
#[derive(Debug)]
pub struct Machine<M> {
    /// The model.
    pub model: M,
    /// Its cache.
    pub cache: KvCache,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// What is below the cache.
    pub tier: Option<Arc<dyn Tier>>,
    /// What bounds a step.
    pub limits: Limits,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// If there is no thread.
    pub fn start<M: LanguageModel + Send + 'static>(machine: Machine<M>) -> Result<(Self, JoinHandle<()>)> {
        let (jobs, receiver) = channel();
        let run = move || work(machine, &receiver);
        let thread = thread::Builder::new().name("engine".into()).spawn(run).context("cannot start a thread")?;
        Ok((Self { jobs }, thread))
    }

    /// Adds a request to the queue. `false` if the thread has ended.
    pub fn submit(&self, job: Job) -> bool {
        self.jobs.send(Message::Job(Box::new(job))).is_ok()
    }

    /// Lets what runs and waits go on until then, and not longer.
    pub fn stop_by(&self, deadline: Instant) {
        let _ = self.jobs.send(Message::StopBy(deadline));
    }
}

/// An answer that is not complete.
struct Open<'a> {
    choice: usize,
    text: Text<'a>,
    tokens: usize,
    prompt_tokens: usize,
    cached_tokens: usize,
    logprobs: Vec<(u32, Logprobs)>,
    replies: UnboundedSender<Reply>,
    since: Instant,
    /// When its last token came.
    last: Instant,
    deadline: Instant,
    /// Its request's place in the queue.
    place: Option<Arc<OwnedSemaphorePermit>>,
}

fn work<M: LanguageModel>(machine: Machine<M>, messages: &Receiver<Message>) {
    let Machine { model, cache, tokenizer, tier, limits } = machine;
    let mut engine = Engine::new(&cache, limits);
    if let Some(tier) = tier {
        engine = engine.over(tier);
    }
    let is_end = |token| tokenizer.is_end(token);
    let mut open: HashMap<usize, Open<'_>> = HashMap::new();
    let mut stop_by = None;
    loop {
        // All that has come, and if there is nothing to do, the next that comes.
        loop {
            let message = if engine.is_idle() {
                messages.recv_timeout(IDLE).map_err(|error| error == RecvTimeoutError::Disconnected)
            } else {
                messages.try_recv().map_err(|error| error == TryRecvError::Disconnected)
            };
            match message {
                Ok(Message::Job(job)) => submit(&mut engine, &mut open, &tokenizer, *job),
                Ok(Message::StopBy(deadline)) => stop_by = Some(deadline),
                // Nobody will ask for anything more.
                Err(true) if engine.is_idle() => return,
                Err(_) => break,
            }
        }
        let failed = match step(&mut engine, &model, &is_end, &mut open) {
            Ok(()) => None,
            // The model may fail for one of the sequences only, but it is not known for which.
            Err(error) => Some(Failure::Model(format!("{error:#}"))),
        };
        let now = Instant::now();
        let stopping = stop_by.is_some_and(|stop_by| stop_by <= now);
        let ended: Vec<usize> = open
            .iter()
            .filter_map(|(&sequence, open)| {
                let failure = match &failed {
                    Some(failure) => failure.clone(),
                    None if stopping => Failure::Stopping,
                    None if open.deadline <= now => Failure::Deadline,
                    None if open.replies.is_closed() => return Some(sequence),
                    None => return None,
                };
                let _ = open.replies.send(Reply::Failed(failure));
                Some(sequence)
            })
            .collect();
        end(&mut engine, &mut open, &ended);
        metrics::state(&engine, cache.pool());
    }
}

fn submit<'a>(engine: &mut Engine<'_>, open: &mut HashMap<usize, Open<'a>>, tokenizer: &'a Tokenizer, job: Job) {
    let Job { request, options, stop, first_choice, replies, since, deadline, place } = job;
    let (place, prompt_tokens) = (Arc::new(place), request.prompt.len());
    for (choice, sequence) in (first_choice..).zip(engine.submit(request, options)) {
        let text = Text::new(tokenizer, stop.clone());
        let (replies, place) = (replies.clone(), Some(place.clone()));
        let (tokens, cached_tokens, logprobs, last) = (0, 0, Vec::new(), since);
        let answer = Open {
            choice,
            text,
            tokens,
            prompt_tokens,
            cached_tokens,
            logprobs,
            replies,
            since,
            last,
            deadline,
            place,
        };
        open.insert(sequence, answer);
    }
}

/// One step, and what it has brought is sent.
fn step(
    engine: &mut Engine<'_>,
    model: &impl LanguageModel,
    is_end: &impl Fn(u32) -> bool,
    open: &mut HashMap<usize, Open<'_>>,
) -> Result<()> {
    let started = Instant::now();
    let events = engine.step(model, is_end)?;
    if !events.is_empty() {
        metrics::step(started.elapsed());
    }
    let mut stopped = Vec::new();
    for event in events {
        match event {
            Event::Started { sequence } => {
                if let Some(open) = open.get_mut(&sequence) {
                    open.place = None;
                }
            }
            Event::Token { sequence, token, logprobs } => {
                let Some(open) = open.get_mut(&sequence) else { continue };
                if open.push(token, logprobs)? {
                    stopped.push(sequence);
                }
            }
            Event::Finished { sequence, answer: Answer { cached_tokens, .. }, reason } => {
                let Some(mut open) = open.remove(&sequence) else { continue };
                open.cached_tokens = cached_tokens;
                // It has stopped already if its last token brought a stop.
                let mut stop = reason == FinishReason::Stop;
                match stopped.iter().position(|&other| other == sequence) {
                    Some(at) => {
                        stopped.swap_remove(at);
                        stop = true;
                    }
                    None => {
                        let (text, found) = open.text.finish()?;
                        open.send(text);
                        stop |= found;
                    }
                }
                open.finish(if stop { "stop" } else { "length" });
            }
        }
    }
    for sequence in &stopped {
        if let Some(open) = open.get_mut(sequence) {
            open.cached_tokens = engine.answer(*sequence).map_or(0, |answer| answer.cached_tokens);
            open.finish("stop");
        }
    }
    end(engine, open, &stopped);
    Ok(())
}

impl Open<'_> {
    /// Takes a token; returns whether the answer stops there.
    fn push(&mut self, token: u32, logprobs: Option<Logprobs>) -> Result<bool> {
        let now = Instant::now();
        metrics::token(self.tokens == 0, now - self.last);
        (self.last, self.tokens) = (now, self.tokens + 1);
        self.logprobs.extend(logprobs.map(|logprobs| (token, logprobs)));
        let (text, stop) = self.text.push(token)?;
        if !text.is_empty() {
            self.send(text);
        }
        Ok(stop)
    }

    fn send(&mut self, text: String) {
        if text.is_empty() && self.logprobs.is_empty() {
            return;
        }
        let logprobs = std::mem::take(&mut self.logprobs);
        // The client may have gone.
        let _ = self.replies.send(Reply::Piece { choice: self.choice, text, logprobs });
    }

    fn finish(&mut self, reason: &'static str) {
        let Self { choice, tokens, cached_tokens, prompt_tokens, since, .. } = *self;
        let _ = self.replies.send(Reply::Finished { choice, reason, tokens, cached_tokens });
        metrics::finished(reason, prompt_tokens, tokens, since.elapsed());
    }
}

/// Ends sequences whose answers nobody waits for any more.
fn end(engine: &mut Engine<'_>, open: &mut HashMap<usize, Open<'_>>, sequences: &[usize]) {
    if sequences.is_empty() {
        return;
    }
    sequences.iter().for_each(|sequence| drop(open.remove(sequence)));
    if let Err(error) = engine.cancel(sequences) {
        // A table is lost, which only a fault in this program can do; its blocks are freed when the thread ends.
        inference::shown::say(&format!("error: {error:#}"));
    }
}
