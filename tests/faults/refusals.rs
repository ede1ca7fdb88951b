//! An answer is the truth: who is refused is not there afterwards, who is accepted is there once, whatever happened to the
//! server in the middle. Half of the clients have no idempotency key and cannot simply send again.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::clients::{Clients, a_moment, all_jobs, plain};
use super::common::{LIMIT, Site, beside, eventually, with, within};
use super::replay::{Random, seed};
use super::shim::{self, Fault};
use super::worker;

/// How often something is done: as an environment variable says, or as usual.
fn count(variable: &str, usual: usize) -> usize {
    std::env::var(variable).map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{variable}={text}: a number")))
}

#[tokio::test]
async fn a_stop_under_load_refuses_nobody_whose_job_is_stored() {
    let mut random = Random::new(seed("a_stop_under_load_refuses_nobody_whose_job_is_stored"));
    let work = json!({"delay_ms": 50});
    let site = Site::new().server("shutdown_grace", "5s").model("fast", worker::entry(4));
    let clients = Clients::default();
    let cycles = count("ROUNDHOUSE_STOP_CYCLES", 4);
    for cycle in 0..cycles {
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
        if cycle % 25 == 24 {
            eprintln!("{} of {cycles} stops, {} jobs accepted", cycle + 1, clients.accepted());
        }
    }
    // What has piled up is done by more at once.
    let server = site.model("fast", worker::entry(64)).start().await;
    clients.settle(&server.api, &work).await;
    clients.compare_histories(&server.api).await;
    for job in all_jobs(&server.api).await {
        let whole = server.api.job(job["id"].as_str().unwrap()).await;
        assert_eq!((&whole["failures"], &whole["crashes"]), (&json!(0), &json!(0)), "a stop charges nothing: {whole}");
    }
    assert!(clients.accepted() > 20, "{}", clients.accepted());
}

#[tokio::test]
async fn kills_under_load_leave_nothing_that_nobody_sent_and_nothing_twice() {
    let mut random = Random::new(seed("kills_under_load_leave_nothing_that_nobody_sent_and_nothing_twice"));
    let site = Site::new().server("worker_grace", "1s").model("fast", worker::entry(4));
    let clients = Clients::default();
    let cycles = count("ROUNDHOUSE_KILL_CYCLES", 5);
    for cycle in 0..cycles {
        let mut server = site.start().await;
        let hands = clients.submit_until_broken(&server.api, 4, random.next(), &plain());
        a_moment(&mut random, 1, 300).await;
        server.kill();
        for hand in hands {
            hand.await.unwrap();
        }
        server.forget_processes();
        if cycle % 100 == 99 {
            eprintln!("{} of {cycles} kills, {} jobs accepted", cycle + 1, clients.accepted());
        }
    }
    let server = site.start().await;
    clients.settle(&server.api, &plain()).await;
    clients.compare_histories(&server.api).await;
}

/// A server whose disk begins to fail when the returned file appears, and no longer does when it is gone.
fn failing_site(what: &str) -> (Site, std::path::PathBuf) {
    let site = Site::new().server("worker_grace", "1s").model("fast", worker::entry(2));
    let site = site.storage("free_min", "0").storage("reserve", "0").storage("quota", "1GiB");
    let arm = site.path().join("arm");
    let env = shim::failing(&site.data(), &Fault { what: what.to_owned(), only: "roundhouse.db-wal" }, &arm);
    (env.iter().fold(site, |site, (name, value)| site.env(name, value)), arm)
}

#[tokio::test]
async fn a_server_whose_disk_is_lost_says_what_it_does_not_know() {
    for what in ["sync-eio:5:1000000", "erofs:20"] {
        let (site, arm) = failing_site(what);
        let mut server = site.start().await;
        let clients = Clients::default();
        let hands = clients.submit_until_broken(&server.api, 8, 1, &plain());
        eventually(LIMIT, "some jobs are accepted", || async { (clients.accepted() > 20).then_some(()) }).await;
        std::fs::write(&arm, "").unwrap();
        let status = server.ended().await;
        assert_eq!(status.code(), Some(1), "{what}");
        assert!(server.log().contains("cannot go on: the database could not be made durable"), "{}", server.log());
        for hand in hands {
            hand.await.unwrap();
        }
        drop(server);
        std::fs::remove_file(&arm).unwrap();
        let server = site.start().await;
        clients.settle(&server.api, &plain()).await;
        clients.compare_histories(&server.api).await;
    }
}

#[tokio::test]
async fn a_job_that_is_being_stored_when_the_server_stops_is_accepted() {
    // Syncs so slow that the stop comes in the middle of one; nothing runs, so nothing else is waited for.
    let (site, arm) = failing_site("slow-sync:200");
    let site = site.model("fast", with(worker::entry(1), json!({"command": ["false"]})));
    for n in 0..3 {
        let mut server = site.start().await;
        std::fs::write(&arm, "").unwrap();
        let (api, name) = (server.api.clone(), format!("stopped {n}"));
        let request = worker::job(&name, plain());
        let sent = beside(async move { api.post("/v1/jobs", &request).await });
        tokio::time::sleep(Duration::from_millis(60)).await;
        server.signal(Signal::SIGTERM);
        let reply = sent.await.unwrap();
        server.ended().await;
        std::fs::remove_file(&arm).unwrap();
        drop(server);
        let server = site.start().await;
        let stored = all_jobs(&server.api).await.iter().any(|job| job["metadata"]["who"] == name.as_str());
        assert_eq!((reply.status == 202), stored, "{}: {}", reply.status, reply.text());
    }
}

#[tokio::test]
async fn a_server_without_room_stores_nothing_that_it_refused() {
    let (site, arm) = failing_site("enospc:0");
    let server = site.start().await;
    let clients = Clients::default();
    let hands = clients.submit_until_broken(&server.api, 4, 1, &plain());
    let accepts = async |clients: &Clients| {
        let before = clients.accepted();
        eventually(LIMIT, "jobs are accepted", || async { (clients.accepted() > before + 20).then_some(()) }).await;
    };
    accepts(&clients).await;
    std::fs::write(&arm, "").unwrap();
    eventually(LIMIT, "some are refused", || async { (!clients.refusals().is_empty()).then_some(()) }).await;
    std::fs::remove_file(&arm).unwrap();
    accepts(&clients).await;
    clients.stop();
    for hand in hands {
        hand.await.unwrap();
    }
    let codes: Value = clients.refusals().into_keys().collect();
    assert_eq!(codes, json!(["storage_unavailable"]));
    clients.settle(&server.api, &plain()).await;
    clients.compare_histories(&server.api).await;
}
