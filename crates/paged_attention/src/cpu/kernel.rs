//! Which instruction sets there are, and which one runs.

use super::arch;
use super::wide::Wide;

/// A compilation of the attention algorithm for one instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernel {
    /// For every machine.
    Portable,
    /// NEON: every 64-bit Arm.
    Neon,
    /// AVX2 with fused multiply-add and half precision conversion: x86-64 since about 2013.
    Avx2,
    /// AVX-512 with VNNI: Intel since Ice Lake, AMD since Zen 4.
    Avx512,
}

/// Something that can be computed with any instruction set.
///
/// It has to be inlined into the shim that permits the instructions, and so have the functions that it calls.
pub(super) trait Run {
    type Output;

    fn run<V: Wide>(self) -> Self::Output;
}

impl Kernel {
    /// All kernels, the fastest last.
    pub const ALL: [Kernel; 4] = [Kernel::Portable, Kernel::Neon, Kernel::Avx2, Kernel::Avx512];

    /// The fastest kernel that this machine can run.
    pub fn best() -> Kernel {
        Self::ALL.into_iter().rfind(|kernel| kernel.is_available()).unwrap_or(Kernel::Portable)
    }

    /// Whether this machine can run it.
    pub fn is_available(self) -> bool {
        match self {
            Kernel::Portable => true,
            #[cfg(target_arch = "aarch64")]
            Kernel::Neon => true,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => arch::avx2::is_available(),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 => arch::avx512::is_available(),
            #[allow(unreachable_patterns)] // every architecture leaves out others
            _ => false,
        }
    }

    /// Its name in benchmarks and errors.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Portable => "portable",
            Kernel::Neon => "neon",
            Kernel::Avx2 => "avx2",
            Kernel::Avx512 => "avx512",
        }
    }

    /// Runs `run` with this instruction set, or with the portable one where there is no such.
    #[allow(unsafe_code)]
    pub(super) fn run<R: Run>(self, run: R) -> R::Output {
        match self {
            #[cfg(target_arch = "aarch64")]
            // SAFETY: NEON is a part of every 64-bit Arm CPU that this target stands for.
            Kernel::Neon => unsafe { arch::neon::run(run) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the guard has just asked this CPU for every instruction that the function is compiled with.
            Kernel::Avx2 if self.is_available() => unsafe { arch::avx2::run(run) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the guard has just asked this CPU for every instruction that the function is compiled with.
            Kernel::Avx512 if self.is_available() => unsafe { arch::avx512::run(run) },
            _ => run.run::<arch::portable::Portable>(),
        }
    }
}
