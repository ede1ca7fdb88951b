//! Files that killed engines leave in shared folders: shared memory, semaphores, rendezvous files. A killed vLLM leaves
//! 420 MB of memory in /dev/shm each time.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::domain::Millis;
use crate::worker::held::is_held;
use crate::worker::procfs::processes;

/// Where killed engines leave files.
struct Folders {
    /// Shared memory and semaphores.
    shared: PathBuf,
    /// Whether processes may use `shared` that cannot be seen here.
    has_unseen_users: bool,
    /// Where programs keep files for a while.
    temporary: BTreeSet<PathBuf>,
}

impl Folders {
    /// Of this machine: `/dev/shm`, `/tmp` and what `TMPDIR` says.
    fn own() -> Self {
        let namespace = |of: &str| std::fs::read_link(format!("/proc/self/ns/{of}")).unwrap_or_default();
        Self {
            shared: PathBuf::from("/dev/shm"),
            has_unseen_users: has_unseen_users(&namespace("ipc"), &namespace("pid")),
            temporary: [PathBuf::from("/tmp"), std::env::temp_dir()].into(),
        }
    }
}

/// Whether processes may use this `/dev/shm` that cannot be seen here: in a container with process ids of its own and the
/// machine's IPC (`--ipc=host`). The numbers of the machine's first namespaces are the kernel's.
fn has_unseen_users(ipc: &Path, pid: &Path) -> bool {
    ipc == Path::new("ipc:[4026531839]") && pid != Path::new("pid:[4026531836]")
}

/// Whether a shared file that no process here has open may be removed: by what the kernel says of those that cannot be
/// seen, and by whether there may be any where it says nothing.
fn is_nobodys(is_held: Option<bool>, has_unseen_users: bool) -> bool {
    is_held.map_or(!has_unseen_users, |held| !held)
}

/// Removes what a worker that lived from `since` on has left, now that it is gone: files of Python's, vLLM's and
/// onnxruntime's naming, owned by this user, made since then, and neither open nor mapped in any living process. Blocking;
/// returns how many.
pub(super) fn remove(since: Millis) -> usize {
    remove_from(&Folders::own(), since)
}

fn remove_from(folders: &Folders, since: Millis) -> usize {
    let is_python = |name: &str| name.starts_with("psm_") || name.starts_with("sem.mp-");
    let mut candidates = made_since(&folders.shared, is_python, since);
    candidates.retain(|path| is_nobodys(is_held(path), folders.has_unseen_users));
    // torch opens its rendezvous file only now and then, so "not open" does not tell whether it is in use.
    let rendezvous = !another_vllm_runs();
    let living: BTreeSet<i32> = processes().iter().filter(|found| !found.is_zombie).map(|found| found.pid).collect();
    let is_log_of_the_dead = |name: &str| writer_of(name).is_some_and(|pid| !living.contains(&pid));
    for folder in &folders.temporary {
        candidates.extend(made_since(folder, |name| rendezvous && name.starts_with("vllm_dist_"), since));
        candidates.extend(made_since(folder, is_log_of_the_dead, since));
        candidates.extend(dead_sockets(folder, since));
    }
    if candidates.is_empty() {
        return 0;
    }
    let used = in_use(folders);
    let mut removed = 0;
    for path in candidates {
        if !used.contains(&path) && std::fs::remove_file(&path).is_ok() {
            removed += 1;
        }
    }
    if removed > 0 {
        tracing::info!(files = removed, "removed what a killed worker left behind");
    }
    removed
}

/// `mat-debug-PID.log`, which onnxruntime writes in every process that imports it, as diffusers does.
fn writer_of(telemetry_log: &str) -> Option<i32> {
    telemetry_log.strip_prefix("mat-debug-")?.strip_suffix(".log")?.parse().ok()
}

fn made_since(dir: &Path, is_wanted: impl Fn(&str) -> bool, since: Millis) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    let own = nix::unistd::geteuid().as_raw();
    entries
        .flatten()
        .filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            is_wanted(&name)
        })
        .filter(|entry| {
            // Not following links: only plain files of this user, made since then.
            std::fs::symlink_metadata(entry.path())
                .is_ok_and(|file| file.is_file() && file.uid() == own && made_ms(&file) >= since)
        })
        .map(|entry| entry.path())
        .collect()
}

