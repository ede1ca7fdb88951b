//! Stored answers as OpenAI's face shows them: our id, the caller's name of the model, images by URL if asked for.

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde_json::{Value, json};

use crate::domain::worker::Answer;
use crate::domain::{ErrorCode, Job, JobKind, JobState};
use crate::http::error::ApiError;
use crate::http::openai::rewrite::TopLevel;
use crate::http::openai::stream::{failure, public_id};
use crate::http::{AppState, JOB_ID, view};
use crate::scheduler::hub::Ended;

/// The answer to a job whose end was seen live.
pub async fn of_ended(state: &AppState, job: &Job, ended: &Ended) -> Response {
    match (failure(job.id, ended), &ended.answer) {
        (Some(error), _) => error.into_response(),
        (None, Some(answer)) => of_answer(state, job, answer).await,
        (None, None) => of_stored(state, job).await,
    }
}

/// The answer to a terminal job as it is stored.
pub async fn of_terminal(state: &AppState, job: &Job) -> Response {
    if job.state == JobState::Succeeded {
        return of_stored(state, job).await;
    }
    let ended = Ended { state: job.state, answer: None, error: job.error.clone() };
    of_ended_badly(job, &ended)
}

fn of_ended_badly(job: &Job, ended: &Ended) -> Response {
    let unknown = || ApiError::new(ErrorCode::InternalError, "the job has no answer").about(job.id);
    failure(job.id, ended).unwrap_or_else(unknown).into_response()
}

async fn of_stored(state: &AppState, job: &Job) -> Response {
    match state.reader.answer(job.id).await {
        Ok(Some(answer)) => of_answer(state, job, &answer).await,
        Ok(None) => {
            let message = "the answer was deleted: it was past its retention, or had been fetched and room was needed (storage.quota); submit \
                           the request anew";
            ApiError::new(ErrorCode::ResultExpired, message).about(job.id).into_response()
        }
        Err(error) => ApiError::from(error).about(job.id).into_response(),
    }
}

async fn of_answer(state: &AppState, job: &Job, answer: &Answer) -> Response {
    let body = match job.kind {
        JobKind::Image if job.present.image_url => by_url(state, job, &answer.body).await,
        JobKind::Chat | JobKind::Completion => named(job, &answer.body),
        JobKind::Image | JobKind::Audio | JobKind::Custom => answer.body.clone(),
    };
    // Links are no images: those count when they are fetched.
    if !(job.kind == JobKind::Image && job.present.image_url) {
        state.delivered(job.id);
    }
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::OK);
    let headers = response.headers_mut();
    view::set(headers, header::CONTENT_TYPE, &answer.content_type);
    view::set(headers, JOB_ID, &job.id.to_string());
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// A chat or completion under our id and the caller's name of the model. Other answers stay as they are.
pub fn named(job: &Job, body: &Bytes) -> Bytes {
    if !matches!(job.kind, JobKind::Chat | JobKind::Completion) {
        return body.clone();
    }
    let Some(mut top) = TopLevel::parse(body) else {
        return body.clone();
    };
    top.set("id", &public_id(job.id, job.kind));
    top.set("model", if job.present.model.is_empty() { &job.model } else { &job.present.model });
    if !job.present.service_tier.is_empty() {
        top.set("service_tier", &job.present.service_tier);
    }
    let mut out = Vec::with_capacity(body.len() + 64);
    top.write(&mut out);
    Bytes::from(out)
}

async fn by_url(state: &AppState, job: &Job, body: &Bytes) -> Bytes {
    let stored = state.reader.artifacts(job.id).await.map(|artifacts| artifacts.len()).unwrap_or(0);
    let expires_s = view::url_expiry_s(state);
    let url = |index: usize| view::artifact_url(state, job.id, &format!("art_{index}"), expires_s);
    link_images(body, stored, url).unwrap_or_else(|| body.clone())
}

/// Replaces the images of an answer by URLs of the artifacts they were stored as, which are in the same order.
fn link_images(body: &[u8], stored: usize, url: impl Fn(usize) -> String) -> Option<Bytes> {
    let mut answer: Value = serde_json::from_slice(body).ok()?;
    let images = answer.get_mut("data")?.as_array_mut()?;
    let inline = images.iter_mut().filter_map(Value::as_object_mut).filter(|image| image.contains_key("b64_json"));
    for (index, image) in inline.enumerate().take(stored) {
        image.shift_remove("b64_json");
        image.shift_insert(0, "url".to_owned(), json!(url(index)));
    }
    Some(Bytes::from(answer.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_become_links_in_their_order() {
        let body = json!({"created": 1, "data": [{"b64_json": "AA==", "revised_prompt": "x"}, {"b64_json": "AQ=="}, {"url": "y"}]});
        let linked = link_images(body.to_string().as_bytes(), 2, |index| format!("/art_{index}")).unwrap();
        assert_eq!(
            linked,
            r#"{"created":1,"data":[{"url":"/art_0","revised_prompt":"x"},{"url":"/art_1"},{"url":"y"}]}"#
        );
        assert!(link_images(b"RIFF", 1, |_| String::new()).is_none());
        let kept = link_images(body.to_string().as_bytes(), 0, |_| String::new()).unwrap();
        assert_eq!(kept, body.to_string(), "what was not stored stays inline");
    }
}
