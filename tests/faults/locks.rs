//! Other programs on the database's file: one that holds its write lock, and one that reads for a long time.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::common::{LIMIT, Site, eventually};
use serde_json::json;

/// A program that holds the database's write lock (`writes`) or a read (`reads`) for `seconds`.
fn stranger(site: &Site, what: &str, seconds: u64) -> Child {
    let mut child = Command::new("python3")
        .arg(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/stranger.py"))
        .arg(site.data().join("roundhouse.db"))
        .args([what, &seconds.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let out = child.stdout.as_mut().unwrap();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).unwrap();
    assert_eq!(line.trim(), "holds");
    child
}

/// Jobs for a model that is never loaded.
fn site() -> Site {
    Site::new()
        .model("later", json!({"type": "text", "command": ["sleep", "1000"], "gpus": 1, "port": 8399}))
        .env("ROUNDHOUSE_GPU_PROBE", "dir:/nonexistent")
}

fn job(n: usize) -> serde_json::Value {
    let body =
        json!({"model": "later", "messages": [{"role": "user", "content": format!("{n} {}", "x".repeat(8_000))}]});
    json!({"endpoint": "/v1/chat/completions", "body": body})
}

#[tokio::test]
async fn a_shell_that_holds_the_write_lock_slows_and_loses_nothing() {
    let seconds = if std::env::var_os("ROUNDHOUSE_SOAK").is_some() { 10 } else { 2 };
    let site = site();
    std::fs::create_dir_all(site.path().join("no-gpus")).unwrap();
    let server = site.start().await;
    let mut accepted = vec![server.api.submit(&job(0)).await];
    let mut holder = stranger(&site, "writes", seconds);
    let second = eventually(LIMIT, "jobs are accepted again", || async {
        let reply = server.api.post("/v1/jobs", &job(1)).await;
        if reply.status == 202 {
            return Some(reply.json()["id"].as_str().unwrap().to_owned());
        }
        // More than the 5 s that a commit waits: refused, to be tried again, and not stored.
        reply.refused(503, "storage_unavailable");
        None
    })
    .await;
    accepted.push(second);
    holder.wait().unwrap();
    accepted.push(server.api.submit(&job(2)).await);
    let all = server.api.get("/v1/jobs").await.json();
    assert_eq!(all["data"].as_array().map(Vec::len), Some(accepted.len()), "{all}");
    for id in &accepted {
        assert_eq!(server.api.job(id).await["state"], "queued");
    }
}

#[tokio::test]
async fn a_reader_that_stays_makes_the_log_grow_and_is_reported() {
    let site = site();
    let server = site.start().await;
    server.api.submit(&job(0)).await;
    let mut reader = stranger(&site, "reads", 600);
    for round in 0..3 {
        let jobs = (0..400).map(|n| job(round * 1_000 + n)).collect();
        server.api.submit_together(jobs).await;
    }
    let wal_bytes = || async {
        let text = server.api.get("/metrics").await.text();
        let line = text.lines().find(|line| line.starts_with("roundhouse_store_wal_bytes ")).expect("the metric");
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    // Twelve hundred bodies of 8 KB, and nothing could be copied back.
    assert!(wal_bytes().await > 9e6, "{}", wal_bytes().await);
    reader.kill().unwrap();
    reader.wait().unwrap();
    // Now it is used from its beginning again, and does not grow.
    let before = wal_bytes().await;
    for round in 3..5 {
        server.api.submit_together((0..400).map(|n| job(round * 1_000 + n)).collect()).await;
    }
    assert!(wal_bytes().await <= before + 5e6, "{before} {}", wal_bytes().await);
    tokio::time::timeout(Duration::from_secs(5), server.api.get("/readyz")).await.expect("an answer").is(200);
}