/// Sockets of ZeroMQ, by which vLLM's processes talk: named by a UUID alone, and nobody has them bound any more.
fn dead_sockets(dir: &Path, since: Millis) -> Vec<PathBuf> {
    // The names first: what is bound in between is none of these.
    let Ok(paths) = std::fs::read_dir(dir).map(|entries| entries.flatten().map(|e| e.path()).collect::<Vec<_>>())
    else {
        return Vec::new();
    };
    let Ok(bound) = std::fs::read_to_string("/proc/net/unix") else { return Vec::new() };
    let bound: BTreeSet<&str> = bound.lines().filter_map(|line| line.split_whitespace().nth(7)).collect();
    let own = nix::unistd::geteuid().as_raw();
    let is_uuid = |path: &Path| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|n| n.len() == 36 && Uuid::try_parse(n).is_ok())
    };
    paths
        .into_iter()
        .filter(|path| is_uuid(path) && path.to_str().is_some_and(|path| !bound.contains(path)))
        .filter(|path| {
            std::fs::symlink_metadata(path)
                .is_ok_and(|file| file.file_type().is_socket() && file.uid() == own && made_ms(&file) >= since)
        })
        .collect()
}

/// The birth time where the file system has one, else the last change of its data.
fn made_ms(file: &std::fs::Metadata) -> Millis {
    file.created()
        .ok()
        .and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok())
        .and_then(|at| i64::try_from(at.as_millis()).ok())
        .unwrap_or_else(|| file.mtime() * 1000 + file.mtime_nsec() / 1_000_000)
}

/// Besides this process, whose own words may name it: a guard's are those of its worker.
fn another_vllm_runs() -> bool {
    let own = nix::unistd::getpid().as_raw();
    processes().iter().any(|process| {
        !process.is_zombie
            && process.pid != own
            && std::fs::read(format!("/proc/{}/cmdline", process.pid)).is_ok_and(|words| is_vllm(&words))
    })
}

/// Whether a command line is that of vLLM's server or of one of its processes, which call themselves `VLLM::EngineCore` and so.
fn is_vllm(command_line: &[u8]) -> bool {
    let program = |word: &[u8]| word == b"vllm" || word.ends_with(b"/vllm") || word.starts_with(b"vllm.");
    command_line.split(|byte| *byte == 0).any(|word| word.starts_with(b"VLLM::") || program(word))
}

/// Every file below these folders that a process has open or mapped.
fn in_use(folders: &Folders) -> BTreeSet<PathBuf> {
    let is_shared =
        |path: &Path| path.starts_with(&folders.shared) || folders.temporary.iter().any(|d| path.starts_with(d));
    let semaphores = semaphores(&folders.shared);
    let mut used = BTreeSet::new();
    for process in processes() {
        let base = format!("/proc/{}", process.pid);
        if let Ok(fds) = std::fs::read_dir(format!("{base}/fd")) {
            let open = fds.flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok());
            used.extend(open.filter(|path| is_shared(path)));
        }
        let Ok(maps) = std::fs::read(format!("{base}/maps")) else {
            continue;
        };
        for line in String::from_utf8_lossy(&maps).lines() {
            let Some(at) = line.find('/') else { continue };
            if is_shared(Path::new(&line[at..])) {
                used.insert(PathBuf::from(&line[at..]));
            }
            if !semaphores.is_empty() {
                used.extend(mapped_inode(line).and_then(|inode| semaphores.get(&inode).cloned()));
            }
        }
    }
    used
}

/// Semaphores by device and inode. glibc makes one under a name of its own and links it to the wanted one, so a mapping
/// shows a path that is deleted: only the inode tells which file it is.
fn semaphores(shared: &Path) -> BTreeMap<(u64, u64), PathBuf> {
    let Ok(entries) = std::fs::read_dir(shared) else {
        return BTreeMap::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("sem."))
        .filter_map(|entry| {
            let file = std::fs::symlink_metadata(entry.path()).ok()?;
            Some(((file.dev(), file.ino()), entry.path()))
        })
        .collect()
}

