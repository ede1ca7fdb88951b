//! Reading requests: bodies with a limit, JSON with its place of error, queries, and names near a misspelt one.

use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Uri, header};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::domain::ErrorCode;
use crate::http::AppState;
use crate::http::error::ApiError;

/// How much of a body that is too long is read, and for how long.
const DISCARD_BYTES_MAX: usize = 64 * 1024 * 1024;
const DISCARD_WITHIN: Duration = Duration::from_secs(5);

/// A parsed JSON object, fields in the order they were sent.
pub struct JsonObject(pub Map<String, Value>);

impl FromRequest<AppState> for JsonObject {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        refuse_other_types(&parts.headers)?;
        let bytes = read(&parts.headers, body, state.server.body_bytes_max).await?;
        parse(&bytes).map(Self)
    }
}

/// The same where a request needs no body: none, or an empty one, is an object without fields.
pub struct OptionalObject(pub Map<String, Value>);

impl FromRequest<AppState> for OptionalObject {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        refuse_other_types(&parts.headers)?;
        let bytes = read(&parts.headers, body, state.server.body_bytes_max).await?;
        if bytes.trim_ascii().is_empty() { Ok(Self(Map::new())) } else { parse(&bytes).map(Self) }
    }
}

/// The variable segments of a path. What cannot be decoded is a path that does not exist.
pub struct Segments<T>(pub T);

impl<T, S> FromRequestParts<S> for Segments<T>
where
    T: DeserializeOwned + Send,
    S: Send + Sync,
{
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = Path::<T>::from_request_parts(parts, state).await;
        path.map(|Path(segments)| Self(segments)).map_err(|_| ApiError::not_found("the path"))
    }
}

/// Anything may be called JSON, or be sent without a type; what says clearly that it is something else is refused.
fn refuse_other_types(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(content_type) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else {
        return Ok(());
    };
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let is_other = ["multipart/", "image/", "audio/", "video/"].iter().any(|other| essence.starts_with(other))
        || ["application/xml", "text/xml", "text/html", "application/zip", "application/gzip"]
            .contains(&essence.as_str());
    if is_other {
        let message = format!("`{essence}` is not taken here: send the body as application/json");
        return Err(ApiError::new(ErrorCode::UnsupportedMediaType, message).at("Content-Type"));
    }
    Ok(())
}

async fn read(headers: &HeaderMap, body: Body, bytes_max: usize) -> Result<Bytes, ApiError> {
    let too_large = || {
        let message = format!("the body is longer than {bytes_max} bytes; large inputs go into several requests");
        ApiError::new(ErrorCode::PayloadTooLarge, message)
    };
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let mut stream = body.into_data_stream();
    if declared.is_some_and(|bytes| bytes > bytes_max) {
        // Who asks first has sent nothing yet.
        if !headers.contains_key(header::EXPECT) {
            discard(&mut stream).await;
        }
        return Err(too_large());
    }
    let mut first: Option<Bytes> = None;
    let mut rest = BytesMut::new();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|error| {
            ApiError::new(ErrorCode::InvalidRequest, format!("the body could not be read to its end: {error}"))
        })?;
        let so_far = first.as_ref().map_or(0, Bytes::len) + rest.len();
        if so_far + chunk.len() > bytes_max {
            discard(&mut stream).await;
            return Err(too_large());
        }
        match &first {
            None => first = Some(chunk),
            Some(_) => rest.extend_from_slice(&chunk),
        }
    }
    match first {
        Some(first) if rest.is_empty() => Ok(first),
        Some(first) => {
            let mut whole = BytesMut::with_capacity(first.len() + rest.len());
            whole.extend_from_slice(&first);
            whole.extend_from_slice(&rest);
            Ok(whole.freeze())
        }
        None => Ok(Bytes::new()),
    }
}

/// Lets a client finish what it sends, within bounds: one whose connection is closed while it still writes may never see
/// why.
async fn discard(stream: &mut BodyDataStream) {
    let all = async {
        let mut bytes = 0;
        while let Some(Ok(chunk)) = stream.next().await
            && bytes < DISCARD_BYTES_MAX
        {
            bytes += chunk.len();
        }
    };
    // Refused either way.
    let _ = tokio::time::timeout(DISCARD_WITHIN, all).await;
}

/// Parses a body into an object; errors say where.
pub fn parse(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(ApiError::new(ErrorCode::InvalidJson, "the body is empty: send a JSON object"));
    }
    match serde_json::from_slice::<Value>(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(ApiError::new(ErrorCode::InvalidRequest, "the body must be a JSON object")),
        Err(error) => Err(ApiError::new(ErrorCode::InvalidJson, format!("the body is not JSON: {error}"))),
    }
}

/// The pairs of a query string, decoded, in order.
pub fn query(uri: &Uri) -> Result<Vec<(String, String)>, ApiError> {
    Query::<Vec<(String, String)>>::try_from_uri(uri)
        .map(|Query(pairs)| pairs)
        .map_err(|error| ApiError::new(ErrorCode::InvalidRequest, format!("the query cannot be read: {error}")))
}

