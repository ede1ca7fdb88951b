//! HTTP to one worker: sends a job, turns what comes back into [`Progress`] and one [`Outcome`].

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::Engine;
use bytes::{Bytes, BytesMut};
use hyper::Method;
use hyper::header::{ACCEPT, CONTENT_TYPE, HeaderName, HeaderValue};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::domain::worker::{Answer, Outcome, Progress};
use crate::domain::{ErrorCode, Token};
use crate::worker::assemble::{Added, AssembleError, Assembler};
use crate::worker::sse;
use crate::worker::verdict::{self, Failure};
use crate::worker::wire::{Ask, Lost, Pool, Reply};

/// Longest answer, or sum of a stream's events, in bytes.
const ANSWER_LIMIT_BYTES: usize = 256 << 20;
/// Most that is read of the body of a refusal, in bytes.
const REFUSAL_LIMIT_BYTES: usize = 256 << 10;
/// How long a server that answered with an error of its own may take to say how it is.
const ENGINE_LIMIT: Duration = Duration::from_secs(1);
/// How long a worker may take for its metrics, and how long they may be, in bytes.
const METRICS_LIMIT: Duration = Duration::from_secs(1);
const METRICS_LIMIT_BYTES: usize = 4 << 20;
/// Most chunks of a stream that are held back while none had content.
const HELD_LIMIT: usize = 64;
const JSON: &str = "application/json";
const NDJSON: &str = "application/x-ndjson";
const SSE: &str = "text/event-stream";

/// Membership in a run, sent as `x-roundhouse-run: <id>;n=<count>`.
#[derive(Clone, Debug)]
pub struct RunTag {
    /// Unique within this server's life.
    pub id: String,
    /// Jobs in the run.
    pub count: usize,
}

/// One job for a worker.
#[derive(Clone, Debug)]
pub struct Call {
    /// `http://127.0.0.1:8001`
    pub base_url: String,
    /// `/v1/chat/completions`
    pub endpoint: String,
    /// Sent as `x-request-id`.
    pub token: Token,
    /// Forwarded JSON.
    pub body: Bytes,
    /// Whether the body asks for a stream: then the answer is SSE, relayed chunk by chunk and assembled.
    pub stream: bool,
    /// Membership in a run of more than one.
    pub run: Option<RunTag>,
    /// Longest time for the whole attempt.
    pub timeout: Duration,
}

/// A pooled HTTP client for workers. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct WorkerClient {
    pool: Pool,
}

/// How an attempt goes wrong before it has an answer.
enum Trouble {
    Failed(Failure),
    Lost(Lost),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<Lost> for Trouble {
    fn from(lost: Lost) -> Self {
        Self::Lost(lost)
    }
}

impl WorkerClient {
    /// An empty pool.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sends the job and returns how it ended. Progress goes to `progress` in order; a full channel is waited for (its
    /// reader never blocks on clients). When `stop` is cancelled, the connection is closed at once: `Outcome::Stopped`.
    ///
    /// A stream's chunks are passed on from the first one with content; those before it (a role, an empty text) are held
    /// until then, so a stream that fails without content has passed nothing on and may be tried again.
    pub async fn run(&self, call: Call, progress: mpsc::Sender<Progress>, stop: CancellationToken) -> Outcome {
        let attempt = Attempt {
            pool: &self.pool,
            authority: authority(&call.base_url),
            call: &call,
            progress: &progress,
            relayed: AtomicBool::new(false),
        };
        if stop.is_cancelled() {
            return Outcome::Stopped; // Nothing was sent.
        }
        // Dropping the unfinished attempt closes its connection, which cancels the request on the worker.
        tokio::select! {
            biased;
            outcome = attempt.run() => outcome,
            () = stop.cancelled() => Outcome::Stopped,
            () = tokio::time::sleep(call.timeout) => attempt.failed(timed_out(call.timeout)),
        }
    }

