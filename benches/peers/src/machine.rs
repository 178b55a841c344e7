//! What the parts are measured with.

use rayon::ThreadPool;

use crate::args::Effort;
use crate::environment::Environment;
use crate::floor::Floor;

/// The threads, floor and peers that attention and generation are measured with.
#[derive(Debug)]
pub struct Machine<'a> {
    /// The threads of all contenders in this process.
    pub threads: &'a ThreadPool,
    /// The memory that the floor reads.
    pub floor: &'a mut Floor,
    /// The peers in Python.
    pub python: &'a Environment,
    /// How thorough the run is.
    pub effort: Effort,
}
