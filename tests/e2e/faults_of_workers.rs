//! Each way in which a worker can go wrong: what its callers see, and what the store says afterwards. The list of all of
//! them, with the tests that are elsewhere, is docs/FAULTS.md.

use std::path::Path;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use reqwest::Method;
use serde_json::{Value, json};

use crate::common::{
    Api, EventStream, LIMIT, Proc, Server, Site, beside, check_history, echo, eventually, free_port, python, with,
    within,
};

/// An entry with `tests/support/stock_server.py`: an engine that knows nothing of us and has a process of its own.
pub(crate) fn stock<A: AsRef<str>>(args: &[A]) -> Value {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let script = root.join("tests/support/stock_server.py");
    let mut command = vec![python(root), "-S".to_owned(), script.display().to_string()];
    command.extend(["--name", "{name}", "--port", "{port}"].map(str::to_owned));
    command.extend(args.iter().map(|arg| arg.as_ref().to_owned()));
    json!({"type": "text", "command": command, "gpus": 0, "startup_time": "100ms", "port": free_port(), "limit": 8})
}

fn none() -> [&'static str; 0] {
    []
}

fn chat(fault: Value, stream: bool) -> Value {
    let message = json!({"role": "user", "content": "hi"});
    json!({"model": "t", "messages": [message], "fault": fault, "stream": stream})
}

pub(crate) fn chat_job(fault: Value) -> Value {
    json!({"endpoint": "/v1/chat/completions", "body": chat(fault, false)})
}

/// The processes of the model: its leader and whatever it has started.
fn leader(server: &Server) -> Proc {
    let is_leader = |found: &Proc| found.command.iter().any(|word| word == "--name") && !is_guard(found);
    server.processes().into_iter().find(is_leader).expect("a worker")
}

fn engine(server: &Server) -> Proc {
    let is_engine = |found: &Proc| found.command.iter().any(|word| word == "--engine");
    server.processes().into_iter().find(is_engine).expect("an engine")
}

pub(crate) fn is_guard(found: &Proc) -> bool {
    found.command.get(1).is_some_and(|word| word == "guard")
}

async fn open(api: &Api, body: &Value) -> (EventStream, String) {
    let answer = api.open(Method::POST, "/v1/chat/completions", Some(body.to_string().into_bytes())).await;
    assert_eq!(answer.status().as_u16(), 200);
    let id = answer.headers()["x-roundhouse-job-id"].to_str().unwrap().to_owned();
    (EventStream::new(answer), id)
}

/// What a stream had to say: its text, and the code of its error.
async fn rest_of(stream: &mut EventStream) -> (String, String) {
    let frames = stream.rest().await;
    assert_eq!(frames.last().map(|frame| frame.data.as_str()), Some("[DONE]"), "{frames:?}");
    let chunks: Vec<Value> = frames[..frames.len() - 1].iter().filter(|f| !f.is_comment()).map(|f| f.json()).collect();
    let text = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    let code = chunks.iter().find_map(|chunk| chunk["error"]["code"].as_str()).unwrap_or_default();
    (text, code.to_owned())
}

/// Insists on what the store says of a job that failed, and on its events.
async fn failed(api: &Api, id: &str, code: &str) -> Value {
    let job = api.finished(id).await;
    assert_eq!((&job["state"], &job["error"]["code"]), (&json!("failed"), &json!(code)), "{job}");
    assert_eq!(check_history(&api.events(id).await), "job.failed");
    job
}

/// Insists on a job that lost a worker, ran again and was charged nothing.
async fn survived(api: &Api, id: &str) -> Value {
    let job = api.succeeded(id).await;
    assert!(job["attempt"].as_i64() >= Some(2) && job["crashes"].as_i64() >= Some(1), "{job}");
    assert_eq!(job["failures"], 0, "{job}");
    let events = api.events(id).await;
    assert_eq!(check_history(&events), "job.succeeded");
    let retrying = events.iter().find(|event| event["type"] == "job.retrying").expect("job.retrying");
    assert_eq!(retrying["error"]["code"], "worker_lost", "{retrying}");
    is_in_plain_words(&retrying["error"]);
    job
}

/// Insists on the words of an error that callers see: those of the HTTP library and of the system are for the log.
fn is_in_plain_words(error: &Value) {
    let message = error["message"].as_str().unwrap();
    let others = ["EOF", "chunk", "error reading", "os error", "hyper", "closed before message completed"];
    assert!(!others.iter().any(|words| message.contains(words)), "{message}");
}

