//! The server is asked to stop under load; clients break their connections in the middle of a submission.

use std::collections::BTreeMap;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::clients::{Clients, a_moment, all_jobs, plain, whole};
use super::common::{Site, within};
use super::replay::{Random, seed};
use super::{count, worker};

#[tokio::test]
async fn a_stop_under_load_loses_nothing_and_charges_nothing() {
    let seed = seed("stops");
    let mut random = Random::new(seed);
    let work = json!({"delay_ms": 50});
    let site = Site::new().server("shutdown_grace", "5s").model("fast", worker::entry(4));
    let clients = Clients::default();
    for _ in 0..count("ROUNDHOUSE_STOP_CYCLES", 4) {
        let mut server = site.start().await;
        let hands = clients.submit_until_broken(&server.api, 8, random.next(), &work);
        a_moment(&mut random, 100, 700).await;
        server.signal(Signal::SIGTERM);
        // The grace period, and what a busy machine needs.
        let status = within(Duration::from_secs(30), "the server stops", server.ended()).await;
        assert_eq!(status.code(), Some(0));
        for hand in hands {
            hand.await.unwrap();
        }
        assert!(server.processes().is_empty(), "nothing is left when the server has ended");
    }
    let server = site.start().await;
    clients.settle(&server.api, &work).await;
    clients.compare_histories(&server.api).await;
    for job in all_jobs(&server.api).await {
        let (failures, crashes, _) = server.charged(job["id"].as_str().unwrap());
        assert_eq!((failures, crashes), (0, 0), "{job}");
    }
    assert!(clients.accepted() > 20, "{}", clients.accepted());
}

/// Jobs in one submission of several.
const TOGETHER: usize = 8;

#[tokio::test]
async fn a_submission_whose_client_vanishes_is_there_whole_or_not_at_all() {
    let seed = seed("vanishing clients");
    let mut random = Random::new(seed);
    let site = Site::new().model("fast", worker::entry(4));
    let server = site.start().await;
    let address = server.api.base.strip_prefix("http://").unwrap().to_owned();
    for n in 0..count("ROUNDHOUSE_VANISHING_CLIENTS", 300) {
        let (path, body) = if n % 3 == 0 {
            let requests: Vec<_> = (0..TOGETHER).map(|_| worker::job(&format!("b{n}"), plain())).collect();
            ("/v1/jobs/bulk", json!({"requests": requests}).to_string())
        } else {
            ("/v1/jobs", worker::job(&format!("s{n}"), plain()).to_string())
        };
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut stream = TcpStream::connect(&address).await.unwrap();
        if n % 4 == 0 {
            // In the middle of the request.
            let cut = random.below(request.len());
            stream.write_all(&request.as_bytes()[..cut]).await.unwrap();
        } else {
            // At some moment between the request's end and the answer's.
            stream.write_all(request.as_bytes()).await.unwrap();
            let wait = Duration::from_micros(random.next() % 4_000);
            let _ = tokio::time::timeout(wait, stream.read_u8()).await;
        }
        // An abrupt end, as of a process that was killed.
        stream.set_zero_linger().unwrap();
    }
    let id = server.api.submit(&worker::job("after", plain())).await;
    server.api.succeeded(&id).await;
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for job in all_jobs(&server.api).await {
        *counts.entry(job["metadata"]["who"].as_str().unwrap().to_owned()).or_default() += 1;
        let job = server.api.finished(job["id"].as_str().unwrap()).await;
        assert_eq!(job["state"], "succeeded", "{job}");
        whole(&server.api, &job).await;
    }
    assert!(counts.len() > 50, "some came through: {counts:?}");
    for (who, count) in counts {
        let expected = if who.starts_with('b') { TOGETHER } else { 1 };
        assert_eq!(count, expected, "{who}");
    }
    let queue = server.api.queue().await;
    assert_eq!((&queue["queued"], &queue["running"]), (&json!(0), &json!(0)), "{queue}");
}
