//! Asking for memory before it is needed.

/// Asks for the cache line of `x`. Nothing else happens, and nothing at all where there is no such instruction.
#[inline(always)]
pub(in crate::cpu) fn prefetch<T>(x: &T) {
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch reads nothing that the program can see and never faults; the address is a live reference's.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(x).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = x;
}