/// Device and inode of a line of `/proc/<pid>/maps`: `address perms offset major:minor inode path`.
fn mapped_inode(line: &str) -> Option<(u64, u64)> {
    let mut words = line.split_whitespace().skip(3);
    let (major, minor) = words.next()?.split_once(':')?;
    let device = nix::sys::stat::makedev(u64::from_str_radix(major, 16).ok()?, u64::from_str_radix(minor, 16).ok()?);
    Some((device, words.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{Clock, SystemClock};

    /// No process has so high a number.
    const GONE_LOG: &str = "mat-debug-4194305.log";

    /// Python's locks between processes are such semaphores; an engine that starts beside us must not lose its own. Seen under
    /// a second name in a folder of this test, since in the real one this would remove what others have left.
    #[test]
    fn a_semaphore_is_kept_while_its_process_lives() {
        use std::io::{BufRead as _, BufReader};
        let script = "import multiprocessing, sys\n\
                      lock = multiprocessing.get_context('spawn').Lock()\n\
                      print('/dev/shm/sem.' + lock._semlock.name[1:], flush=True)\n\
                      sys.stdin.read()";
        let mut python = std::process::Command::new("python3")
            .args(["-c", script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(python.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let shared = tempfile::tempdir_in("/dev/shm").unwrap();
        let semaphore = shared.path().join("sem.mp-seen");
        std::fs::hard_link(line.trim(), &semaphore).unwrap();
        let folders = folders_of(&shared, None);
        let since = SystemClock::default().now() - 60_000;
        assert_eq!(remove_from(&folders, since), 0, "mapped by a living process");
        python.kill().unwrap();
        python.wait().unwrap();
        assert_eq!(remove_from(&folders, since), 1);
        assert!(!semaphore.exists());
    }

    fn folders_of(shared: &tempfile::TempDir, temporary: Option<&tempfile::TempDir>) -> Folders {
        let path = |dir: &tempfile::TempDir| dir.path().to_owned();
        let temporary = temporary.map(path).into_iter().collect();
        Folders { shared: path(shared), has_unseen_users: false, temporary }
    }

    #[test]
    fn nothing_is_removed_from_shared_memory_that_unseen_processes_may_use() {
        let unseen = |ipc: &str, pid: &str| has_unseen_users(Path::new(ipc), Path::new(pid));
        let (first_ipc, first_pid) = ("ipc:[4026531839]", "pid:[4026531836]");
        assert!(unseen(first_ipc, "pid:[4026533107]"), "a container with --ipc=host");
        assert!(!unseen(first_ipc, first_pid), "no container");
        assert!(!unseen("ipc:[4026533105]", "pid:[4026533107]"), "a container");
        assert!(!unseen("ipc:[4026533105]", first_pid), "a container with --pid=host");
        assert!(!unseen("", ""), "nobody says");

        assert!(is_nobodys(Some(false), true), "the kernel knows");
        assert!(!is_nobodys(Some(true), false), "held in another container of the pod");
        assert!(is_nobodys(None, false) && !is_nobodys(None, true));
    }

    #[test]
    fn removes_only_new_files_that_nobody_has_open() {
        // Folders of its own: whatever else ends meanwhile removes what it finds in the real ones.
        let (shared, temporary) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let of = |dir: &tempfile::TempDir, name: &str| dir.path().join(name);
        let left = [of(&shared, "psm_left"), of(&shared, "sem.mp-left"), of(&temporary, GONE_LOG)];
        let living = format!("mat-debug-{}.log", std::process::id());
        let other = ["mat-debug-.log", "mat-debug-1.log.old", &living].map(|name| of(&temporary, name));
        let other = [of(&shared, "left")].into_iter().chain(other).collect::<Vec<_>>();
        left.iter().chain(&other).for_each(|path| std::fs::write(path, "x").unwrap());
        let open = of(&shared, "psm_open");
        let held = std::fs::File::create(&open).unwrap();
        let now = SystemClock::default().now();
        let remove = |since| remove_from(&folders_of(&shared, Some(&temporary)), since);

        assert_eq!(remove(now + 60_000), 0, "older than the worker");
        assert_eq!(remove(now - 1_000), 3);
        assert!(left.iter().all(|path| !path.exists()));
        assert!(open.exists(), "open in a living process");
        assert!(other.iter().all(|path| path.exists()), "not of a known name, or of a living process");
        drop(held);
        assert_eq!(remove(now - 1_000), 1);
    }

    #[test]
    fn vllm_is_known_by_its_program_and_not_by_words_that_name_it() {
        for words in
            [b"python\0/x/.venv/bin/vllm\0serve" as &[u8], b"VLLM::EngineCore", b"python\0-m\0vllm.entrypoints.cli"]
        {
            assert!(is_vllm(words), "{}", String::from_utf8_lossy(words));
        }
        for words in [b"roundhouse\0guard\0--\0python\0models/vllm/server.py" as &[u8], b"verify\0--vllm", b""] {
            assert!(!is_vllm(words), "{}", String::from_utf8_lossy(words));
        }
    }

    #[test]
    fn a_socket_that_nobody_has_bound_any_more_is_a_leftover() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(Uuid::from_u128(7).to_string());
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(dead_sockets(dir.path(), 0).is_empty(), "it is bound");
        drop(listener);
        assert_eq!(dead_sockets(dir.path(), 0), [path]);
        assert!(dead_sockets(dir.path(), i64::MAX).is_empty(), "older than the worker");
    }
}
