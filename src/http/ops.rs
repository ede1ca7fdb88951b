//! Operations: the queue and its reasons, models, workers, health, metrics.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::clock::rfc3339;
use crate::domain::worker::WorkerView;
use crate::domain::{ErrorCode, ModelSpec, ModelState};
use crate::http::body::Segments;
use crate::http::error::ApiError;
use crate::http::{AppState, metrics as series, worker_metrics};
use crate::scheduler::handle::{Decision, ModelQueueView, QueueView, ShapeView};
use crate::store::Trouble;

/// `GET /v1/queue`
pub async fn queue(State(state): State<AppState>) -> Response {
    Json(queue_json(&state.handle.queue())).into_response()
}

fn queue_json(view: &QueueView) -> Value {
    let models: Vec<Value> = view.models.iter().map(model_queue_json).collect();
    let history: Vec<Value> = view.history.iter().map(decision_json).collect();
    json!({
        "object": "queue",
        "queued": view.queued,
        "running": view.running,
        "decision": view.decision.as_ref().map(decision_json),
        "history": history,
        "overload": view.overload,
        "paused": view.paused,
        "draining": view.draining,
        "swaps": view.swaps,
        "swaps_in_arrival_order": view.swaps_in_arrival_order,
        "models": models,
    })
}

pub(super) fn decision_json(decision: &Decision) -> Value {
    let mut shown = json!(decision);
    shown["at"] = json!(rfc3339(decision.at));
    shown
}

fn model_queue_json(view: &ModelQueueView) -> Value {
    let mut shown = json!(view);
    shown["due_at"] = json!(view.due_at.map(rfc3339));
    shown["fetch"] = json!(fetch_json(view));
    shown["batching"] = json!(batching_json(Some(view)));
    shown
}

fn fetch_json(view: &ModelQueueView) -> Option<Value> {
    let fetch = view.fetch.as_ref()?;
    let mut shown = json!(fetch);
    shown["retry_at"] = json!(fetch.retry_at.map(rfc3339));
    Some(shown)
}

/// `GET /v1/models`, in OpenAI's shape with ours beside it. Touches no GPU.
pub async fn models(State(state): State<AppState>) -> Response {
    let queue = state.handle.queue();
    let live = state.live();
    let data: Vec<Value> = live.models.specs.iter().map(|spec| model_json(&state, spec, &queue)).collect();
    let mut shown = json!({"object": "list", "data": data});
    if let Some(problems) = &live.refused {
        shown["roundhouse"]["refused_edit"] = json!(problems);
    }
    let is_removed = |view: &&ModelQueueView| live.models.specs.iter().all(|spec| spec.name != view.model);
    let removed: Vec<Value> = queue.models.iter().filter(is_removed).map(removed_json).collect();
    if !removed.is_empty() {
        shown["roundhouse"]["removed"] = json!(removed);
    }
    Json(shown).into_response()
}

/// A model that has no entry any more, of which jobs or a worker are left: nobody can ask for it, so it is no model of the list.
fn removed_json(view: &ModelQueueView) -> Value {
    json!({"id": view.model, "queue_depth": view.queued, "running": view.running, "trouble": view.trouble})
}

/// `GET /v1/models/{name}`; names may hold slashes.
pub async fn model(State(state): State<AppState>, Segments(name): Segments<String>) -> Result<Response, ApiError> {
    let spec = state.models().get(&name)?.clone();
    Ok(Json(model_json(&state, &spec, &state.handle.queue())).into_response())
}

pub(super) fn model_json(state: &AppState, spec: &ModelSpec, queue: &QueueView) -> Value {
    let view = queue.models.iter().find(|view| view.model == spec.name);
    json!({
        "id": spec.name,
        "object": "model",
        "created": state.started_at / 1_000,
        "owned_by": "roundhouse",
        "roundhouse": {
            "kind": spec.kind.as_str(),
            "endpoints": spec.endpoints,
            "aliases": spec.aliases,
            "state": view.map_or(ModelState::Absent, |view| view.state).as_str(),
            "state_reason": view.and_then(|view| view.state_reason).map(|reason| reason.as_str()),
            "trouble": view.and_then(|view| view.trouble.as_deref()),
            "last_failure": view.and_then(|view| view.last_failure.as_deref()),
            "fetch": view.and_then(fetch_json),
            "queue_depth": view.map_or(0, |view| view.queued),
            "running": view.map_or(0, |view| view.running),
            "paused": view.is_some_and(|view| view.paused),
            "draining": view.is_some_and(|view| view.draining),
            "pinned": view.is_some_and(|view| view.pinned),
            "parking": view.and_then(|view| view.parking.as_ref()),
            "est_wait_s": view.and_then(|view| view.est_wait_s),
            "batching": batching_json(view),
        },
    })
}

/// What was learned about the passes of a model.
fn batching_json(view: Option<&ModelQueueView>) -> Vec<Value> {
    let shapes = view.into_iter().flat_map(|view| &view.batching);
    let json = |shape: &ShapeView| {
        let per_s: Vec<Value> = shape.per_s.iter().map(|(jobs, per_s)| json!({"jobs": jobs, "per_s": per_s})).collect();
        let ShapeView { shape, key, batch_size, max_batch, .. } = shape;
        json!({"shape": shape, "key": key, "batch_size": batch_size, "max_batch": max_batch, "measured": per_s})
    };
    shapes.map(json).collect()
}

