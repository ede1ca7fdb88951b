//! The native job API, one endpoint after the other.

use std::time::Duration;

use base64::Engine as _;
use reqwest::Method;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::common::{Api, LIMIT, Site, beside, check_history, echo, echo_job, eventually, is_terminal, with};

fn image(prompt: &str, more: Value) -> Value {
    json!({"endpoint": "/v1/images/generations", "body": with(json!({"model": "i", "prompt": prompt}), more)})
}

fn models() -> Site {
    Site::new()
        .model("a", echo("custom", &[] as &[&str]))
        .model("t", echo("text", &[] as &[&str]))
        .model("i", echo("image", &[] as &[&str]))
        .model("s", echo("audio", &[] as &[&str]))
}

#[tokio::test]
async fn a_job_from_submission_to_answer() {
    let server = models().start().await;
    let api = &server.api;
    let request = json!({"endpoint": "/echo", "body": {"model": "a", "any": [1, "two", null], "echo": {"delay_ms": 500}},
                         "priority": 8, "timeout_s": 30, "max_attempts": 2, "metadata": {"run": "42"}});
    let reply = api.post("/v1/jobs", &request).await.is(202);
    let job = reply.json();
    let id = job["id"].as_str().unwrap();
    assert_eq!(reply.header("location"), format!("/v1/jobs/{id}"));
    assert_eq!(reply.header("x-roundhouse-job-id"), id);
    let expected = [
        ("object", json!("job")),
        ("kind", json!("custom")),
        ("endpoint", json!("/echo")),
        ("model", json!("a")),
        ("state", json!("queued")),
        ("priority", json!(8)),
        ("max_attempts", json!(2)),
        ("metadata", json!({"run": "42"})),
        ("attempt", json!(0)),
        ("error", Value::Null),
    ];
    for (field, value) in expected {
        assert_eq!(job[field], value, "{field}: {job}");
    }
    assert_eq!(job["timeout_s"].as_f64(), Some(30.0), "{job}");
    assert!(job["created_at"].as_str().unwrap().ends_with('Z'), "RFC 3339: {job}");

    // Too early for an answer.
    let early = api.get(&format!("/v1/jobs/{id}/response?wait=0")).await.is(202);
    assert_eq!(early.json()["id"], id);
    let job = api.succeeded(id).await;
    assert!(job["timings"]["run_s"].as_f64().unwrap() >= 0.4, "{job}");
    assert!(job["started_at"].as_str() <= job["finished_at"].as_str(), "{job}");
    let answer = api.get(&format!("/v1/jobs/{id}/response")).await.is(200);
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!(answer.json()["body"]["any"], json!([1, "two", null]), "unknown fields go to the worker as they are");
    assert_eq!(
        job["result"]["body"]["body"]["any"],
        json!([1, "two", null]),
        "short answers are in the job, too: {job}"
    );

    // The other shape of a submission, for a model's main endpoint.
    let custom = api.submit(&json!({"kind": "custom", "model": "a", "input": {"x": 1}})).await;
    api.succeeded(&custom).await;
    assert_eq!(api.get(&format!("/v1/jobs/{custom}/response")).await.is(200).json()["body"]["x"], 1);

    // Any prefix of the same uuid resolves.
    let other = id.replace("job_", "chatcmpl-");
    assert_eq!(api.job(&other).await["id"], id);
}

