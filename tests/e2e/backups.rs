//! Backups while the server works, restores elsewhere, snapshots for a disk that goes, and where data may lie.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::common::{Api, LIMIT, Site, beside, check_history, echo, echo_job, eventually};

const MIB: usize = 1 << 20;

fn site() -> Site {
    Site::new()
        .model("echo", echo("custom", &[] as &[&str]))
        .model("slow", echo("custom", &["--delay-ms", "150"]))
        .model("images", echo("image", &[] as &[&str]))
}

/// A job whose request and answer hold a MiB each.
async fn large(api: &Api) -> String {
    let body = json!({"model": "echo", "pad": "x".repeat(MIB)});
    api.submit(&json!({"endpoint": "/echo", "body": body})).await
}

async fn image(api: &Api, seed: u64) -> String {
    let body = json!({"model": "images", "prompt": "a fox", "seed": seed});
    api.submit(&json!({"endpoint": "/v1/images/generations", "body": body})).await
}

async fn response(api: &Api, id: &str) -> bytes::Bytes {
    api.following().get(&format!("/v1/jobs/{id}/response")).await.is(200).body
}

async fn artifact(api: &Api, id: &str) -> bytes::Bytes {
    api.get(&format!("/v1/jobs/{id}/artifacts/art_0")).await.is(200).body
}

async fn roundhouse(words: &[&str], paths: &[(&str, &Path)]) -> Output {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_roundhouse"));
    command.args(words);
    for (flag, path) in paths {
        if !flag.is_empty() {
            command.arg(flag);
        }
        command.arg(path);
    }
    command.output().await.unwrap()
}

#[tokio::test]
async fn snapshots_that_fail_are_said_by_readyz_and_the_log_until_they_work_again() {
    let site = site();
    let folder = site.path().join("snapshots");
    let site = site.storage("snapshot_dir", folder.display().to_string()).storage("snapshot_every", "100ms");
    let server = site.start().await;
    let api = &server.api;
    let is_there =
        || async { (api.get("/health").await.json()["storage"]["snapshot"]["last_at"].is_string()).then_some(()) };
    eventually(LIMIT, "there is one", is_there).await;
    // Its volume goes away, and a file is where it was.
    let away = site.path().join("away");
    std::fs::rename(&folder, &away).unwrap();
    std::fs::write(&folder, "").unwrap();
    let id = api.submit_echo("echo", json!({})).await;
    api.succeeded(&id).await;
    let ready = eventually(LIMIT, "it is said", || async {
        let ready = api.get("/readyz").await.is(200).json();
        (ready["degraded"][0]["store"] == "snapshots_fail").then_some(ready)
    })
    .await;
    let text = ready["degraded"][0]["reason"].as_str().unwrap();
    assert!(text.contains("the last good one is") && !text.contains(&*site.path().to_string_lossy()), "{text}");
    std::fs::remove_file(&folder).unwrap();
    std::fs::rename(&away, &folder).unwrap();
    eventually(LIMIT, "they are taken again", || async {
        server.log().contains("snapshots are taken again").then_some(())
    })
    .await;
    assert_eq!(api.get("/readyz").await.is(200).json()["degraded"], json!([]));
    let log = server.log();
    assert_eq!(log.matches("no snapshot could be taken").count(), 1, "{log}");
}

#[track_caller]
fn succeeds(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    out.into_owned()
}

/// What it says when it refuses.
#[track_caller]
fn refuses(output: &Output) -> String {
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{}\n{err}", String::from_utf8_lossy(&output.stdout));
    err
}

async fn back_up(data: &Path, dest: &Path) -> Output {
    roundhouse(&["backup"], &[("", dest), ("--data-dir", data)]).await
}

async fn restore(source: &Path, data: &Path) -> Output {
    roundhouse(&["restore"], &[("", source), ("--data-dir", data)]).await
}

/// The first number of a line of what a command said.
#[track_caller]
fn number(said: &str, line: &str) -> u64 {
    let found = said.lines().find_map(|l| l.trim().strip_prefix(line)).unwrap_or_else(|| panic!("no {line}: {said}"));
    found.split_whitespace().next().unwrap().trim_end_matches(':').parse().unwrap()
}

fn files_in(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    found
}

