//! Models whose copy has no room in host memory, and one sleep at load, on a GPU that `ROUNDHOUSE_FAKE_GPUS` plays.

use serde_json::{Value, json};

use crate::common::{Site, echo, with};
use crate::parking::{is, loads, visit};

const GIB: u64 = 1 << 30;

/// A model that takes 50 of the 80 GiB, and makes a copy of 30 GiB at load if there is room for it; importing takes it 2 s.
fn copies(args: &[&str]) -> Value {
    let (device, host) = ((50 * GIB).to_string(), (30 * GIB).to_string());
    let all = ["--device-bytes", &device, "--host-bytes", &host, "--import-ms", "2000"];
    let args: Vec<&str> = all.into_iter().chain(args.iter().copied()).collect();
    with(echo("custom", &args), json!({"gpus": 1, "memory": "50GiB", "park": "ram", "max_attempts": 1}))
}

#[tokio::test]
async fn a_model_without_room_for_its_copy_keeps_its_process_and_reads_its_weights_again() {
    let site = Site::new().model("a", copies(&["--reread-s", "0.1"])).model("b", copies(&[]));
    let server = site.env("ROUNDHOUSE_FAKE_GPUS", "1x80GiB").scheduler("park_ram", "20GiB").start().await;
    let api = &server.api;
    visit(api, "a").await;
    let before = server.worker("a").await.pid;
    visit(api, "b").await;
    is(api, "a", "parked").await;
    let worker = api.worker("a").await;
    assert_eq!((&worker["without_copy"], &worker["host_bytes"]), (&json!(true), &json!(0)), "{worker}");
    let models = api.get("/v1/models").await.is(200).json();
    let a = models["data"].as_array().unwrap().iter().find(|model| model["id"] == "a").unwrap();
    let a = &a["roundhouse"];
    assert_eq!((&a["parking"]["can"], &a["parking"]["without_copy"]), (&json!(false), &json!(true)), "{a}");
    let job = visit(api, "a").await;
    assert_eq!(job["attempt"], 1, "{job}");
    assert_eq!(loads(api, "a").await, (1, 1));
    assert_eq!(server.worker("a").await.pid, before, "it is the same process");
    assert_eq!(loads(api, "b").await, (1, 0));
    let queue = api.queue().await;
    let reasons: Vec<&str> =
        queue["history"].as_array().unwrap().iter().filter_map(|decision| decision["reason"].as_str()).collect();
    let bare = reasons.iter().find(|reason| reason.starts_with("park a without a copy")).expect("a decision");
    assert!(bare.contains("its wake reads the weights again, about"), "{bare}");
    assert!(reasons.iter().any(|reason| reason.starts_with("stop b without parking it")), "{reasons:?}");
}

#[tokio::test]
async fn what_is_loaded_before_anybody_comes_sleeps_once() {
    let device = (50 * GIB).to_string();
    let preload = with(
        echo("custom", &["--device-bytes", &device]),
        json!({"gpus": 1, "memory": "50GiB", "park": "ram", "preload": true}),
    );
    let site = Site::new().model("a", preload).env("ROUNDHOUSE_FAKE_GPUS", "1x80GiB");
    let server = site.scheduler("park_ram", "40GiB").start().await;
    is(&server.api, "a", "resident").await;
    let worker = server.api.worker("a").await;
    let names: Vec<_> = worker["phases"].as_array().unwrap().iter().map(|phase| phase["phase"].clone()).collect();
    assert_eq!(names.last(), Some(&json!("rehearsal")), "{worker}");
    visit(&server.api, "a").await;
    assert_eq!(server.api.worker("a").await["starts"], 1);
}
