//! The instruction sets: for each a type of sixteen numbers, and a shim that permits the compiler its instructions.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(super) mod neon;
pub(super) mod portable;
pub(super) mod prefetch;