/// Insists on a model that does not load for this reason: who holds the line is told, who left a job finds it waiting.
async fn does_not_load(server: &Server, reason: &str) {
    let api = &server.api;
    let refused = api.post("/v1/chat/completions", &chat(json!({}), false)).await.refused(503, "model_load_failed");
    let error = refused.json()["error"].clone();
    assert!(error["message"].as_str().unwrap().contains(reason), "{error}");
    failed(api, error["job_id"].as_str().expect("its job"), "model_load_failed").await;
    let id = api.submit(&chat_job(json!({}))).await;
    let job = eventually(LIMIT, "its job says why it waits", || async {
        let job = api.job(&id).await;
        assert_eq!(job["state"], "queued", "{job}");
        (job["state_reason"] == "model_blocked").then_some(job)
    })
    .await;
    assert_eq!((&job["attempt"], &job["failures"], &job["crashes"]), (&json!(0), &json!(0), &json!(0)), "{job}");
    let worker = api.worker("t").await;
    assert!(worker["failed_loads"].as_u64() >= Some(1), "{worker}");
    api.poke(&format!("/v1/jobs/{id}/cancel")).await.is(200);
    assert_eq!(api.finished(&id).await["state"], "cancelled");
}

/// In the middle of a stream, with two others behind it, something of the worker dies.
async fn a_death(harm: impl FnOnce(&Server)) {
    let token = format!("psm_rh{}_", free_port());
    let server = Site::new().model("t", stock(&["--shm", &token, "--chatter"])).start().await;
    let api = &server.api;
    let (mut stream, streamed) = open(api, &chat(json!({"words": 1000, "gap_s": 0.02}), true)).await;
    let first = stream.next_data().await.unwrap();
    assert_eq!(first.json()["choices"][0]["delta"]["content"], "word0 ");
    let waiting = api.submit(&chat_job(json!({}))).await;
    let caller = {
        let api = api.clone();
        beside(async move { api.following().post("/v1/chat/completions", &chat(json!({}), false)).await })
    };
    api.happened(&waiting, "job.started").await;
    // Not only on their way to it: those would have lost nothing.
    eventually(LIMIT, "all three have reached it", || async {
        (server.worker_log("t").matches("a request").count() == 3).then_some(())
    })
    .await;
    let before = server.processes();
    harm(&server);

    assert_eq!(rest_of(&mut stream).await.1, "worker_lost");
    let job = failed(api, &streamed, "worker_lost").await;
    assert_eq!(job["attempt"], 1, "nothing is repeated to a caller who has seen a part: {job}");
    is_in_plain_words(&job["error"]);
    survived(api, &waiting).await;
    let answer = caller.await.unwrap().is(200);
    assert!(
        answer.json()["choices"][0]["message"]["content"].as_str().unwrap().starts_with("word0"),
        "{}",
        answer.text()
    );
    survived(api, answer.header("x-roundhouse-job-id")).await;
    let alive: Vec<&Proc> = before.iter().filter(|found| found.is_alive()).collect();
    assert!(alive.is_empty(), "left of the dead: {alive:?}");
    assert_eq!(shared_memory(&token).len(), 1, "that of the dead is gone");
}

pub(crate) fn shared_memory(token: &str) -> Vec<String> {
    let names = std::fs::read_dir("/dev/shm").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(token)).collect()
}

#[tokio::test]
async fn the_leader_is_killed() {
    a_death(|server| leader(server).signal(Signal::SIGKILL)).await;
}

#[tokio::test]
async fn an_engine_process_is_killed() {
    // Its server lives on for a moment and answers everybody with an error of its own: no failure of theirs.
    a_death(|server| engine(server).signal(Signal::SIGKILL)).await;
}

#[tokio::test]
async fn the_whole_group_is_killed() {
    a_death(|server| killpg(Pid::from_raw(leader(server).pid), Signal::SIGKILL).unwrap()).await;
}

#[tokio::test]
async fn a_server_that_outlives_its_engine_is_ended() {
    let server = Site::new().model("t", stock(&["--survive-engine"])).start().await;
    let api = &server.api;
    let running = api.submit(&chat_job(json!({"words": 500, "gap_s": 0.02}))).await;
    api.happened(&running, "job.started").await;
    let before = leader(&server);
    engine(&server).signal(Signal::SIGKILL);
    survived(api, &running).await;
    assert!(!before.is_alive());
    assert_eq!(api.worker("t").await["starts"], 2);
}

