//! Small C libraries that tests put below the processes under test.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Compiles a source (a path within the project) as a shared library of this name; where it is. Once per run is enough.
pub(crate) fn compiled(source: &str, name: &str) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(source);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(folder).unwrap();
    // A name of our own until it is whole: two test runs may build it at the same time.
    let (library, making) = (folder.join(name), folder.join(format!("{name}.{}", std::process::id())));
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let built = Command::new(&compiler)
        .args(["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"])
        .arg(&making)
        .arg(&source)
        .output();
    let output = built.unwrap_or_else(|error| {
        panic!("these tests need a small C library, and `{compiler}` cannot be run ({error}): install gcc, or set CC")
    });
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "`{compiler}` cannot build {}:\n{said}", source.display());
    std::fs::rename(&making, &library).unwrap();
    library
}