#[tokio::test]
async fn polling_by_version_costs_nothing_and_long_polls_end_with_the_job() {
    let server = models().start().await;
    let api = &server.api;
    let id = api.submit_echo("a", json!({"delay_ms": 1500})).await;
    api.happened(&id, "job.started").await;
    let reply = api.get(&format!("/v1/jobs/{id}?wait=0")).await.is(200);
    assert_eq!(reply.json()["state"], "running");
    assert_eq!(reply.header("etag"), format!("\"v{}\"", reply.json()["version"]));
    assert!(!reply.header("openai-poll-after-ms").is_empty(), "{:?}", reply.headers);
    // A long poll until any change comes back before the end.
    let seen = reply.json()["version"].as_i64().unwrap();
    let version = reply.header("etag").to_owned();
    let changed =
        api.header("if-none-match", &version).get(&format!("/v1/jobs/{id}?wait=60&until=change")).await.is(200).json();
    assert!(changed["version"].as_i64().unwrap() > seen, "{changed}");

    // More than 85 count as 85.
    let ended = api.get(&format!("/v1/jobs/{id}?wait=500")).await.is(200);
    assert_eq!(ended.json()["state"], "succeeded");
    let etag = ended.header("etag").to_owned();
    let same = api.header("if-none-match", &etag).get(&format!("/v1/jobs/{id}")).await.is(304);
    assert!(same.body.is_empty());
    assert_eq!(same.header("etag"), etag);
    api.header("if-none-match", "\"v1\"").get(&format!("/v1/jobs/{id}")).await.is(200);
    // A wait that is over before the job is answers with the job as it is.
    let slow = api.submit_echo("a", json!({"delay_ms": 60000})).await;
    let waited = api.get(&format!("/v1/jobs/{slow}?wait=1")).await.is(200).json();
    assert!(!is_terminal(&waited), "{waited}");
    api.poke(&format!("/v1/jobs/{slow}/cancel")).await.is(200);
}

#[tokio::test]
async fn lists_are_filtered_and_paged_without_gaps() {
    let server = Site::new()
        .model("a", echo("custom", &["--load-s", "60"]))
        .model("t", echo("text", &["--load-s", "60"]))
        .start()
        .await;
    let api = &server.api;
    let mut ids = Vec::new();
    for n in 0..25 {
        let request = if n % 5 == 0 {
            json!({"endpoint": "/v1/completions", "body": {"model": "t", "prompt": "x"}, "metadata": {"n": n.to_string()}})
        } else {
            with(echo_job("a", json!({})), json!({"metadata": {"n": n.to_string(), "odd key": "a b&c"}}))
        };
        ids.push(api.submit(&request).await);
    }
    api.poke(&format!("/v1/jobs/{}/cancel", ids[3])).await.is(200);

    let first = api.get("/v1/jobs").await.is(200).json();
    assert_eq!((&first["object"], &first["has_more"]), (&json!("list"), &json!(true)));
    assert_eq!(first["data"].as_array().unwrap().len(), 20, "the usual page");
    assert_eq!(first["data"][0]["id"], ids[24].as_str(), "newest first");
    assert_eq!((&first["first_id"], &first["last_id"]), (&json!(ids[24]), &json!(ids[5])));

    for (order, expected) in [("desc", ids.iter().rev().cloned().collect::<Vec<_>>()), ("asc", ids.clone())] {
        let mut seen: Vec<String> = Vec::new();
        loop {
            let after = seen.last().map(|last| format!("&after={last}")).unwrap_or_default();
            let page = api.get(&format!("/v1/jobs?limit=7&order={order}{after}")).await.is(200).json();
            seen.extend(page["data"].as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap().to_owned()));
            if page["has_more"] == false {
                break;
            }
        }
        assert_eq!(seen, expected, "{order}");
    }
    let count = |query: &'static str| async move {
        let page = api.get(&format!("/v1/jobs?limit=100&{query}")).await.is(200).json();
        page["data"].as_array().unwrap().len()
    };
    assert_eq!(count("model=t").await, 5);
    assert_eq!(count("kind=completion").await, 5);
    assert_eq!(count("state=cancelled").await, 1);
    assert_eq!(count("state=queued&model=a").await, 19);
    assert_eq!(count("metadata[n]=7").await, 1);
    assert_eq!(count("metadata[odd%20key]=a%20b%26c").await, 20);
    assert_eq!(count("metadata[n]=7&metadata[odd%20key]=no").await, 0);
    for (query, param) in [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("state=done", "state"),
        ("order=up", "order"),
        ("after=job_nonsense", "after"),
        ("kind=smell", "kind"),
    ] {
        let reply = api.get(&format!("/v1/jobs?{query}")).await.refused(400, "invalid_request");
        assert_eq!(reply.json()["error"]["param"], param, "{query}");
    }
}