    /// What a worker tells by its own `/metrics`. `None`: it has none, or does not answer within a second.
    pub async fn metrics(&self, base_url: &str) -> Option<String> {
        let told = async {
            let authority = authority(base_url);
            let mut reply = self.pool.call(authority, &Ask::get("/metrics")).await.ok()?;
            let status = reply.status;
            let body = reply.whole(METRICS_LIMIT_BYTES).await.ok()??;
            self.pool.give_back(authority, reply);
            (status == 200).then(|| String::from_utf8_lossy(&body).into_owned())
        };
        tokio::time::timeout(METRICS_LIMIT, told).await.ok().flatten()
    }

    /// Why the engine behind a worker that still answers is dead: engines with processes of their own (vLLM) answer each of
    /// their requests with an error then, say so by `/health`, and go down. `None`: it lives, or nothing proves that it does
    /// not.
    pub async fn engine_death(&self, base_url: &str) -> Option<String> {
        let health = async {
            let authority = authority(base_url);
            let mut reply = self.pool.call(authority, &Ask::get("/health")).await?;
            let status = reply.status;
            reply.whole(REFUSAL_LIMIT_BYTES).await?;
            self.pool.give_back(authority, reply);
            Ok::<u16, Lost>(status)
        };
        match tokio::time::timeout(ENGINE_LIMIT, health).await {
            Ok(Ok(status)) if status >= 500 => {
                Some(format!("its engine is dead: /health answers with status {status}"))
            }
            Ok(Err(lost)) => {
                tracing::warn!(worker = base_url, "/health does not answer: {lost}");
                Some(format!("{}, when it was asked for its health", lost.what))
            }
            Ok(Ok(_)) | Err(_) => None,
        }
    }
}

fn timed_out(limit: Duration) -> Failure {
    let message = format!("the attempt ran longer than its limit of {} s", limit.as_secs_f64());
    Failure::new(ErrorCode::ExecutionTimeout, message, true)
}

fn authority(base_url: &str) -> &str {
    base_url.strip_prefix("http://").unwrap_or(base_url).trim_end_matches('/')
}

struct Attempt<'a> {
    pool: &'a Pool,
    authority: &'a str,
    call: &'a Call,
    progress: &'a mpsc::Sender<Progress>,
    /// Whether a chunk was passed on, so that no other attempt may follow.
    relayed: AtomicBool,
}

