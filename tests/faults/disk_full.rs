//! A disk that is really full: a small file system of its own, in a mount namespace of its own.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use reqwest::Method;
use serde_json::json;

use super::clients::{all_jobs, plain, whole};
use super::common::{Api, LIMIT, Site, eventually, is_terminal};
use super::worker;

const MIB: usize = 1024 * 1024;

#[test]
fn a_full_disk_refuses_new_jobs_keeps_answers_and_recovers() {
    let can = |flags: &str| {
        let tried = Command::new("unshare").args([flags, "true"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        tried.is_ok_and(|status| status.success())
    };
    // A user namespace where the kernel lets us; else we must be root.
    let flags = ["-Urm", "-m"].into_iter().find(|flags| can(flags)).unwrap_or_else(|| {
        panic!("neither `unshare -Urm true` nor `unshare -m true` works here: this test mounts a small tmpfs of its own and \
                needs user namespaces (sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces > 0) or root")
    });
    let output = Command::new("unshare")
        .arg(flags)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(super::CHILD, "disk-full")
        .output()
        .unwrap();
    let said = format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("recovered from a full disk"), "{said}");
}

/// What the test does within its namespace.
pub(crate) async fn scenario() {
    let site = Site::new()
        .storage("free_min", "4MiB")
        .storage("reserve", "4MiB")
        .storage("quota", "1GiB")
        .storage("wal_pages", 200)
        .model("fast", worker::entry(3));
    std::fs::create_dir(site.data()).unwrap();
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=32m", "none"]).arg(site.data()).status().unwrap();
    assert!(mounted.success(), "a tmpfs can be mounted");
    let mut server = site.start().await;
    let api = server.api.clone();

    // Jobs that run, and whose answers (rows, and a file) come when the disk is full.
    let gate = site.path().join("gate");
    let mut running = Vec::new();
    for answer_bytes in [100, 20_000, 300_000] {
        let held = json!({"gate": gate, "answer_bytes": answer_bytes});
        running.push(api.submit(&worker::job(&format!("running {answer_bytes}"), held)).await);
    }
    for id in &running {
        api.happened(id, "job.started").await;
    }

    // Somebody else's file takes a part, submissions the rest.
    let ballast = site.data().join("ballast");
    std::fs::write(&ballast, vec![1; 10 * MIB]).unwrap();
    let mut accepted = running.clone();
    let refused = loop {
        let request = worker::job(&format!("n{}", accepted.len()), json!({"fill": "x".repeat(20_000)}));
        let reply = api.post("/v1/jobs", &request).await;
        if reply.status != 202 {
            break reply;
        }
        accepted.push(reply.json()["id"].as_str().unwrap().to_owned());
        assert!(accepted.len() < 2_000, "the disk is small");
    };
    refused.refused(503, "storage_unavailable");
    assert!(server.log().contains("nearly full"), "the log says why: {}", server.log());

    // And then nothing at all is left.
    let foreign = site.data().join("foreign");
    fill(&foreign);
    api.post("/v1/jobs", &worker::job("too much", plain())).await.refused(503, "storage_unavailable");
    std::fs::write(&gate, "").unwrap();
    for id in &running {
        whole(&api, &api.succeeded(id).await).await;
    }
    still_there(&api, &accepted).await;

    // A kill in the middle of it, and a start on a disk that is full.
    fill(&foreign);
    server.kill();
    drop(server);
    let server = site.start().await;
    let api = server.api.clone();
    still_there(&api, &accepted).await;
    api.post("/v1/jobs", &worker::job("still too much", plain())).await.refused(503, "storage_unavailable");

    std::fs::remove_file(&foreign).unwrap();
    std::fs::remove_file(&ballast).unwrap();
    let again = eventually(LIMIT, "jobs are accepted again", || async {
        let request = worker::job("room again", plain()).to_string().into_bytes();
        let reply = api.try_send(Method::POST, "/v1/jobs", Some(request)).await.unwrap();
        (reply.status == 202).then(|| reply.json()["id"].as_str().unwrap().to_owned())
    })
    .await;
    accepted.push(again);
    for id in &accepted {
        whole(&api, &api.succeeded(id).await).await;
    }
    still_there(&api, &accepted).await;
    eprintln!("recovered from a full disk; {} jobs", accepted.len());
}

/// Writes until there is no room.
fn fill(path: &Path) {
    let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
    let mut piece = vec![7; MIB];
    while !piece.is_empty() {
        if file.write_all(&piece).is_err() {
            piece.truncate(piece.len() / 2);
        }
    }
}

/// All that were accepted, and nothing else.
async fn still_there(api: &Api, accepted: &[String]) {
    let jobs = all_jobs(api).await;
    let ids: Vec<&str> = jobs.iter().map(|job| job["id"].as_str().unwrap()).collect();
    assert_eq!(ids, accepted.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(jobs.iter().all(|job| !is_terminal(job) || job["state"] == "succeeded"));
}
