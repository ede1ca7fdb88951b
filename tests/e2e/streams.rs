//! Streamed answers through the shim: framing that unforgiving clients accept, failures, and callers that go away.

use std::time::Duration;

use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::{Value, json};

use crate::common::{Api, EventStream, Frame, Site, check_history, echo, with};

fn chat(wishes: Value) -> Value {
    json!({"model": "t:latest", "stream": true, "messages": [{"role": "user", "content": "one two three"}], "echo": wishes,
           "metadata": {"who": "me"}})
}

fn text_model(args: &[&str]) -> Value {
    with(echo("text", args), json!({"aliases": ["t:latest"]}))
}

/// Opens a stream; returns it with the job's id.
async fn open(api: &Api, path: &str, body: &Value) -> (EventStream, String) {
    let answer = api.open(Method::POST, path, Some(body.to_string().into_bytes())).await;
    assert_eq!(answer.status().as_u16(), 200);
    let header = |name: &str| answer.headers().get(name).map_or("", |value| value.to_str().unwrap()).to_owned();
    assert!(header("content-type").starts_with("text/event-stream"), "{:?}", answer.headers());
    assert!(header("cache-control").contains("no-store"), "{:?}", answer.headers());
    assert_eq!(header("x-accel-buffering"), "no");
    let id = header("x-roundhouse-job-id");
    (EventStream::new(answer), id)
}

/// Insists on the framing and returns the data frames before `[DONE]`.
fn check_framing(stream: &EventStream, frames: &[Frame]) -> Vec<Value> {
    let text = std::str::from_utf8(&stream.all).unwrap();
    assert!(text.ends_with("data: [DONE]\n\n"), "{text:?}");
    assert_eq!(text.matches("[DONE]").count(), 1, "{text:?}");
    for block in text.trim_end_matches('\n').split("\n\n") {
        let is_comment = block.lines().all(|line| line.starts_with(": "));
        let is_data = block.starts_with("data: ") && block.lines().count() == 1 && block.len() > "data: ".len();
        assert!(is_comment || is_data, "neither a comment nor one line of data: {block:?}");
    }
    let data: Vec<&Frame> = frames.iter().filter(|frame| !frame.is_comment()).collect();
    data[..data.len() - 1].iter().map(|frame| frame.json()).collect()
}

fn content(chunks: &[Value]) -> String {
    chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect()
}

#[tokio::test]
async fn a_streamed_chat_has_exactly_the_frames_that_clients_expect() {
    let server = Site::new().model("t", text_model(&[])).start().await;
    let api = &server.api;
    let (mut stream, id) = open(api, "/v1/chat/completions", &chat(json!({}))).await;
    let frames = stream.rest().await;
    let chunks = check_framing(&stream, &frames);
    let own = id.replace("job_", "chatcmpl-");
    for chunk in &chunks {
        assert_eq!(chunk["id"], own.as_str(), "{chunk}");
        assert_eq!(
            (&chunk["model"], &chunk["object"]),
            (&json!("t:latest"), &json!("chat.completion.chunk")),
            "{chunk}"
        );
        assert!(chunk["usage"].is_null(), "nobody asked: {chunk}");
        assert_eq!(chunk["choices"].as_array().unwrap().len(), 1, "{chunk}");
    }
    assert_eq!(content(&chunks), "echo: one two three");
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let reasons: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]["finish_reason"]).collect();
    assert_eq!(reasons.iter().filter(|reason| !reason.is_null()).count(), 1);
    assert_eq!(reasons.last().unwrap(), &&json!("stop"));

    // What is stored is the answer as one object.
    let job = api.succeeded(&id).await;
    assert!(job["usage"]["completion_tokens"].as_u64().unwrap() > 0, "usage is known though nobody asked: {job}");
    let answer = api.get(&format!("/v1/jobs/{id}/response")).await.is(200).json();
    assert_eq!(answer["choices"][0]["message"]["content"], "echo: one two three", "{answer}");
    assert_eq!(answer["object"], "chat.completion", "{answer}");
    assert_eq!(check_history(&api.events(&id).await), "job.succeeded");

    let mut asked = chat(json!({}));
    asked["stream_options"] = json!({"include_usage": true});
    let (mut stream, _) = open(api, "/v1/chat/completions", &asked).await;
    let frames = stream.rest().await;
    let chunks = check_framing(&stream, &frames);
    let last = chunks.last().unwrap();
    assert_eq!(last["choices"], json!([]), "{last}");
    assert!(last["usage"]["total_tokens"].as_u64().unwrap() > 0, "{last}");
    assert_eq!(content(&chunks), "echo: one two three");

    let completion = json!({"model": "t", "prompt": "four", "stream": true});
    let (mut stream, id) = open(api, "/v1/completions", &completion).await;
    let frames = stream.rest().await;
    let chunks = check_framing(&stream, &frames);
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, "echo: four");
    assert!(chunks.iter().all(|chunk| chunk["id"] == id.replace("job_", "cmpl-").as_str()), "{chunks:?}");
}

