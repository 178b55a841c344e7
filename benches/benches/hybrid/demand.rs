//! How much memory there is, and how much of it is asked for.

/// How many tokens a sequence computes at a time.
pub(crate) const CHUNK: usize = 512;

/// The memory, and the sequences that compete for it.
pub(crate) struct Demand {
    /// The budget in bytes.
    pub(crate) bytes: usize,
    /// How many tokens a long sequence has.
    pub(crate) long: usize,
    /// How many tokens a short sequence has.
    pub(crate) short: usize,
    /// How many sequences arrive while the demand shifts.
    pub(crate) arrivals: usize,
}

impl Demand {
    pub(crate) const fn full() -> Self {
        Self { bytes: 4 << 30, long: 32_768, short: 300, arrivals: 2000 }
    }

    /// For a smoke test. As in the full run, one long sequence fits, and two do not.
    pub(crate) const fn small() -> Self {
        Self { bytes: 1 << 30, long: 4096, short: 300, arrivals: 60 }
    }
}
