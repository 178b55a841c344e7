//! The instruction sets, and which one runs.
//!
//! The algorithm is written once and compiled once per instruction set: each shim below is a function that permits the
//! compiler more instructions and contains nothing but the inlined algorithm.

use super::algorithm::{self, Scratch, Task};
use super::element::Element;

/// A compilation of the attention algorithm for one instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernel {
    /// For every machine.
    Portable,
    /// AVX2 with fused multiply-add and half precision conversion: x86-64 since about 2013.
    Avx2,
}

impl Kernel {
    /// All kernels, the fastest last.
    pub const ALL: [Kernel; 2] = [Kernel::Portable, Kernel::Avx2];

    /// The fastest kernel that this machine can run.
    pub fn best() -> Kernel {
        Self::ALL.into_iter().rfind(|kernel| kernel.is_available()).unwrap_or(Kernel::Portable)
    }

    /// Whether this machine can run it.
    pub fn is_available(self) -> bool {
        match self {
            Kernel::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Kernel::Avx2 => false,
        }
    }

    /// Its name in benchmarks and errors.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Portable => "portable",
            Kernel::Avx2 => "avx2",
        }
    }

    pub(super) fn attend<T: Element>(self, task: &Task<'_, T>, out: &mut [&mut [f32]], scratch: &mut Scratch) {
        match self {
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Kernel::Avx2 if self.is_available() => {
                // SAFETY: the guard has just asked this CPU for every feature that the function is compiled with.
                unsafe { attend_avx2(task, out, scratch) }
            }
            _ => algorithm::attend::<T, false>(task, out, scratch),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn attend_avx2<T: Element>(task: &Task<'_, T>, out: &mut [&mut [f32]], scratch: &mut Scratch) {
    algorithm::attend::<T, true>(task, out, scratch);
}
