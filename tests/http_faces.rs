//! The HTTP faces over a real store and scheduler, in this process, with no worker: jobs stay queued until a test ends
//! them through the store.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use axum::response::Response;
use bytes::Bytes;
use roundhouse::clock::SystemClock;
use roundhouse::config::ServerSettings;
use roundhouse::domain::worker::Answer;
use roundhouse::domain::{ErrorCode, JobId, JobKind, JobState, Launch, ModelKind, ModelSpec};
use roundhouse::http::auth::ApiKeys;
use roundhouse::http::{self, AppState};
use roundhouse::lifecycle::Tasks;
use roundhouse::policy::Knobs;
use roundhouse::scheduler::handle::Handle;
use roundhouse::scheduler::run;
use roundhouse::store::{self, End, Store};
use roundhouse::worker::client::WorkerClient;
use roundhouse::worker::fetching::Fetches;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tower::ServiceExt as _;

const SOON: Duration = Duration::from_secs(20);

fn spec(name: &str, kind: ModelKind, endpoint: &str) -> ModelSpec {
    ModelSpec {
        name: name.to_owned(),
        kind,
        launch: Launch::Command(vec!["true".to_owned()]),
        model: None,
        revision: None,
        port: 8001,
        has_own_port: false,
        startup_time: Duration::from_secs(1),
        endpoints: vec![endpoint.to_owned()],
        args: Vec::new(),
        env: BTreeMap::new(),
        aliases: Vec::new(),
        limit: 4,
        max_batch: 1,
        first_batch: 1,
        timeout: Duration::from_secs(600),
        max_attempts: 3,
        idle_ttl: None,
        preload: false,
        gpus: 0,
        memory: None,
        max_replicas: 1,
        pin: false,
        exclusive: false,
        park: roundhouse::domain::Park::Off,
        spare: false,
        upstream_model: name.to_owned(),
        dir: "/".into(),
    }
}

/// Waits and graces of `Bench::new`: long enough to be out of the way.
fn patient() -> ServerSettings {
    ServerSettings { body_bytes_max: 400_000, ..ServerSettings::default() }
}

struct Bench {
    router: Router,
    handle: Handle,
    store: Store,
    tasks: Tasks,
    _dir: tempfile::TempDir,
}

impl Bench {
    async fn new() -> Self {
        Self::with(patient(), "", 4_000).await
    }

