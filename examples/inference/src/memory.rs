//! How much memory the machine has.

/// The machine's memory in bytes, or the container's share of it.
pub fn memory() -> usize {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let total = system.cgroup_limits().map_or(u64::MAX, |limits| limits.total_memory).min(system.total_memory());
    // 0: the system does not report its memory. Then nothing is refused.
    if total == 0 { usize::MAX } else { total as usize }
}

/// Bytes in GiB, for people.
pub fn gib(bytes: usize) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}