fn flip_a_byte(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[tokio::test]
async fn a_backup_of_a_busy_server_restores_elsewhere_byte_by_byte_and_its_queue_goes_on() {
    let site = site();
    let server = site.start().await;
    let api = server.api.clone();
    let (result, picture) = (large(&api).await, image(&api, 1).await);
    api.succeeded(&result).await;
    api.succeeded(&picture).await;
    let expected = (response(&api, &result).await, artifact(&api, &picture).await);
    assert!(expected.0.len() > MIB);
    let mut waiting = Vec::new();
    for _ in 0..30 {
        waiting.push(api.submit(&echo_job("slow", json!({}))).await);
    }
    // Others go on submitting while the backups are taken.
    let stop = Arc::new(AtomicBool::new(false));
    let load = beside({
        let (api, stop) = (api.clone(), stop.clone());
        async move {
            let mut count = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let id = image(&api, count).await;
                api.succeeded(&id).await;
                count += 1;
            }
            count
        }
    });
    let dest = site.path().join("backup");
    let first = succeeds(&back_up(&site.data(), &dest).await);
    let later = large(&api).await;
    api.succeeded(&later).await;
    let second = succeeds(&back_up(&site.data(), &dest).await);
    stop.store(true, Ordering::Relaxed);
    assert!(load.await.unwrap() > 0);
    // The MiB of request and answer, and the image; then only what came after.
    assert!(number(&first, "files copied") >= 3 && number(&first, "already there") == 0, "{first}");
    let before = number(&first, "files copied");
    assert_eq!(number(&second, "already there"), before, "{second}");
    assert!(number(&second, "files copied") >= 2 && number(&second, "removed") == 0, "{second}");
    let third = succeeds(&back_up(&site.data(), &dest).await);
    assert_eq!(
        number(&third, "already there"),
        files_in(&dest.join("artifacts")).len() as u64 - number(&third, "files copied")
    );
    let checked = succeeds(&roundhouse(&["restore", "--check"], &[("", &dest)]).await);
    assert!(checked.contains("is whole"), "{checked}");
    let refusal = refuses(&restore(&dest, &site.data()).await);
    assert!(refusal.contains("overwrites nothing") && refusal.contains("--data-dir"), "{refusal}");
    drop(server);

    let other = self::site();
    let said = succeeds(&restore(&dest, &other.data()).await);
    assert!(said.contains("restored") && number(&said, "jobs") > 30, "{said}");
    let server = other.start().await;
    let restored = (response(&server.api, &result).await, artifact(&server.api, &picture).await);
    assert!(restored == expected, "byte by byte");
    assert!(response(&server.api, &later).await.len() > MIB);
    let mut had_to_run = 0;
    for id in &waiting {
        let job = server.api.succeeded(id).await;
        had_to_run += u32::from(job["attempt"] != 1 || job["started_at"].as_str() > job["queued_at"].as_str());
        assert_eq!(check_history(&server.api.events(id).await), "job.succeeded");
    }
    assert!(had_to_run > 0);
    // Two servers with one id would end each other's workers.
    let id = |data: PathBuf| roundhouse::store::data_dir_id_of(&data).unwrap();
    assert_ne!(id(site.data()), id(other.data()));
}

