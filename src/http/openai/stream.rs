//! The SSE stream of a chat or completion, exactly as OpenAI's clients want it: unnamed `data:` frames, comments as
//! keep-alive, never `id:`, `retry:` or `event:` lines, `[DONE]` last, then closed.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::domain::job::Present;
use crate::domain::worker::Answer;
use crate::domain::{ErrorCode, JobId, JobKind, JobState};
use crate::http::error::ApiError;
use crate::http::openai::LAST_WORD;
use crate::http::openai::rewrite::TopLevel;
use crate::http::waiters::{Guard, SyncCall};
use crate::scheduler::hub::{Ended, JobWatch};

/// A stream without output says something this often.
pub const KEEP_ALIVE: Duration = Duration::from_secs(15);
const DONE: &[u8] = b"data: [DONE]\n\n";

/// Where a job stands that has not started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queued {
    /// Jobs that the plan starts first.
    pub position: Option<usize>,
    /// Seconds until it may start.
    pub eta_s: Option<i64>,
}

/// Looks whether the job is still queued, and where.
pub type Look = Box<dyn Fn() -> BoxFuture<'static, Option<Queued>> + Send + Sync>;

/// How chunks are shown: our id, the caller's name of the model, usage only if asked for.
#[derive(Clone, Debug)]
pub struct Shape {
    kind: JobKind,
    id: String,
    model: String,
    service_tier: String,
    include_usage: bool,
}

impl Shape {
    /// Of one job.
    pub fn new(id: JobId, kind: JobKind, present: &Present) -> Self {
        Self {
            kind,
            id: public_id(id, kind),
            model: present.model.clone(),
            service_tier: present.service_tier.clone(),
            include_usage: present.include_usage,
        }
    }

    /// Appends the engine's chunk as a frame, or nothing if the caller is not to see it.
    fn frame(&self, chunk: &[u8], out: &mut Vec<u8>) {
        let Some(mut top) = TopLevel::parse(chunk) else {
            return;
        };
        // How it ended is said once, when that is committed.
        if top.get("error").is_some_and(|error| error != "null") {
            return;
        }
        if !self.include_usage
            && let Some(usage) = top.get("usage")
        {
            let is_usage_chunk =
                usage != "null" && top.get("choices").is_some_and(|c| c.trim_matches(['[', ']', ' ']).is_empty());
            if is_usage_chunk {
                return;
            }
            top.remove("usage");
        }
        top.set("id", &self.id);
        top.set("model", &self.model);
        if !self.service_tier.is_empty() {
            top.set("service_tier", &self.service_tier);
        }
        out.extend_from_slice(b"data: ");
        top.write(out);
        out.extend_from_slice(b"\n\n");
    }

