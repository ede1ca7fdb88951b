//! What a worker is started with: its environment, its umask and its folder, as the kernel shows them.

use std::collections::BTreeMap;

use serde_json::json;

use crate::common::{Site, echo, with};

fn environ(pid: i32) -> BTreeMap<String, String> {
    let bytes = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    text.split('\0').filter_map(|pair| pair.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

#[tokio::test]
async fn a_worker_has_no_credential_that_its_entry_does_not_give_and_writes_for_its_user_alone() {
    let env = json!({"OWN_TOKEN": "set by the entry", "PASSED_TOKEN": null});
    let entry = with(echo("custom", &[] as &[&str]), json!({"env": env}));
    let mut site = Site::new().model("m", entry);
    let secrets = [
        "HF_TOKEN",
        "OPENAI_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "PGPASSWORD",
        "CLIENT_SECRET_FILE",
        "OWN_TOKEN",
        "PASSED_TOKEN",
    ];
    for name in secrets {
        site = site.env(name, "of the server");
    }
    let site = site.env("PLAIN_SETTING", "kept");
    let server = site.start().await;
    let job = server.api.submit_echo("m", json!({})).await;
    server.api.succeeded(&job).await;
    let worker = server.worker("m").await;
    let found = environ(worker.pid);
    let has: BTreeMap<&str, &str> =
        secrets.iter().filter_map(|name| Some((*name, found.get(*name)?.as_str()))).collect();
    assert_eq!(has, BTreeMap::from([("OWN_TOKEN", "set by the entry"), ("PASSED_TOKEN", "of the server")]));
    assert_eq!(found.get("PLAIN_SETTING").map(String::as_str), Some("kept"));
    // The guard above it has no more than the worker.
    let guard = server.processes().into_iter().find(|found| !found.is_worker()).unwrap();
    assert!(!environ(guard.pid).contains_key("HF_TOKEN"));

    let status = std::fs::read_to_string(format!("/proc/{}/status", worker.pid)).unwrap();
    let umask = status.lines().find_map(|line| line.strip_prefix("Umask:")).map(str::trim);
    assert_eq!(umask, Some("0077"));
    let folder = std::fs::read_link(format!("/proc/{}/cwd", worker.pid)).unwrap();
    assert_eq!(folder, site.path().canonicalize().unwrap(), "the folder of models.yaml");
}
