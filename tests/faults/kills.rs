//! The server is killed at any moment, under load, again and again.

use super::clients::{Clients, a_moment, plain};
use super::common::Site;
use super::replay::{Random, seed};
use super::{count, worker};

const CYCLES: usize = 30;
const HANDS: usize = 4;

#[tokio::test]
async fn what_was_accepted_outlives_kills_at_any_moment_and_ends_once() {
    let seed = seed("kills");
    let mut random = Random::new(seed);
    let cycles = count("ROUNDHOUSE_KILL_CYCLES", CYCLES);
    let site = Site::new().server("worker_grace", "1s").model("fast", worker::entry(4));
    let clients = Clients::default();
    for cycle in 0..cycles {
        let mut server = site.start().await;
        let hands = clients.submit_until_broken(&server.api, HANDS, random.next(), &plain());
        a_moment(&mut random, 1, 300).await;
        server.kill();
        for hand in hands {
            hand.await.unwrap();
        }
        server.forget_processes();
        if cycle % 50 == 49 {
            eprintln!("kills: {} cycles, {} jobs accepted", cycle + 1, clients.accepted());
            let server = site.start().await;
            clients.settle(&server.api, &plain()).await;
            clients.compare(&server.api).await;
        }
    }
    let server = site.start().await;
    clients.settle(&server.api, &plain()).await;
    clients.compare_histories(&server.api).await;
    eprintln!("kills: {cycles} cycles, {} jobs accepted", clients.accepted());
    assert!(clients.accepted() > cycles, "{} jobs in {cycles} cycles", clients.accepted());
}