    async fn with(server: ServerSettings, keys: &str, waiting_sync_max: usize) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let (tasks, clock) = (Tasks::new(), Arc::new(SystemClock::default()));
        let opened = store::open(
            dir.path(),
            clock.clone(),
            roundhouse::domain::StorageSettings::default(),
            Arc::new(|reason| panic!("{reason}")),
        )
        .await
        .expect("a store");
        let models = vec![
            spec("text", ModelKind::Text, "/v1/chat/completions"),
            spec("flux", ModelKind::Image, "/v1/images/generations"),
        ];
        let store = opened.store.clone();
        let (_, reports) = mpsc::unbounded_channel();
        let handle = run::start(run::Parts {
            store: opened.store,
            clock: clock.clone(),
            tasks: tasks.clone(),
            client: WorkerClient::new(),
            models: models.clone(),
            knobs: Knobs::default(),
            workers: BTreeMap::new(),
            start_worker: Arc::new(|_, _| unreachable!("nothing is edited")),
            spares: roundhouse::worker::spare::Spares::default(),
            reports,
            fetches: Fetches::none(),
            epoch: opened.epoch,
            learned: opened.learned,
            served: opened.served,
            weights: BTreeMap::new(),
            controls: roundhouse::domain::Controls::default(),
            gpus: Arc::new(roundhouse::worker::gpu::NoGpus),
            cpu_bytes: 1 << 30,
            park_bytes: 0,
            next_number: opened.next_number,
        })
        .await
        .expect("a scheduler");
        let state = AppState::new(http::Parts {
            handle: handle.clone(),
            reader: store.reader().clone(),
            models,
            server,
            waiting_sync_max,
            keys: if keys.is_empty() { ApiKeys::none() } else { ApiKeys::parse(keys).expect("keys") },
            tasks: tasks.clone(),
            clock,
            url_secret: [7; 32],
            durability: roundhouse::store::snapshots::Durability::default(),
            gpu_hourly_cost: None,
        });
        Self { router: http::router(state), handle, store, tasks, _dir: dir }
    }

    async fn send(&self, request: Request<Body>) -> Seen {
        let response = self.router.clone().oneshot(request).await.expect("the router answers");
        tokio::time::timeout(SOON, Seen::read(response)).await.expect("a body that ends")
    }

    async fn get(&self, path: &str) -> Seen {
        self.send(Request::get(path).body(Body::empty()).expect("a request")).await
    }

    async fn post(&self, path: &str, body: &Value) -> Seen {
        self.send(Request::post(path).body(Body::from(body.to_string())).expect("a request")).await
    }

    /// Sends a request and hangs up once its job is there.
    async fn post_and_hang_up(&self, path: &str, body: &Value, prefer: &str) -> JobId {
        let request =
            Request::post(path).header("prefer", prefer).body(Body::from(body.to_string())).expect("a request");
        let mut call = Box::pin(self.router.clone().oneshot(request));
        let found = async {
            loop {
                let page = self.get("/v1/jobs").await.json();
                if let Some(id) = page["data"][0]["id"].as_str() {
                    return id.parse().expect("an id");
                }
            }
        };
        tokio::select! {
            response = &mut call => panic!("answered: {:?}", response.map(|r| r.status())),
            id = found => id,
        }
    }

    async fn ended(&self, id: JobId) -> JobState {
        let mut watch = self.handle.watch(id);
        let job = self.store.reader().job(id).await.expect("the job");
        if job.state.is_terminal() {
            return job.state;
        }
        tokio::time::timeout(SOON, watch.ended()).await.expect("an end").state
    }

    /// Ends a queued job as its worker would.
    async fn succeed(&self, id: JobId, kind: JobKind, content_type: &str, body: &str) {
        let claimed = self.store.claim(vec![id.number], 1).await.expect("claimed");
        let token = claimed[0].token;
        let answer = Answer {
            status: 200,
            content_type: content_type.into(),
            body: Bytes::copy_from_slice(body.as_bytes()),
            usage: None,
        };
        let kept = self.store.keep(token, kind, &answer).await.expect("kept");
        self.store.finish(token, End::Succeeded(kept), 0.0).await.expect("stored").expect("ended");
    }
}

struct Seen {
    status: StatusCode,
    headers: axum::http::HeaderMap,
    body: Bytes,
}

impl Seen {
    async fn read(response: Response) -> Self {
        let (parts, body) = response.into_parts();
        let body = axum::body::to_bytes(body, usize::MAX).await.expect("a body");
        Self { status: parts.status, headers: parts.headers, body }
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{}: {:?}", self.status, self.body))
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("text")
    }

    /// Status and code of an error, whose body must be complete.
    fn error(&self) -> (u16, String) {
        let json = self.json();
        assert_eq!(json["status"], self.status.as_u16(), "{json}");
        assert_eq!(json["detail"], json["error"]["message"]);
        assert!(!self.header("x-request-id").is_empty());
        (self.status.as_u16(), json["error"]["code"].as_str().expect("a code").to_owned())
    }
}

fn chat() -> Value {
    json!({"model": "text", "messages": [{"role": "user", "content": "hi"}]})
}

fn image_job() -> Value {
    json!({"endpoint": "/v1/images/generations", "body": {"model": "flux", "prompt": "x", "response_format": "url"}})
}

fn with_key(request: axum::http::request::Builder, key: &str) -> Request<Body> {
    request.header("authorization", format!("Bearer {key}")).body(Body::empty()).expect("a request")
}

#[tokio::test]
async fn a_job_is_committed_answered_and_found_again() {
    let bench = Bench::new().await;
    let made = bench.post("/v1/jobs", &image_job()).await;
    assert_eq!(made.status, 202, "{}", made.text());
    let job = made.json();
    let own = format!("/v1/jobs/{}", job["id"].as_str().expect("an id"));
    assert_eq!((made.header("location"), made.header("x-roundhouse-job-id")), (own.as_str(), &own[9..]));
    assert_eq!((&job["state"], &job["priority"], &job["queue"]["position"]), (&json!("queued"), &json!(5), &json!(0)));
    assert!(!made.header("retry-after").is_empty() && !made.header("openai-poll-after-ms").is_empty());
    let found = bench.get(&own.replace("job_", "chatcmpl-")).await;
    assert_eq!(found.json()["id"], job["id"], "any face's prefix finds it");
    assert_eq!(bench.get(&own[..own.len() - 1]).await.error(), (404, "not_found".into()));
}

