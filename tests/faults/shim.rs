//! `disk.c`, compiled once per run and preloaded into processes under test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// What goes wrong, as `disk.c` describes it.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    /// For example `sync-eio:3`.
    pub(crate) what: String,
    /// End of the paths that are concerned; empty: all.
    pub(crate) only: &'static str,
}

/// Environment variables that put the shim below a process whose files are in `folder`.
pub(crate) fn recording(folder: &Path, log: &Path) -> Vec<(String, String)> {
    let mut env = preload(folder);
    env.push(("FAULT_DISK_LOG".to_owned(), log.display().to_string()));
    env
}

/// The same with a fault that begins when the file `arm` appears, and ends when it is removed.
pub(crate) fn failing(folder: &Path, fault: &Fault, arm: &Path) -> Vec<(String, String)> {
    let mut env = preload(folder);
    env.push(("FAULT_DISK_FAULT".to_owned(), fault.what.clone()));
    env.push(("FAULT_DISK_ARM".to_owned(), arm.display().to_string()));
    env.push(("FAULT_DISK_ONLY".to_owned(), fault.only.to_owned()));
    env
}

fn preload(folder: &Path) -> Vec<(String, String)> {
    vec![
        ("LD_PRELOAD".to_owned(), library().display().to_string()),
        ("FAULT_DISK_DIR".to_owned(), folder.display().to_string()),
    ]
}

/// The compiled library.
fn library() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faults/disk.c");
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        std::fs::create_dir_all(folder).unwrap();
        // A name of our own until it is whole: two test runs may build it at the same time.
        let (library, making) = (folder.join("disk.so"), folder.join(format!("disk.{}.so", std::process::id())));
        let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
        let built = Command::new(&compiler)
            .args(["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"])
            .arg(&making)
            .arg(&source)
            .output();
        let output = built.unwrap_or_else(|error| {
            panic!("these tests preload a small C library, and `{compiler}` cannot be run ({error}): install gcc, or set CC")
        });
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "`{compiler}` cannot build {}:\n{said}", source.display());
        std::fs::rename(&making, &library).unwrap();
        library
    })
}