impl Attempt<'_> {
    async fn run(&self) -> Outcome {
        match self.exchange().await {
            Ok(answer) => Outcome::Answered(answer),
            Err(Trouble::Failed(failure)) => self.failed(failure),
            Err(Trouble::Lost(lost)) => {
                tracing::warn!(job.id = %self.call.token.id, "no answer: {lost}");
                Outcome::WorkerLost { reached: lost.reached, reason: lost.what.to_owned() }
            }
        }
    }

    fn failed(&self, failure: Failure) -> Outcome {
        if self.relayed.load(Ordering::Relaxed) { failure.after_output().into() } else { failure.into() }
    }

    async fn exchange(&self) -> Result<Answer, Trouble> {
        let mut reply = self.pool.call(self.authority, &self.ask()).await?;
        let status = reply.status;
        if !(200..300).contains(&status) {
            let body = reply.whole(REFUSAL_LIMIT_BYTES).await?.unwrap_or_default();
            self.pool.give_back(self.authority, reply);
            return Err(verdict::refused(status, &body).into());
        }
        let answer = match reply.media_type().as_str() {
            NDJSON => self.read_lines(&mut reply).await?,
            SSE => self.read_events(&mut reply).await?,
            media_type => self.read_whole(&mut reply, media_type).await?,
        };
        self.pool.give_back(self.authority, reply);
        Ok(answer)
    }

    fn ask(&self) -> Ask {
        let accept = if self.call.stream { SSE } else { NDJSON };
        let mut headers =
            vec![(CONTENT_TYPE, HeaderValue::from_static(JSON)), (ACCEPT, HeaderValue::from_static(accept))];
        let mut add = |name: &'static str, value: String| {
            // Both values are made of ids and digits, which are legal in a header.
            if let Ok(value) = HeaderValue::try_from(value) {
                headers.push((HeaderName::from_static(name), value));
            }
        };
        add("x-request-id", self.call.token.to_string());
        if let Some(run) = &self.call.run {
            add("x-roundhouse-run", format!("{};n={}", run.id, run.count));
        }
        Ask { method: Method::POST, path: self.call.endpoint.clone(), headers, body: self.call.body.clone() }
    }

    /// A whole body, JSON or binary, as stock servers answer.
    async fn read_whole(&self, reply: &mut Reply, media_type: &str) -> Result<Answer, Trouble> {
        let body = reply.whole(ANSWER_LIMIT_BYTES).await?;
        let body = body.ok_or_else(too_long)?;
        let usage = verdict::check(&self.call.endpoint, media_type, &body)?;
        Ok(Answer {
            status: reply.status,
            content_type: match reply.content_type() {
                "" => "application/octet-stream".to_owned(),
                given => given.to_owned(),
            },
            body,
            usage,
        })
    }

    /// Progress lines, then a result or an error: the wire of our own workers.
    async fn read_lines(&self, reply: &mut Reply) -> Result<Answer, Trouble> {
        let mut buffer = BytesMut::new();
        let mut searched = 0;
        while let Some(piece) = reply.chunk().await? {
            buffer.extend_from_slice(&piece);
            while let Some(at) = buffer[searched..].iter().position(|b| *b == b'\n') {
                let line = buffer.split_to(searched + at + 1).freeze();
                searched = 0;
                if let Some(answer) = self.take_line(&line).await? {
                    return Ok(answer);
                }
            }
            searched = buffer.len();
            if searched > ANSWER_LIMIT_BYTES {
                return Err(too_long().into());
            }
        }
        match self.take_line(&buffer.freeze()).await? {
            Some(answer) => Ok(answer),
            None => Err(Failure::worker_error("the worker's answer ended without a result").into()),
        }
    }

    async fn take_line(&self, line: &Bytes) -> Result<Option<Answer>, Trouble> {
        if line.trim_ascii().is_empty() {
            return Ok(None);
        }
        let parsed: Line = serde_json::from_slice(line).map_err(|e| {
            Failure::invalid_output(format!(
                "a line of the worker's answer is not in the wire format: {:?} at column {}",
                e.classify(),
                e.column()
            ))
        })?;
        match &*parsed.kind {
            "progress" => {
                let (step, total) = (parsed.step.unwrap_or(0), parsed.total.unwrap_or(0));
                self.tell(Progress::Step { step, total }).await;
                Ok(None)
            }
            "result" => self.result(line, &parsed).map(Some),
            "error" => Err(verdict::line_error(
                parsed.status,
                parsed.code.as_deref(),
                parsed.message.as_deref(),
                parsed.param.as_deref(),
            )
            .into()),
            // A later version's line kind is no reason to fail a job.
            _ => Ok(None),
        }
    }

    fn result(&self, line: &Bytes, parsed: &Line) -> Result<Answer, Trouble> {
        let body = if let Some(json) = parsed.json {
            line.slice_ref(json.get().as_bytes())
        } else if let Some(base64) = &parsed.body_b64 {
            base64::engine::general_purpose::STANDARD
                .decode(base64.as_bytes())
                .map_err(|e| Failure::invalid_output(format!("the result's body_b64: {e}")))?
                .into()
        } else {
            return Err(Failure::invalid_output("the result has neither `json` nor `body_b64`").into());
        };
        let content_type = parsed.content_type.as_deref().unwrap_or(JSON);
        let media_type = content_type.split(';').next().unwrap_or_default().trim();
        let usage = verdict::check(&self.call.endpoint, media_type, &body)?;
        Ok(Answer { status: 200, content_type: content_type.to_owned(), body, usage })
    }

    /// Server-sent events: each is passed on as it came and put together.
    async fn read_events(&self, reply: &mut Reply) -> Result<Answer, Trouble> {
        let mut stream = Stream { attempt: self, assembler: Assembler::new(&self.call.endpoint), held: Vec::new() };
        let mut parser = sse::Parser::default();
        let mut total = 0;
        while let Some(piece) = reply.chunk().await? {
            total += piece.len();
            if total > ANSWER_LIMIT_BYTES {
                return Err(too_long().into());
            }
            parser.push(&piece);
            while let Some(data) = parser.next().map_err(|e| Failure::invalid_output(e.to_string()))? {
                if stream.take(data).await? {
                    return stream.finish(reply.status).await;
                }
            }
        }
        if let Some(data) = parser.last() {
            stream.take(data).await?;
        }
        stream.finish(reply.status).await
    }

    /// Nobody listening is no trouble: the answer still counts.
    async fn tell(&self, progress: Progress) {
        drop(self.progress.send(progress).await);
    }
}

