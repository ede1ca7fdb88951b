//! `POST /v1/jobs/bulk`: many jobs in one commit, as one batch.

use std::collections::HashSet;

use axum::Json;
use axum::extract::{Extension, OriginalUri, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use crate::domain::{BatchId, Job, NewJob};
use crate::http::auth::Caller;
use crate::http::body::{self, JsonObject, shortened, unknown_field};
use crate::http::error::ApiError;
use crate::http::jobs::submission::{self, Source};
use crate::http::prepare::Models;
use crate::http::{AppState, idempotency};

/// Most jobs in one call.
pub const REQUESTS_MAX: usize = 1_000;

/// All or none, unless `?partial=true`.
pub async fn create(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    OriginalUri(uri): OriginalUri,
    headers: HeaderMap,
    JsonObject(object): JsonObject,
) -> Result<Response, ApiError> {
    let partial = body::flag(&body::query(&uri)?, "partial")?;
    let key = idempotency::key(&headers, &caller, "/v1/jobs/bulk", if partial { "partial" } else { "" }, &object)?;
    let requests = requests(object)?;
    let batch = state.handle.new_batch();
    let source = Source::bulk(caller.tenant, state.clock.now(), batch);
    let (good, faults) = check(&state.models(), requests, &source);
    if good.is_empty() || (!partial && !faults.is_empty()) {
        return Err(refusal(faults, partial));
    }
    let (items, jobs): (Vec<Item>, Vec<NewJob>) = good.into_iter().unzip();
    let accepted = state.handle.submit(jobs, key).await?;
    let batch = accepted.jobs.first().and_then(|job| job.batch).unwrap_or(batch);
    // Numbers follow the items; of a submission of days ago some may be gone.
    let first = accepted.jobs.first().map_or(0, |job| job.id.number);
    let item = |job: &Job| usize::try_from(job.id.number - first).ok().and_then(|place| items.get(place));
    let jobs: Vec<Value> =
        accepted.jobs.iter().filter_map(|job| item(job).map(|item| item.accepted(&job.id.to_string()))).collect();
    Ok(idempotency::mark(reply(batch, jobs, partial.then_some(faults)), accepted.replayed))
}

/// A request by its place in the call.
struct Item {
    index: usize,
    custom_id: Option<String>,
}

impl Item {
    fn accepted(&self, id: &str) -> Value {
        json!({"index": self.index, "custom_id": self.custom_id, "id": id})
    }

    fn refused(&self, error: &ApiError) -> Value {
        json!({
            "index": self.index,
            "custom_id": self.custom_id,
            "code": error.code.as_str(),
            "param": error.param,
            "message": error.message,
        })
    }
}

fn requests(mut object: Map<String, Value>) -> Result<Vec<Value>, ApiError> {
    if let Some(name) = object.keys().find(|name| *name != "requests") {
        return Err(unknown_field(name, &["requests"]));
    }
    let Some(Value::Array(requests)) = object.shift_remove("requests") else {
        return Err(ApiError::invalid("requests", "requests must be a list, each item like the body of POST /v1/jobs"));
    };
    if !(1..=REQUESTS_MAX).contains(&requests.len()) {
        let message = format!("requests has {} items; 1 to {REQUESTS_MAX} are taken in one call", requests.len());
        return Err(ApiError::invalid("requests", message));
    }
    Ok(requests)
}

type Checked = (Vec<(Item, NewJob)>, Vec<Value>);

fn check(models: &Models, requests: Vec<Value>, source: &Source) -> Checked {
    let (mut good, mut faults) = (Vec::with_capacity(requests.len()), Vec::new());
    let mut seen = HashSet::new();
    for (index, request) in requests.into_iter().enumerate() {
        let custom_id = request.get("custom_id").and_then(Value::as_str).map(shortened);
        let item = Item { index, custom_id };
        match check_one(models, request, source, &mut seen) {
            Ok(job) => good.push((item, job)),
            Err(error) => faults.push(item.refused(&error)),
        }
    }
    // Ids are echoed whole where the job was taken.
    good.iter_mut().for_each(|(item, job)| item.custom_id.clone_from(&job.custom_id));
    (good, faults)
}

fn check_one(models: &Models, request: Value, source: &Source, seen: &mut HashSet<String>) -> Result<NewJob, ApiError> {
    let Value::Object(request) = request else {
        return Err(ApiError::invalid("requests", "a request must be an object, like the body of POST /v1/jobs"));
    };
    let job = submission::read(models, request, source.clone())?;
    match &job.custom_id {
        Some(id) if !seen.insert(id.clone()) => {
            Err(ApiError::invalid("custom_id", format!("custom_id `{}` is there twice", shortened(id))))
        }
        _ => Ok(job),
    }
}

fn refusal(faults: Vec<Value>, partial: bool) -> ApiError {
    let which = match faults.len() {
        1 => "1 request is".to_owned(),
        count => format!("{count} requests are"),
    };
    let message = if partial {
        format!("{which} invalid and none is valid: nothing was submitted")
    } else {
        format!("{which} invalid, so nothing was submitted; see details, or use ?partial=true")
    };
    ApiError::invalid("requests", message).with_details(Value::Array(faults))
}

fn reply(batch: BatchId, jobs: Vec<Value>, faults: Option<Vec<Value>>) -> Response {
    let mut body = json!({"batch_id": batch.to_string(), "jobs": jobs});
    if let Some(faults) = faults {
        body["errors"] = Value::Array(faults);
    }
    (StatusCode::ACCEPTED, Json(body)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::prepare::tests::specs;

    fn request(model: &str, custom_id: Value) -> Value {
        json!({"endpoint": "/v1/images/generations", "body": {"model": model, "prompt": "x"}, "custom_id": custom_id})
    }

    fn checked(requests: Vec<Value>) -> Checked {
        check(&Models::new(specs()), requests, &Source::bulk("default".into(), 0, BatchId(4)))
    }

    #[test]
    fn faults_name_their_request() {
        let (good, faults) = checked(vec![
            request("flux", json!("a")),
            request("nope", json!("b")),
            request("flux", json!("a")),
            request("flux", json!("")),
            json!(3),
            request("flux", Value::Null),
        ]);
        assert_eq!(good.iter().map(|(item, _)| item.index).collect::<Vec<_>>(), [0, 5]);
        assert_eq!((good[0].1.priority, good[0].1.batch), (3, Some(BatchId(4))));
        let shown: Vec<_> =
            faults.iter().map(|f| (f["index"].clone(), f["code"].clone(), f["param"].clone())).collect();
        assert_eq!(
            json!(shown),
            json!([
                [1, "model_not_found", "body.model"],
                [2, "invalid_request", "custom_id"],
                [3, "invalid_request", "custom_id"],
                [4, "invalid_request", "requests"]
            ])
        );
        assert_eq!(faults[0]["custom_id"], "b");
    }

    #[test]
    fn the_list_is_bounded() {
        let list = |n: usize| requests(json!({"requests": vec![json!({}); n]}).as_object().unwrap().clone());
        assert!(list(0).is_err() && list(1_001).is_err());
        assert_eq!(list(1_000).unwrap().len(), 1_000);
        assert!(
            requests(json!({"request": []}).as_object().unwrap().clone()).unwrap_err().message.contains("`requests`")
        );
    }
}