#[tokio::test]
async fn bulk_submissions_are_all_or_nothing_unless_asked_otherwise() {
    let server = models().start().await;
    let api = &server.api;
    let good = |n: usize| with(echo_job("a", json!({})), json!({"custom_id": format!("c-{n}")}));
    let mut requests: Vec<Value> = (0..10).map(good).collect();
    let reply = api.post("/v1/jobs/bulk", &json!({"requests": requests})).await.is(202).json();
    let batch = reply["batch_id"].as_str().unwrap().to_owned();
    let jobs = reply["jobs"].as_array().unwrap();
    assert_eq!(jobs.len(), 10);
    for (n, job) in jobs.iter().enumerate() {
        assert_eq!((&job["index"], &job["custom_id"]), (&json!(n), &json!(format!("c-{n}"))), "{job}");
        let ended = api.succeeded(job["id"].as_str().unwrap()).await;
        assert_eq!((&ended["batch_id"], &ended["priority"]), (&json!(batch), &json!(3)), "{ended}");
    }
    let page = api.get(&format!("/v1/jobs?batch_id={batch}&limit=100")).await.is(200).json();
    assert_eq!(page["data"].as_array().unwrap().len(), 10);

    requests[3] = with(echo_job("nobody", json!({})), json!({"custom_id": "bad"}));
    requests[7] = with(good(7), json!({"priority": 11}));
    let before = api.get("/v1/jobs?limit=1").await.json()["first_id"].clone();
    let reply = api.post("/v1/jobs/bulk", &json!({"requests": requests})).await.is(400);
    let details = &reply.json()["error"]["details"];
    assert_eq!(details.as_array().unwrap().len(), 2, "{details}");
    assert_eq!((&details[0]["index"], &details[0]["code"]), (&json!(3), &json!("model_not_found")), "{details}");
    assert_eq!((&details[0]["custom_id"], &details[0]["param"]), (&json!("bad"), &json!("body.model")), "{details}");
    assert_eq!((&details[1]["index"], &details[1]["param"]), (&json!(7), &json!("priority")), "{details}");
    assert_eq!(api.get("/v1/jobs?limit=1").await.json()["first_id"], before, "nothing was taken");

    let reply = api.post("/v1/jobs/bulk?partial=true", &json!({"requests": requests})).await.is(202).json();
    let jobs = reply["jobs"].as_array().unwrap();
    let taken: Vec<&str> = jobs.iter().filter_map(|job| job["id"].as_str()).collect();
    assert_eq!(taken.len(), 8, "{reply}");
    let refused: Vec<&Value> = reply["errors"].as_array().unwrap().iter().map(|error| &error["index"]).collect();
    assert_eq!(refused, [&json!(3), &json!(7)], "{reply}");
    for id in taken {
        api.succeeded(id).await;
    }
}

#[tokio::test]
async fn events_can_be_resumed_after_every_one() {
    let server = models().start().await;
    let api = &server.api;
    let id = api.submit(&image("x", json!({"echo": {"delay_ms": 2500, "steps": 5}}))).await;
    // A live reader from the start.
    let mut live = api.follow(&id, 0).await;
    let live = beside(async move { live.rest_persisted(LIMIT).await });
    api.succeeded(&id).await;
    let live = live.await.unwrap();
    let stored = api.events(&id).await;
    assert_eq!(check_history(&stored), "job.succeeded");
    let names: Vec<&str> = stored.iter().map(|event| event["type"].as_str().unwrap()).collect();
    for wanted in ["job.queued", "job.loading", "job.started", "job.progress", "job.succeeded"] {
        assert!(names.contains(&wanted), "{wanted}: {names:?}");
    }
    assert!(stored.iter().all(|event| event["job_id"] == id.as_str() && event["ts"].is_string()), "{stored:?}");
    let progress = stored.iter().rfind(|event| event["type"] == "job.progress").unwrap();
    assert_eq!(
        (&progress["progress"]["step"], &progress["progress"]["percent"]),
        (&json!(5), &json!(100.0)),
        "{progress}"
    );

    assert_eq!(live.len(), stored.len(), "{live:?}");
    for (frame, event) in live.iter().zip(&stored) {
        assert_eq!(frame.id, event["seq"].as_i64());
        assert_eq!(frame.event, event["type"].as_str().unwrap());
        assert_eq!(frame.json()["seq"], event["seq"]);
    }
    let last = stored.len() as i64;
    for after in 0..last {
        let frames = api.follow(&id, after).await.rest_persisted(LIMIT).await;
        let seqs: Vec<i64> = frames.iter().map(|frame| frame.id.unwrap()).collect();
        assert_eq!(seqs, (after + 1..=last).collect::<Vec<_>>(), "after {after}");
    }
    // An EventSource that has everything is told to stop.
    for path in [format!("/v1/jobs/{id}/events?after={last}"), format!("/v1/jobs/{id}/events?after={}", last + 9)] {
        api.header("accept", "text/event-stream").get(&path).await.is(204);
    }
    let resumed = api.header("last-event-id", &last.to_string()).header("accept", "text/event-stream");
    resumed.get(&format!("/v1/jobs/{id}/events")).await.is(204);
    let answer = api.open(Method::GET, &format!("/v1/jobs/{id}/events"), None).await;
    assert!(answer.headers()["content-type"].to_str().unwrap().starts_with("text/event-stream"));
    assert!(answer.headers()["cache-control"].to_str().unwrap().contains("no-store"));
    assert_eq!(answer.headers()["x-accel-buffering"], "no");
}

