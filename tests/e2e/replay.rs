//! `roundhouse replay`: a trace on a real server of its own, beside its simulation.

use std::path::Path;
use std::process::Output;

use serde_json::json;

use super::common::{self, Site, echo, echo_job, with};

/// Three jobs of `a`, and one of `b` that comes when they have long ended: two loads whoever plays it.
const TRACE: &str = "\
#box,gpus=1,gpu_gb=80,host_gb=0,seed=1
#model,a,gpus=1,gb_per_gpu=70,cold_s=30,wake_s=3,stop_s=1.5,limit=4,alpha=0.5,join=1,mean_work_s=3
#model,b,gpus=1,gb_per_gpu=70,cold_s=30,wake_s=3,stop_s=1.5,limit=4,alpha=0.5,join=0,mean_work_s=3
arrival_s,model,class,deadline_s,tenant,work_s,count
0,a,interactive,,t0,3,1
1,a,batch,,t1,3,2
240,b,interactive,,t0,3,1
";

/// Where in swaps a live replay may be from the simulation: a tenth of them, but at least one.
fn is_near(live: f64, simulated: f64) -> bool {
    (live - simulated).abs() <= (simulated / 10.0).max(1.0)
}

async fn replay(trace: &Path, more: &[&str]) -> Output {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_roundhouse"));
    command.arg("replay").arg(trace).arg("--echo").arg(root.join("models/echo"));
    command.arg("--python").arg(common::python(root)).args(more).env("TMPDIR", trace.parent().unwrap());
    command.output().await.unwrap()
}

#[tokio::test]
async fn a_trace_on_a_real_server_has_the_measures_of_the_simulation_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("two.csv");
    std::fs::write(&trace, TRACE).unwrap();
    let output = replay(&trace, &["--factor", "20"]).await;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let line = |name: &str| text.lines().find(|line| line.trim_start().starts_with(name)).unwrap_or_default();
    let words = |name: &str| line(name).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(words("simulated"), ["simulated", "retimed", "live"], "{text}");
    assert_eq!(words("swaps"), ["swaps", "2.00", "2.00", "2.00"], "{text}");
    // Nothing is left but the trace.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

    let output = replay(&trace, &["--factor", "0"]).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("--factor: 0 must be a number from 1"), "{said}");
    std::fs::write(&trace, TRACE.replace("gpus=1,gpu_gb", "gpus=2,gpu_gb")).unwrap();
    let output = replay(&trace, &[]).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("two cannot be replayed: it is for 2 GPUs"), "{said}");
}

/// Arrival order would cost this trace 17 swaps, the longest queue first 20, and a grouping that looks at nothing else 4.
#[tokio::test]
async fn the_scheduler_swaps_as_often_live_as_in_the_simulation() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("small-201.csv");
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/traces/small-201.csv"), &trace).unwrap();
    let output = replay(&trace, &["--factor", "30", "--csv"]).await;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split(',').collect()).collect();
    let names: Vec<&str> = rows.iter().map(|row| row[1]).collect();
    assert_eq!(names, ["policy", "simulated", "retimed", "live"], "{text}");
    let swaps: Vec<f64> = rows[1..].iter().map(|row| row[2].parse().unwrap()).collect();
    assert_eq!(rows[0][2], "swaps", "{text}");
    assert_eq!(swaps[0], 4.0, "{text}");
    assert!(is_near(swaps[2], swaps[0]), "{text}");
}

/// What `replay` stands on: an hour is a second for deadlines, limits and what loads take.
#[tokio::test]
async fn a_server_whose_clock_is_fast_waits_less_and_has_taken_longer() {
    let model = with(echo("custom", &["--load-s", "0.5"]), json!({"timeout": "1000h", "max_attempts": 1}));
    let server = Site::new().model("a", model).env("ROUNDHOUSE_CLOCK_FACTOR", "3600").start().await;
    let api = &server.api;
    let job_with = |wishes, more| with(echo_job("a", wishes), more);
    let first = api.submit_echo("a", json!({})).await;
    let job = api.succeeded(&first).await;
    assert!(job["timings"]["load_s"].as_f64() >= Some(1_800.0), "{job}");

    let blocker = api.submit(&job_with(json!({"delay_ms": 60_000}), json!({}))).await;
    api.happened(&blocker, "job.started").await;
    let late = api.submit(&job_with(json!({}), json!({"deadline_s": 3_600}))).await;
    assert_eq!(api.finished(&late).await["error"]["code"], "queue_deadline_exceeded");
    assert_eq!(api.job(&blocker).await["state"], "running");
    api.poke(&format!("/v1/jobs/{blocker}/cancel")).await.is(200);
    let long = api.submit(&job_with(json!({"delay_ms": 60_000}), json!({"timeout_s": 3_600}))).await;
    let job = api.finished(&long).await;
    assert_eq!(job["error"]["code"], "execution_timeout", "{job}");
    let counted = api.get("/metrics").await.is(200).text();
    let sum = counted.lines().find_map(|line| line.strip_prefix("roundhouse_load_seconds_sum{model=\"a\"} "));
    assert!(sum.unwrap().parse::<f64>().unwrap() >= 1_800.0, "{sum:?}");
}
