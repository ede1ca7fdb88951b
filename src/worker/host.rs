//! The memory of this machine, or of the container that this program runs in.

use std::path::Path;

/// Memory that processes here may use, in bytes: the machine's, or the least limit of the cgroups that this process is in if
/// that is less. What cannot be read is no limit.
pub fn memory_bytes() -> u64 {
    below(Path::new("/"))
}

fn below(root: &Path) -> u64 {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
    let machine = of_machine(&read("proc/meminfo"));
    let own = read("proc/self/cgroup");
    let limit = |file: String| read(&file).trim().parse().ok();
    let new = groups(&own, "").into_iter().map(|group| format!("sys/fs/cgroup{group}/memory.max"));
    let old =
        groups(&own, "memory").into_iter().map(|group| format!("sys/fs/cgroup/memory{group}/memory.limit_in_bytes"));
    new.chain(old).filter_map(limit).chain(machine).min().unwrap_or(u64::MAX)
}

/// The cgroup of `/proc/self/cgroup` that has this controller ("": the one of version 2), and those above it: "/a/b", "/a",
/// "". In a container with a namespace of its own the last one is all there is; a unit of systemd or a job of Slurm lies
/// deeper.
fn groups(own: &str, controller: &str) -> Vec<String> {
    let mut found = own.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        controllers.split(',').any(|name| name == controller).then_some(path)
    });
    let mut parts: Vec<&str> =
        found.next().unwrap_or("/").split('/').filter(|part| !part.is_empty() && *part != "..").collect();
    let mut all = Vec::new();
    loop {
        all.push(parts.iter().map(|part| format!("/{part}")).collect());
        if parts.pop().is_none() {
            return all;
        }
    }
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

    #[test]
    fn the_least_limit_of_the_cgroups_it_is_in_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("proc/meminfo", "MemTotal: 4000 kB\n");
        assert_eq!(below(root.path()), 4000 << 10);
        write("sys/fs/cgroup/memory.max", "3000000\n");
        assert_eq!(below(root.path()), 3_000_000, "a container's");
        write("proc/self/cgroup", "0::/system.slice/my.service\n");
        write("sys/fs/cgroup/system.slice/memory.max", "2000000\n");
        write("sys/fs/cgroup/system.slice/my.service/memory.max", "max\n");
        assert_eq!(below(root.path()), 2_000_000, "a unit's slice");
        write("sys/fs/cgroup/system.slice/my.service/memory.max", "1000000\n");
        assert_eq!(below(root.path()), 1_000_000, "a unit's");
        write("proc/self/cgroup", "5:cpu,cpuacct:/\n4:memory:/slurm/job_7\n");
        write("sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes", "500000\n");
        assert_eq!(below(root.path()), 500_000, "of an old kind");
    }
}