#[tokio::test]
async fn chunks_come_while_the_job_runs_and_events_have_them_too() {
    let server = Site::new().model("t", text_model(&[])).start().await;
    let api = &server.api;
    let (mut stream, id) = open(api, "/v1/chat/completions", &chat(json!({"tokens": 40, "tokens_per_s": 20}))).await;
    let first = stream.next_data().await.unwrap();
    assert_eq!(first.json()["object"], "chat.completion.chunk");
    assert_eq!(api.job(&id).await["state"], "running", "the first chunk is there long before the last");
    let mut frames = vec![first];
    frames.extend(stream.rest().await);
    let chunks = check_framing(&stream, &frames);
    assert_eq!(content(&chunks).split_whitespace().count(), 40);

    // The same text is in the event log, in order.
    let events = api.events(&id).await;
    check_history(&events);
    let outputs: Vec<&Value> = events.iter().filter(|event| event["type"] == "job.output").collect();
    assert!(outputs.len() >= 2, "coalesced, but not to one: {}", outputs.len());
    let logged: Vec<Value> =
        outputs.iter().flat_map(|event| event["delta"].as_array().unwrap().iter().cloned()).collect();
    assert_eq!(content(&logged), content(&chunks));
}

#[tokio::test]
async fn a_stream_that_fails_says_so_and_ends_with_done() {
    let site = Site::new().model("t", with(text_model(&[]), json!({"max_attempts": 1})));
    let server = site.start().await;
    let api = &server.api;
    let cases = [
        (json!({"stream_error_after": 2}), "worker_error", true),
        (json!({"no_finish": true}), "worker_error", true),
        (json!({"crash": true, "tokens": 40, "tokens_per_s": 40}), "worker_lost", true),
        // Not at once: what fails at once has a real status.
        (json!({"fail": "not today", "delay_ms": 1500}), "worker_error", false),
    ];
    for (wishes, code, has_text) in cases {
        let (mut stream, id) = open(api, "/v1/chat/completions", &chat(wishes.clone())).await;
        let frames = stream.rest().await;
        let chunks = check_framing(&stream, &frames);
        let errors: Vec<&Value> = chunks.iter().filter(|chunk| !chunk["error"].is_null()).collect();
        assert_eq!(errors.len(), 1, "{wishes}: {chunks:?}");
        assert_eq!(chunks.last(), errors.first().copied(), "{wishes}: the error comes last");
        assert_eq!(errors[0]["error"]["code"], code, "{wishes}: {chunks:?}");
        assert_eq!(!content(&chunks).is_empty(), has_text, "{wishes}: {chunks:?}");
        let job = api.finished(&id).await;
        assert_eq!((&job["state"], &job["error"]["code"]), (&json!("failed"), &json!(code)), "{wishes}: {job}");
        assert_eq!(job["attempt"], 1, "{wishes}: nothing is repeated to a caller who has seen a part: {job}");
        assert_eq!(check_history(&api.events(&id).await), "job.failed");
    }
    // What is wrong before anything is accepted has its real status.
    let mut unknown = chat(json!({}));
    unknown["model"] = json!("nobody");
    api.post("/v1/chat/completions", &unknown).await.refused(404, "model_not_found");
}