#[tokio::test]
async fn long_polls_end_with_the_change_they_wait_for() {
    let bench = Bench::new().await;
    let id = bench.post("/v1/jobs", &image_job()).await.json()["id"].as_str().expect("an id").to_owned();
    let seen = bench.get(&format!("/v1/jobs/{id}")).await;
    let etag = seen.header("etag").to_owned();
    let changes = async {
        let mut etag = etag;
        loop {
            let change = Request::get(format!("/v1/jobs/{id}?wait=60&until=change")).header("if-none-match", &etag);
            let seen = bench.send(change.body(Body::empty()).expect("a request")).await;
            assert_eq!(seen.status, StatusCode::OK, "woken by a change, never by the time");
            assert_ne!(seen.header("etag"), etag);
            seen.header("etag").clone_into(&mut etag);
            if seen.json()["state"] == "cancelled" {
                return;
            }
        }
    };
    let (terminal, cancel) = (format!("/v1/jobs/{id}?wait=60"), format!("/v1/jobs/{id}/cancel"));
    let ((), ended, _) = tokio::join!(changes, bench.get(&terminal), async {
        tokio::task::yield_now().await;
        bench.post(&cancel, &json!({})).await
    });
    assert_eq!(ended.json()["state"], "cancelled");
    let unchanged = Request::get(&terminal).header("if-none-match", ended.header("etag")).body(Body::empty());
    assert_eq!(bench.send(unchanged.expect("a request")).await.status, 304, "an ended job is not waited for");
    assert_eq!(bench.get(&format!("/v1/jobs/{id}?until=noon")).await.error(), (400, "invalid_request".into()));
}

#[tokio::test]
async fn cancelling_is_idempotent_unless_asked_to_be_strict() {
    let bench = Bench::new().await;
    let id = bench.post("/v1/jobs", &image_job()).await.json()["id"].as_str().expect("an id").to_owned();
    let cancel = |query: &str| {
        let request = Request::post(format!("/v1/jobs/{id}/cancel{query}")).header("content-type", "application/json");
        request.body(Body::empty()).expect("a request")
    };
    assert_eq!(bench.post(&format!("/v1/jobs/{id}/retry"), &json!({})).await.error(), (409, "job_not_terminal".into()));
    for _ in 0..2 {
        let seen = bench.send(cancel("")).await;
        assert_eq!((seen.status, &seen.json()["error"]["code"]), (StatusCode::OK, &json!("cancelled_by_user")));
    }
    let strict = bench.send(cancel("?strict=true")).await;
    assert_eq!(strict.error(), (409, "job_already_terminal".into()));
    assert_eq!(strict.header("x-should-retry"), "false");
    let response = bench.get(&format!("/v1/jobs/{id}/response")).await;
    assert_eq!(response.error(), (409, "cancelled_by_user".into()));
    let again = bench.post(&format!("/v1/jobs/{id}/retry"), &json!({})).await;
    assert_eq!((again.status, &again.json()["retry_of"]), (StatusCode::ACCEPTED, &json!(id)));
    assert_ne!(again.json()["id"], id);
}

#[tokio::test]
async fn events_are_whole_resumable_and_end() {
    let bench = Bench::new().await;
    let id = bench.post("/v1/jobs", &image_job()).await.json()["id"].as_str().expect("an id").to_owned();
    let (events, cancel) = (format!("/v1/jobs/{id}/events"), format!("/v1/jobs/{id}/cancel"));
    let (stream, _) = tokio::join!(bench.get(&events), async {
        tokio::task::yield_now().await;
        bench.post(&cancel, &json!({})).await
    });
    assert_eq!(stream.header("content-type"), "text/event-stream; charset=utf-8");
    assert_eq!((stream.header("x-accel-buffering"), stream.header("cache-control")), ("no", "no-store"));
    let numbers =
        |text: &str| -> Vec<i64> { text.lines().filter_map(|line| line.strip_prefix("id: ")?.parse().ok()).collect() };
    let all = numbers(stream.text());
    let last = *all.last().expect("events");
    assert_eq!(all, (1..=last).collect::<Vec<_>>(), "gapless");
    assert!(stream.text().starts_with("retry: 2000\n\n") && stream.text().contains("event: job.cancelled\n"));
    let rest = bench.get(&format!("/v1/jobs/{id}/events?after=1")).await;
    assert_eq!(numbers(rest.text()), (2..=last).collect::<Vec<_>>());
    assert_eq!(bench.get(&format!("/v1/jobs/{id}/events?after={last}")).await.status, 204);
    let json = Request::get(format!("/v1/jobs/{id}/events")).header("accept", "application/json").body(Body::empty());
    let page = bench.send(json.expect("a request")).await.json();
    assert_eq!((&page["last_seq"], &page["has_more"]), (&json!(last), &json!(false)));
    let terminal = page["data"].as_array().and_then(|data| data.last()).expect("events");
    assert_eq!((&terminal["type"], &terminal["job"]["state"]), (&json!("job.cancelled"), &json!("cancelled")));
}

