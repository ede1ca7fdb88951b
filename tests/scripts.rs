//! `scripts/start-all.sh` and `scripts/stop-all.sh` with a stand-in for the server.

#![expect(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Longest wait for something that has to happen; a busy machine needs some of it.
const LIMIT: Duration = Duration::from_secs(60);

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// A data folder with a stand-in server; whatever is left is stopped at the end.
struct Sandbox {
    dir: tempfile::TempDir,
}

impl Sandbox {
    fn new(behaviour: &[&str]) -> Self {
        let made = Self { dir: tempfile::tempdir().unwrap() };
        std::fs::create_dir(made.stand_in()).unwrap();
        for name in behaviour {
            std::fs::write(made.stand_in().join(name), "").unwrap();
        }
        made
    }

    fn stand_in(&self) -> PathBuf {
        self.dir.path().join("stand-in")
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn log(&self) -> PathBuf {
        self.data().join("log/roundhouse.log")
    }

    fn script(&self, name: &str, arguments: &[&str]) -> Output {
        Command::new(root().join("scripts").join(name))
            .args(arguments)
            .current_dir(self.dir.path())
            .env_remove("ROUNDHOUSE_CONFIG")
            .env("STAND_IN", self.stand_in())
            .env("ROUNDHOUSE_BIN", root().join("tests/fixtures/serve.sh"))
            .env("ROUNDHOUSE_DATA_DIR", self.data())
            .env("ROUNDHOUSE_RESTART_FIRST_MS", "10")
            .env("ROUNDHOUSE_RESTART_MAX_MS", "40")
            .env("ROUNDHOUSE_LOG_BYTES_MAX", "20000")
            .env("ROUNDHOUSE_LOG_CHECK_S", "0.05")
            .env("ROUNDHOUSE_STOP_WAIT_S", "3")
            .env("ROUNDHOUSE_LEFTOVER_WAIT_S", "1")
            .output()
            .unwrap()
    }

    fn start(&self) -> String {
        let output = self.script("start-all.sh", &[]);
        assert!(output.status.success(), "{}", both(&output));
        both(&output)
    }

    fn stop(&self) -> String {
        let output = self.script("stop-all.sh", &[]);
        assert!(output.status.success(), "{}", both(&output));
        both(&output)
    }

    /// The process ids that the stand-in wrote.
    fn pids(&self, name: &str) -> Vec<i32> {
        let text = std::fs::read_to_string(self.stand_in().join(name)).unwrap_or_default();
        text.lines().map(|line| line.parse().unwrap()).collect()
    }

    fn keeper(&self) -> i32 {
        let text = std::fs::read_to_string(self.data().join("keeper.pid")).unwrap();
        text.split_whitespace().next().unwrap().parse().unwrap()
    }

    fn log_text(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    /// Every process that belongs to this sandbox: told by the folder in its environment.
    fn left(&self) -> Vec<String> {
        let mark = format!("STAND_IN={}", self.stand_in().display());
        let of = |pid: &Path| -> Option<String> {
            let environment = std::fs::read(pid.join("environ")).ok()?;
            let is_ours = environment.split(|byte| *byte == 0).any(|entry| entry == mark.as_bytes());
            let command = std::fs::read(pid.join("cmdline")).ok().filter(|command| !command.is_empty())?;
            is_ours.then(|| format!("{} {}", pid.display(), String::from_utf8_lossy(&command).replace('\0', " ")))
        };
        let processes = std::fs::read_dir("/proc").unwrap();
        processes.filter_map(|entry| of(&entry.unwrap().path())).collect()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.script("stop-all.sh", &[]);
        for pid in self.pids("workers").into_iter().chain(self.pids("pids")) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn both(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A zombie, whose command line is empty, is not alive.
fn is_alive(pid: i32) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|command| !command.is_empty())
}

fn kill_hard(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

/// Looks until something is so: nothing tells a test when another process's child has changed.
#[track_caller]
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let tries = LIMIT.as_millis() / 20;
    for _ in 0..tries {
        if is_so() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("{what} did not happen within {} s", LIMIT.as_secs());
}

#[test]
fn it_starts_once_and_stops_everything() {
    let it = Sandbox::new(&[]);
    let said = it.script("start-all.sh", &["--listen", "127.0.0.1:9123"]);
    let text = both(&said);
    assert!(said.status.success(), "{text}");
    assert!(text.contains("Roundhouse accepts requests on http://127.0.0.1:9123"), "{text}");
    assert!(text.contains("scripts/stop-all.sh --data-dir "), "{text}");
    let arguments = std::fs::read_to_string(it.stand_in().join("arguments")).unwrap();
    let config = root().join("models.yaml");
    assert_eq!(
        arguments.trim(),
        format!("serve --listen 127.0.0.1:9123 config={} data={}", config.display(), it.data().display())
    );

    let again = it.start();
    assert!(again.contains("Already running") && again.contains("http://127.0.0.1:9123"), "{again}");
    assert_eq!(it.pids("pids").len(), 1);

    assert!(it.stop().contains("Stopped."));
    assert!(it.log_text().contains("stopping"), "the server was asked, not killed");
    assert_eq!(it.left(), Vec::<String>::new());
    assert!(it.stop().contains("Nothing runs"));
    it.start();
    assert_eq!(it.pids("pids").len(), 2);
}

#[test]
fn a_new_api_key_is_shown_once_and_not_logged() {
    const KEY: &str = "rh-made-at-this-start";
    let it = Sandbox::new(&["key"]);
    let output = it.script("start-all.sh", &[]);
    assert!(output.status.success(), "{}", both(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout).matches(KEY).count(), 1, "{}", both(&output));
    it.stop();
    let again = it.start();
    assert!(again.contains("/api_key") && !again.contains(KEY), "{again}");
    assert!(it.log_text().contains("/api_key") && !it.log_text().contains(KEY), "{}", it.log_text());
}

#[test]
fn a_killed_server_comes_back() {
    let it = Sandbox::new(&[]);
    it.start();
    kill_hard(it.pids("pids")[0]);
    until("a second start", || it.pids("pids").len() == 2);
    let second = it.pids("pids")[1];
    assert!(is_alive(second));
    assert!(it.log_text().contains("keeper: serve ended with status 137"), "{}", it.log_text());
    it.stop();
    assert!(!is_alive(second));
    assert_eq!(it.pids("pids").len(), 2, "a stop is no reason to start again");
}

#[test]
fn waits_between_starts_double_up_to_a_limit() {
    let it = Sandbox::new(&["die"]);
    it.start();
    let waits = || -> Vec<String> {
        let log = it.log_text();
        let lines = log.lines().filter(|line| line.starts_with("keeper: serve ended with status 3"));
        lines.map(|line| line.split("next start in ").nth(1).unwrap().to_owned()).collect()
    };
    until("five starts", || waits().len() >= 5);
    assert_eq!(waits()[..5], ["0.010 s", "0.020 s", "0.040 s", "0.040 s", "0.040 s"]);
    it.stop();
    assert_eq!(it.left(), Vec::<String>::new());
}

#[test]
fn the_log_is_capped() {
    let it = Sandbox::new(&["chatter"]);
    it.start();
    let old = it.data().join("log/roundhouse.log.1");
    until("a rotation", || old.exists());
    let first = std::fs::metadata(&old).unwrap().modified().unwrap();
    until("a second rotation", || std::fs::metadata(&old).unwrap().modified().unwrap() > first);
    assert!(std::fs::metadata(&old).unwrap().len() <= 20_000);
    let pid = it.pids("pids")[0];
    assert!(is_alive(pid) && it.pids("pids").len() == 1, "rotating does not disturb the server");
    std::fs::remove_file(it.stand_in().join("chatter")).unwrap();
    let files = std::fs::read_dir(it.data().join("log")).unwrap();
    let bytes: u64 = files.map(|file| file.unwrap().metadata().unwrap().len()).sum();
    // Between two looks of 50 ms it may grow beyond its cap.
    assert!(bytes < 2_000_000, "{bytes}");
    it.stop();
    assert_eq!(it.left(), Vec::<String>::new());
}

#[test]
fn a_first_start_that_fails_says_why_and_leaves_nothing() {
    let it = Sandbox::new(&["fail"]);
    let output = it.script("start-all.sh", &[]);
    let text = both(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("models.yaml:3: unknown key") && text.contains("the server does not start"), "{text}");
    assert_eq!(it.left(), Vec::<String>::new());
    std::fs::remove_file(it.stand_in().join("fail")).unwrap();
    it.start();
}

#[test]
fn a_stubborn_server_and_its_worker_are_killed() {
    let it = Sandbox::new(&["stubborn"]);
    it.start();
    until("a worker", || it.pids("workers").len() == 1);
    let text = it.stop();
    assert!(text.contains("Still running after 3 s") && text.contains("Some of its processes are left"), "{text}");
    assert_eq!(it.left(), Vec::<String>::new());
}

#[test]
fn a_lost_keeper_is_noticed() {
    let it = Sandbox::new(&[]);
    it.start();
    kill_hard(it.keeper());
    until("the end of the keeper", || !is_alive(it.keeper()));
    let output = it.script("start-all.sh", &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(both(&output).contains("nothing keeps it alive"), "{}", both(&output));
    it.stop();
    assert!(!is_alive(it.pids("pids")[0]));
    it.start();
}
