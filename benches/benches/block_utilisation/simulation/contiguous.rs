//! One contiguous region for each sequence: how large, is what they differ in.

use anyhow::{Result, ensure};

use super::allocator::Pool;
use super::buddies::Buddies;
use super::first_come::Memory;
use super::regions::Regions;

/// The maximum length for everybody: what candle's `KvCache` reserves.
pub(crate) struct MaximumLength {
    max_len: usize,
    places: usize,
    taken: usize,
}

impl MaximumLength {
    pub(crate) fn new(pool: Pool) -> Self {
        Self { max_len: pool.max_len, places: pool.tokens / pool.max_len, taken: 0 }
    }
}

impl Memory for MaximumLength {
    type Held = ();

    fn start(&mut self, _tokens: usize, _total: usize) -> Option<()> {
        (self.taken < self.places).then(|| self.taken += 1)
    }

    fn grow(&mut self, _held: &mut (), _tokens: usize) -> bool {
        true
    }

    fn end(&mut self, _held: ()) {
        self.taken -= 1;
    }

    fn reserved(&self) -> usize {
        self.taken * self.max_len
    }
}

/// The whole length, known in advance, rounded up to a power of two.
pub(crate) struct PowerOfTwo {
    memory: Buddies,
    reserved: usize,
}

impl PowerOfTwo {
    pub(crate) fn new(pool: Pool) -> Result<Self> {
        let (largest, needed) = (1usize << pool.tokens.ilog2(), pool.max_len.next_power_of_two());
        ensure!(needed <= largest, "a region of {needed} tokens does not fit into a pool of {}", pool.tokens);
        Ok(Self { memory: Buddies::new(pool.tokens), reserved: 0 })
    }
}

impl Memory for PowerOfTwo {
    /// Where the region starts, and the power.
    type Held = (usize, usize);

    fn start(&mut self, _tokens: usize, total: usize) -> Option<Self::Held> {
        let order = total.next_power_of_two().ilog2() as usize;
        let start = self.memory.take(order)?;
        self.reserved += 1 << order;
        Some((start, order))
    }

    fn grow(&mut self, _held: &mut Self::Held, _tokens: usize) -> bool {
        true
    }

    fn end(&mut self, (start, order): Self::Held) {
        self.memory.give_back(start, order);
        self.reserved -= 1 << order;
    }

    fn reserved(&self) -> usize {
        self.reserved
    }
}

/// Exactly the whole length, known in advance: what is lost is lost between the regions.
pub(crate) struct Known {
    memory: Regions,
    reserved: usize,
}

impl Known {
    pub(crate) fn new(tokens: usize) -> Self {
        Self { memory: Regions::new(tokens), reserved: 0 }
    }
}

impl Memory for Known {
    /// Where the region starts, and its length.
    type Held = (usize, usize);

    fn start(&mut self, _tokens: usize, total: usize) -> Option<Self::Held> {
        let start = self.memory.take(total)?;
        self.reserved += total;
        Some((start, total))
    }

    fn grow(&mut self, _held: &mut Self::Held, _tokens: usize) -> bool {
        true
    }

    fn end(&mut self, (start, len): Self::Held) {
        self.memory.give_back(start, len);
        self.reserved -= len;
    }

    fn reserved(&self) -> usize {
        self.reserved
    }
}

/// The prompt rounded up to a power of two, and twice as much whenever it is full, up to the maximum length: in place
/// where the neighbouring memory is free, by copying to a new region otherwise. Both are there while it copies.
pub(crate) struct Doubling {
    memory: Regions,
    max_len: usize,
    reserved: usize,
}

impl Doubling {
    pub(crate) fn new(pool: Pool) -> Self {
        Self { memory: Regions::new(pool.tokens), max_len: pool.max_len, reserved: 0 }
    }
}

impl Memory for Doubling {
    /// Where the region starts, and its length.
    type Held = (usize, usize);

    fn start(&mut self, tokens: usize, _total: usize) -> Option<Self::Held> {
        let len = (tokens + 1).next_power_of_two().min(self.max_len);
        let start = self.memory.take(len)?;
        self.reserved += len;
        Some((start, len))
    }

    fn grow(&mut self, held: &mut Self::Held, tokens: usize) -> bool {
        let (start, len) = *held;
        if tokens <= len {
            return true;
        }
        let longer = (2 * len).min(self.max_len).max(tokens);
        if self.memory.take_at(start + len, longer - len) {
            *held = (start, longer);
        } else if let Some(elsewhere) = self.memory.take(longer) {
            self.memory.give_back(start, len);
            *held = (elsewhere, longer);
        } else {
            return false;
        }
        self.reserved += longer - len;
        true
    }

    fn end(&mut self, (start, len): Self::Held) {
        self.memory.give_back(start, len);
        self.reserved -= len;
    }

    fn reserved(&self) -> usize {
        self.reserved
    }
}
