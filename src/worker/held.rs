//! Whether anybody has a file open or mapped, processes that cannot be seen from here among them.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::libc::{F_SETLEASE, F_UNLCK, F_WRLCK, O_CLOEXEC, O_NOFOLLOW, SIGURG, c_int, fcntl};

/// Which signal tells of a lease that is asked back; Linux has one number for it everywhere, and libc none.
const F_SETSIG: c_int = 10;

/// By asking the kernel for a write lease (fcntl(2), "Leases"), which it gives only if nobody else has the file open or
/// mapped, in whatever container: containers of one pod share `/dev/shm` and see no processes of each other. `None`: not
/// to be told (a kernel or a file system without leases, or a file of another user).
pub(super) fn is_held(path: &Path) -> Option<bool> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(O_NOFOLLOW | O_CLOEXEC).open(path).ok()?;
    let set = |command: c_int, value: c_int| {
        #[expect(unsafe_code, reason = "no crate has these commands; they take a plain number")]
        // SAFETY: the descriptor is open until `file` is dropped, and no memory is passed.
        Errno::result(unsafe { fcntl(file.as_raw_fd(), command, value) })
    };
    // Whoever opens it just then has us told by a signal: one that is ignored, for the usual one ends the process.
    set(F_SETSIG, SIGURG).ok()?;
    match set(F_SETLEASE, F_WRLCK) {
        Ok(_) => set(F_SETLEASE, F_UNLCK).ok().map(|_| false),
        Err(Errno::EAGAIN) => Some(true),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufRead as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_file_that_a_process_has_open_or_mapped_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("psm_x");
        std::fs::write(&path, "x").unwrap();
        assert_eq!(is_held(&path), Some(false));
        for keep in ["pass", "import mmap; m = mmap.mmap(f.fileno(), 1); f.close()"] {
            let program =
                format!("import sys; f = open({path:?}, 'r+b'); {keep}; print('up', flush=True); sys.stdin.read()");
            let mut python = Command::new("python3")
                .args(["-c", &program])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut line = String::new();
            let up = std::io::BufReader::new(python.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
            assert!(up > 0, "{keep}");
            assert_eq!(is_held(&path), Some(true), "{keep}");
            python.kill().unwrap();
            python.wait().unwrap();
            assert_eq!(is_held(&path), Some(false));
        }
        assert_eq!(is_held(&dir.path().join("none")), None);
    }
}
