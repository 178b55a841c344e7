//! The instruction sets. For each, a vector type of sixteen lanes, and a shim function that is compiled with the
//! instruction set enabled.

/// Calls one intrinsic of up to three arguments, or a shim function. The arguments are evaluated outside of the unsafe
/// block.
///
/// A file may use it only for its own instruction set, in functions that its shim function calls. Each vector type is
/// private to its file and named only in that function, and `Kernel::run` calls it only if the CPU has the instructions.
/// A pointer must come from a reference to an array of exactly the size that is read or written.
macro_rules! instruction {
    ($f:ident $(::<$c:tt>)? ()) => {{
        // SAFETY: the CPU has this instruction, see above.
        unsafe { $f $(::<$c>)? () }
    }};
    ($f:ident $(::<$c:tt>)? ($a:expr)) => {{
        let a = $a;
        // SAFETY: the CPU has this instruction, and a pointer has the array that it needs, see above.
        unsafe { $f $(::<$c>)? (a) }
    }};
    ($f:ident $(::<$c:tt>)? ($a:expr, $b:expr)) => {{
        let (a, b) = ($a, $b);
        // SAFETY: the CPU has this instruction, and a pointer has the array that it needs, see above.
        unsafe { $f $(::<$c>)? (a, b) }
    }};
    ($f:ident $(::<$c:tt>)? ($a:expr, $b:expr, $third:expr)) => {{
        let (a, b, c) = ($a, $b, $third);
        // SAFETY: the CPU has this instruction, see above.
        unsafe { $f $(::<$c>)? (a, b, c) }
    }};
}

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(super) mod neon;
pub(super) mod portable;
pub(super) mod prefetch;
