//! A disk that is really full: a small tmpfs in a mount namespace of its own.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::common::{Api, LIMIT, echo, eventually, with};

const MIB: usize = 1024 * 1024;

/// A server whose data dir is all of a small disk.
struct OnSmallDisk {
    child: Child,
    api: Api,
    /// The disk as others see it.
    disk: PathBuf,
    log: PathBuf,
    _dir: tempfile::TempDir,
}

impl Drop for OnSmallDisk {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

fn namespace() -> Vec<&'static str> {
    for flags in [&["-Urm"][..], &["-m"]] {
        let tried = Command::new("unshare").args(flags).arg("true").stderr(Stdio::null()).status();
        if tried.is_ok_and(|status| status.success()) {
            return flags.to_vec();
        }
    }
    panic!("this test mounts a small tmpfs: it needs `unshare -Urm` (user namespaces) or root");
}

async fn start(size_mib: usize) -> OnSmallDisk {
    let dir = tempfile::tempdir().unwrap();
    let mount = dir.path().join("disk");
    std::fs::create_dir(&mount).unwrap();
    let config = dir.path().join("models.yaml");
    let slow = |kind: &str| with(echo(kind, &["--delay-ms", "3000"]), json!({"limit": 4}));
    let file = json!({
        "models": {"echo": slow("text"), "images": slow("image")},
        "storage": {"free_min": "4MiB", "reserve": "4MiB", "quota": "1GiB"},
        "server": {"worker_grace": "2s"},
    });
    std::fs::write(&config, file.to_string()).unwrap();
    let log = dir.path().join("server.log");
    let script = "mount -t tmpfs -o size=$1m tmpfs \"$2\" && shift && shift && exec \"$@\"";
    let mut child = Command::new("unshare")
        .args(namespace())
        .args(["--", "sh", "-c", script, "sh", &size_mib.to_string()])
        .arg(&mount)
        .arg(env!("CARGO_BIN_EXE_roundhouse"))
        .args(["serve", "--listen", "127.0.0.1:0", "--config"])
        .arg(&config)
        .arg("--data-dir")
        .arg(mount.join("data"))
        .env_remove("ROUNDHOUSE_API_KEYS")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = line
        .split("http://")
        .nth(1)
        .and_then(|rest| rest.split(' ').next())
        .unwrap_or_else(|| panic!("the server did not start: {line}{}", std::fs::read_to_string(&log).unwrap()));
    // `unshare` and `sh` have become the server.
    let root = PathBuf::from(format!("/proc/{}/root", child.id()));
    let disk = root.join(mount.strip_prefix("/").unwrap());
    OnSmallDisk { api: Api::new(&format!("http://{address}")), child, disk, log, _dir: dir }
}

fn chat(text: &str) -> serde_json::Value {
    let body = json!({"model": "echo", "messages": [{"role": "user", "content": text}]});
    json!({"endpoint": "/v1/chat/completions", "body": body})
}

/// Fills the disk to its last byte.
fn fill(file: &PathBuf) {
    use std::io::Write as _;
    let mut filler = std::fs::File::create(file).unwrap();
    let mut piece = MIB;
    while piece > 0 {
        if filler.write_all(&vec![0; piece]).is_err() {
            piece /= 2;
        }
    }
}

fn image() -> serde_json::Value {
    json!({"endpoint": "/v1/images/generations", "body": {"model": "images", "prompt": "x", "n": 4, "size": "256x256"}})
}

/// Jobs of one model run while the disk fills up; afterwards there is room again.
async fn answers_land(jobs: Vec<serde_json::Value>, is_right: impl Fn(&serde_json::Value) -> bool) {
    let server = start(32).await;
    let api = &server.api;
    // The first also loads the model.
    let first = api.submit(&jobs[0]).await;
    api.succeeded(&first).await;
    let mut running = Vec::new();
    for job in &jobs {
        running.push(api.submit(job).await);
    }
    for id in &running {
        api.happened(id, "job.started").await;
    }
    let filler = server.disk.join("filler");
    fill(&filler);
    api.post("/v1/jobs", &chat("refused")).await.refused(503, "storage_unavailable");
    for id in &running {
        api.succeeded(id).await;
        let answer = api.get(&format!("/v1/jobs/{id}/response")).await.is(200).json();
        assert!(is_right(&answer), "{answer}");
    }
    api.post("/v1/jobs", &chat("refused")).await.refused(503, "storage_unavailable");
    let log = std::fs::read_to_string(&server.log).unwrap();
    assert!(log.contains("nearly full") && log.contains("make room"), "{log}");
    std::fs::remove_file(&filler).unwrap();
    let next = eventually(LIMIT, "jobs are accepted again", || async {
        let reply = api.post("/v1/jobs", &jobs[0]).await;
        (reply.status == 202).then(|| reply.json()["id"].as_str().unwrap().to_owned())
    })
    .await;
    api.succeeded(&next).await;
    let all = api.get("/v1/jobs").await.json();
    assert_eq!(all["data"].as_array().map(Vec::len), Some(jobs.len() + 2), "what was refused is not there: {all}");
    assert!(server.disk.join("data/reserve").exists(), "the reserve is back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_land_on_a_full_disk_and_new_jobs_wait_for_room() {
    let jobs = (0..4).map(|n| chat(&format!("running {n} {}", "x".repeat(20_000)))).collect();
    answers_land(jobs, |answer| answer["choices"][0]["finish_reason"] == "stop").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_land_on_a_full_disk_too() {
    answers_land(vec![image()], |answer| answer["data"].as_array().is_some_and(|images| images.len() == 4)).await;
}
