//! A job's files: `GET /v1/jobs/{id}/artifacts` and `/artifacts/{aid}`, with ranges.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::domain::{ErrorCode, Job, JobId};
use crate::http::auth::Caller;
use crate::http::body::Segments;
use crate::http::error::ApiError;
use crate::http::jobs::job_id;
use crate::http::{AppState, view};
use crate::store::StoreError;
use crate::store::read::Artifact;

/// Jobs with some of their files fetched that are remembered.
const FETCHED_MAX: usize = 10_000;

/// The list, each with a signed URL.
pub async fn list(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segments(id): Segments<String>,
) -> Result<Response, ApiError> {
    let id = job_id(&id)?;
    not_expired(&state.job(&caller, id).await?)?;
    let artifacts = state.reader.artifacts(id).await?;
    let data = view::artifacts_json(&state, id, &artifacts);
    let end = |artifact: Option<&Artifact>| artifact.map(|artifact| artifact.id.clone());
    let body = json!({
        "object": "list",
        "first_id": end(artifacts.first()),
        "last_id": end(artifacts.last()),
        "has_more": false,
        "data": data,
    });
    Ok(Json(body).into_response())
}

/// One file, or a range of it.
pub async fn get(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Segments((id, artifact)): Segments<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let id = job_id(&id)?;
    let job = state.job(&caller, id).await?;
    not_expired(&job)?;
    let artifacts = state.reader.artifacts(id).await?;
    let count = artifacts.len();
    let found = artifacts.into_iter().enumerate().find(|(_, found)| found.id == artifact);
    let (place, artifact) = found.ok_or_else(|| ApiError::not_found("the artifact"))?;
    let etag = format!("\"{}\"", artifact.sha256);
    if matches(&headers, header::IF_NONE_MATCH, &etag) {
        return Ok(with_headers(StatusCode::NOT_MODIFIED, Body::empty(), &artifact, &etag));
    }
    let if_range = !headers.contains_key(header::IF_RANGE) || matches(&headers, header::IF_RANGE, &etag);
    let range = headers.get(header::RANGE).filter(|_| if_range).and_then(|value| value.to_str().ok());
    let wanted = range.map_or(Wanted::All, |range| wanted(range, artifact.bytes));
    let range = match wanted {
        Wanted::All => None,
        Wanted::Part(start, end) => Some((start, end)),
        Wanted::Nothing => return Err(ApiError::range_not_satisfiable(artifact.bytes)),
    };
    let bytes = state.reader.artifact_bytes(id, &artifact.id, range).await.map_err(|error| match error {
        StoreError::NotFound => ApiError::not_found("the artifact"),
        error => error.into(),
    })?;
    let is_whole = range.is_none_or(|range| range == (0, artifact.bytes));
    if is_whole && state.fetched.all(job.id, place, count) {
        state.delivered(job.id);
    }
    let status = if range.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
    let mut response = with_headers(status, Body::from(bytes), &artifact, &etag);
    if let Some((start, end)) = range {
        let shown = format!("bytes {start}-{}/{}", end - 1, artifact.bytes);
        view::set(response.headers_mut(), header::CONTENT_RANGE, &shown);
    }
    Ok(response)
}

/// Which files of jobs were fetched whole; a job's answer is delivered when all of them were.
#[derive(Default)]
pub struct Fetched {
    places: Mutex<HashMap<JobId, BTreeSet<usize>>>,
}

impl Fetched {
    /// Notes a file; says whether all of its job have been fetched.
    fn all(&self, id: JobId, place: usize, count: usize) -> bool {
        if count == 1 {
            return true;
        }
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if places.len() >= FETCHED_MAX {
            // Forgotten jobs only count as not delivered.
            places.clear();
        }
        let known = places.entry(id).or_default();
        known.insert(place);
        let is_all = known.len() == count;
        if is_all {
            places.remove(&id);
        }
        is_all
    }
}

/// What an emptied job had is gone.
fn not_expired(job: &Job) -> Result<(), ApiError> {
    match job.emptied_at {
        None => Ok(()),
        Some(_) => {
            let message = "the job's files are past their retention and were deleted";
            Err(ApiError::new(ErrorCode::ResultExpired, message).about(job.id))
        }
    }
}

fn matches(headers: &HeaderMap, name: header::HeaderName, etag: &str) -> bool {
    let value = headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(',').any(|tag| tag.trim().trim_start_matches("W/") == etag || tag.trim() == "*")
}

fn with_headers(status: StatusCode, body: Body, artifact: &Artifact, etag: &str) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    view::set(headers, header::CONTENT_TYPE, &artifact.mime);
    view::set(headers, header::ETAG, etag);
    view::set(headers, header::CONTENT_DISPOSITION, &format!("inline; filename=\"{}\"", artifact.name));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    // What was stored never changes.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, max-age=86400, immutable"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    All,
    /// Start, end exclusive; not empty.
    Part(u64, u64),
    /// Outside the file.
    Nothing,
}

/// Reads `Range`. Several ranges, or what is no range of bytes, mean the whole file, as the RFC allows.
fn wanted(range: &str, bytes: u64) -> Wanted {
    let parse = |text: &str| text.trim().parse::<u64>().ok();
    let Some((first, last)) = range.trim().strip_prefix("bytes=").and_then(|spec| spec.split_once('-')) else {
        return Wanted::All;
    };
    let (start, end) = match (first.trim(), last.trim()) {
        ("", "") => return Wanted::All,
        ("", suffix) => match parse(suffix) {
            Some(length) => (bytes.saturating_sub(length), bytes),
            None => return Wanted::All,
        },
        (first, "") => match parse(first) {
            Some(first) => (first, bytes),
            None => return Wanted::All,
        },
        (first, last) => match (parse(first), parse(last)) {
            (Some(first), Some(last)) if first <= last => (first, last.saturating_add(1).min(bytes)),
            _ => return Wanted::All,
        },
    };
    if start < end { Wanted::Part(start, end) } else { Wanted::Nothing }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read() {
        for (range, expected) in [
            ("bytes=0-0", Wanted::Part(0, 1)),
            ("bytes=2-", Wanted::Part(2, 10)),
            ("bytes=-3", Wanted::Part(7, 10)),
            ("bytes=-30", Wanted::Part(0, 10)),
            ("bytes=5-99", Wanted::Part(5, 10)),
            ("bytes=10-", Wanted::Nothing),
            ("bytes=-0", Wanted::Nothing),
            ("bytes=3-2", Wanted::All),
            ("bytes=0-1,3-4", Wanted::All),
            ("bytes=-", Wanted::All),
            ("items=0-1", Wanted::All),
            ("bytes=0-18446744073709551615", Wanted::Part(0, 10)),
            ("bytes=a-b", Wanted::All),
        ] {
            assert_eq!(wanted(range, 10), expected, "{range}");
        }
        assert_eq!(wanted("bytes=0-", 0), Wanted::Nothing);
    }

    #[test]
    fn tags_match_in_lists_and_weakly() {
        let headers = HeaderMap::from_iter([(header::IF_NONE_MATCH, "\"a\", W/\"b\"".parse().unwrap())]);
        assert!(matches(&headers, header::IF_NONE_MATCH, "\"b\""));
        assert!(!matches(&headers, header::IF_NONE_MATCH, "\"c\""));
        assert!(!matches(&HeaderMap::new(), header::IF_NONE_MATCH, "\"c\""));
    }
}