/// `POST /v1/models/{name}/retry`: forgets back-off and quarantine.
pub(super) fn retry_model(state: &AppState, name: &str) -> Result<Response, ApiError> {
    let spec = state.models().get(name)?.clone();
    if !state.handle.retry_model(&spec.name) {
        return Err(ApiError::new(ErrorCode::NoWorkerForModel, format!("`{}` has no worker here", spec.name)));
    }
    Ok(Json(model_json(state, &spec, &state.handle.queue())).into_response())
}

/// `GET /v1/workers`
pub async fn workers(State(state): State<AppState>) -> Response {
    let data: Vec<Value> = state.handle.workers().iter().map(worker_json).collect();
    Json(json!({"object": "list", "data": data, "spares": state.handle.spares()})).into_response()
}

fn worker_json(view: &WorkerView) -> Value {
    let mut shown = json!(view);
    shown["since"] = json!(rfc3339(view.since));
    shown["retry_at"] = json!(view.retry_at.map(rfc3339));
    shown
}

/// `GET /health`: the process answers, and says how safe accepted jobs are. Cheap, and open to everybody.
pub async fn health(State(state): State<AppState>) -> Response {
    let storage = state.durability.view(state.clock.now());
    Json(json!({"status": "ok", "storage": storage})).into_response()
}

/// `GET /readyz`: jobs can be accepted durably. Models in trouble are listed, and are no reason to be unready; neither is a
/// quota that is used up, since fetching answers makes room, nor a disk that is nearly full, since what runs goes on.
pub async fn ready(State(state): State<AppState>) -> Result<Response, ApiError> {
    if state.tasks.soft().is_cancelled() {
        return Err(ApiError::new(ErrorCode::Draining, "the server is shutting down"));
    }
    if state.handle.queue().draining {
        let message = "all models are being drained by hand: new jobs are refused until `roundhouse queue resume`";
        return Err(ApiError::new(ErrorCode::Draining, message));
    }
    state.handle.is_ready().await.map_err(|reason| ApiError::new(ErrorCode::StorageUnavailable, reason))?;
    let mut degraded = degraded(&state.handle.queue());
    degraded.extend(state.handle.store_troubles().iter().map(store_trouble));
    if let Some(problems) = &state.live().refused {
        degraded.push(json!({"config": "refused_edit", "reason": problems}));
    }
    degraded.extend(state.durability.trouble(state.clock.now()).iter().map(store_trouble));
    Ok(Json(json!({"status": "ready", "degraded": degraded})).into_response())
}

fn degraded(view: &QueueView) -> Vec<Value> {
    let troubled = view.models.iter().filter(|model| {
        let is_broken = matches!(model.state, ModelState::Backoff | ModelState::Quarantined | ModelState::Blocked);
        is_broken || model.trouble.is_some() || model.last_failure.is_some()
    });
    troubled
        .map(|model| {
            json!({
                "model": model.model,
                "state": model.state.as_str(),
                "state_reason": model.state_reason.map(|reason| reason.as_str()),
                "reason": model.trouble.as_ref().or(model.last_failure.as_ref()),
            })
        })
        .collect()
}

fn store_trouble(trouble: &Trouble) -> Value {
    json!({"store": trouble.state, "reason": trouble.reason})
}

/// `GET /metrics`, Prometheus text: the server's own series, then those of its workers.
pub async fn metrics(State(state): State<AppState>) -> Response {
    let seen = series::Seen {
        queue: &state.handle.queue(),
        counters: &state.handle.counters(),
        store: &state.handle.store_metrics().await,
        sync_calls: state.waiters.sync_calls(),
        #[expect(clippy::cast_precision_loss, reason = "uptimes are far below 2^52 ms")]
        uptime_s: (state.clock.now() - state.started_at) as f64 / 1e3,
    };
    let workers = state.handle.worker_metrics().await;
    let mut response = (series::render(&seen) + &worker_metrics::render(&workers)).into_response();
    let text = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, text);
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::StateReason;

    #[test]
    fn times_of_the_queue_are_shown_as_times_and_troubles_listed() {
        let model = ModelQueueView {
            paused: false,
            draining: false,
            pinned: false,
            batching: Vec::new(),
            parking: None,
            model: "flux".into(),
            queued: 2,
            queued_interactive: 1,
            running: 0,
            oldest_age_s: Some(1.5),
            resident: false,
            est_wait_s: None,
            swap_cost_s: 41.0,
            due_at: Some(1_790_000_000_123),
            state: ModelState::Quarantined,
            state_reason: Some(StateReason::ModelBlocked),
            trouble: Some("out of memory".into()),
            last_failure: None,
            fetch: None,
        };
        let decision = Decision {
            at: 1_790_000_000_123,
            gpus: vec![0],
            action: "wait",
            code: "blocked",
            model: Some("flux".into()),
            other: None,
            reason: "flux does not load".into(),
            numbers: [("retry_s", 10.0)].into(),
        };
        let view = QueueView { queued: 2, decision: Some(decision), models: vec![model], ..QueueView::default() };
        let shown = queue_json(&view);
        assert_eq!(shown["models"][0]["due_at"], "2026-09-21T14:13:20.123Z");
        assert_eq!(shown["decision"]["at"], "2026-09-21T14:13:20.123Z");
        assert_eq!(shown["decision"]["numbers"]["retry_s"], 10.0);
        assert_eq!(
            json!(degraded(&view)),
            json!([{"model": "flux", "state": "quarantined", "state_reason": "model_blocked", "reason": "out of memory"}])
        );
    }
}
