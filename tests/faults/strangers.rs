//! Others on the database's file: a shell that holds the write lock, a reader that does not let go.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::json;

use super::clients::{Clients, metric, plain};
use super::common::{LIMIT, Site, eventually};
use super::{is_long, worker};

/// Another program that has the file open, until it is dropped.
struct Stranger {
    child: Child,
}

impl Stranger {
    /// Does `what` (Python, on the connection `c`) and holds on to it.
    fn new(data: &Path, what: &str) -> Self {
        let script = format!(
            "import sqlite3, sys\nc = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)\n{what}\n\
             print('holds', flush=True)\nsys.stdin.read()"
        );
        let child = Command::new("python3")
            .args(["-c", &script])
            .arg(data.join("roundhouse.db"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = child.unwrap_or_else(|error| panic!("python3 plays the stranger, and cannot be run: {error}"));
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "holds\n");
        Self { child }
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn site() -> Site {
    Site::new().storage("wal_pages", 100).model("fast", worker::entry(4))
}

#[tokio::test]
async fn a_shell_with_the_write_lock_slows_the_server_and_loses_nothing() {
    let site = site();
    let server = site.start().await;
    let clients = Clients::default();
    let hands = clients.submit_until_broken(&server.api, 4, 1, &plain());
    eventually(LIMIT, "some jobs are accepted", || async { (clients.accepted() > 20).then_some(()) }).await;
    let shell = Stranger::new(&site.data(), "c.execute('begin immediate')");
    let before = clients.accepted();
    // Longer than the store waits for a lock, or not.
    tokio::time::sleep(Duration::from_secs(if is_long() { 10 } else { 2 })).await;
    assert!(clients.accepted() <= before + 4, "nothing is accepted that cannot be stored");
    drop(shell);
    let before = clients.accepted();
    eventually(LIMIT, "jobs are accepted again", || async { (clients.accepted() > before + 20).then_some(()) }).await;
    clients.stop();
    for hand in hands {
        hand.await.unwrap();
    }
    assert!(clients.refusals().keys().all(|code| code == "storage_unavailable"), "{:?}", clients.refusals());
    clients.settle(&server.api, &plain()).await;
    clients.compare_histories(&server.api).await;
}

#[tokio::test]
async fn a_reader_that_does_not_let_go_is_seen_in_the_size_of_the_log() {
    let site = site();
    let server = site.start().await;
    let wal = || metric(&server.api, "roundhouse_store_wal_bytes");
    let submit = async |megabytes: usize| {
        for n in 0..megabytes * 2 {
            let jobs = (0..25).map(|_| worker::job("filler", json!({"fill": "x".repeat(20_000), "n": n}))).collect();
            server.api.submit_together(jobs).await;
        }
    };
    submit(1).await;
    let before = wal().await;
    let look = "c.execute('begin')\nc.execute('select count(*) from job').fetchall()";
    let reader = Stranger::new(&site.data(), look);
    submit(4).await;
    let held = wal().await;
    assert!(held > before + 3e6, "{before} -> {held}: the log cannot begin anew under a reader");
    drop(reader);
    submit(1).await;
    let after = wal().await;
    submit(4).await;
    let much_later = wal().await;
    // The file keeps its size; what matters is that it is used again.
    assert!(much_later <= after.max(held) + 1e6, "{held} -> {after} -> {much_later}");
}
