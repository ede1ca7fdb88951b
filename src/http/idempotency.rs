//! `Idempotency-Key`: a submission that is sent again makes nothing new.

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::store::IdempotencyKey;

const KEY_CHARS_MAX: usize = 255;
const HEADER: &str = "idempotency-key";
const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// The key of a submission to `route`, if it has one. Equal bodies are equal JSON, whatever its spaces. `manner`: what else
/// makes it another request.
pub fn key(
    headers: &HeaderMap,
    caller: &Caller,
    route: &str,
    manner: &str,
    body: &Map<String, Value>,
) -> Result<Option<IdempotencyKey>, ApiError> {
    let Some(value) = headers.get(HEADER) else {
        return Ok(None);
    };
    let text = value.to_str().ok().map(str::trim).filter(|text| (1..=KEY_CHARS_MAX).contains(&text.len()));
    let text = text
        .ok_or_else(|| ApiError::invalid("Idempotency-Key", "Idempotency-Key must have 1 to 255 ASCII characters"))?;
    let body = serde_json::to_vec(body).unwrap_or_default();
    Ok(Some(IdempotencyKey {
        key: hash(&[caller.tenant.as_bytes(), route.as_bytes(), text.as_bytes()]),
        request: hash(&[manner.as_bytes(), &body]),
    }))
}

fn hash(parts: &[&[u8]]) -> [u8; 16] {
    let mut sha = Sha256::new();
    for part in parts {
        sha.update((part.len() as u64).to_le_bytes());
        sha.update(part);
    }
    let mut out = [0; 16];
    out.copy_from_slice(&sha.finalize()[..16]);
    out
}

/// Says that nothing new was made.
pub fn mark(mut response: Response, replayed: bool) -> Response {
    if replayed {
        response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
    }
    response
}
