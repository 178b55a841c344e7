//! The limit of the machine's arithmetic.

use std::hint::black_box;

/// Independent chains of multiply-adds: enough to keep all units busy, and few enough to fit into registers.
pub const CHAINS: usize = 96;

/// Does `rounds` times [`CHAINS`] multiply-adds of f32 in registers on this thread, with the widest instructions of this
/// machine.
pub fn multiply_adds(rounds: usize) -> f32 {
    pulp::Arch::new().dispatch(MultiplyAdds(rounds))
}

/// A type, because a closure may be compiled without the instructions that `dispatch` permits.
struct MultiplyAdds(usize);

impl pulp::NullaryFnOnce for MultiplyAdds {
    type Output = f32;

    #[inline(always)]
    fn call(self) -> f32 {
        let (by, plus) = (black_box(0.999f32), black_box(1e-3f32));
        let mut sums = [0f32; CHAINS];
        for _ in 0..self.0 {
            for sum in &mut sums {
                *sum = sum.mul_add(by, plus);
            }
        }
        sums.iter().sum()
    }
}
