//! The Azure LLM inference traces: `TIMESTAMP,ContextTokens,GeneratedTokens`.

use anyhow::{Context, Result, ensure};
use jiff::civil::DateTime;

use super::request::Request;

pub(super) fn parse(text: &str) -> Result<Vec<Request>> {
    let mut lines = text.lines().zip(1..);
    let header = lines.next().map(|(line, _)| line.trim());
    ensure!(
        header == Some("TIMESTAMP,ContextTokens,GeneratedTokens"),
        "the first line is not TIMESTAMP,ContextTokens,GeneratedTokens"
    );
    let mut first = None;
    let mut requests = Vec::new();
    for (line, number) in lines.filter(|(line, _)| !line.trim().is_empty()) {
        let (time, input, output) = fields(line).with_context(|| format!("line {number}: {line}"))?;
        let first = *first.get_or_insert(time);
        requests.push(Request {
            number: requests.len() as u32,
            arrival: time.duration_since(first).as_secs_f64(),
            input,
            output,
            prefix: Vec::new(),
        });
    }
    Ok(requests)
}

fn fields(line: &str) -> Result<(DateTime, usize, usize)> {
    let mut fields = line.trim().split(',');
    let mut next = || fields.next().context("three fields are expected");
    let time = next()?.parse().context("the timestamp is not a date and time")?;
    let input: usize = next()?.parse().context("the context's tokens are not a number")?;
    let output: usize = next()?.parse().context("the generated tokens are not a number")?;
    ensure!(input > 0 && output > 0, "a request has {input} context tokens and {output} generated ones");
    Ok((time, input, output))
}

#[cfg(test)]
#[allow(unused_imports, dead_code, reason = "a benchmark is built with cfg(test) and without its tests")]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_parsed_and_an_error_names_the_line() {
        let header = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n";
        let two = format!("{header}2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9305900,396,109\r\n");
        let requests = parse(&two).expect("both lines are right");
        let numbers: Vec<_> = requests.iter().map(|r| (r.number, r.arrival, r.input, r.output)).collect();
        assert_eq!(numbers, [(0, 0.0, 374, 44), (1, 4.25, 396, 109)]);
        let wrong = format!("{two}2023-11-16 18:15:50.9305900,0,109\n");
        let error = parse(&wrong).expect_err("no context");
        assert!(format!("{error:#}").starts_with("line 4"), "{error:#}");
        assert!(parse("a,b,c\n").is_err() && parse("").is_err());
    }
}
