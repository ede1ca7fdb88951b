//! What an operator does by hand: pause, resume, drain and purge the queue; load, unload and pin models.

use axum::Json;
use axum::extract::{Extension, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use crate::domain::{Control, ErrorCode};
use crate::http::auth::Caller;
use crate::http::body::{OptionalObject, Segments, unknown_field};
use crate::http::error::ApiError;
use crate::http::{AppState, ops};

/// `POST /v1/queue/{pause,resume,drain,purge}`, each with an optional `{"model": NAME}`.
pub async fn queue(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segments(word): Segments<String>,
    OptionalObject(body): OptionalObject,
) -> Result<Response, ApiError> {
    caller.may_operate()?;
    let control = match word.as_str() {
        "purge" => return purge(&state, &body).await,
        "pause" => Control::Pause(model(&state, &body, false)?),
        "resume" => Control::Resume(model(&state, &body, true)?),
        "drain" => Control::Drain(model(&state, &body, false)?),
        _ => return Err(ApiError::not_found("the path")),
    };
    state.handle.control(control).await?;
    Ok(ops::queue(State(state)).await)
}

async fn purge(state: &AppState, body: &Map<String, Value>) -> Result<Response, ApiError> {
    let removed = state.handle.purge(model(state, body, true)?).await?;
    Ok(Json(json!({"removed": removed})).into_response())
}

/// The model that the body names, if it does; `queued`: one that has waiting jobs will do, in the file or not.
fn model(state: &AppState, body: &Map<String, Value>, queued: bool) -> Result<Option<String>, ApiError> {
    if let Some(field) = body.keys().find(|field| *field != "model") {
        return Err(unknown_field(field, &["model"]));
    }
    match body.get("model") {
        None => Ok(None),
        Some(Value::String(name)) if queued && state.handle.queue().models.iter().any(|view| view.model == *name) => {
            Ok(Some(name.clone()))
        }
        Some(Value::String(name)) => Ok(Some(state.models().get(name)?.name.clone())),
        Some(_) => Err(ApiError::invalid("model", "model must be the name of a model")),
    }
}

/// `POST /v1/models/{name}/{retry,load,unload,pin,unpin}`; names may hold slashes.
pub async fn model_by_hand(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segments(path): Segments<String>,
) -> Result<Response, ApiError> {
    let (name, word) = path.rsplit_once('/').unwrap_or_default();
    let control: fn(String) -> Control = match word {
        "retry" => {
            caller.may_operate()?;
            return ops::retry_model(&state, name);
        }
        "load" => Control::Load,
        "unload" => Control::Unload,
        "pin" => Control::Pin,
        "unpin" => Control::Unpin,
        _ => {
            let message = "the path does not exist; by hand: POST /v1/models/NAME/retry, load, unload, pin or unpin";
            return Err(ApiError::new(ErrorCode::NotFound, message));
        }
    };
    caller.may_operate()?;
    let spec = state.models().get(name)?.clone();
    let control = control(spec.name.clone());
    let queue = state.handle.queue();
    let trouble = queue.models.iter().find(|view| view.model == spec.name).and_then(|view| view.trouble.as_deref());
    if let (Control::Load(_), Some(trouble)) = (&control, trouble) {
        let message =
            format!("`{name}` cannot be loaded now: {trouble}; once that is mended, `roundhouse models retry`");
        return Err(ApiError::new(ErrorCode::NoWorkerForModel, message));
    }
    state.handle.control(control).await?;
    Ok(Json(ops::model_json(&state, &spec, &state.handle.queue())).into_response())
}
