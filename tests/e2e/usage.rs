//! Who had how much of the device.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::common::{Api, Site, echo, with};

async fn usage(api: &Api, query: &str) -> Value {
    api.get(&format!("/v1/usage?{query}")).await.is(200).json()
}

fn of(row: &Value, field: &str) -> f64 {
    row[field].as_f64().unwrap_or_else(|| panic!("no {field}: {row}"))
}

fn sum(usage: &Value, field: &str) -> f64 {
    usage["data"].as_array().unwrap().iter().map(|row| of(row, field)).sum()
}

fn row<'a>(usage: &'a Value, key: &str, value: &str) -> &'a Value {
    let rows = usage["data"].as_array().unwrap();
    rows.iter().find(|row| row[key] == value).unwrap_or_else(|| panic!("no row of {value}: {usage}"))
}

fn is_near(a: f64, b: f64) -> bool {
    (a - b).abs() < 0.02
}

#[tokio::test]
async fn work_swaps_and_idling_add_up_to_the_time_that_passed_and_outlive_a_kill() {
    let args = ["--load-s", "0.5", "--delay-ms", "300"];
    let site = Site::new()
        .scheduler("gpu_hourly_cost", 36)
        .model("a", with(echo("custom", &args), json!({"limit": 4})))
        .model("b", echo("custom", &args));
    let mut server = site.start().await;
    let seen = Instant::now();
    let first = usage(&server.api, "by=model").await;
    let ids = server.api.submit_together(vec![crate::common::echo_job("a", json!({})); 6]).await;
    let other = server.api.submit_echo("b", json!({})).await;
    for id in ids.iter().chain([&other]) {
        server.api.succeeded(id).await;
    }
    let asked = Instant::now();
    let models = usage(&server.api, "by=model").await;
    let (least, most) = (asked - seen, seen.elapsed());
    // What the questions themselves take lies between.
    let passed = of(&models["total"], "gpu_s") - of(&first["total"], "gpu_s");
    let slack = Duration::from_secs(1).as_secs_f64();
    assert!(passed >= least.as_secs_f64() - slack && passed <= most.as_secs_f64() + slack, "{passed}: {models}");
    let total = &models["total"];
    assert!(is_near(of(total, "work_s") + of(total, "swap_s") + of(total, "idle_s"), of(total, "gpu_s")), "{models}");
    assert!(is_near(sum(&models, "gpu_s"), of(total, "gpu_s")), "{models}");
    assert!(is_near(of(total, "cost"), of(total, "gpu_s") / 100.0), "{models}");
    assert!(of(row(&models, "model", "b"), "swap_s") >= 0.5, "{models}");
    assert_eq!(models["saved"]["estimate"], true, "{models}");
    assert_eq!((&models["saved"]["swaps"], &models["saved"]["swaps_in_arrival_order"]), (&json!(1), &json!(1)));

    // Jobs that shared the worker shared its time: in all they had what the device worked.
    let jobs = usage(&server.api, "by=job").await;
    assert_eq!(jobs["data"].as_array().unwrap().len(), 7, "{jobs}");
    assert!((sum(&jobs, "work_s") - of(total, "work_s")).abs() < 0.1, "{jobs} {models}");
    assert!((sum(&jobs, "swap_s") - of(total, "swap_s")).abs() < 0.1, "apportioned: {jobs} {models}");
    let job = server.api.job(&other).await;
    assert!(of(&job["timings"], "gpu_s") >= 0.3, "{job}");
    assert!(is_near(of(&job["timings"], "gpu_s"), of(row(&jobs, "job", &other), "work_s")), "{jobs}");
    let batches = usage(&server.api, "by=batch").await;
    assert_eq!((batches["data"].as_array().unwrap().len(), &batches["data"][0]["jobs"]), (1, &json!(6)), "{batches}");
    let mine = job_sum(&server.api, &ids).await;
    assert!(is_near(sum(&batches, "work_s"), mine), "{mine}: {batches}");

    server.kill();
    let server = site.start().await;
    let again = usage(&server.api, "by=model").await;
    for field in ["work_s", "swap_s"] {
        assert!(is_near(of(&again["total"], field), of(total, field)), "{again} {models}");
    }
    assert_eq!(again["total"]["jobs"], 7);
    let tomorrow = usage(&server.api, "by=model&from=4102444800&to=4102448400").await;
    assert_eq!((tomorrow["data"].as_array().unwrap().len(), of(&tomorrow["total"], "gpu_s")), (0, 0.0), "{tomorrow}");
}

async fn job_sum(api: &Api, ids: &[String]) -> f64 {
    let mut sum = 0.0;
    for id in ids {
        sum += of(&api.job(id).await["timings"], "gpu_s");
    }
    sum
}

#[tokio::test]
async fn tenants_see_their_own() {
    let site = Site::new().model("a", echo("custom", &["--delay-ms", "100"]));
    let site = site.env("ROUNDHOUSE_API_KEYS", "alice:alice-secret,bob:bob-secret,admin:admin-secret");
    let server = site.start().await;
    let (alice, bob, admin) =
        (server.api.key("alice-secret"), server.api.key("bob-secret"), server.api.key("admin-secret"));
    for (api, count) in [(&alice, 2), (&bob, 1)] {
        for _ in 0..count {
            let id = api.submit_echo("a", json!({})).await;
            api.succeeded(&id).await;
        }
    }
    for by in ["model", "tenant", "job"] {
        let own = usage(&alice, &format!("by={by}")).await;
        assert_eq!(
            (&own["total"]["jobs"], &own["saved"], &own["total"]["idle_s"]),
            (&json!(2), &Value::Null, &Value::Null)
        );
        assert!(own["data"].as_array().unwrap().iter().all(|row| row["tenant"].is_null() || row["tenant"] == "alice"));
        assert!(is_near(sum(&own, "work_s"), of(&own["total"], "work_s")), "{own}");
    }
    let all = usage(&admin, "by=tenant").await;
    assert_eq!((&row(&all, "tenant", "alice")["jobs"], &row(&all, "tenant", "bob")["jobs"]), (&json!(2), &json!(1)));
    assert_eq!(usage(&admin, "by=job&limit=1").await["data"].as_array().unwrap().len(), 1);
    for (query, param) in [
        ("by=color", "by"),
        ("from=x", "from"),
        ("from=5&to=5", "to"),
        ("to=9223372036854775", "to"),
        ("limit=0", "limit"),
    ] {
        let refused = alice.get(&format!("/v1/usage?{query}")).await.refused(400, "invalid_request").json();
        assert_eq!(refused["error"]["param"], param, "{refused}");
    }
}