#[tokio::test]
async fn bulk_is_all_or_nothing_unless_asked_otherwise_and_lists_are_paged() {
    let bench = Bench::new().await;
    let item = |n: usize| {
        let mut item = image_job();
        item["custom_id"] = json!(format!("r-{n}"));
        item
    };
    let mut requests: Vec<Value> = (0..250).map(item).collect();
    requests.push(json!({"endpoint": "/v1/images/generations", "body": {"model": "fluxx", "prompt": "x"}}));
    let refused = bench.post("/v1/jobs/bulk", &json!({"requests": requests})).await;
    assert_eq!(refused.error(), (400, "invalid_request".into()));
    assert_eq!(refused.json()["error"]["details"][0]["index"], 250);
    assert_eq!(bench.get("/v1/jobs").await.json()["data"], json!([]), "nothing was submitted");
    let taken = bench.post("/v1/jobs/bulk?partial=true", &json!({"requests": requests})).await;
    assert_eq!(taken.status, 202);
    let taken = taken.json();
    assert_eq!(
        (taken["jobs"].as_array().map(Vec::len), taken["errors"].as_array().map(Vec::len)),
        (Some(250), Some(1))
    );
    assert_eq!(taken["jobs"][7]["custom_id"], "r-7");
    let batch = taken["batch_id"].as_str().expect("a batch");
    let (mut ids, mut after) = (HashSet::new(), String::new());
    loop {
        let page = bench.get(&format!("/v1/jobs?batch_id={batch}&limit=100&order=asc{after}")).await.json();
        ids.extend(page["data"].as_array().expect("a page").iter().map(|job| job["id"].to_string()));
        after = format!("&after={}", page["last_id"].as_str().expect("an id"));
        if page["has_more"] == false {
            break;
        }
    }
    assert_eq!(ids.len(), 250);
    assert_eq!(bench.get("/v1/jobs?limit=0").await.error(), (400, "invalid_request".into()));
}

#[tokio::test]
async fn other_tenants_jobs_do_not_exist() {
    let bench = Bench::with(patient(), "alice:secret-alice,bob:secret-bob", 9).await;
    assert_eq!(bench.get("/v1/jobs").await.error(), (401, "invalid_api_key".into()));
    assert_eq!(bench.get("/metrics").await.error(), (401, "invalid_api_key".into()));
    assert_eq!(bench.get("/nope").await.error(), (401, "invalid_api_key".into()), "not even what exists is told");
    assert_eq!(bench.get("/health").await.status, 200);
    let request = Request::post("/v1/jobs").header("authorization", "Bearer secret-alice");
    let made = bench.send(request.body(Body::from(image_job().to_string())).expect("a request")).await;
    let id = made.json()["id"].as_str().expect("an id").to_owned();
    for path in ["", "/events", "/response", "/artifacts", "/artifacts/art_0"] {
        let seen = bench.send(with_key(Request::get(format!("/v1/jobs/{id}{path}")), "secret-bob")).await;
        assert_eq!(seen.error(), (404, "not_found".into()), "{path}");
    }
    for path in ["cancel", "retry"] {
        let seen = bench.send(with_key(Request::post(format!("/v1/jobs/{id}/{path}")), "secret-bob")).await;
        assert_eq!(seen.error(), (404, "not_found".into()), "{path}");
    }
    let listed =
        |key: &'static str| async { bench.send(with_key(Request::get("/v1/jobs"), key)).await.json()["data"].clone() };
    assert_eq!(listed("secret-bob").await, json!([]));
    assert_eq!(listed("secret-alice").await[0]["id"], json!(id));
}

