//! `GET /v1/jobs/{id}/events`: everything that happened to a job, in order and without gaps, then live until its end. As
//! SSE with resume, or as JSON for pollers.

use std::collections::VecDeque;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, OriginalUri, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use crate::clock::rfc3339;
use crate::domain::{Job, JobId, JobState};
use crate::http::auth::Caller;
use crate::http::body::{self, Segments};
use crate::http::error::ApiError;
use crate::http::jobs::job_id;
use crate::http::openai::sse_headers;
use crate::http::{AppState, JOB_ID, view};
use crate::scheduler::handle::Position;
use crate::scheduler::hub::JobWatch;
use crate::store::read::EventRow;

const HEARTBEAT: Duration = Duration::from_secs(15);
/// How often a queued job's place in line is looked at.
const POSITION_EVERY: Duration = Duration::from_secs(5);
const EVENTS_PER_READ: u32 = 200;
const PAGE_DEFAULT: u64 = 1_000;

/// SSE, unless JSON alone is accepted.
pub async fn get(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segments(id): Segments<String>,
    OriginalUri(uri): OriginalUri,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let id = job_id(&id)?;
    let query = body::query(&uri)?;
    let after = after(&query, &headers)?;
    // Watched before it is read, so that nothing is missed in between.
    let watch = state.handle.watch(id);
    let job = state.job(&caller, id).await?;
    if wants_json(&headers) {
        let limit = body::number(&query, "limit")?.unwrap_or(PAGE_DEFAULT).clamp(1, PAGE_DEFAULT);
        return page(&state, &job, after, u32::try_from(limit).unwrap_or(1)).await;
    }
    if job.state.is_terminal() && state.reader.events(id, after, 1).await?.is_empty() {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let events = EventStream::new(state, id, watch, after);
    let frames = stream::unfold(events, |mut events| async move {
        let bytes = events.next().await?;
        Some((Ok::<_, std::convert::Infallible>(bytes), events))
    });
    let mut response = Response::new(Body::from_stream(frames));
    sse_headers(response.headers_mut());
    view::set(response.headers_mut(), JOB_ID, &id.to_string());
    Ok(response)
}

/// The last event the reader has: `Last-Event-ID` (sent by browsers when they come back) or `?after=`.
fn after(query: &[(String, String)], headers: &HeaderMap) -> Result<i64, ApiError> {
    let header = headers.get("last-event-id").and_then(|value| value.to_str().ok()).map(str::trim);
    let (name, text) = match (header.filter(|text| !text.is_empty()), body::field(query, "after")) {
        (Some(text), _) => ("Last-Event-ID", text),
        (None, Some(text)) => ("after", text),
        (None, None) => return Ok(0),
    };
    let number: Option<i64> = text.parse().ok().filter(|number| *number >= 0);
    number.ok_or_else(|| ApiError::invalid(name, format!("{name} must be the number of an event")))
}

fn wants_json(headers: &HeaderMap) -> bool {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    accept.contains("application/json") && !accept.contains("text/event-stream")
}

async fn page(state: &AppState, job: &Job, after: i64, limit: u32) -> Result<Response, ApiError> {
    let events = state.reader.events(job.id, after, limit).await?;
    let mut data = Vec::with_capacity(events.len());
    for event in &events {
        let ended = ended(state, job.id, event).await?;
        data.push(event_json(job.id, event, ended));
    }
    let last_seq = events.last().map_or(after, |event| event.seq);
    let has_more = events.len() == limit as usize;
    let body = json!({"object": "list", "data": data, "last_seq": last_seq, "has_more": has_more});
    Ok(Json(body).into_response())
}

/// With a terminal event: the job as it ended.
async fn ended(state: &AppState, id: JobId, event: &EventRow) -> Result<Option<Value>, ApiError> {
    if !is_terminal(&event.kind) {
        return Ok(None);
    }
    let job = state.reader.job(id).await?;
    Ok(Some(view::full(state, &job, None).await.json))
}

fn is_terminal(kind: &str) -> bool {
    kind.strip_prefix("job.").and_then(JobState::parse).is_some_and(JobState::is_terminal)
}

/// An event as shown: its own fields after the common ones; times in RFC 3339.
fn event_json(id: JobId, event: &EventRow, job: Option<Value>) -> Value {
    let mut shown = Map::new();
    shown.insert("type".into(), json!(event.kind));
    shown.insert("job_id".into(), json!(id.to_string()));
    shown.insert("seq".into(), json!(event.seq));
    shown.insert("ts".into(), json!(rfc3339(event.at)));
    for (name, value) in event.body.as_object().into_iter().flatten() {
        let (name, value) = match (name.as_str(), value.as_i64()) {
            ("eta_ms", at) => ("eta", json!(at.map(rfc3339))),
            ("not_before_ms", at) => ("not_before", json!(at.map(rfc3339))),
            (name, _) => (name, value.clone()),
        };
        shown.insert(name.to_owned(), value);
    }
    if let Some(job) = job {
        shown.insert("job".into(), job);
    }
    Value::Object(shown)
}

/// `id`, `event` and `data` lines; JSON has no line breaks of its own.
fn frame(event: &EventRow, shown: &Value) -> String {
    format!("id: {}\nevent: {}\ndata: {shown}\n\n", event.seq, event.kind)
}

fn position_frame(id: JobId, position: &Position) -> String {
    let shown = json!({
        "type": "queue.position",
        "job_id": id.to_string(),
        "position": position.position,
        "eta_start": view::range(position.eta_start),
        "swaps_ahead": position.swaps_ahead,
    });
    format!("event: queue.position\ndata: {shown}\n\n")
}

/// One reader. Reading events is no waiting for the answer: it keeps no sync job alive.
struct EventStream {
    state: AppState,
    id: JobId,
    watch: JobWatch,
    /// The last event that was given out.
    after: i64,
    ready: VecDeque<String>,
    is_over: bool,
    heartbeat_at: Instant,
    look_at: Instant,
    /// Place and swaps ahead as shown last.
    shown: Option<(Option<usize>, usize)>,
}

enum Step {
    Changed,
    Heartbeat,
    Look,
    Stopping,
}

impl EventStream {
    fn new(state: AppState, id: JobId, watch: JobWatch, after: i64) -> Self {
        Self {
            state,
            id,
            watch,
            after,
            ready: VecDeque::from(["retry: 2000\n\n".to_owned()]),
            is_over: false,
            heartbeat_at: Instant::now() + HEARTBEAT,
            look_at: Instant::now(),
            shown: None,
        }
    }

    /// The next bytes to send; `None`: close.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if !self.ready.is_empty() {
                self.heartbeat_at = Instant::now() + HEARTBEAT;
                return Some(Bytes::from(self.ready.drain(..).collect::<String>()));
            }
            if self.is_over {
                return None;
            }
            if let Err(error) = self.read().await {
                // The reader resumes where it was.
                tracing::warn!(job.id = %self.id, "an event stream was cut: {}", error.message);
                self.close(": the store cannot be read now; come back\n\n");
                continue;
            }
            if self.ready.is_empty() && !self.is_over {
                self.wait().await;
            }
        }
    }

    /// Reads what is stored beyond what was given out.
    async fn read(&mut self) -> Result<(), ApiError> {
        // Asked before reading: an end that comes in between is read the next time.
        let has_ended = self.watch.live().ended.is_some();
        let events = self.state.reader.events(self.id, self.after, EVENTS_PER_READ).await?;
        // The reader asked for what lies beyond the end.
        self.is_over |= has_ended && events.is_empty();
        for event in events {
            let ended = ended(&self.state, self.id, &event).await?;
            self.is_over |= ended.is_some();
            self.ready.push_back(frame(&event, &event_json(self.id, &event, ended)));
            self.after = event.seq;
        }
        Ok(())
    }

    async fn wait(&mut self) {
        let step = tokio::select! {
            _ = self.watch.changed() => Step::Changed,
            () = tokio::time::sleep_until(self.heartbeat_at) => Step::Heartbeat,
            () = tokio::time::sleep_until(self.look_at) => Step::Look,
            () = self.state.tasks.soft().cancelled() => Step::Stopping,
        };
        match step {
            Step::Changed => {}
            Step::Heartbeat => self.ready.push_back(": hb\n\n".to_owned()),
            Step::Look => self.look().await,
            Step::Stopping => self.close(": the server stops; come back\n\n"),
        }
    }

    /// Tells a queued job's place in line when it has changed. Not stored, so without a number.
    async fn look(&mut self) {
        self.look_at = Instant::now() + POSITION_EVERY;
        let Ok(job) = self.state.reader.job(self.id).await else {
            return;
        };
        if job.state != JobState::Queued {
            return;
        }
        let position = self.state.handle.position(&job).await;
        let place = (position.position, position.swaps_ahead);
        if self.shown != Some(place) {
            self.shown = Some(place);
            self.ready.push_back(position_frame(self.id, &position));
        }
    }

    fn close(&mut self, comment: &str) {
        self.is_over = true;
        self.ready.push_back(comment.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: &str, body: Value) -> EventRow {
        EventRow { seq: 4, attempt: 1, kind: kind.into(), at: 1_790_000_000_123, body }
    }

    #[test]
    fn frames_are_as_documented() {
        let id = JobId::new(1, 2, 3);
        let progress = event("job.progress", json!({"progress": {"step": 12, "total": 28, "percent": 43}}));
        assert_eq!(
            frame(&progress, &event_json(id, &progress, None)),
            format!(
                "id: 4\nevent: job.progress\ndata: {{\"type\":\"job.progress\",\"job_id\":\"{id}\",\"seq\":4,\
                 \"ts\":\"2026-09-21T14:13:20.123Z\",\"progress\":{{\"step\":12,\"total\":28,\"percent\":43}}}}\n\n"
            )
        );
        let place = position_frame(id, &Position { position: Some(3), swaps_ahead: 1, ..Position::default() });
        assert!(place.starts_with("event: queue.position\ndata: {") && !place.contains("id: "));
    }

    #[test]
    fn stored_times_are_shown_as_times() {
        let shown =
            event_json(JobId::new(1, 2, 3), &event("job.retrying", json!({"not_before_ms": null, "eta_ms": 0})), None);
        assert_eq!((&shown["not_before"], &shown["eta"]), (&Value::Null, &json!("1970-01-01T00:00:00.000Z")));
        assert!(shown.get("eta_ms").is_none());
    }

    #[test]
    fn readers_say_where_they_are() {
        let query = |text: &str| vec![("after".to_owned(), text.to_owned())];
        let last = |text: &str| HeaderMap::from_iter([("last-event-id".parse().unwrap(), text.parse().unwrap())]);
        assert_eq!(after(&[], &HeaderMap::new()), Ok(0));
        assert_eq!(after(&query("7"), &HeaderMap::new()), Ok(7));
        assert_eq!(after(&query("7"), &last("9")), Ok(9), "the browser's own place is newer");
        assert_eq!(after(&query("x"), &HeaderMap::new()).unwrap_err().param.as_deref(), Some("after"));
        assert!(after(&[], &last("-1")).is_err());
    }

    #[test]
    fn terminal_events_are_known() {
        assert!(is_terminal("job.succeeded") && is_terminal("job.expired"));
        assert!(!is_terminal("job.queued") && !is_terminal("job.progress") && !is_terminal("job.cancelling"));
    }
}
