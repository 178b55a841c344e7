//! The log probabilities of a token and its alternatives.

/// A token and the natural logarithm of its probability, before temperature and top-p.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// The logarithm.
    pub logprob: f32,
}

/// The log probabilities at one position.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// That of the token that was drawn.
    pub drawn: f32,
    /// The most likely tokens, the most likely first.
    pub top: Vec<TokenLogprob>,
}

impl Logprobs {
    /// Those of a drawn token and of the `most` most likely ones.
    pub(super) fn of(logits: &[f32], token: u32, most: usize) -> Self {
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit - highest).exp()).sum();
        let of = |logit: f32| logit - highest - sum.ln() as f32;
        let mut top: Vec<u32> = (0..logits.len() as u32).collect();
        let logit = |token: u32| logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
        let most = most.min(top.len());
        let order = |a: &u32, b: &u32| logit(*b).total_cmp(&logit(*a)).then(a.cmp(b));
        if most < top.len() {
            top.select_nth_unstable_by(most, order);
            top.truncate(most);
        }
        top.sort_by(order);
        let logprob = |token| TokenLogprob { token, logprob: of(logit(token)) };
        Self { drawn: of(logit(token)), top: top.into_iter().map(logprob).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_add_up_and_the_most_likely_come_first() {
        let logits = [1000.0, 1001.0, 999.0, 1001.0];
        let all = Logprobs::of(&logits, 2, 9);
        assert_eq!(all.top.iter().map(|top| top.token).collect::<Vec<_>>(), [1, 3, 0, 2]);
        let sum: f32 = all.top.iter().map(|top| top.logprob.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-5, "{sum}");
        assert_eq!(all.drawn, all.top[3].logprob);
        assert_eq!(Logprobs::of(&logits, 2, 2), Logprobs { drawn: all.drawn, top: all.top[..2].to_vec() });
        assert!(Logprobs::of(&logits, 2, 0).top.is_empty());
    }
}