#[tokio::test]
async fn files_are_read_in_ranges_and_by_signature() {
    let bench = Bench::with(patient(), "alice:secret-alice", 9).await;
    let request = Request::post("/v1/jobs").header("authorization", "Bearer secret-alice");
    let made = bench.send(request.body(Body::from(image_job().to_string())).expect("a request")).await;
    let id: JobId = made.json()["id"].as_str().and_then(|id| id.parse().ok()).expect("an id");
    bench.succeed(id, JobKind::Image, "application/json", r#"{"created":1,"data":[{"b64_json":"iVBORw=="}]}"#).await;
    let answer = bench.send(with_key(Request::get(format!("/v1/jobs/{id}/response")), "secret-alice")).await;
    let url = answer.json()["data"][0]["url"].as_str().expect("a URL, as the body asked").to_owned();
    assert_eq!(answer.json()["data"][0].get("b64_json"), None);
    let whole = bench.get(&url).await;
    assert_eq!(
        (whole.status, &whole.body[..], whole.header("content-type")),
        (StatusCode::OK, &b"\x89PNG"[..], "image/png")
    );
    let part =
        bench.send(Request::get(&url).header("range", "bytes=1-2").body(Body::empty()).expect("a request")).await;
    assert_eq!(
        (part.status, &part.body[..], part.header("content-range")),
        (StatusCode::PARTIAL_CONTENT, &b"PN"[..], "bytes 1-2/4")
    );
    let beyond =
        bench.send(Request::get(&url).header("range", "bytes=4-").body(Body::empty()).expect("a request")).await;
    assert_eq!((beyond.error(), beyond.header("content-range")), ((416, "invalid_request".into()), "bytes */4"));
    let known = Request::get(&url).header("if-none-match", whole.header("etag")).body(Body::empty());
    assert_eq!(bench.send(known.expect("a request")).await.status, 304);
    assert_eq!(bench.get(&url.replace("art_0", "art_1")).await.error(), (403, "forbidden".into()));
    assert_eq!(bench.get(&url.replace("exp=", "exp=9")).await.error(), (403, "forbidden".into()));
    let bare = url.split('?').next().expect("a path");
    assert_eq!(bench.get(bare).await.error(), (401, "invalid_api_key".into()));
    let job = bench.send(with_key(Request::get(format!("/v1/jobs/{id}")), "secret-alice")).await.json();
    assert_eq!((&job["state"], &job["artifacts"][0]["bytes"]), (&json!("succeeded"), &json!(4)));
}

#[tokio::test]
async fn stored_chat_answers_carry_our_id_and_the_callers_name() {
    let bench = Bench::new().await;
    let made = bench.post("/v1/jobs", &json!({"endpoint": "/v1/chat/completions", "body": chat()})).await.json();
    let id: JobId = made["id"].as_str().and_then(|id| id.parse().ok()).expect("an id");
    assert_eq!(bench.get(&format!("/v1/jobs/{id}/response?wait=0")).await.status, 202);
    bench.succeed(id, JobKind::Chat, "application/json", r#"{"id":"x","model":"y","choices":[]}"#).await;
    let answer = bench.get(&format!("/v1/jobs/{id}/response")).await;
    assert_eq!(answer.text(), format!(r#"{{"id":"{}","model":"text","choices":[]}}"#, id.with_prefix("chatcmpl-")));
    let job = bench.get(&format!("/v1/jobs/{id}")).await.json();
    assert_eq!(job["result"]["body"], answer.json(), "short answers are in the job");
}

#[tokio::test]
async fn a_caller_who_hangs_up_takes_the_job_along_but_only_a_sync_one() {
    let quick = ServerSettings { disconnect_grace: Duration::from_millis(20), ..patient() };
    let bench = Bench::with(quick.clone(), "", 9).await;
    let id = bench.post_and_hang_up("/v1/chat/completions", &chat(), "").await;
    assert_eq!(bench.ended(id).await, JobState::Cancelled);
    let job = bench.store.reader().job(id).await.expect("the job");
    assert_eq!(job.error.map(|error| error.code), Some(ErrorCode::ClientDisconnected));
    let bench = Bench::with(quick, "", 9).await;
    let id = bench
        .post_and_hang_up("/v1/jobs", &json!({"endpoint": "/v1/chat/completions", "body": chat()}), "wait=60")
        .await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(bench.store.reader().job(id).await.expect("the job").state, JobState::Queued);
}

#[tokio::test]
async fn a_stream_that_is_dropped_takes_the_job_along() {
    let bench = Bench::with(ServerSettings { disconnect_grace: Duration::from_millis(20), ..patient() }, "", 9).await;
    let mut body = chat();
    body["stream"] = json!(true);
    let request = Request::post("/v1/chat/completions").body(Body::from(body.to_string())).expect("a request");
    let response = bench.router.clone().oneshot(request).await.expect("an answer");
    assert_eq!(response.status(), 200, "at once, though nothing has started");
    let id = response.headers()["x-roundhouse-job-id"].to_str().ok().and_then(|id| id.parse().ok()).expect("an id");
    drop(response);
    assert_eq!(bench.ended(id).await, JobState::Cancelled);
}

#[tokio::test]
async fn hops_lead_to_the_answer_or_to_504_and_then_the_job_goes_on() {
    let server = ServerSettings {
        sync_hop: Duration::from_millis(30),
        sync_max_hops: 2,
        hop_grace: Duration::from_millis(50),
        disconnect_grace: Duration::from_millis(20),
        ..patient()
    };
    let bench = Bench::with(server, "", 9).await;
    let mut seen = bench.post("/v1/chat/completions", &chat()).await;
    for hop in 1..=2 {
        assert_eq!((seen.status, seen.header("cache-control")), (StatusCode::SEE_OTHER, "no-store"));
        let location = seen.header("location").to_owned();
        assert!(
            location.starts_with("/v1/jobs/job_") && location.ends_with(&format!("/response?hop={hop}")),
            "{location}"
        );
        seen = bench.get(&location).await;
    }
    assert_eq!(seen.error(), (504, "sync_wait_exceeded".into()));
    assert_eq!(seen.header("x-should-retry"), "false");
    let id: JobId = seen.json()["error"]["job_id"].as_str().and_then(|id| id.parse().ok()).expect("an id");
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert_eq!(bench.store.reader().job(id).await.expect("the job").state, JobState::Queued, "it was told to go on");
    let abandoned = bench.post("/v1/chat/completions", &chat()).await;
    let id: JobId = abandoned.header("x-roundhouse-job-id").parse().expect("an id");
    assert_eq!(bench.ended(id).await, JobState::Cancelled, "nobody came for the next hop");
}

#[tokio::test]
async fn waiting_calls_are_capped_and_places_given_back() {
    let bench = Bench::with(patient(), "", 1).await;
    let request = Request::post("/v1/chat/completions").body(Body::from(chat().to_string())).expect("a request");
    let mut first = Box::pin(bench.router.clone().oneshot(request));
    let refused = async {
        loop {
            tokio::task::yield_now().await;
            let waiting = bench.get("/metrics").await.text().contains("roundhouse_waiting_sync_calls 1\n");
            if waiting {
                return bench.post("/v1/chat/completions", &chat()).await;
            }
        }
    };
    let refused = tokio::select! {
        _ = &mut first => panic!("answered"),
        refused = refused => refused,
    };
    assert_eq!(refused.error(), (429, "queue_full".into()));
    assert_eq!(refused.json()["error"]["details"]["limit"], 1);
    assert!(refused.header("retry-after").parse::<u64>().is_ok_and(|seconds| seconds <= 60));
    drop(first);
    assert!(bench.get("/metrics").await.text().contains("roundhouse_waiting_sync_calls 0\n"));
}

#[tokio::test]
async fn respond_async_turns_a_call_into_a_job() {
    let bench = Bench::new().await;
    let request = Request::post("/v1/chat/completions").header("prefer", "respond-async");
    let seen = bench.send(request.body(Body::from(chat().to_string())).expect("a request")).await;
    assert_eq!((seen.status, seen.header("preference-applied")), (StatusCode::ACCEPTED, "respond-async"));
    assert_eq!((&seen.json()["object"], &seen.json()["priority"]), (&json!("job"), &json!(5)));
}

#[tokio::test]
async fn bad_requests_are_told_what_is_wrong() {
    let bench = Bench::new().await;
    let raw = |body: Vec<u8>| Request::post("/v1/chat/completions").body(Body::from(body)).expect("a request");
    let garbled = bench.send(raw(b"{\"model\": }".to_vec())).await;
    assert_eq!(garbled.error(), (400, "invalid_json".into()));
    assert_eq!(garbled.header("content-type"), "application/json");
    assert_eq!(bench.send(raw(vec![b' '; 400_001])).await.error(), (413, "payload_too_large".into()));
    let multipart = Request::post("/v1/jobs").header("content-type", "multipart/form-data; boundary=x");
    let seen = bench.send(multipart.body(Body::from("--x--")).expect("a request")).await;
    assert_eq!(
        (seen.error(), seen.header("content-type")),
        ((415, "unsupported_media_type".into()), "application/problem+json")
    );
    let seen = bench.post("/v1/jobs?wait=5", &image_job()).await;
    let said = seen.json()["detail"].as_str().unwrap_or_default().to_owned();
    assert_eq!(seen.error(), (400, "invalid_request".into()));
    assert!(said.contains("`wait` is not a field here") && said.contains("`Prefer: wait=SECONDS`"), "{said}");
    let wrong_method = bench.send(Request::put("/v1/jobs").body(Body::empty()).expect("a request")).await;
    assert_eq!(wrong_method.error(), (405, "method_not_allowed".into()));
    assert!(wrong_method.header("allow").contains("POST"));
    assert_eq!(bench.get("/v1/nope").await.error(), (404, "not_found".into()));
    assert_eq!(bench.get("/v1/jobs/%FF").await.error(), (404, "not_found".into()));
    assert_eq!(bench.get("/v1/models/fluxx").await.error(), (404, "model_not_found".into()));
    assert_eq!(bench.post("/v1/models/flux/reload", &json!({})).await.error(), (404, "not_found".into()));
    assert_eq!(bench.get("/v1/jobs").await.json()["data"], json!([]), "the queue has seen nothing of it");
}

#[tokio::test]
async fn operations_answer() {
    let bench = Bench::new().await;
    bench.post("/v1/jobs", &image_job()).await;
    assert_eq!(bench.get("/readyz").await.json()["status"], "ready");
    let models = bench.get("/v1/models").await.json();
    assert_eq!((&models["object"], &models["data"][1]["id"]), (&json!("list"), &json!("flux")));
    assert_eq!(bench.get("/v1/workers").await.json()["data"], json!([]));
    assert_eq!(bench.get("/v1/queue").await.json()["object"], "queue");
    assert!(bench.get("/metrics").await.text().contains("# TYPE roundhouse_jobs gauge"));
}

#[tokio::test]
async fn stopping_ends_open_streams_and_all_connections() {
    let bench = Bench::new().await;
    let id = bench.post("/v1/jobs", &image_job()).await.json()["id"].as_str().expect("an id").to_owned();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    bench.tasks.spawn("http", http::serve(listener, bench.router.clone(), bench.tasks.clone()));
    let connect = || async { tokio::net::TcpStream::connect(address).await.expect("a connection") };
    let mut idle = connect().await;
    let mut events = connect().await;
    let request = format!("GET /v1/jobs/{id}/events HTTP/1.1\r\nhost: x\r\n\r\n");
    events.write_all(request.as_bytes()).await.expect("sent");
    let mut text = Vec::new();
    while !String::from_utf8_lossy(&text).contains("event: job.queued") {
        events.read_buf(&mut text).await.expect("read");
    }
    bench.tasks.soft().cancel();
    let rest = tokio::time::timeout(SOON, events.read_to_end(&mut text)).await.expect("the stream ends");
    rest.expect("read");
    assert!(String::from_utf8_lossy(&text).contains(": the server stops; come back"));
    let read = tokio::time::timeout(SOON, idle.read_to_end(&mut Vec::new())).await.expect("idle connections close");
    assert_eq!(read.expect("read"), 0);
    // Who comes now has one request; the hard stage ends the rest, also those who never say anything.
    let (mut late, mut silent) = (connect().await, connect().await);
    late.write_all(b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("sent");
    let mut text = Vec::new();
    let read = tokio::time::timeout(SOON, late.read_to_end(&mut text)).await.expect("one answer, then the end");
    read.expect("read");
    assert!(String::from_utf8_lossy(&text).starts_with("HTTP/1.1 503 "), "{}", String::from_utf8_lossy(&text));
    bench.tasks.hard().cancel();
    let read = tokio::time::timeout(SOON, silent.read_to_end(&mut Vec::new())).await.expect("silent connections close");
    assert_eq!(read.expect("read"), 0);
    assert!(bench.tasks.wait(SOON).await, "no task is left");
}