#[tokio::test]
async fn a_poisonous_request_kills_an_engine_and_no_neighbour() {
    let server = Site::new().model("t", stock(&none())).start().await;
    let api = &server.api;
    let mut requests = vec![chat_job(json!({"words": 20, "gap_s": 0.01})); 4];
    requests[2] = chat_job(json!({"words": 20, "die_after": 1}));
    let mut innocents = api.submit_together(requests).await;
    let killer = innocents.remove(2);
    let job = failed(api, &killer, "worker_lost").await;
    assert!(job["error"]["message"].as_str().unwrap().contains("EngineCore"), "{job}");
    for id in &innocents {
        let job = api.succeeded(id).await;
        assert_eq!(job["failures"], 0, "{job}");
        check_history(&api.events(id).await);
    }
}

#[tokio::test]
async fn a_caller_whose_requests_kill_takes_the_model_from_nobody() {
    let server = Site::new().model("t", stock(&none())).start().await;
    let api = &server.api;
    for _ in 0..3 {
        let killer = api.submit(&chat_job(json!({"words": 20, "die_after": 1}))).await;
        failed(api, &killer, "worker_lost").await;
        api.post("/v1/chat/completions", &chat(json!({}), false)).await.is(200);
    }
    assert_eq!(api.worker("t").await["failed_loads"], 0);
}

#[tokio::test]
async fn it_ends_at_once_though_with_status_0() {
    let server = Site::new().model("t", stock(&["--exit", "0"])).start().await;
    does_not_load(&server, "exited with status 0; its log says: nothing to do here").await;
}

#[tokio::test]
async fn it_hangs_before_it_is_ready() {
    let server = Site::new().server("load_limit", "1s").model("t", stock(&["--deaf"])).start().await;
    does_not_load(&server, "was not ready within 1 s").await;
}

#[tokio::test]
async fn it_is_never_ready() {
    let server = Site::new().server("load_limit", "1s").model("t", stock(&["--never-ready"])).start().await;
    does_not_load(&server, "was not ready within 1 s").await;
}

#[tokio::test]
async fn it_hangs_when_it_is_ready() {
    // Stopped as a whole: its health hangs, and so does what it runs. Three probes of 5 s.
    let server = Site::new().model("t", stock(&none())).start().await;
    let api = &server.api;
    let running = api.submit(&chat_job(json!({"words": 200, "gap_s": 0.02}))).await;
    api.happened(&running, "job.started").await;
    let before = leader(&server);
    killpg(Pid::from_raw(before.pid), Signal::SIGSTOP).unwrap();
    survived(api, &running).await;
    assert!(!before.is_alive());
}

#[tokio::test]
async fn it_hangs_in_the_middle_of_a_stream() {
    let entry = with(stock(&none()), json!({"timeout": "2s"}));
    let server = Site::new().model("t", entry).start().await;
    let api = &server.api;
    let (mut stream, streamed) = open(api, &chat(json!({"words": 9, "hang_after": 3}), true)).await;
    let waiting = api.submit(&chat_job(json!({}))).await;
    let (text, code) = rest_of(&mut stream).await;
    assert_eq!((text.as_str(), code.as_str()), ("word0 word1 word2 ", "execution_timeout"));
    let job = failed(api, &streamed, "execution_timeout").await;
    assert_eq!(job["attempt"], 1, "{job}");
    // Its engine hangs, so whoever waits for it goes to another.
    api.succeeded(&waiting).await;
    assert_eq!(api.worker("t").await["starts"], 2);
}

#[tokio::test]
async fn it_breaks_the_connection_and_lives() {
    let server = Site::new().model("t", stock(&none())).start().await;
    let api = &server.api;
    let broken = api.submit(&chat_job(json!({"break": true}))).await;
    let job = failed(api, &broken, "worker_lost").await;
    is_in_plain_words(&job["error"]);
    let answer = api.get(&format!("/v1/jobs/{broken}/response")).await;
    for said in [job["error"]["message"].to_string(), answer.text()] {
        assert!(said.contains("its connection broke") && !said.contains("died while"), "{said}");
    }
    api.post("/v1/chat/completions", &chat(json!({}), false)).await.is(200);
    assert_eq!(api.worker("t").await["starts"], 1);
}

#[tokio::test]
async fn another_worker_answers_on_its_port() {
    let mut entry = stock(&none());
    let port = entry["port"].clone();
    let command = entry["command"].as_array_mut().unwrap();
    command.extend([json!("--other-instance-on"), json!(port.to_string())]);
    let server = Site::new().model("t", entry).start().await;
    let api = &server.api;
    let answer = api.post("/v1/chat/completions", &chat(json!({}), false)).await.is(200);
    let job = api.job(answer.header("x-roundhouse-job-id")).await;
    assert_eq!((&job["state"], &job["attempt"]), (&json!("succeeded"), &json!(1)), "{job}");
    let worker = api.worker("t").await;
    assert_ne!(worker["port"], port, "{worker}");
    assert_eq!(worker["failed_loads"], 0, "{worker}");
}

