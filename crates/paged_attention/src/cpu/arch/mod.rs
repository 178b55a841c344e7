//! The instruction sets. For each, a vector type of sixteen lanes, and a shim function that is compiled with the
//! instruction set enabled.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(super) mod neon;
pub(super) mod portable;
pub(super) mod prefetch;
