//! Allocators that give each sequence one contiguous region. They differ in its size.

use anyhow::{Result, ensure};

use super::allocator::Pool;
use super::buddies::Buddies;
use super::first_come::Memory;
use super::regions::Regions;

/// The maximum length for each sequence, as candle's `KvCache` reserves.
pub(crate) struct MaximumLength {
    max_len: usize,
    regions: usize,
    in_use: usize,
}

impl MaximumLength {
    pub(crate) fn new(pool: Pool) -> Self {
        Self { max_len: pool.max_len, regions: pool.tokens / pool.max_len, in_use: 0 }
    }
}

impl Memory for MaximumLength {
    type Allocation = ();

    fn start(&mut self, _tokens: usize, _total: usize) -> Option<()> {
        (self.in_use < self.regions).then(|| self.in_use += 1)
    }

    fn grow(&mut self, _allocation: &mut (), _tokens: usize) -> bool {
        true
    }

    fn end(&mut self, _allocation: ()) {
        self.in_use -= 1;
    }

    fn reserved(&self) -> usize {
        self.in_use * self.max_len
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
    /// The start of the region, and its size as a power of two.
    type Allocation = (usize, usize);

    fn start(&mut self, _tokens: usize, total: usize) -> Option<Self::Allocation> {
        let order = total.next_power_of_two().ilog2() as usize;
        let start = self.memory.allocate(order)?;
        self.reserved += 1 << order;
        Some((start, order))
    }

    fn grow(&mut self, _allocation: &mut Self::Allocation, _tokens: usize) -> bool {
        true
    }

    fn end(&mut self, (start, order): Self::Allocation) {
        self.memory.free(start, order);
        self.reserved -= 1 << order;
    }

    fn reserved(&self) -> usize {
        self.reserved
    }
}

/// Exactly the whole length, known in advance: memory is lost only between the regions.
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
    /// The start of the region, and its length.
    type Allocation = (usize, usize);

    fn start(&mut self, _tokens: usize, total: usize) -> Option<Self::Allocation> {
        let start = self.memory.allocate(total)?;
        self.reserved += total;
        Some((start, total))
    }

    fn grow(&mut self, _allocation: &mut Self::Allocation, _tokens: usize) -> bool {
        true
    }

    fn end(&mut self, (start, len): Self::Allocation) {
        self.memory.free(start, len);
        self.reserved -= len;
    }

    fn reserved(&self) -> usize {
        self.reserved
    }
}

/// The prompt rounded up to a power of two, doubled whenever it is full, up to the maximum length: in place if the
/// memory after it is free, otherwise by copying to a new region. Both regions are allocated while it copies.
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
    /// The start of the region, and its length.
    type Allocation = (usize, usize);

    fn start(&mut self, tokens: usize, _total: usize) -> Option<Self::Allocation> {
        let len = (tokens + 1).next_power_of_two().min(self.max_len);
        let start = self.memory.allocate(len)?;
        self.reserved += len;
        Some((start, len))
    }

    fn grow(&mut self, allocation: &mut Self::Allocation, tokens: usize) -> bool {
        let (start, len) = *allocation;
        if tokens <= len {
            return true;
        }
        let longer = (2 * len).min(self.max_len).max(tokens);
        if self.memory.allocate_at(start + len, longer - len) {
            *allocation = (start, longer);
        } else if let Some(elsewhere) = self.memory.allocate(longer) {
            self.memory.free(start, len);
            *allocation = (elsewhere, longer);
        } else {
            return false;
        }
        self.reserved += longer - len;
        true
    }

    fn end(&mut self, (start, len): Self::Allocation) {
        self.memory.free(start, len);
        self.reserved -= len;
    }

    fn reserved(&self) -> usize {
        self.reserved
    }
}