#[tokio::test]
async fn a_damaged_backup_is_refused_by_the_name_of_what_is_damaged() {
    let site = site();
    let server = site.start().await;
    let id = image(&server.api, 1).await;
    server.api.succeeded(&id).await;
    let dest = site.path().join("backup");
    succeeds(&back_up(&site.data(), &dest).await);
    let target = site.path().join("restored");
    let file = files_in(&dest.join("artifacts")).remove(0);
    flip_a_byte(&file);
    let name = file.file_name().unwrap().to_string_lossy().into_owned();
    for refusal in [restore(&dest, &target).await, roundhouse(&["restore", "--check"], &[("", &dest)]).await] {
        let refusal = refuses(&refusal);
        assert!(refusal.contains(&name) && refusal.contains(&format!("{id}: damaged")), "{refusal}");
        assert!(refusal.contains("roundhouse restore --without-lost-files"), "{refusal}");
    }
    let without = |words: &'static [&'static str], target: &Path| {
        let (dest, target) = (dest.clone(), target.to_owned());
        async move { succeeds(&roundhouse(words, &[("", &dest), ("--data-dir", &target)]).await) }
    };
    let said = without(&["restore", "--check", "--without-lost-files"], &target).await;
    assert!(said.contains("can be restored, without 1 files") && said.contains(&name), "{said}");
    let other = self::site();
    let said = without(&["restore", "--without-lost-files"], &other.data()).await;
    assert!(said.contains("restored") && said.contains(&format!("{id}: damaged")), "{said}");
    let restored = other.start().await;
    let reply = restored.api.get(&format!("/v1/jobs/{id}/artifacts/art_0")).await;
    assert!(reply.status == 500 && reply.text().contains("is lost or damaged"), "{}: {}", reply.status, reply.text());
    assert!(restored.log().contains("restored from a backup: what was accepted"), "{}", restored.log());
    assert!(!restored.log().contains("nothing that was accepted is lost"), "{}", restored.log());
    drop(restored);
    flip_a_byte(&file);
    flip_a_byte(&dest.join("roundhouse.db"));
    let refusal = refuses(&restore(&dest, &target).await);
    assert!(refusal.contains("backup/roundhouse.db: damaged"), "{refusal}");
    assert!(!target.join("roundhouse.db").exists());
    // A data dir whose server runs, however empty it looks.
    let full = site.path().join("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("thesis.txt"), "x").unwrap();
    assert!(refuses(&back_up(&site.data(), &full).await).contains("is not empty"));
    assert!(refuses(&back_up(&site.data(), &site.data().join("backup")).await).contains("choose another folder"));
}

#[tokio::test]
async fn a_lost_data_dir_is_restored_from_its_snapshots_and_the_loss_is_told_beforehand() {
    let site = site();
    let snapshots = site.path().join("volume/snapshots");
    let disk = format!("{}=overlay,{}=nfs", site.data().display(), site.path().join("volume").display());
    let site = site
        .env("ROUNDHOUSE_SNAPSHOT_DIR", &snapshots.display().to_string())
        .env("ROUNDHOUSE_SNAPSHOT_EVERY", "500ms")
        .env("ROUNDHOUSE_STATFS", &disk);
    let mut server = site.start().await;
    let api = server.api.clone();
    let done = image(&api, 7).await;
    api.succeeded(&done).await;
    let expected = artifact(&api, &done).await;
    let manifest = snapshots.join("manifest.json");
    eventually(LIMIT, "a snapshot with the image", || async {
        let text = std::fs::read_to_string(&manifest).unwrap_or_default();
        (serde_json::from_str::<serde_json::Value>(&text).ok()?["jobs"]["succeeded"] == 1).then_some(())
    })
    .await;
    let health = api.get("/health").await.is(200).json();
    assert_eq!(health["status"], "ok");
    let storage = &health["storage"];
    assert_eq!((&storage["durability"], &storage["loss_window_s"]), (&json!("snapshot"), &json!(0.5)), "{health}");
    assert_eq!((&storage["file_system"], &storage["persistent"]), (&json!("overlay"), &json!(false)), "{health}");
    assert!(storage["snapshot"]["last_at"].is_string() && storage["snapshot"]["failed"].is_null(), "{health}");
    assert!(server.log().contains("so are the jobs and results of up to 0.5 s"), "{}", server.log());
    // A second server takes no copy of what another one's jobs are.
    let second = self::site();
    second.start().await;
    std::fs::remove_dir_all(second.data()).unwrap();
    let refusal = refuses(&serve(&second, &[("ROUNDHOUSE_SNAPSHOT_DIR", &snapshots.display().to_string())]).await);
    assert!(refusal.contains("somebody else writes") && refusal.contains("--snapshot-dir"), "{refusal}");
    assert!(!second.data().join("roundhouse.db").exists() && !second.data().join("artifacts").exists());
    // The pod is gone, and its disk.
    server.kill();
    server.all_gone(Duration::from_secs(20)).await;
    std::fs::remove_dir_all(site.data()).unwrap();
    drop(server);

    let site = site.env("ROUNDHOUSE_SNAPSHOT_EVERY", "1h");
    let mut server = site.start().await;
    assert!(server.log().contains("had no database: restored the snapshot"), "{}", server.log());
    assert_eq!(artifact(&server.api, &done).await, expected);
    // A stop in order takes everything along, whenever the last snapshot was.
    let running = server.api.submit_echo("slow", json!({"delay_ms": 1500})).await;
    let waiting = server.api.submit_echo("slow", json!({})).await;
    server.api.happened(&running, "job.started").await;
    server.signal(Signal::SIGTERM);
    assert_eq!(server.ended().await.code(), Some(0));
    assert!(server.log().contains("the last snapshot holds everything"), "{}", server.log());
    drop(server);
    std::fs::remove_dir_all(site.data()).unwrap();

    let server = site.start().await;
    assert_eq!(server.api.job(&running).await["state"], "succeeded");
    server.api.succeeded(&waiting).await;
    drop(server);

    // An unreadable snapshot is not taken for none: an empty server would overwrite it.
    std::fs::remove_dir_all(site.data()).unwrap();
    flip_a_byte(&snapshots.join("roundhouse.db"));
    let refusal = refuses(&serve(&site, &[("ROUNDHOUSE_SNAPSHOT_DIR", &snapshots.display().to_string())]).await);
    assert!(refusal.contains("--snapshot-dir") && refusal.contains("damaged"), "{refusal}");
}