/// The first value of a query's field.
pub fn field<'a>(query: &'a [(String, String)], name: &str) -> Option<&'a str> {
    query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}

/// A whole number in a query.
pub fn number(query: &[(String, String)], name: &str) -> Result<Option<u64>, ApiError> {
    field(query, name)
        .map(|text| {
            text.parse().map_err(|_| {
                ApiError::invalid(name, format!("{name} must be a whole number, not `{}`", shortened(text)))
            })
        })
        .transpose()
}

/// A yes or no in a query; a bare name is yes.
pub fn flag(query: &[(String, String)], name: &str) -> Result<bool, ApiError> {
    match field(query, name) {
        None | Some("false" | "0") => Ok(false),
        Some("true" | "1" | "") => Ok(true),
        Some(other) => {
            Err(ApiError::invalid(name, format!("{name} must be true or false, not `{}`", shortened(other))))
        }
    }
}

/// Values of others in messages: short, so that nothing large or private is repeated.
pub fn shortened(text: &str) -> String {
    const CHARS_MAX: usize = 60;
    match text.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// The names, most alike first.
pub fn by_likeness<'a>(name: &str, names: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let name = shortened(name).to_lowercase();
    let mut ranked: Vec<(f64, &str)> =
        names.into_iter().map(|other| (strsim::jaro_winkler(&name, &other.to_lowercase()), other)).collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    ranked.into_iter().map(|(_, other)| other).collect()
}

/// An error about a field that does not exist, naming the nearest that does.
pub fn unknown_field(field: &str, known: &[&str]) -> ApiError {
    let nearest = by_likeness(field, known.iter().copied()).first().copied().unwrap_or_default();
    ApiError::invalid(
        shortened(field),
        format!("`{}` is not a field here; the nearest is `{nearest}`, of {}", shortened(field), known.join(", ")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_json_say_where() {
        let error = parse(b"{\n  \"model\": }").unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidJson);
        assert!(error.message.contains("line 2 column 12"), "{}", error.message);
        assert_eq!(parse(b"[1]").unwrap_err().code, ErrorCode::InvalidRequest);
        assert_eq!(parse(b" \n").unwrap_err().code, ErrorCode::InvalidJson);
        assert_eq!(parse("\u{feff}{}".as_bytes()), Ok(Map::new()));
        let deep = "[".repeat(100_000);
        assert_eq!(parse(deep.as_bytes()).unwrap_err().code, ErrorCode::InvalidJson, "depth is limited");
    }

    #[tokio::test]
    async fn bodies_have_a_limit_whether_they_say_their_length_or_not() {
        let headers = HeaderMap::from_iter([(header::CONTENT_LENGTH, "11".parse().unwrap())]);
        let declared = read(&headers, Body::empty(), 10).await.unwrap_err();
        assert_eq!(declared.code, ErrorCode::PayloadTooLarge);
        let chunks = || Body::from_stream(futures_util::stream::iter([Ok::<_, std::io::Error>("12345"), Ok("67890")]));
        assert_eq!(read(&HeaderMap::new(), chunks(), 10).await.unwrap(), "1234567890");
        assert_eq!(read(&HeaderMap::new(), chunks(), 9).await.unwrap_err().code, ErrorCode::PayloadTooLarge);
    }

    #[test]
    fn only_clearly_other_types_are_refused() {
        let typed = |text: &str| HeaderMap::from_iter([(header::CONTENT_TYPE, text.parse().unwrap())]);
        for good in
            ["application/json", "application/json; charset=utf-8", "text/plain", "application/x-www-form-urlencoded"]
        {
            assert!(refuse_other_types(&typed(good)).is_ok(), "{good}");
        }
        assert!(refuse_other_types(&HeaderMap::new()).is_ok());
        let error = refuse_other_types(&typed("multipart/form-data; boundary=x")).unwrap_err();
        assert_eq!(error.code, ErrorCode::UnsupportedMediaType);
    }

    #[test]
    fn misspelt_names_find_their_neighbours() {
        assert_eq!(by_likeness("fluxx", ["text", "musicgen", "flux"])[0], "flux");
        assert!(unknown_field("priorty", &["endpoint", "priority"]).message.contains("nearest is `priority`"));
    }

    #[test]
    fn queries_are_read() {
        let pairs = query(&"/v1/jobs?limit=5&metadata%5Brun%5D=4%202&strict".parse().unwrap()).unwrap();
        assert_eq!(number(&pairs, "limit"), Ok(Some(5)));
        assert_eq!(field(&pairs, "metadata[run]"), Some("4 2"));
        assert_eq!(flag(&pairs, "strict"), Ok(true));
        assert_eq!(flag(&pairs, "partial"), Ok(false));
        assert_eq!(number(&[("limit".into(), "-1".into())], "limit").unwrap_err().param.as_deref(), Some("limit"));
    }
}