    /// The chunks that an assembled answer would have come in, for a caller who saw none of them.
    fn synthesise(&self, answer: &Answer, out: &mut Vec<u8>) {
        let Ok(answer) = serde_json::from_slice::<Value>(&answer.body) else {
            return;
        };
        let created = answer.get("created").cloned().unwrap_or(json!(0));
        let object = if self.kind == JobKind::Chat { "chat.completion.chunk" } else { "text_completion" };
        let chunk =
            |choices: Value| json!({"id": "", "object": object, "created": created, "model": "", "choices": choices});
        for choice in answer.get("choices").and_then(Value::as_array).into_iter().flatten() {
            let index = choice.get("index").cloned().unwrap_or(json!(0));
            let logprobs = choice.get("logprobs").cloned().unwrap_or(Value::Null);
            let reason = choice.get("finish_reason").cloned().unwrap_or(json!("stop"));
            if self.kind == JobKind::Chat {
                let delta = delta_of(choice.get("message"));
                let first = json!([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": null}]);
                self.frame(chunk(first).to_string().as_bytes(), out);
                let last = json!([{"index": index, "delta": {}, "logprobs": null, "finish_reason": reason}]);
                self.frame(chunk(last).to_string().as_bytes(), out);
            } else {
                let text = choice.get("text").cloned().unwrap_or(json!(""));
                let only = json!([{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}]);
                self.frame(chunk(only).to_string().as_bytes(), out);
            }
        }
        if self.include_usage
            && let Some(usage) = answer.get("usage").filter(|usage| !usage.is_null())
        {
            let mut last = chunk(json!([]));
            last["usage"] = usage.clone();
            self.frame(last.to_string().as_bytes(), out);
        }
    }
}

/// A whole message as one delta: what is null is left out, tool calls are numbered.
fn delta_of(message: Option<&Value>) -> Value {
    let mut delta = message.and_then(Value::as_object).cloned().unwrap_or_default();
    delta.retain(|_, value| !value.is_null());
    delta.entry("role").or_insert(json!("assistant"));
    if let Some(calls) = delta.get_mut("tool_calls").and_then(Value::as_array_mut) {
        if calls.is_empty() {
            delta.shift_remove("tool_calls");
        } else {
            calls.iter_mut().enumerate().for_each(|(index, call)| call["index"] = json!(index));
        }
    }
    Value::Object(delta)
}

/// The job's id as OpenAI's face shows it.
pub fn public_id(id: JobId, kind: JobKind) -> String {
    id.with_prefix(if kind == JobKind::Chat { "chatcmpl-" } else { "cmpl-" })
}

/// One caller's stream. Dropping it before its end says that the caller is gone.
pub struct ChunkStream {
    id: JobId,
    shape: Shape,
    watch: JobWatch,
    /// Number of the next chunk.
    next: u64,
    is_shown: bool,
    /// `None`: the last frame has been given out.
    guard: Option<Guard>,
    _place: SyncCall,
    look: Look,
    soft: CancellationToken,
    hard: CancellationToken,
    quiet_until: Instant,
    /// The soft stage has been seen, and the job was running.
    is_stopping: bool,
    /// The hard stage has been seen: when the end of a job that it cuts is no longer waited for.
    over_at: Option<Instant>,
    /// The answer was streamed to its end.
    is_answer: bool,
}

enum Step {
    Changed,
    Quiet,
    Soft,
    Hard,
    Over,
}

impl ChunkStream {
    /// Streams the job from its first chunk on.
    pub fn new(
        id: JobId,
        shape: Shape,
        watch: JobWatch,
        guard: Guard,
        place: SyncCall,
        look: Look,
        (soft, hard): (CancellationToken, CancellationToken),
    ) -> Self {
        Self {
            id,
            shape,
            watch,
            next: 0,
            is_shown: false,
            guard: Some(guard),
            _place: place,
            look,
            soft,
            hard,
            quiet_until: Instant::now() + KEEP_ALIVE,
            is_stopping: false,
            over_at: None,
            is_answer: false,
        }
    }

    /// Waits a moment for the first chunk, so that a call which fails at once gets a real status.
    pub async fn early_failure(&mut self, patience: Duration) -> Option<ApiError> {
        let first = async {
            loop {
                let live = self.watch.live();
                if live.chunks_end > 0 || live.ended.is_some() {
                    return live.ended.filter(|_| live.chunks_end == 0);
                }
                self.watch.changed().await;
            }
        };
        let ended = tokio::time::timeout(patience, first).await.ok().flatten()?;
        let error = failure(self.id, &ended)?;
        self.answered();
        Some(error)
    }

    /// Whether the whole answer of a success has been given out.
    pub fn is_answer(&self) -> bool {
        self.is_answer
    }

    /// The next bytes to send; `None`: close.
    pub async fn next(&mut self) -> Option<Bytes> {
        loop {
            self.guard.as_ref()?;
            // In this order: chunks are published before the end, so an end that is seen here has all of them before it.
            let ended = self.watch.live().ended;
            match self.watch.chunks(self.next) {
                Ok(chunks) => {
                    let mut out = Vec::new();
                    self.next += chunks.len() as u64;
                    chunks.iter().for_each(|chunk| self.shape.frame(chunk, &mut out));
                    self.is_shown |= !out.is_empty();
                    if let Some(ended) = ended {
                        self.finish(&ended, &mut out);
                    }
                    if !out.is_empty() {
                        return Some(self.said(out));
                    }
                }
                // Behind, before anything was shown: the assembled answer has it all.
                Err(_) if !self.is_shown => {
                    if let Some(ended) = ended {
                        let mut out = Vec::new();
                        self.finish(&ended, &mut out);
                        return Some(self.said(out));
                    }
                }
                Err(lagged) => return Some(self.cut(&lagged.to_string())),
            }
            match self.step().await {
                Step::Changed if self.over_at.is_some() && self.waits_again().await => return Some(self.stop()),
                Step::Changed => {}
                Step::Quiet => {
                    let comment = self.comment().await;
                    return Some(self.said(comment.into_bytes()));
                }
                Step::Soft => {
                    self.is_stopping = true;
                    if self.waits_again().await {
                        return Some(self.stop());
                    }
                }
                Step::Hard => {
                    self.over_at = Some(Instant::now() + LAST_WORD);
                    if self.waits_again().await {
                        return Some(self.stop());
                    }
                }
                // Its end was not stored, so it runs again.
                Step::Over => return Some(self.stop()),
            }
        }
    }

    async fn step(&mut self) -> Step {
        let (is_stopping, over_at) = (self.is_stopping, self.over_at);
        tokio::select! {
            biased;
            _ = self.watch.changed() => Step::Changed,
            () = tokio::time::sleep_until(over_at.unwrap_or_else(Instant::now)), if over_at.is_some() => Step::Over,
            () = self.hard.cancelled(), if over_at.is_none() => Step::Hard,
            () = self.soft.cancelled(), if !is_stopping => Step::Soft,
            () = tokio::time::sleep_until(self.quiet_until) => Step::Quiet,
        }
    }

    /// Whether the job is queued, be it still or once more.
    async fn waits_again(&self) -> bool {
        (self.look)().await.is_some()
    }

    /// What a stream says that has nothing to say.
    async fn comment(&self) -> String {
        let queued = if self.next == 0 { (self.look)().await } else { None };
        let Some(queued) = queued else {
            return ": keep-alive\n\n".to_owned();
        };
        let mut comment = ": queued".to_owned();
        if let Some(position) = queued.position {
            comment.push_str(&format!(" position={position}"));
        }
        if let Some(eta_s) = queued.eta_s {
            comment.push_str(&format!(" eta={eta_s}s"));
        }
        comment.push_str("\n\n");
        comment
    }

    fn said(&mut self, out: Vec<u8>) -> Bytes {
        self.quiet_until = Instant::now() + KEEP_ALIVE;
        Bytes::from(out)
    }

    fn finish(&mut self, ended: &Ended, out: &mut Vec<u8>) {
        match (failure(self.id, ended), &ended.answer) {
            (Some(error), _) => error_frame(&error, out),
            (None, Some(answer)) if !self.is_shown => self.shape.synthesise(answer, out),
            (None, _) => {}
        }
        self.is_answer = ended.state == JobState::Succeeded;
        out.extend_from_slice(DONE);
        self.answered();
    }

    fn answered(&mut self) {
        if let Some(guard) = self.guard.take() {
            guard.answered();
        }
    }

    /// This reader is too slow; the job is not its fault and can be read whole for a while.
    fn cut(&mut self, why: &str) -> Bytes {
        if let Some(guard) = self.guard.take() {
            guard.hand_over();
        }
        let message = format!("{why}; the whole answer will be at /v1/jobs/{}/response", self.id);
        let mut out = Vec::new();
        error_frame(&ApiError::new(ErrorCode::InternalError, message).about(self.id), &mut out);
        out.extend_from_slice(DONE);
        Bytes::from(out)
    }

    /// The server stops, and the job goes on at its next start.
    fn stop(&mut self) -> Bytes {
        self.guard = None;
        let mut out = Vec::new();
        error_frame(&ApiError::goes_on(self.id), &mut out);
        out.extend_from_slice(DONE);
        Bytes::from(out)
    }
}

/// Why a job that has ended has no answer.
pub fn failure(id: JobId, ended: &Ended) -> Option<ApiError> {
    if ended.state == JobState::Succeeded {
        return None;
    }
    let unknown =
        || ApiError::new(ErrorCode::InternalError, format!("the job is {} and does not say why", ended.state));
    Some(ended.error.as_ref().map_or_else(unknown, |error| ApiError::of_job(error, id)).about(id))
}

fn error_frame(error: &ApiError, out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(json!({"error": error.inner()}).to_string().as_bytes());
    out.extend_from_slice(b"\n\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::JobError;
    use crate::http::waiters::{Role, Waiters};
    use crate::lifecycle::Tasks;
    use crate::scheduler::hub::Hub;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    struct World {
        hub: Hub,
        id: JobId,
        cancelled: Arc<AtomicUsize>,
        waiters: Waiters,
        tasks: Tasks,
    }

    impl World {
        fn new() -> Self {
            let cancelled = Arc::new(AtomicUsize::new(0));
            let seen = cancelled.clone();
            let tasks = Tasks::new();
            let cancel: crate::http::waiters::Cancel = Arc::new(move |_| {
                seen.fetch_add(1, Ordering::SeqCst);
                Box::pin(async {})
            });
            let waiters = Waiters::new(cancel, tasks.clone(), Duration::from_secs(30), Duration::from_secs(2));
            Self { hub: Hub::default(), id: JobId::new(1_700_000_000_000, 5, 9), cancelled, waiters, tasks }
        }

        fn stream(&self, kind: JobKind, include_usage: bool, queued: Option<Queued>) -> ChunkStream {
            let present = Present { include_usage, model: "nick\"name".into(), ..Present::default() };
            ChunkStream::new(
                self.id,
                Shape::new(self.id, kind, &present),
                self.hub.watch(self.id.number),
                self.waiters.wait(self.id, Role::Caller),
                self.waiters.sync_hop(),
                Box::new(move || Box::pin(async move { queued })),
                (self.tasks.soft().clone(), self.tasks.hard().clone()),
            )
        }

        fn chunk(&self, text: &str) {
            self.hub.chunk(self.id.number, Bytes::copy_from_slice(text.as_bytes()));
        }

        fn succeed(&self, answer: Value) {
            let answer = Answer {
                status: 200,
                content_type: "application/json".into(),
                body: Bytes::from(answer.to_string()),
                usage: None,
            };
            let ended = Ended { state: JobState::Succeeded, answer: Some(Arc::new(answer)), error: None };
            self.hub.end(self.id.number, 3, 3, ended);
        }

        fn fail(&self, code: ErrorCode) {
            let error = Some(JobError::new(code, "it broke", true));
            self.hub.end(self.id.number, 3, 3, Ended { state: JobState::Failed, answer: None, error });
        }

        fn uuid(&self) -> String {
            self.id.uuid().to_string()
        }
    }

    async fn all(mut stream: ChunkStream) -> String {
        let mut text = String::new();
        while let Some(bytes) = stream.next().await {
            text.push_str(std::str::from_utf8(&bytes).unwrap());
        }
        text
    }

    const HELLO: &str = r#"{"id":"x","object":"chat.completion.chunk","created":1,"model":"org/m","choices":[{"index":0,"delta":{"content":"Hi"}}],"usage":null}"#;
    const USAGE: &str = r#"{"id":"x","choices":[],"usage":{"total_tokens":3}}"#;

    #[tokio::test]
    async fn chunks_are_relayed_with_our_id_and_the_callers_model() {
        let world = World::new();
        let stream = world.stream(JobKind::Chat, false, None);
        world.chunk(HELLO);
        world.chunk(USAGE);
        world.succeed(json!({}));
        let id = world.uuid();
        assert_eq!(
            all(stream).await,
            format!(
                "data: {{\"id\":\"chatcmpl-{id}\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"nick\\\"name\",\
                 \"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"Hi\"}}}}]}}\n\ndata: [DONE]\n\n"
            )
        );
    }

    #[tokio::test]
    async fn the_usage_chunk_is_shown_to_those_who_asked() {
        let world = World::new();
        let stream = world.stream(JobKind::Completion, true, None);
        world.chunk(USAGE);
        world.succeed(json!({}));
        let id = world.uuid();
        assert_eq!(
            all(stream).await,
            format!(
                "data: {{\"id\":\"cmpl-{id}\",\"choices\":[],\"usage\":{{\"total_tokens\":3}},\"model\":\"nick\\\"name\"}}\n\ndata: [DONE]\n\n"
            )
        );
    }

    #[tokio::test(start_paused = true)]
    async fn chunks_go_out_at_once_and_silence_is_filled_with_comments() {
        let world = World::new();
        let mut stream = world.stream(JobKind::Chat, false, Some(Queued { position: Some(3), eta_s: Some(42) }));
        let began = Instant::now();
        assert_eq!(stream.next().await.unwrap(), ": queued position=3 eta=42s\n\n");
        assert_eq!(began.elapsed(), KEEP_ALIVE);
        world.chunk(HELLO);
        assert!(stream.next().await.unwrap().starts_with(b"data: "));
        assert_eq!(began.elapsed(), KEEP_ALIVE);
        assert_eq!(stream.next().await.unwrap(), ": keep-alive\n\n");
        world.fail(ErrorCode::WorkerLost);
        let last = stream.next().await.unwrap();
        let frames: Vec<&str> = std::str::from_utf8(&last).unwrap().split("\n\n").collect();
        let error: Value = serde_json::from_str(frames[0].strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!((error["error"]["code"].as_str(), frames[1], frames[2]), (Some("worker_lost"), "data: [DONE]", ""));
        assert_eq!(stream.next().await, None, "closed at once");
        drop(stream);
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(world.cancelled.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn an_answer_whose_chunks_were_missed_is_cut_into_chunks_again() {
        let world = World::new();
        let stream = world.stream(JobKind::Chat, true, None);
        world.succeed(json!({"id": "x", "created": 7, "choices": [{"index": 0, "finish_reason": "tool_calls",
            "message": {"role": "assistant", "content": null, "tool_calls": [{"id": "c", "type": "function"}]}}],
            "usage": {"total_tokens": 5}}));
        let text = all(stream).await;
        let frames: Vec<Value> =
            text.split("\n\n").filter_map(|frame| serde_json::from_str(frame.strip_prefix("data: ")?).ok()).collect();
        assert_eq!(frames.len(), 3);
        assert_eq!(
            frames[0]["choices"][0]["delta"],
            json!({"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "index": 0}]})
        );
        assert_eq!(frames[1]["choices"][0]["finish_reason"], "tool_calls");
        assert_eq!(frames[2]["usage"]["total_tokens"], 5);
        assert!(frames.iter().all(|f| f["id"] == format!("chatcmpl-{}", world.uuid()) && f["created"] == 7));
        assert!(text.ends_with("data: [DONE]\n\n"));
    }

    #[tokio::test]
    async fn missed_completions_keep_their_shape() {
        let world = World::new();
        let stream = world.stream(JobKind::Completion, false, None);
        world.succeed(json!({"choices": [{"index": 0, "text": "yes", "finish_reason": "length"}], "usage": {}}));
        let text = all(stream).await;
        let first: Value =
            serde_json::from_str(text.split("\n\n").next().unwrap().strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(
            (&first["object"], &first["choices"][0]["text"], &first["choices"][0]["finish_reason"]),
            (&json!("text_completion"), &json!("yes"), &json!("length"))
        );
        assert_eq!(text.matches("data: ").count(), 2, "no usage unasked");
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_stream_is_a_lost_caller() {
        let world = World::new();
        let mut stream = world.stream(JobKind::Chat, false, None);
        world.chunk(HELLO);
        stream.next().await.unwrap();
        drop(stream);
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(world.cancelled.load(Ordering::SeqCst), 1);
        assert_eq!(world.waiters.sync_calls(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_at_once_gets_a_status() {
        let world = World::new();
        let mut stream = world.stream(JobKind::Chat, false, None);
        world.fail(ErrorCode::InvalidRequest);
        assert_eq!(stream.early_failure(Duration::from_millis(300)).await.unwrap().code, ErrorCode::InvalidRequest);
        let world = World::new();
        let mut stream = world.stream(JobKind::Chat, false, None);
        assert_eq!(stream.early_failure(Duration::from_millis(300)).await, None, "still unknown");
        world.chunk(HELLO);
        world.fail(ErrorCode::WorkerError);
        assert_eq!(stream.early_failure(Duration::from_millis(300)).await, None, "output has come");
        assert!(all(stream).await.contains("worker_error"));
    }

    #[tokio::test]
    async fn a_reader_that_fell_behind_is_told_and_the_job_kept() {
        let world = World::new();
        let mut stream = world.stream(JobKind::Chat, false, None);
        world.chunk(HELLO);
        stream.next().await.unwrap();
        for _ in 0..5 {
            world.chunk(&format!("{{\"choices\":[],\"pad\":\"{}\"}}", "x".repeat(1024 * 1024)));
        }
        let text = all(stream).await;
        assert!(text.contains("4 MiB behind") && text.ends_with("data: [DONE]\n\n"));
    }

    #[tokio::test]
    async fn stopping_ends_queued_calls_and_lets_running_ones_finish() {
        let world = World::new();
        let queued = world.stream(JobKind::Chat, false, Some(Queued { position: None, eta_s: None }));
        let running = world.stream(JobKind::Chat, false, None);
        world.tasks.soft().cancel();
        assert!(all(queued).await.contains("\"code\":\"draining\""));
        world.chunk(HELLO);
        world.succeed(json!({}));
        let text = all(running).await;
        assert!(text.contains("Hi") && text.ends_with("data: [DONE]\n\n") && !text.contains("error"), "{text}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_a_stop_cuts_is_given_its_end() {
        let world = World::new();
        let stream = world.stream(JobKind::Chat, false, None);
        world.chunk(HELLO);
        world.tasks.soft().cancel();
        world.tasks.hard().cancel();
        let ending = async {
            tokio::time::sleep(LAST_WORD / 2).await;
            world.chunk(HELLO);
            world.fail(ErrorCode::WorkerLost);
        };
        let (text, ()) = tokio::join!(all(stream), ending);
        assert_eq!(text.matches("Hi").count(), 2, "{text}");
        assert!(text.contains("\"code\":\"worker_lost\"") && text.ends_with("data: [DONE]\n\n"), "{text}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_whose_job_goes_on_after_the_stop_is_told_so() {
        // Back in the queue, or not stored as anything else in time.
        for (queued, within) in [(Some(Queued { position: None, eta_s: None }), Duration::ZERO), (None, LAST_WORD)] {
            let world = World::new();
            let stream = world.stream(JobKind::Chat, false, queued);
            world.tasks.soft().cancel();
            world.tasks.hard().cancel();
            let began = Instant::now();
            let text = all(stream).await;
            assert_eq!(began.elapsed(), within);
            assert!(text.contains("\"code\":\"draining\"") && text.contains("\"retryable\":false"), "{text}");
            assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
        }
    }
}
