//! Mooncake's traces: one JSON object per line, with `timestamp` in milliseconds, `input_length`, `output_length` and
//! `hash_ids`.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::request::{PREFIX_BLOCK, Request};

#[derive(Deserialize)]
struct Line {
    timestamp: f64,
    input_length: usize,
    output_length: usize,
    hash_ids: Vec<u32>,
}

/// The largest block id. A token is `id * PREFIX_BLOCK + offset`, which must fit into 31 bits.
const MAX_ID: u32 = (1 << 31) / PREFIX_BLOCK as u32 - 1;

pub(super) fn parse(text: &str) -> Result<Vec<Request>> {
    let mut requests: Vec<Request> = Vec::new();
    for (line, number) in text.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty()) {
        let request = request(line, requests.len() as u32).with_context(|| format!("line {number}"))?;
        requests.push(request);
    }
    if let Some(first) = requests.first().map(|request| request.arrival) {
        requests.iter_mut().for_each(|request| request.arrival -= first);
    }
    Ok(requests)
}

fn request(line: &str, number: u32) -> Result<Request> {
    let Line { timestamp, input_length: input, output_length: output, hash_ids: prefix } = serde_json::from_str(line)?;
    ensure!(input > 0 && output > 0, "a request has {input} tokens in and {output} out");
    let blocks = input.div_ceil(PREFIX_BLOCK);
    ensure!(prefix.len() <= blocks, "{} hash_ids for {blocks} blocks of {PREFIX_BLOCK} tokens", prefix.len());
    if let Some(id) = prefix.iter().find(|&&id| id > MAX_ID) {
        anyhow::bail!("the block id {id} is above {MAX_ID}");
    }
    Ok(Request { number, arrival: timestamp / 1000.0, input, output, prefix })
}

#[cfg(test)]
#[allow(unused_imports, dead_code, reason = "a benchmark is built with cfg(test) and without its tests")]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_equal_exactly_where_the_ids_are() {
        let line = |ids: &str| {
            format!("{{\"timestamp\": 3000, \"input_length\": 1000, \"output_length\": 5, \"hash_ids\": {ids}}}\n")
        };
        let requests = parse(&(line("[0, 1]") + &line("[0, 2]"))).expect("both lines are right");
        let [a, b] = &requests[..] else { unreachable!("{} requests", requests.len()) };
        assert_eq!((a.arrival, a.total()), (0.0, 1004));
        assert!((0..512).all(|position| a.token(position) == b.token(position)));
        assert!((512..1004).all(|position| a.token(position) != b.token(position)));
        assert!(parse(&line("[0, 1, 2]")).is_err(), "three ids for two blocks");
        assert!(parse(&line("[4194304, 1]")).is_err(), "an id beyond 31 bits of tokens");
    }
}