#[tokio::test]
async fn a_reader_that_breaks_off_in_the_middle_resumes_live() {
    let server = models().start().await;
    let api = &server.api;
    let id = api.submit(&image("x", json!({"echo": {"delay_ms": 3000, "steps": 6}}))).await;
    let mut seen = Vec::new();
    loop {
        // A new connection for each event, as a client on a bad line would have it.
        let mut stream = api.follow(&id, seen.len() as i64).await;
        let frame = loop {
            match stream.next().await {
                Some(frame) if frame.id.is_some() => break frame,
                Some(_) => {}
                None => panic!("ended after {seen:?}"),
            }
        };
        seen.push(frame.id.unwrap());
        if frame.event == "job.succeeded" {
            break;
        }
    }
    assert_eq!(seen, (1..=seen.len() as i64).collect::<Vec<_>>());
}

#[tokio::test]
async fn artifacts_can_be_fetched_whole_and_in_parts() {
    let server = models().start().await;
    let api = &server.api;
    let id = api.submit(&image("a cat", json!({"n": 2, "seed": 7, "size": "32x16"}))).await;
    let job = api.succeeded(&id).await;
    let artifacts = job["artifacts"].as_array().unwrap();
    assert_eq!(artifacts.len(), 2, "{job}");
    let listed = api.get(&format!("/v1/jobs/{id}/artifacts")).await.is(200).json();
    assert_eq!(listed["data"].as_array().unwrap().len(), 2, "{listed}");
    let answer = api.get(&format!("/v1/jobs/{id}/response")).await.is(200).json();
    for (n, artifact) in artifacts.iter().enumerate() {
        let path = format!("/v1/jobs/{id}/artifacts/{}", artifact["id"].as_str().unwrap());
        let whole = api.get(&path).await.is(200);
        assert_eq!(whole.header("content-type"), "image/png");
        assert_eq!(artifact["bytes"], whole.body.len());
        let hash: String = Sha256::digest(&whole.body).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(artifact["sha256"], hash);
        assert_eq!(whole.header("etag"), format!("\"{hash}\""));
        let inline = answer["data"][n]["b64_json"].as_str().unwrap();
        assert_eq!(base64::engine::general_purpose::STANDARD.decode(inline).unwrap(), whole.body, "the same image");

        let part = api.header("range", "bytes=1-3").get(&path).await.is(206);
        assert_eq!(
            (&part.body[..], part.header("content-range")),
            (&b"PNG"[..], format!("bytes 1-3/{}", whole.body.len()).as_str())
        );
        let tail = api.header("range", "bytes=-8").get(&path).await.is(206);
        assert_eq!(tail.body, whole.body[whole.body.len() - 8..]);
        let rest = api.header("range", "bytes=8-").get(&path).await.is(206);
        assert_eq!(rest.body, whole.body[8..]);
        let beyond = api.header("range", "bytes=99999999-").get(&path).await.is(416);
        assert_eq!(beyond.header("content-range"), format!("bytes */{}", whole.body.len()));
        let etag = whole.header("etag").to_owned();
        assert!(api.header("if-none-match", &etag).get(&path).await.is(304).body.is_empty());
    }
    // What a page can embed.
    let by_url = api.get(artifacts[0]["url"].as_str().unwrap()).await.is(200);
    assert!(by_url.body.starts_with(b"\x89PNG"));
    api.get(&format!("/v1/jobs/{id}/artifacts/art_9")).await.refused(404, "not_found");

    // A sound is its own answer.
    let id = api
        .submit(
            &json!({"endpoint": "/v1/audio/generations", "body": {"model": "s", "prompt": "rain", "duration": 0.5}}),
        )
        .await;
    api.succeeded(&id).await;
    let answer = api.get(&format!("/v1/jobs/{id}/response")).await.is(200);
    assert_eq!(answer.header("content-type"), "audio/wav");
    let file = api.get(&format!("/v1/jobs/{id}/artifacts/art_0")).await.is(200);
    assert_eq!(file.body, answer.body);

    // The same request gives the same bytes, another seed others.
    let mut images = Vec::new();
    for seed in [7, 7, 8] {
        let id = api.submit(&image("a cat", json!({"seed": seed}))).await;
        api.succeeded(&id).await;
        images.push(api.get(&format!("/v1/jobs/{id}/artifacts/art_0")).await.is(200).body);
    }
    assert!(images[0] == images[1] && images[1] != images[2]);
}