#[tokio::test]
async fn a_caller_who_leaves_a_stream_ends_its_job() {
    let site = Site::new().server("disconnect_grace", "200ms").model("t", text_model(&[]));
    let server = site.start().await;
    let api = &server.api;
    let (mut stream, id) = open(api, "/v1/chat/completions", &chat(json!({"tokens": 5000, "tokens_per_s": 20}))).await;
    stream.next_data().await.unwrap();
    drop(stream);
    api.happened(&id, "job.cancelled").await;
    let job = api.job(&id).await;
    assert_eq!(job["error"]["code"], "client_disconnected", "{job}");
    let after = api
        .submit(&json!({"endpoint": "/v1/chat/completions", "body": {"model": "t",
                                   "messages": [{"role": "user", "content": "x"}]}}))
        .await;
    api.succeeded(&after).await;
    assert_eq!(api.worker("t").await["starts"], 1);
}

#[tokio::test]
async fn a_waiting_stream_is_kept_alive_by_comments() {
    // The comments come every 15 s, whatever the settings.
    let server = Site::new().model("t", text_model(&["--load-s", "17"])).start().await;
    let (mut stream, _) = open(&server.api, "/v1/chat/completions", &chat(json!({}))).await;
    let frames = crate::common::within(Duration::from_secs(60), "the stream ends", stream.rest()).await;
    let before = frames.iter().take_while(|frame| frame.is_comment()).count();
    assert!(before >= 1, "{frames:?}");
    let chunks = check_framing(&stream, &frames);
    assert_eq!(content(&chunks), "echo: one two three");
}

#[tokio::test]
async fn a_stop_whose_grace_is_over_ends_streams_and_repeats_none_that_was_seen() {
    let site = Site::new().server("shutdown_grace", "1s").model("t", text_model(&[]));
    let mut server = site.start().await;
    let api = server.api.clone();
    let seen = chat(json!({"tokens": 5000, "tokens_per_s": 20}));
    let (mut seen, seen_id) = open(&api, "/v1/chat/completions", &seen).await;
    let first = seen.next_data().await.unwrap();
    let (mut unseen, unseen_id) = open(&api, "/v1/chat/completions", &chat(json!({"delay_ms": 4000}))).await;
    api.happened(&unseen_id, "job.started").await;
    server.signal(Signal::SIGTERM);

    let mut frames = vec![first];
    frames.extend(seen.rest().await);
    let chunks = check_framing(&seen, &frames);
    assert!(!content(&chunks).is_empty(), "{chunks:?}");
    let error = &chunks.last().unwrap()["error"];
    assert_eq!((&error["code"], &error["job_id"]), (&json!("worker_lost"), &json!(seen_id)), "{error}");
    assert!(error["message"].as_str().unwrap().contains("the server was stopped"), "{error}");

    let frames = unseen.rest().await;
    let chunks = check_framing(&unseen, &frames);
    let error = &chunks.last().unwrap()["error"];
    assert_eq!((&error["code"], &error["job_id"]), (&json!("draining"), &json!(unseen_id)), "{error}");
    assert_eq!(error["retryable"], false, "its job goes on: {error}");
    assert_eq!(server.ended().await.code(), Some(0));
    drop(server);

    let server = site.start().await;
    let job = server.api.job(&seen_id).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("failed"), &json!("worker_lost")), "{job}");
    assert_eq!((&job["attempt"], &job["crashes"]), (&json!(1), &json!(0)), "{job}");
    assert_eq!(check_history(&server.api.events(&seen_id).await), "job.failed");
    let answer = server.api.following().get(&format!("/v1/jobs/{unseen_id}/response")).await.is(200).json();
    assert_eq!(answer["choices"][0]["message"]["content"], "echo: one two three", "{answer}");
    let job = server.api.job(&unseen_id).await;
    assert_eq!((&job["attempt"], &job["failures"]), (&json!(2), &json!(0)), "{job}");
}
