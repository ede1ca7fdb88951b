//! `disk.c`, compiled once per run and preloaded into processes under test.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::common::compiled;

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
    BUILT.get_or_init(|| compiled("tests/faults/disk.c", "disk.so"))
}
