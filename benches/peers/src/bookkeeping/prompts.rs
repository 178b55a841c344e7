//! Tokens to publish and to look for.

/// Ids in the vocabulary that the tokens are drawn from.
const VOCABULARY: u64 = 128_000;

/// An endless supply of prompts, the same in every run and no two alike.
#[derive(Debug, Default)]
pub(crate) struct Prompts {
    drawn: u64,
}

impl Prompts {
    /// The next prompt.
    pub(crate) fn next(&mut self, tokens: usize) -> Vec<u32> {
        (0..tokens).map(|_| self.token()).collect()
    }

    /// A counter, well stirred.
    fn token(&mut self) -> u32 {
        self.drawn += 1;
        let mut bits = self.drawn.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for shift in [29, 32] {
            bits = (bits ^ (bits >> shift)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        }
        ((bits >> 32) % VOCABULARY) as u32
    }
}
