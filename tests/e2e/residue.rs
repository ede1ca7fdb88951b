//! What a parked process keeps of its GPU is in nobody's way.

use serde_json::{Value, json};

use crate::common::{Site, echo, with};
use crate::parking::{is, loads, visit};

/// A model that takes so much of the 80 GiB; parked, its process keeps 2 GiB.
fn taking(gib: u64) -> Value {
    let (bytes, kept) = ((gib << 30).to_string(), (2_u64 << 30).to_string());
    let args = ["--device-bytes", &bytes, "--device-parked-bytes", &kept];
    with(echo("custom", &args), json!({"gpus": 1, "memory": format!("{gib}GiB"), "park": "ram"}))
}

#[tokio::test]
async fn a_parked_process_is_dropped_before_a_model_that_does_not_fit_beside_it_is_loaded() {
    let site = Site::new().model("small", taking(50)).model("large", taking(79));
    let server = site.env("ROUNDHOUSE_FAKE_GPUS", "1x80GiB").scheduler("park_ram", "200GiB").start().await;
    let api = &server.api;
    visit(api, "small").await;
    visit(api, "large").await;
    is(api, "small", "absent").await;
    let queue = api.queue().await;
    let drop = queue["history"].as_array().unwrap().iter().find(|decision| decision["code"] == "drop").unwrap().clone();
    let expected =
        "drop small from host memory: its process keeps 2 GiB of gpu0, where large needs 79.0 GiB of 80.0 GiB";
    assert_eq!((&drop["reason"], &drop["model"]), (&json!(expected), &json!("small")));
    // The other way round there is room.
    visit(api, "small").await;
    is(api, "large", "parked").await;
    visit(api, "large").await;
    is(api, "small", "absent").await;
    assert_eq!((loads(api, "small").await, loads(api, "large").await), ((2, 0), (1, 1)));
    assert!(server.log().contains("stop small without parking it: its process would keep 2 GiB"), "{}", server.log());
}

#[tokio::test]
async fn a_worker_on_two_gpus_may_keep_as_much_of_each_as_one_on_one() {
    let on_both = || {
        let (bytes, kept) = ((50_u64 << 30).to_string(), (3_u64 << 30).to_string());
        let args = ["--device-bytes", &bytes, "--device-parked-bytes", &kept];
        with(echo("custom", &args), json!({"gpus": 2, "memory": "50GiB", "park": "ram"}))
    };
    let site = Site::new().model("one", on_both()).model("other", on_both());
    let server = site.env("ROUNDHOUSE_FAKE_GPUS", "2x80GiB").scheduler("park_ram", "200GiB").start().await;
    let api = &server.api;
    visit(api, "one").await;
    visit(api, "other").await;
    is(api, "one", "parked").await;
    visit(api, "one").await;
    assert_eq!(loads(api, "one").await, (1, 1), "{}", server.log());
}
