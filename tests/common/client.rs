//! A client of the server's public API, as plain as can be.

use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Client, Method, redirect};
use serde_json::{Value, json};

use super::{LIMIT, within};

/// One way to talk to one server. Does not follow redirects unless told to.
#[derive(Clone)]
pub(crate) struct Api {
    http: Client,
    pub(crate) base: String,
    headers: HeaderMap,
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Reply {
    /// Insists on a status.
    #[track_caller]
    pub(crate) fn is(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}", self.text());
        self
    }

    /// Insists on an error.
    #[track_caller]
    pub(crate) fn refused(self, status: u16, code: &str) -> Self {
        assert_eq!((self.status, self.code().as_str()), (status, code), "{}", self.text());
        self
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}: {}", self.status, self.text()))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body[..self.body.len().min(4_000)]).into_owned()
    }

    /// `error.code`, or nothing.
    pub(crate) fn code(&self) -> String {
        let body: Value = serde_json::from_slice(&self.body).unwrap_or_default();
        body["error"]["code"].as_str().unwrap_or_default().to_owned()
    }

    /// A header's value, or nothing.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

impl Api {
    pub(crate) fn new(base: &str) -> Self {
        Self { http: client(redirect::Policy::none(), true), base: base.to_owned(), headers: HeaderMap::new() }
    }

    /// The same with a header in every request.
    pub(crate) fn header(&self, name: &str, value: &str) -> Self {
        let mut headers = self.headers.clone();
        headers.insert(name.parse::<HeaderName>().unwrap(), value.parse::<HeaderValue>().unwrap());
        Self { headers, ..self.clone() }
    }

    /// The same with an API key.
    pub(crate) fn key(&self, key: &str) -> Self {
        self.header("authorization", &format!("Bearer {key}"))
    }

    /// The same following redirects, with a connection for each request.
    pub(crate) fn following(&self) -> Self {
        Self { http: client(redirect::Policy::limited(60), false), ..self.clone() }
    }

    /// The same at another address.
    pub(crate) fn at(&self, base: &str) -> Self {
        Self { base: base.to_owned(), ..self.clone() }
    }

