//! What was sent, for replays.

use std::collections::VecDeque;

use bytes::Bytes;

/// The last batches that were sent, with their sequence numbers.
#[derive(Debug)]
pub(super) struct Sent {
    /// The sequence number of the first batch that is kept.
    first: u64,
    batches: VecDeque<Bytes>,
    bytes: usize,
    most_batches: usize,
    most_bytes: usize,
}

impl Sent {
    pub(super) fn new(most_batches: usize, most_bytes: usize) -> Self {
        Self { first: 0, batches: VecDeque::new(), bytes: 0, most_batches, most_bytes }
    }

    /// Keeps a batch, as long as it is among the last ones. Returns its sequence number.
    pub(super) fn push(&mut self, batch: Bytes) -> u64 {
        let sequence = self.first + self.batches.len() as u64;
        self.bytes += batch.len();
        self.batches.push_back(batch);
        while self.batches.len() > self.most_batches || self.bytes > self.most_bytes {
            let Some(oldest) = self.batches.pop_front() else { break };
            self.bytes -= oldest.len();
            self.first += 1;
        }
        sequence
    }

    /// Whether the batch with this sequence number was sent, and is not kept any more.
    pub(super) fn has_dropped(&self, sequence: u64) -> bool {
        sequence < self.first
    }

    /// The batches that are kept, from this sequence number on.
    pub(super) fn from(&self, sequence: u64) -> impl Iterator<Item = (u64, &Bytes)> {
        let skipped = usize::try_from(sequence.saturating_sub(self.first)).unwrap_or(usize::MAX);
        (self.first..).zip(&self.batches).skip(skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(sent: &Sent, from: u64) -> Vec<u64> {
        sent.from(from).map(|(sequence, _)| sequence).collect()
    }

    #[test]
    fn the_last_batches_are_kept() {
        let mut sent = Sent::new(3, 10);
        for sequence in 0..5 {
            assert_eq!(sent.push(Bytes::from_static(b"ab")), sequence);
        }
        assert_eq!(
            (numbers(&sent, 0), numbers(&sent, 3), numbers(&sent, u64::MAX)),
            (vec![2, 3, 4], vec![3, 4], vec![])
        );
        assert!(sent.has_dropped(1) && !sent.has_dropped(2) && !sent.has_dropped(9));
        // Four bytes are too many together with seven.
        sent.push(Bytes::from_static(b"abcdefg"));
        assert_eq!(numbers(&sent, 0), [4, 5]);
        // A batch that is too large is sent, but not kept.
        assert_eq!(sent.push(Bytes::from_static(b"abcdefghijk")), 6);
        assert_eq!((numbers(&sent, 0), sent.bytes), (vec![], 0));
        assert_eq!(sent.push(Bytes::new()), 7);
        assert!(sent.has_dropped(6));
    }
}
