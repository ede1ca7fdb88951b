//! Files of the store that are removed or replaced while the server runs: it stops by itself, what it accepted is saved, and
//! it says where and what to do.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::json;

use super::clients::{Clients, plain};
use super::common::{LIMIT, Server, Site, echo, eventually};
use super::worker;

fn site() -> Site {
    Site::new().server("worker_grace", "1s").model("fast", worker::entry(4))
}

/// Runs a server under load, does something to its files, and waits for its end. What clients were told, and the last log.
async fn end_by(site: &Site, harm: impl FnOnce(&Path)) -> (Clients, String) {
    let mut server = site.start().await;
    let clients = Clients::default();
    let hands = clients.submit_until_broken(&server.api, 4, 1, &plain());
    eventually(LIMIT, "some jobs are accepted", || async { (clients.accepted() > 20).then_some(()) }).await;
    harm(&site.data());
    let accepted = clients.accepted();
    let status = server.ended().await;
    assert_eq!(status.code(), Some(1), "{}", server.log());
    for hand in hands {
        hand.await.unwrap();
    }
    assert!(clients.accepted() > accepted, "some were accepted before it was seen");
    let log = server.log();
    let reason =
        log.lines().rfind(|line| line.contains("cannot go on: ")).unwrap_or_else(|| panic!("{log}")).to_owned();
    (clients, reason)
}

/// Everything that was accepted is there, once.
async fn goes_on(site: &Site, clients: &Clients) -> Server {
    let server = site.start().await;
    clients.settle(&server.api, &plain()).await;
    clients.compare_histories(&server.api).await;
    server
}

fn rescued(data: &Path) -> Option<PathBuf> {
    let mut entries = std::fs::read_dir(data).unwrap().map(|entry| entry.unwrap().path());
    entries.find(|path| path.to_string_lossy().contains("roundhouse.db.rescued-"))
}

/// What a command says that is to refuse.
async fn refusal(words: &[&str], site: &Site) -> String {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_roundhouse"));
    command.args(words).arg("--data-dir").arg(site.data()).env_remove("ROUNDHOUSE_API_KEYS").env("NO_COLOR", "1");
    command.current_dir(site.path()).stdin(Stdio::null());
    let output = command.output().await.unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{words:?}: {said}");
    said
}

#[tokio::test]
async fn a_database_that_is_removed_is_saved_and_goes_on_where_it_was() {
    let site = site();
    let (clients, reason) = end_by(&site, |data| std::fs::remove_file(data.join("roundhouse.db")).unwrap()).await;
    let copy = rescued(&site.data()).unwrap_or_else(|| panic!("{reason}"));
    for word in ["roundhouse.db was removed", "rename this copy", &copy.display().to_string()] {
        assert!(reason.contains(word), "{word}: {reason}");
    }
    // Nobody begins anew beside it without knowing.
    let models = site.path().join("models.yaml").display().to_string();
    for words in [
        &["serve", "--listen", "127.0.0.1:0", "--config", &models][..],
        &["doctor"],
        &["backup", &site.path().join("backup").display().to_string()],
    ] {
        let said = refusal(words, &site).await;
        assert!(said.contains(&copy.display().to_string()) && said.contains("rename this copy"), "{said}");
    }
    std::fs::rename(copy, site.data().join("roundhouse.db")).unwrap();
    goes_on(&site, &clients).await;
}

#[tokio::test]
async fn a_database_that_is_replaced_is_saved_and_the_new_one_left_alone() {
    let site = site();
    let (clients, reason) = end_by(&site, |data| {
        std::fs::write(data.join("other"), "mine").unwrap();
        std::fs::rename(data.join("other"), data.join("roundhouse.db")).unwrap();
    })
    .await;
    assert!(reason.contains("replaced by another file") && reason.contains("move the new roundhouse.db"), "{reason}");
    let database = site.data().join("roundhouse.db");
    assert_eq!(std::fs::read(&database).unwrap(), b"mine");
    std::fs::rename(rescued(&site.data()).unwrap(), &database).unwrap();
    goes_on(&site, &clients).await;
}

