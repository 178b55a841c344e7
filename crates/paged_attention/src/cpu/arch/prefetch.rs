//! Software prefetch.

/// Prefetches the cache line of `x` into the second-level cache (x86-64 `prefetcht1`). Does nothing on other
/// architectures.
#[inline(always)]
pub(in crate::cpu) fn prefetch<T>(x: &T) {
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch reads nothing that the program can see and never faults; the address is that of a live
        // reference.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(x).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = x;
}