#[tokio::test]
async fn it_runs_out_of_memory_on_one_item() {
    let entry = with(echo("image", &["--load-s", "1"]), json!({"max_batch": 4, "limit": 4, "max_attempts": 2}));
    let server = Site::new().model("t", entry).start().await;
    let api = &server.api;
    let image = |wishes: Value| json!({"endpoint": "/v1/images/generations", "body": {"model": "t", "prompt": "x", "echo": wishes}});
    let mut requests = vec![image(json!({})); 4];
    requests[2] = image(json!({"oom": true}));
    let mut others = api.submit_together(requests).await;
    let big = others.remove(2);
    let job = failed(api, &big, "worker_oom").await;
    assert_eq!(api.get(&format!("/v1/jobs/{big}/response")).await.code(), "worker_oom", "{job}");
    for id in &others {
        api.succeeded(id).await;
        assert_eq!(check_history(&api.events(id).await), "job.succeeded");
    }
    assert_eq!(api.worker("t").await["starts"], 1, "none of it restarted the worker");
}

#[tokio::test]
async fn the_disk_is_full_for_its_log() {
    let site = Site::new().model("t", stock(&["--chatter"]));
    std::fs::create_dir_all(site.data().join("log")).unwrap();
    let log = site.data().join("log/t.log");
    std::os::unix::fs::symlink("/dev/full", &log).unwrap();
    let server = site.start().await;
    let api = &server.api;
    let mut said = 0;
    for _ in 0..3 {
        let answer = api.post("/v1/chat/completions", &chat(json!({}), false)).await.is(200);
        assert_eq!(api.job(answer.header("x-roundhouse-job-id")).await["state"], "succeeded");
        said = server.log().matches("a worker's log cannot be written").count();
    }
    assert_eq!(said, 1, "once, not for each line: {}", server.log());
    std::fs::remove_file(&log).unwrap();
    eventually(LIMIT, "with room again, the log goes on", || async {
        api.post("/v1/chat/completions", &chat(json!({}), false)).await.is(200);
        std::fs::read_to_string(&log).is_ok_and(|text| text.contains("a request")).then_some(())
    })
    .await;
    assert_eq!(api.worker("t").await["starts"], 1);
}

#[tokio::test]
async fn a_hundred_starts_and_ends_leave_nothing_behind() {
    let token = format!("psm_rh{}_", free_port());
    let site = Site::new().server("backoff_first", "10ms").server("backoff_max", "10ms");
    let temporary = site.path().join("tmp");
    std::fs::create_dir(&temporary).unwrap();
    let site = site.env("TMPDIR", &temporary.display().to_string()).model("t", stock(&["--shm", &token]));
    let server = site.start().await;
    let api = &server.api;
    let mut open_files = 0;
    for cycle in 0..100 {
        let id = api.submit(&chat_job(json!({"words": 1}))).await;
        let job = api.succeeded(&id).await;
        assert_eq!((&job["attempt"], &job["crashes"]), (&json!(1), &json!(0)), "{job}");
        let before = server.processes();
        match cycle % 3 {
            0 => drop(api.poke("/v1/models/t/unload").await.is(200)),
            1 => leader(&server).signal(Signal::SIGKILL),
            _ => killpg(Pid::from_raw(leader(&server).pid), Signal::SIGKILL).unwrap(),
        }
        eventually(LIMIT, "all of it is gone", || async {
            let state = api.worker("t").await["state"].clone();
            // The scheduler hears of it a moment after it is shown; until then it would send jobs there.
            let is_known = api.queue().await["models"][0]["resident"] == false;
            let is_gone = state != "resident" && state != "draining" && is_known;
            (is_gone && !before.iter().any(Proc::is_alive)).then_some(())
        })
        .await;
        if cycle == 9 {
            open_files = files_of(&server);
        }
    }
    server.all_gone(LIMIT).await;
    assert_eq!(shared_memory(&token), Vec::<String>::new());
    assert_eq!(std::fs::read_dir(&temporary).unwrap().count(), 0, "files in the folder for temporary ones");
    let now = files_of(&server);
    // A connection of this test may come or go.
    assert!(now <= open_files + 3, "{open_files} open files after 10, {now} after 100");
    assert_eq!(children_of(&server), 0, "zombies among them");
    let last = api.submit(&chat_job(json!({}))).await;
    within(LIMIT, "it still serves", api.succeeded(&last)).await;
}

fn files_of(server: &Server) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count()
}

/// Children of the server, zombies too.
fn children_of(server: &Server) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap();
    let children = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default());
    children.map(|pids| pids.split_whitespace().count()).sum()
}
