//! The memory of this machine, or of the container that this program runs in.

/// Memory that processes here may use, in bytes: the machine's, or the container's limit if that is less. What cannot be read
/// is no limit.
pub fn memory_bytes() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let machine = of_machine(&read("/proc/meminfo"));
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let container = limits.iter().filter_map(|path| read(path).trim().parse().ok()).min();
    machine.into_iter().chain(container).min().unwrap_or(u64::MAX)
}

/// `MemTotal` of `/proc/meminfo`, in bytes.
fn of_machine(meminfo: &str) -> Option<u64> {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = total.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_of_the_machine_is_read() {
        let text = "MemFree:  5 kB\nMemTotal:       16316412 kB\nMemAvailable: 1 kB\n";
        assert_eq!(of_machine(text), Some(16_316_412 << 10));
        assert_eq!(of_machine("MemTotal: many kB"), None);
        assert!(memory_bytes() > 0);
    }
}