#[tokio::test]
async fn failed_jobs_show_their_error_and_can_be_run_again_as_new_ones() {
    let site = Site::new().model("a", with(echo("custom", &["--fail-item", "1"]), json!({"max_attempts": 1})));
    let server = site.start().await;
    let api = &server.api;
    let request = with(echo_job("a", json!({"delay_ms": 300})), json!({"metadata": {"run": "1"}, "priority": 2}));
    let id = api.submit(&request).await;
    api.poke(&format!("/v1/jobs/{id}/retry")).await.refused(409, "job_not_terminal");
    let job = api.finished(&id).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("failed"), &json!("worker_error")), "{job}");
    let reply = api.get(&format!("/v1/jobs/{id}/response")).await.refused(500, "worker_error");
    assert_eq!(reply.json()["error"]["job_id"], id.as_str());
    assert_eq!(reply.header("x-should-retry"), "false");

    let reply = api.poke(&format!("/v1/jobs/{id}/retry")).await.is(202);
    let again = reply.json();
    assert_ne!(again["id"], id.as_str());
    assert_eq!(
        (&again["retry_of"], &again["metadata"]["run"], &again["priority"]),
        (&json!(id), &json!("1"), &json!(2)),
        "{again}"
    );
    api.succeeded(again["id"].as_str().unwrap()).await;
    assert_eq!(api.job(&id).await["state"], "failed", "the old one stays as it was");
}

#[tokio::test]
async fn ids_that_are_not_there_are_not_found() {
    let server = models().start().await;
    let api = &server.api;
    let id = api.submit_echo("a", json!({})).await;
    api.succeeded(&id).await;
    // The tag is the last 40 bits: guessing from a neighbour's id leads nowhere.
    let last = if id.ends_with('0') { '1' } else { '0' };
    let guessed = format!("{}{last}", &id[..id.len() - 1]);
    let foreign = "job_0190163d-8694-739b-aea5-966c26f8ad90".to_owned();
    for unknown in [guessed, foreign, "job_x".to_owned(), "nonsense".to_owned()] {
        for path in ["", "/events", "/response", "/artifacts", "/artifacts/art_0"] {
            api.get(&format!("/v1/jobs/{unknown}{path}")).await.refused(404, "not_found");
        }
        for path in ["/cancel", "/retry"] {
            api.poke(&format!("/v1/jobs/{unknown}{path}")).await.refused(404, "not_found");
        }
    }
}