#[tokio::test]
async fn a_removed_log_ends_the_server_and_costs_nothing() {
    for name in ["roundhouse.db-wal", "roundhouse.db-shm"] {
        let site = site();
        let (clients, reason) = end_by(&site, |data| std::fs::remove_file(data.join(name)).unwrap()).await;
        for word in [name, "nothing that was accepted is lost", "start the server again"] {
            assert!(reason.contains(word), "{word}: {reason}");
        }
        assert_eq!(rescued(&site.data()), None);
        goes_on(&site, &clients).await;
    }
}

#[tokio::test]
async fn a_removed_lock_is_made_again_and_keeps_others_out() {
    let site = site();
    let server = site.start().await;
    std::fs::remove_file(site.data().join("lock")).unwrap();
    eventually(LIMIT, "it is seen", || async { server.log().contains("locked again").then_some(()) }).await;
    let models = site.path().join("models.yaml").display().to_string();
    let said = refusal(&["serve", "--listen", "127.0.0.1:0", "--config", &models], &site).await;
    assert!(said.contains("another roundhouse server uses"), "{said}");
    server.api.get("/readyz").await.is(200);
}

#[tokio::test]
async fn a_database_that_is_removed_while_the_server_stops_is_saved_too() {
    let site = Site::new().model("slow", echo("custom", &[] as &[&str]));
    let mut server = site.start().await;
    let id = server.api.submit_echo("slow", json!({"delay_ms": 3_000})).await;
    server.api.happened(&id, "job.started").await;
    server.signal(nix::sys::signal::Signal::SIGTERM);
    eventually(LIMIT, "it stops", || async { (server.api.get("/readyz").await.status == 503).then_some(()) }).await;
    std::fs::remove_file(site.data().join("roundhouse.db")).unwrap();
    let status = server.ended().await;
    let log = server.log();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("everything that was accepted is in"), "{log}");
    let copy = rescued(&site.data()).unwrap_or_else(|| panic!("{log}"));
    std::fs::rename(copy, site.data().join("roundhouse.db")).unwrap();
    let server = site.start().await;
    server.api.succeeded(&id).await;
}

#[tokio::test]
async fn a_data_dir_that_is_removed_is_said_to_be_lost_and_a_moved_one_is_whole() {
    let site = site();
    let aside = site.path().join("aside");
    let (clients, reason) = end_by(&site, |data| std::fs::rename(data, &aside).unwrap()).await;
    for word in ["data was removed or moved", "could not be saved", "move it back"] {
        assert!(reason.contains(word), "{word}: {reason}");
    }
    // What the last seconds made there anew.
    let _ = std::fs::remove_dir_all(site.data());
    std::fs::rename(&aside, site.data()).unwrap();
    goes_on(&site, &clients).await;
}

#[tokio::test]
async fn a_removed_data_dir_comes_back_whole_from_the_snapshot_at_the_end() {
    let site = site();
    let snapshots = site.path().join("snapshots").display().to_string();
    let site = site.env("ROUNDHOUSE_SNAPSHOT_DIR", &snapshots).env("ROUNDHOUSE_SNAPSHOT_EVERY", "1h");
    let (clients, _) = end_by(&site, |data| std::fs::remove_dir_all(data).unwrap()).await;
    let _ = std::fs::remove_dir_all(site.data());
    let server = goes_on(&site, &clients).await;
    assert!(server.log().contains("the last snapshot holds everything"), "{}", server.log());
    assert!(server.log().contains("had no database: restored the snapshot"), "{}", server.log());
}

#[tokio::test]
async fn a_removed_folder_of_files_costs_its_files_only() {
    let site = Site::new().model("echo", echo("custom", &[] as &[&str]));
    let server = site.start().await;
    // Too large for a row.
    let large = json!({"endpoint": "/echo", "body": {"model": "echo", "pad": "x".repeat(100_000)}});
    let submit = async || server.api.submit(&large).await;
    let lost = submit().await;
    server.api.succeeded(&lost).await;
    std::fs::remove_dir_all(site.data().join("artifacts")).unwrap();
    let reply = server.api.get(&format!("/v1/jobs/{lost}/response")).await;
    assert_eq!((reply.status, reply.code().as_str()), (500, "internal_error"), "{}", reply.text());
    let next = submit().await;
    server.api.succeeded(&next).await;
    server.api.get(&format!("/v1/jobs/{next}/response")).await.is(200);
}
