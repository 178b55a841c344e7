//! The tokens of prompts to publish and to match.

/// The number of token ids.
const VOCABULARY: u64 = 128_000;

/// An infinite sequence of prompts, the same in every run, no two of which are equal.
#[derive(Debug, Default)]
pub(crate) struct Prompts {
    drawn: u64,
}

impl Prompts {
    /// The next prompt, of `tokens` tokens.
    pub(crate) fn next(&mut self, tokens: usize) -> Vec<u32> {
        (0..tokens).map(|_| self.token()).collect()
    }

    /// The next token: a hash of a counter.
    fn token(&mut self) -> u32 {
        self.drawn += 1;
        let mut bits = self.drawn.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for shift in [29, 32] {
            bits = (bits ^ (bits >> shift)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        }
        ((bits >> 32) % VOCABULARY) as u32
    }
}