/// What is kept while a stream is read.
struct Stream<'a> {
    attempt: &'a Attempt<'a>,
    assembler: Assembler,
    /// Chunks without content, while there has been none with.
    held: Vec<Bytes>,
}

impl Stream<'_> {
    /// Takes the data of one event; true at `[DONE]`.
    async fn take(&mut self, data: Bytes) -> Result<bool, Trouble> {
        let text = data.trim_ascii();
        if text == b"[DONE]" {
            return Ok(true);
        }
        if text.is_empty() {
            return Ok(false);
        }
        let chunk: Value = serde_json::from_slice(text).map_err(|e| {
            Failure::invalid_output(format!(
                "an event of the stream is no JSON: {:?} at column {}",
                e.classify(),
                e.column()
            ))
        })?;
        if let Some(error) = chunk.get("error").filter(|e| !e.is_null()) {
            return Err(verdict::frame_error(error).into());
        }
        let added = self.assembler.add(chunk).map_err(unassembled)?;
        self.held.push(data);
        let flows = self.attempt.relayed.load(Ordering::Relaxed);
        if flows || added == Added::Content || self.held.len() > HELD_LIMIT {
            self.pass_on().await;
        }
        Ok(false)
    }

    async fn pass_on(&mut self) {
        self.attempt.relayed.store(true, Ordering::Relaxed);
        for chunk in self.held.drain(..) {
            self.attempt.tell(Progress::Chunk(chunk)).await;
        }
    }

    async fn finish(mut self, status: u16) -> Result<Answer, Trouble> {
        if self.assembler.is_complete() {
            self.pass_on().await;
        }
        let (answer, usage) = self.assembler.finish().map_err(unassembled)?;
        Ok(Answer { status, content_type: JSON.to_owned(), body: answer.to_string().into(), usage })
    }
}

fn unassembled(error: AssembleError) -> Failure {
    match error {
        AssembleError::Malformed(_) => Failure::invalid_output(error.to_string()),
        _ => Failure::worker_error(error.to_string()),
    }
}

fn too_long() -> Failure {
    Failure::invalid_output(format!("the engine's answer is longer than {ANSWER_LIMIT_BYTES} bytes"))
}

/// One NDJSON line.
#[derive(Deserialize)]
struct Line<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
    step: Option<u64>,
    total: Option<u64>,
    #[serde(borrow)]
    content_type: Option<Cow<'a, str>>,
    #[serde(borrow)]
    json: Option<&'a RawValue>,
    #[serde(borrow)]
    body_b64: Option<Cow<'a, str>>,
    status: Option<u16>,
    #[serde(borrow)]
    code: Option<Cow<'a, str>>,
    #[serde(borrow)]
    message: Option<Cow<'a, str>>,
    #[serde(borrow)]
    param: Option<Cow<'a, str>>,
}