fn serve_command(site: &Site, env: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_roundhouse"));
    command.args(["serve", "--listen", "127.0.0.1:0", "--config"]).arg(site.path().join("models.yaml"));
    command.arg("--data-dir").arg(site.data()).env_remove("ROUNDHOUSE_API_KEYS").env("NO_COLOR", "1");
    command.envs(env.iter().copied());
    command
}

/// Runs a server that is to refuse.
async fn serve(site: &Site, env: &[(&str, &str)]) -> Output {
    tokio::process::Command::from(serve_command(site, env)).output().await.unwrap()
}

#[tokio::test]
async fn a_network_file_system_is_refused_and_used_with_one_connection_if_that_is_asked_for() {
    let site = site();
    let server = site.start().await;
    drop(server);
    let disk = format!("{}=nfs", site.data().display());
    let refusal = refuses(&serve(&site, &[("ROUNDHOUSE_STATFS", &disk)]).await);
    for word in ["lies on NFS", "--data-dir", "--allow-network-fs", "--snapshot-dir"] {
        assert!(refusal.contains(word), "{refusal}");
    }

    let mut command = serve_command(&site, &[("ROUNDHOUSE_STATFS", &disk), ("ROUNDHOUSE_ALLOW_NETWORK_FS", "true")]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.split_whitespace().find(|word| word.starts_with("http://")).unwrap_or_else(|| panic!("{line}"));
    let api = Api::new(address);
    let id = api.submit_echo("slow", json!({})).await;
    api.succeeded(&id).await;
    let health = api.get("/health").await.is(200).json();
    assert_eq!((&health["storage"]["durability"], &health["storage"]["file_system"]), (&json!("fsync"), &json!("NFS")));
    // Nobody else may have a connection.
    let refusal = refuses(&back_up(&site.data(), &site.path().join("backup")).await);
    assert!(refusal.contains("--allow-network-fs") && refusal.contains("stop it first"), "{refusal}");
    let output = roundhouse(&["doctor", "--allow-network-fs"], &[("--data-dir", &site.data())]).await;
    assert!(succeeds(&output).contains("not to be seen now"));
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && log.contains("allowed by --allow-network-fs"), "{log}");
    succeeds(&back_up(&site.data(), &site.path().join("backup")).await);
}

#[tokio::test]
async fn the_doctor_looks_at_a_running_server_and_finds_what_is_gone() {
    let site = site();
    let server = site.start().await;
    let id = image(&server.api, 1).await;
    server.api.succeeded(&id).await;
    let config = site.path().join("models.yaml");
    let data = site.data();
    let look = |words: &'static [&'static str]| {
        let (config, data) = (config.clone(), data.clone());
        async move { roundhouse(words, &[("--config", &config), ("--data-dir", &data)]).await }
    };
    let text = succeeds(&look(&["doctor", "--deep"]).await);
    for word in ["one runs on this data dir", "1: 1 succeeded", "Nothing is wrong.", "database and its log"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let file = files_in(&data.join("artifacts")).remove(0);
    std::fs::remove_file(&file).unwrap();
    succeeds(&look(&["doctor"]).await);
    let output = look(&["doctor", "--deep"]).await;
    refuses(&output);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains(&*file.file_name().unwrap().to_string_lossy()) && text.contains("it is gone"), "{text}");
    drop(server);
    let text = succeeds(&look(&["doctor"]).await);
    assert!(text.contains("none runs on this data dir"), "{text}");
}
