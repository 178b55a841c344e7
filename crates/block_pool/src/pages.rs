//! Giving memory back to the system while its addresses stay reserved.
#![allow(unsafe_code)]

use std::ops::Range;

/// Numbers whose memory can be replaced by zeros: every pattern of bits is a number.
pub(crate) trait Number: Copy {}

impl Number for f32 {}
impl Number for half::f16 {}
impl Number for half::bf16 {}
impl Number for u8 {}

/// Gives the pages that lie wholly in `range` of these numbers back to the system. The numbers there are arbitrary
/// afterwards (zeros, in memory that an allocator has requested from the system), and the system provides the pages
/// again when they are used next. Does nothing on systems where this is not known to work.
pub(crate) fn release<T: Number>(numbers: &mut [T], range: Range<usize>) {
    let Some(numbers) = numbers.get_mut(range) else { return };
    #[cfg(target_os = "linux")]
    {
        // SAFETY: `sysconf` reads a constant of the system.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let page = usize::try_from(page).unwrap_or(1 << 16).max(1);
        let bytes = numbers.as_mut_ptr_range();
        let first = bytes.start.addr().next_multiple_of(page);
        let end = bytes.end.addr() / page * page;
        if first < end {
            let start = bytes.start.map_addr(|_| first);
            // SAFETY: the pages lie inside `numbers`, which are borrowed exclusively, so nobody else reads or writes them.
            // They stay mapped. Their new content is zeros, or that of the file that they map; every pattern of bits is a
            // number. If the system refuses, it changes nothing.
            unsafe { libc::madvise(start.cast(), end - first, libc::MADV_DONTNEED) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = numbers;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pages_inside_the_range_are_released() {
        const N: usize = 1 << 20;
        let mut numbers = vec![1f32; N];
        release(&mut numbers, 100..N - 100);
        release(&mut numbers, N..N + 7); // out of range: nothing
        assert!(numbers[..100].iter().chain(&numbers[N - 100..]).all(|&x| x == 1.0));
        if cfg!(target_os = "linux") {
            assert_eq!(numbers[N / 2], 0.0);
        }
        numbers.fill(2.0);
        assert!(numbers.iter().all(|&x| x == 2.0));
    }
}
