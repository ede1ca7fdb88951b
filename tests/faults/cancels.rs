//! Clients that leave at every moment of a submission: no half of it is applied, nothing is stuck afterwards.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use serde_json::json;

use super::common::{Api, Site, check_history, echo, within};
use super::replay::{Random, seed};

const PATHS: [&str; 3] = ["/v1/jobs", "/v1/jobs/bulk", "/v1/chat/completions"];

/// Submissions that are left; `ROUNDHOUSE_SOAK` makes more of them.
fn leavers() -> usize {
    if std::env::var_os("ROUNDHOUSE_SOAK").is_some() { 5_000 } else { 300 }
}

/// Submits a slow job and asks to cancel it, leaving at some moment of that.
async fn leave_a_cancel(api: &Api, address: &str, random: &mut Random) {
    let wishes = json!({"delay_ms": 60_000});
    let body = json!({"model": "echo", "messages": [{"role": "user", "content": "slow"}], "echo": wishes});
    let id = api.submit(&json!({"endpoint": "/v1/chat/completions", "body": body})).await;
    let text = format!("POST /v1/jobs/{id}/cancel HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n");
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    let some = std::time::Duration::from_micros(random.below(3_000) as u64);
    let mut buffer = [0; 64];
    let _ = tokio::time::timeout(some, stream.read(&mut buffer)).await;
    drop(stream);
    // It was asked, or it was not: then it is asked again. Nobody waits a minute for its end.
    let job = api.job(&id).await;
    if job["state"] == "queued" || job["state"] == "running" {
        api.poke(&format!("/v1/jobs/{id}/cancel")).await.is(200);
    }
    let ended = within(std::time::Duration::from_secs(20), "a cancelled job ends", api.finished(&id)).await;
    assert_eq!(ended["state"], "cancelled", "{ended}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_leave_at_any_moment_leave_no_half_of_a_submission() {
    let mut random = Random::new(seed("clients_that_leave_at_any_moment_leave_no_half_of_a_submission"));
    let site = Site::new().model("echo", echo("text", &["--delay-ms", "5"]));
    let server = site.start().await;
    let address = server.said().last().unwrap().split("http://").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    for n in 0..leavers() {
        let path = PATHS[n % PATHS.len()];
        let chat = json!({"model": "echo", "messages": [{"role": "user", "content": format!("leaver {n}")}]});
        let job = json!({"endpoint": "/v1/chat/completions", "body": chat});
        let body = match path {
            "/v1/jobs" => job.to_string(),
            "/v1/jobs/bulk" => json!({"requests": [job, job, job]}).to_string(),
            _ => chat.to_string(),
        };
        let text = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut stream = TcpStream::connect(&address).await.unwrap();
        // In a part of the cases in the middle of the request, else at some moment of its life.
        let sent = if n % 5 == 0 { random.below(text.len()) } else { text.len() };
        stream.write_all(&text.as_bytes()[..sent]).await.unwrap();
        if n % 5 != 0 {
            let some = std::time::Duration::from_micros(random.below(12_000) as u64);
            let mut buffer = [0; 64];
            let _ = tokio::time::timeout(some, stream.read(&mut buffer)).await;
        }
        if n % 2 == 0 {
            // A reset instead of a farewell.
            let _ = stream.set_zero_linger();
        }
        drop(stream);
        if n % 10 == 3 {
            leave_a_cancel(&server.api, &address, &mut random).await;
        }
    }
    let body = json!({"model": "echo", "messages": [{"role": "user", "content": "after"}]});
    let after = server.api.submit(&json!({"endpoint": "/v1/chat/completions", "body": body})).await;
    server.api.succeeded(&after).await;
    let mut batches = std::collections::BTreeMap::<String, usize>::new();
    let mut cursor = String::new();
    let mut seen = 0;
    loop {
        let page = server.api.get(&format!("/v1/jobs?order=asc&limit=100{cursor}")).await.is(200).json();
        for job in page["data"].as_array().unwrap() {
            let id = job["id"].as_str().unwrap();
            let job = server.api.finished(id).await;
            let end = check_history(&server.api.events(id).await);
            assert!(end == "job.succeeded" || end == "job.cancelled", "{job}");
            if let Some(batch) = job["batch_id"].as_str() {
                *batches.entry(batch.to_owned()).or_default() += 1;
            }
            seen += 1;
            cursor = format!("&after={id}");
        }
        if page["has_more"] == json!(false) {
            break;
        }
    }
    assert!(seen > 50, "{seen} jobs were accepted");
    assert!(batches.values().all(|jobs| *jobs == 3), "a part of a batch: {batches:?}");
    server.api.get("/readyz").await.is(200);
}
