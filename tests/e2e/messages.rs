//! What the program says when a path or an address cannot be used: the flag, the path, the reason once, and what to do.

use std::path::Path;
use std::process::Command;

const MODELS: &str = "models:\n  m: {type: custom, command: 'true', endpoint: /x}\n";

/// Runs the program in `dir` until it ends; it is expected to fail. What it says.
#[track_caller]
fn refuses(dir: &Path, words: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_roundhouse"))
        .args(words)
        .current_dir(dir)
        .env("NO_COLOR", "1")
        .env_remove("ROUNDHOUSE_API_KEYS")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{words:?}: {text}");
    let last = text.lines().last().unwrap_or_default().to_owned();
    assert!(last.matches("(os error").count() <= 1, "told twice: {last}");
    last
}

#[test]
fn paths_that_cannot_be_used_are_named_with_their_flag_and_the_reason_once() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("models.yaml"), MODELS).unwrap();
    std::fs::write(dir.join("file"), "").unwrap();
    let serve = ["serve", "--listen", "127.0.0.1:0"];
    let cases: &[(&[&str], &[&str])] = &[
        (&[serve[0], serve[1], serve[2], "--config", "nope.yaml"], &["nope.yaml", "--config", "No such file"]),
        (&[serve[0], serve[1], serve[2], "--data-dir", "file"], &["--data-dir", "file is a file, not a folder"]),
        (&[serve[0], serve[1], serve[2], "--data-dir", "file/data"], &["--data-dir", "file/data", "Not a directory"]),
        (&[serve[0], serve[1], serve[2], "--snapshot-dir", "file"], &["--snapshot-dir", "file", "os error"]),
        (&["backup", "copy", "--data-dir", "nope"], &["nope (--data-dir)", "No such file"]),
        (&["restore", "nope", "--data-dir", "data2"], &["nope", "holds no backup"]),
        (&["restore", "--check", "nope"], &["nope", "holds no backup"]),
        (&["config", "check", "--config", "nope.yaml"], &["nope.yaml", "--config", "No such file"]),
        (&["models", "fetch", "--config", "nope.yaml"], &["nope.yaml", "--config", "No such file"]),
        (&["models", "list", "--server", "http://127.0.0.1:1"], &["127.0.0.1:1", "--server"]),
    ];
    for (words, expected) in cases {
        let said = refuses(dir, words);
        for word in *expected {
            assert!(said.contains(word), "{words:?} should say {word}: {said}");
        }
    }
}

#[test]
fn a_log_filter_that_logs_something_else_than_was_meant_is_refused_with_status_2() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("models.yaml"), MODELS).unwrap();
    let cases: &[(&[&str], &str)] = &[
        (&["serve", "--data-dir", "/dev/null/x", "--log", "inof"], "`inof` is no level (error, warn, info"),
        (&["serve", "--data-dir", "/dev/null/x", "--log", "foo=bar=baz"], "`foo=bar=baz` cannot be read"),
        (&["models", "list", "--server", "http://127.0.0.1:1", "--log", "wran"], "`wran` is no level"),
    ];
    for (words, expected) in cases {
        let output =
            Command::new(env!("CARGO_BIN_EXE_roundhouse")).args(*words).current_dir(dir.path()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {text}");
        assert!(text.contains("--log (ROUNDHOUSE_LOG)") && text.contains(expected), "{words:?}: {text}");
    }
}

#[test]
fn an_address_that_is_taken_is_said_with_its_flag_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("models.yaml"), MODELS).unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let said = refuses(dir.path(), &["serve", "--listen", &address]);
    for word in [address.as_str(), "--listen", "in use", "stop it", "another port"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    let said = refuses(dir.path(), &["serve", "--listen", "no.such.host.invalid:9000"]);
    assert!(said.contains("--listen") && said.contains("HOST:PORT"), "{said}");
    let said = refuses(dir.path(), &["serve", "--listen", "9000"]);
    assert!(said.contains("--listen") && !said.contains("models.yaml"), "{said}");
}
