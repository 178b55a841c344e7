//! The instruction sets, and the choice of the one that runs.

use super::arch;
use super::wide::Run;

/// A compilation of the attention algorithm for one instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernel {
    /// Plain Rust, for every machine.
    Portable,
    /// NEON: every 64-bit Arm.
    Neon,
    /// AVX2 with fused multiply-add and half precision conversion: x86-64 since about 2013.
    Avx2,
    /// AVX-512 with VNNI: Intel since Ice Lake, AMD since Zen 4.
    Avx512,
}

impl Kernel {
    /// All kernels, the fastest last.
    pub const ALL: [Kernel; 4] = [Kernel::Portable, Kernel::Neon, Kernel::Avx2, Kernel::Avx512];

    /// The fastest kernel that this machine can run.
    pub fn best() -> Kernel {
        Self::ALL.into_iter().rfind(|kernel| kernel.is_available()).unwrap_or(Kernel::Portable)
    }

    /// Whether this machine can run this kernel.
    pub fn is_available(self) -> bool {
        match self {
            Kernel::Portable => true,
            #[cfg(target_arch = "aarch64")]
            Kernel::Neon => true,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => arch::avx2::is_available(),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 => arch::avx512::is_available(),
            #[allow(unreachable_patterns)] // reachable only where an arm above is compiled out
            _ => false,
        }
    }

    /// The kernel's name in benchmarks and errors.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Portable => "portable",
            Kernel::Neon => "neon",
            Kernel::Avx2 => "avx2",
            Kernel::Avx512 => "avx512",
        }
    }

    /// Runs `run` with this instruction set, or with the portable kernel if this machine cannot run it.
    #[allow(unsafe_code)]
    pub(super) fn run<R: Run>(self, run: R) -> R::Output {
        match self {
            #[cfg(target_arch = "aarch64")]
            // SAFETY: every 64-bit Arm CPU that this target covers has NEON.
            Kernel::Neon => unsafe { arch::neon::run(run) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the guard has just checked that this CPU has every instruction set that the function is compiled
            // with.
            Kernel::Avx2 if self.is_available() => unsafe { arch::avx2::run(run) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the guard has just checked that this CPU has every instruction set that the function is compiled
            // with.
            Kernel::Avx512 if self.is_available() => unsafe { arch::avx512::run(run) },
            _ => run.run::<arch::portable::Portable>(),
        }
    }
}
