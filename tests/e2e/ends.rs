//! Deadlines, timeouts and cancelling.

use serde_json::{Value, json};

use crate::common::{Site, check_history, echo, echo_job, with};

fn job_with(wishes: Value, more: Value) -> Value {
    with(echo_job("a", wishes), more)
}

#[tokio::test]
async fn deadlines_and_timeouts_end_jobs_with_their_own_codes() {
    let site = Site::new().model("a", echo("custom", &[] as &[&str])).model("t", echo("text", &[] as &[&str]));
    let server = site.start().await;
    let api = &server.api;
    let first = api.submit_echo("a", json!({})).await;
    api.succeeded(&first).await;

    let blocker = api.submit_echo("a", json!({"delay_ms": 3000})).await;
    api.happened(&blocker, "job.started").await;
    let never_started = api.submit(&job_with(json!({}), json!({"start_deadline_s": 1}))).await;
    let queued_too_long = api.submit(&job_with(json!({}), json!({"deadline_s": 1}))).await;
    for id in [&never_started, &queued_too_long] {
        let job = api.finished(id).await;
        assert_eq!(job["state"], "expired", "{job}");
        assert_eq!(job["error"]["code"], "queue_deadline_exceeded", "{job}");
        assert_eq!(check_history(&api.events(id).await), "job.expired");
        api.get(&format!("/v1/jobs/{id}/response")).await.refused(504, "queue_deadline_exceeded");
    }
    assert_eq!(api.job(&blocker).await["state"], "running", "the one before it was not disturbed");
    api.succeeded(&blocker).await;

    let too_long = api.submit(&job_with(json!({"delay_ms": 20000}), json!({"deadline_s": 1}))).await;
    let job = api.finished(&too_long).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("expired"), &json!("deadline_exceeded")), "{job}");

    let timed_out = api.submit(&job_with(json!({"delay_ms": 20000}), json!({"timeout_s": 1, "max_attempts": 2}))).await;
    let job = api.finished(&timed_out).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("failed"), &json!("execution_timeout")), "{job}");
    assert_eq!(job["attempt"], 2, "a timeout is tried again: {job}");
    assert_eq!(check_history(&api.events(&timed_out).await), "job.failed");

    // The worker noticed that nobody waits, and is free.
    let last = api.submit_echo("a", json!({})).await;
    api.succeeded(&last).await;
    assert_eq!(api.worker("a").await["starts"], 1);
}

#[tokio::test]
async fn cancelling_ends_queued_and_running_jobs_and_changes_no_ended_one() {
    let site = Site::new().model("a", echo("custom", &[] as &[&str]));
    let server = site.start().await;
    let api = &server.api;
    let running = api.submit_echo("a", json!({"delay_ms": 60000, "steps": 100})).await;
    let queued = api.submit_echo("a", json!({})).await;
    let next = api.submit_echo("a", json!({})).await;
    api.happened(&running, "job.started").await;

    let job = api.poke(&format!("/v1/jobs/{queued}/cancel")).await.is(200).json();
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("cancelled"), &json!("cancelled_by_user")), "{job}");
    assert_eq!(job["attempt"], 0, "{job}");
    let job = api.poke(&format!("/v1/jobs/{running}/cancel")).await.is(200).json();
    assert!(job["state"] == "cancelling" || job["state"] == "cancelled", "{job}");
    // Twice is once.
    api.poke(&format!("/v1/jobs/{running}/cancel")).await.is(200);
    let job = api.finished(&running).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("cancelled"), &json!("cancelled_by_user")), "{job}");
    api.succeeded(&next).await;
    assert_eq!(api.worker("a").await["starts"], 1, "cancelling does not cost the worker");

    for (id, end) in [(&running, "job.cancelled"), (&queued, "job.cancelled"), (&next, "job.succeeded")] {
        let before = api.job(id).await;
        assert_eq!(api.poke(&format!("/v1/jobs/{id}/cancel")).await.is(200).json()["version"], before["version"]);
        api.poke(&format!("/v1/jobs/{id}/cancel?strict=true")).await.refused(409, "job_already_terminal");
        assert_eq!(api.job(id).await["state"], before["state"]);
        assert_eq!(check_history(&api.events(id).await), end);
    }
    // A body is allowed, as SDKs send one.
    api.post(&format!("/v1/jobs/{next}/cancel"), &json!({})).await.is(200);
}
