//! The requests of a workload.

/// Tokens that share one id in [`Request::prefix`].
pub(crate) const PREFIX_BLOCK: usize = 512;

/// One request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Request {
    /// Its index in the workload.
    pub(crate) number: u32,
    /// Seconds after the first request.
    pub(crate) arrival: f64,
    /// Tokens of its prompt, at least 1.
    pub(crate) input: usize,
    /// Tokens that will be generated, at least 1.
    pub(crate) output: usize,
    /// One id for each 512 tokens of the prompt; the last may have fewer. Equal ids mean equal tokens, with equal
    /// tokens before them. Empty if the trace has no ids; then the prompt shares no prefix with any other.
    pub(crate) prefix: Vec<u32>,
}

impl Request {
    /// The number of tokens stored at the end: all but the last generated one, which is never read.
    pub(crate) fn total(&self) -> usize {
        self.input + self.output - 1
    }

    /// The token at `position`. At the same position, two requests have the same token exactly if they have the same
    /// prefix id there.
    #[inline]
    pub(crate) fn token(&self, position: usize) -> u32 {
        const OWN: u32 = 1 << 31;
        match self.prefix.get(position / PREFIX_BLOCK).filter(|_| position < self.input) {
            Some(&id) => (id * PREFIX_BLOCK as u32 + (position % PREFIX_BLOCK) as u32) & !OWN,
            // The factor is odd, so no two requests have the same first token.
            None => OWN | self.number.wrapping_mul(0x9E37_79B1).wrapping_add(position as u32),
        }
    }
}