    /// Sends a request and returns as soon as the head of the answer is there.
    pub(crate) async fn open(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> reqwest::Response {
        self.try_open(method, path, body).await.unwrap()
    }

    /// The same where the connection may break.
    pub(crate) async fn try_open(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> reqwest::Result<reqwest::Response> {
        let mut request = self.http.request(method, format!("{}{path}", self.base));
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        // After the default type, so that a test can set another one.
        request = request.headers(self.headers.clone());
        request.send().await
    }

    pub(crate) async fn send(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> Reply {
        self.try_send(method, path, body).await.unwrap()
    }

    pub(crate) async fn try_send(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> reqwest::Result<Reply> {
        let what = format!("{method} {path} is answered");
        within(LIMIT, &what, async {
            let answer = self.try_open(method, path, body).await?;
            let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
            Ok(Reply { status, headers, body: answer.bytes().await? })
        })
        .await
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send(Method::GET, path, None).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Reply {
        self.send(Method::POST, path, Some(body.to_string().into_bytes())).await
    }

    /// POST without a body.
    pub(crate) async fn poke(&self, path: &str) -> Reply {
        self.send(Method::POST, path, None).await
    }

    /// Submits a job and returns its id.
    pub(crate) async fn submit(&self, request: &Value) -> String {
        let reply = self.post("/v1/jobs", request).await.is(202);
        reply.json()["id"].as_str().unwrap().to_owned()
    }

    /// Submits a job to the `/echo` endpoint of a custom model; `wishes` is its `echo` object.
    pub(crate) async fn submit_echo(&self, model: &str, wishes: Value) -> String {
        self.submit(&echo_job(model, wishes)).await
    }

    /// Submits jobs in one go, and returns their ids in order.
    pub(crate) async fn submit_together(&self, requests: Vec<Value>) -> Vec<String> {
        let reply = self.post("/v1/jobs/bulk", &json!({"requests": requests})).await.is(202).json();
        let jobs = reply["jobs"].as_array().unwrap();
        jobs.iter().map(|job| job["id"].as_str().unwrap().to_owned()).collect()
    }

    /// The job as it is now.
    pub(crate) async fn job(&self, id: &str) -> Value {
        self.get(&format!("/v1/jobs/{id}")).await.is(200).json()
    }

    /// The job, once it has ended.
    pub(crate) async fn finished(&self, id: &str) -> Value {
        within(LIMIT, &format!("{id} ends"), async {
            loop {
                let job = self.get(&format!("/v1/jobs/{id}?wait=30")).await.is(200).json();
                if is_terminal(&job) {
                    return job;
                }
            }
        })
        .await
    }

    /// The job, once it has ended well.
    pub(crate) async fn succeeded(&self, id: &str) -> Value {
        let job = self.finished(id).await;
        assert_eq!(job["state"], "succeeded", "{job}");
        job
    }

    /// Persisted events, all of them.
    pub(crate) async fn events(&self, id: &str) -> Vec<Value> {
        let api = self.header("accept", "application/json");
        let mut events: Vec<Value> = Vec::new();
        loop {
            let after = events.last().map_or(0, |event| event["seq"].as_i64().unwrap());
            let page = api.get(&format!("/v1/jobs/{id}/events?after={after}")).await.is(200).json();
            let data = page["data"].as_array().unwrap();
            events.extend(data.iter().cloned());
            if data.is_empty() || events.last().is_some_and(|event| event["seq"] == page["last_seq"]) {
                return events;
            }
        }
    }

    /// Follows the events of a job from `after` on.
    pub(crate) async fn follow(&self, id: &str, after: i64) -> EventStream {
        let mut api = self.header("accept", "text/event-stream");
        if after > 0 {
            api = api.header("last-event-id", &after.to_string());
        }
        let answer = api.open(Method::GET, &format!("/v1/jobs/{id}/events"), None).await;
        assert_eq!(answer.status().as_u16(), 200, "{id}");
        EventStream::new(answer)
    }

    /// Waits for an event of a job, also if it happened before.
    pub(crate) async fn happened(&self, id: &str, kind: &str) -> Frame {
        let mut events = self.follow(id, 0).await;
        within(LIMIT, &format!("{kind} of {id}"), async {
            loop {
                let frame = events.next().await.unwrap_or_else(|| panic!("{id} ended without {kind}"));
                if frame.event == kind {
                    return frame;
                }
            }
        })
        .await
    }

    /// `GET /v1/queue`
    pub(crate) async fn queue(&self) -> Value {
        self.get("/v1/queue").await.is(200).json()
    }

    /// One entry of `GET /v1/workers`.
    pub(crate) async fn worker(&self, model: &str) -> Value {
        let workers = self.get("/v1/workers").await.is(200).json();
        let found = workers["data"].as_array().unwrap().iter().find(|worker| worker["model"] == model);
        found.unwrap_or_else(|| panic!("no worker of {model}: {workers}")).clone()
    }

    /// The one job whose metadata has `who`, once it is there.
    pub(crate) async fn job_of(&self, who: &str) -> String {
        super::eventually(LIMIT, &format!("a job of {who}"), || async {
            let page = self.get(&format!("/v1/jobs?metadata[who]={who}")).await.is(200).json();
            page["data"][0]["id"].as_str().map(str::to_owned)
        })
        .await
    }
}

fn client(policy: redirect::Policy, pooled: bool) -> Client {
    let idle = if pooled { usize::MAX } else { 0 };
    Client::builder().no_proxy().redirect(policy).pool_max_idle_per_host(idle).build().unwrap()
}

/// A submission for the `/echo` endpoint of a custom model.
pub(crate) fn echo_job(model: &str, wishes: Value) -> Value {
    json!({"endpoint": "/echo", "body": {"model": model, "echo": wishes}})
}

pub(crate) fn is_terminal(job: &Value) -> bool {
    ["succeeded", "failed", "cancelled", "expired"].iter().any(|state| job["state"] == *state)
}

/// Insists on what every ended job's events have: a gapless `seq` from 1, attempts that count up one by one, and exactly
/// one terminal event, the last. Returns its name.
#[track_caller]
pub(crate) fn check_history(events: &[Value]) -> String {
    let kind = |event: &Value| event["type"].as_str().unwrap_or_default().to_owned();
    let seqs: Vec<i64> = events.iter().map(|event| event["seq"].as_i64().unwrap()).collect();
    assert_eq!(seqs, (1..=seqs.len() as i64).collect::<Vec<_>>(), "gapless: {events:?}");
    let attempts: Vec<i64> =
        events.iter().filter(|e| kind(e) == "job.started").map(|e| e["attempt"].as_i64().unwrap()).collect();
    assert_eq!(attempts, (1..=attempts.len() as i64).collect::<Vec<_>>(), "attempts count up: {events:?}");
    let terminal: Vec<String> = events
        .iter()
        .map(kind)
        .filter(|kind| ["job.succeeded", "job.failed", "job.cancelled", "job.expired"].contains(&kind.as_str()))
        .collect();
    assert_eq!(terminal.len(), 1, "one end: {events:?}");
    assert_eq!(events.last().map(kind).as_ref(), terminal.first(), "the end comes last: {events:?}");
    terminal[0].clone()
}

/// One frame of a stream of server-sent events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    /// As it came, without the empty line at its end.
    pub(crate) raw: String,
    pub(crate) id: Option<i64>,
    pub(crate) event: String,
    pub(crate) data: String,
}

impl Frame {
    fn parse(raw: &str) -> Self {
        let mut frame = Self { raw: raw.to_owned(), id: None, event: String::new(), data: String::new() };
        for line in raw.lines() {
            match line.split_once(':').map(|(name, value)| (name, value.strip_prefix(' ').unwrap_or(value))) {
                Some(("id", id)) => frame.id = id.parse().ok(),
                Some(("event", event)) => event.clone_into(&mut frame.event),
                Some(("data", data)) => frame.data.push_str(data),
                _ => {}
            }
        }
        frame
    }

    /// Nothing but comment lines.
    pub(crate) fn is_comment(&self) -> bool {
        self.raw.lines().all(|line| line.starts_with(':'))
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// A live stream of server-sent events. Dropping it closes the connection.
pub(crate) struct EventStream {
    bytes: Pin<Box<dyn Stream<Item = reqwest::Result<Bytes>> + Send>>,
    pending: Vec<u8>,
    /// Everything that has come.
    pub(crate) all: Vec<u8>,
}

impl EventStream {
    pub(crate) fn new(answer: reqwest::Response) -> Self {
        Self { bytes: Box::pin(answer.bytes_stream()), pending: Vec::new(), all: Vec::new() }
    }

    /// The next frame; `None` when the server has closed the stream.
    pub(crate) async fn next(&mut self) -> Option<Frame> {
        within(LIMIT, "the next frame", async {
            loop {
                if let Some(end) = self.pending.windows(2).position(|pair| pair == b"\n\n") {
                    let rest = self.pending.split_off(end + 2);
                    let raw = std::mem::replace(&mut self.pending, rest);
                    return Some(Frame::parse(std::str::from_utf8(&raw[..end]).unwrap()));
                }
                let Some(more) = self.bytes.next().await else {
                    assert!(self.pending.is_empty(), "half a frame at the end: {:?}", self.pending);
                    return None;
                };
                let more = more.unwrap();
                self.pending.extend_from_slice(&more);
                self.all.extend_from_slice(&more);
            }
        })
        .await
    }

    /// The next frame that is more than a comment.
    pub(crate) async fn next_data(&mut self) -> Option<Frame> {
        loop {
            match self.next().await {
                Some(frame) if frame.is_comment() => {}
                other => return other,
            }
        }
    }

    /// All frames up to the end.
    pub(crate) async fn rest(&mut self) -> Vec<Frame> {
        let mut frames = Vec::new();
        while let Some(frame) = self.next().await {
            frames.push(frame);
        }
        frames
    }

    /// All frames with an id up to the end, within a limit.
    pub(crate) async fn rest_persisted(&mut self, limit: Duration) -> Vec<Frame> {
        let frames = within(limit, "the stream ends", self.rest()).await;
        frames.into_iter().filter(|frame| frame.id.is_some()).collect()
    }
}