#[tokio::test]
async fn models_workers_queue_and_health_are_shown_without_touching_a_model() {
    let site = models().model("x", with(echo("text", &[] as &[&str]), json!({"aliases": ["gpt-x"]})));
    let server = site.start().await;
    let api = &server.api;
    let models = api.get("/v1/models").await.is(200).json();
    let names: Vec<&str> =
        models["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    for name in ["a", "t", "i", "s", "x"] {
        assert!(names.contains(&name), "{names:?}");
    }
    assert_eq!((&models["object"], &models["data"][0]["object"]), (&json!("list"), &json!("model")));
    assert_eq!(models["data"][0]["roundhouse"]["kind"], "custom", "{models}");
    assert_eq!(api.get("/v1/models/t").await.is(200).json()["id"], "t");
    api.get("/v1/models/nobody").await.refused(404, "model_not_found");
    let workers = api.get("/v1/workers").await.is(200).json();
    assert!(workers["data"].as_array().unwrap().iter().all(|worker| worker["state"] == "absent"), "{workers}");
    let queue = api.queue().await;
    assert_eq!((&queue["queued"], &queue["swaps"], &queue["models"][0]["model"]), (&json!(0), &json!(0), &json!("a")));
    assert!(queue["decision"]["reason"].is_string(), "{queue}");
    api.get("/health").await.is(200);
    let ready = api.get("/readyz").await.is(200).json();
    assert_eq!(ready["degraded"], json!([]), "{ready}");
    assert!(server.processes().is_empty(), "nothing was started to answer this");

    // By alias, and shown as asked.
    let chat = json!({"model": "gpt-x", "messages": [{"role": "user", "content": "hi"}]});
    let answer = api.post("/v1/chat/completions", &chat).await.is(200).json();
    assert_eq!(answer["model"], "gpt-x");
    let metrics = api.get("/metrics").await.is(200).text();
    for words in ["# TYPE", "succeeded", "swaps"] {
        assert!(metrics.contains(words), "{words}: {metrics}");
    }
}

#[tokio::test]
async fn image_urls_open_the_image() {
    let site = models().server("public_url", "https://images.example.org");
    let server = site.start().await;
    let api = &server.api;
    let request = json!({"model": "i", "prompt": "x", "response_format": "url"});
    let answer = api.post("/v1/images/generations", &request).await.is(200).json();
    let url = answer["data"][0]["url"].as_str().unwrap();
    assert!(answer["data"][0]["b64_json"].is_null(), "{answer}");
    let path = url.strip_prefix("https://images.example.org").expect("the public address");
    assert!(api.get(path).await.is(200).body.starts_with(b"\x89PNG"));
}

/// Hundreds of callers at once over two models: none is refused, none gets another's answer.
#[tokio::test]
async fn many_callers_over_two_models_all_get_their_own_answer() {
    let site = Site::new().model("a", echo("text", &[] as &[&str])).model("b", echo("text", &[] as &[&str]));
    let server = site.start().await;
    let call = |n: usize, api: Api| async move {
        let model = ["a", "b"][n % 2];
        let chat = json!({"model": model, "messages": [{"role": "user", "content": format!("caller {n}")}]});
        let answer = api.post("/v1/chat/completions", &chat).await.is(200).json();
        assert_eq!(answer["choices"][0]["message"]["content"], format!("echo: caller {n}"));
    };
    let calls: Vec<_> = (0..300).map(|n| beside(call(n, server.api.clone()))).collect();
    for call in calls {
        call.await.unwrap();
    }
    let queue = eventually(Duration::from_secs(10), "the view is settled", || async {
        let queue = server.api.queue().await;
        (queue["running"] == 0).then_some(queue)
    })
    .await;
    assert!(queue["swaps"].as_u64().unwrap() <= 3, "{queue}");
}

#[tokio::test]
async fn prompts_and_outputs_are_never_logged() {
    const WORD: &str = "xyzzy-plugh";
    let site = models().env("ROUNDHOUSE_LOG", "info,roundhouse=trace");
    let server = site.start().await;
    let api = &server.api;
    let chat = |more: Value| with(json!({"model": "t", "messages": [{"role": "user", "content": WORD}]}), more);
    let answer = api.post("/v1/chat/completions", &chat(json!({}))).await.is(200);
    assert!(answer.text().contains(WORD));
    let streamed = api.post("/v1/chat/completions", &chat(json!({"stream": true}))).await.is(200);
    assert!(streamed.text().contains(WORD));
    api.post("/v1/chat/completions", &chat(json!({"echo": {"status": 418}}))).await.is(418);
    api.post("/v1/chat/completions", &chat(json!({"echo": {"no_finish": true, "delay_ms": 1}}))).await;
    api.post("/v1/chat/completions", &chat(json!({"temperature": {"no": WORD}, "stream": WORD}))).await.is(400);
    api.send(Method::POST, "/v1/jobs", Some(format!("{{{WORD}").into_bytes())).await.is(400);
    let id = api.submit(&image(WORD, json!({}))).await;
    api.succeeded(&id).await;
    assert!(server.log().contains("DEBUG"), "the log is as talkative as it can be");
    for text in [server.log(), server.worker_log("t"), server.worker_log("i")] {
        assert!(!text.contains(WORD), "{text}");
    }
}
