//! How long a caller is held, and what `Prefer` asks.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue, header};

/// Longest wait of one request, in seconds: proxies cut at about 100.
pub const WAIT_MAX_S: u64 = 85;
/// Least time of a hop, however impatient the client.
const HOP_MIN: Duration = Duration::from_millis(100);
/// A hop ends this long before the client's read timeout, or a quarter of it if that is less.
const MARGIN: Duration = Duration::from_secs(5);

/// The time of one hop: the server's, or less if the client's own read timeout (told by OpenAI's Python SDK) is near.
pub fn hop_time(sync_hop: Duration, headers: &HeaderMap) -> Duration {
    let told =
        headers.get("x-stainless-read-timeout").and_then(|value| value.to_str().ok()?.trim().parse::<f64>().ok());
    let timeout = told.filter(|seconds| *seconds > 0.0).and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    match timeout {
        Some(timeout) => sync_hop.min(timeout.saturating_sub(MARGIN.min(timeout / 4))).max(HOP_MIN.min(sync_hop)),
        None => sync_hop,
    }
}

/// RFC 7240 preferences that are known here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefer {
    /// The job instead of its answer.
    pub respond_async: bool,
    /// How long to wait for the end, in seconds, at most [`WAIT_MAX_S`].
    pub wait_s: Option<u64>,
}

impl Prefer {
    /// Unknown preferences and unreadable values are ignored, as the RFC wants.
    pub fn read(headers: &HeaderMap) -> Self {
        let mut prefer = Self::default();
        let values = headers.get_all("prefer").iter().filter_map(|value| value.to_str().ok());
        for preference in values.flat_map(|value| value.split(',')) {
            let preference = preference.split(';').next().unwrap_or_default();
            let (name, value) = preference.split_once('=').unwrap_or((preference, ""));
            match name.trim().to_ascii_lowercase().as_str() {
                "respond-async" => prefer.respond_async = true,
                "wait" => prefer.wait_s = value.trim().trim_matches('"').parse().ok().map(|s: u64| s.min(WAIT_MAX_S)),
                _ => {}
            }
        }
        prefer
    }
}

/// Says which preferences were honoured.
pub fn applied(headers: &mut HeaderMap, respond_async: bool, wait_s: Option<u64>) {
    let applied: Vec<String> = [respond_async.then(|| "respond-async".to_owned()), wait_s.map(|s| format!("wait={s}"))]
        .into_iter()
        .flatten()
        .collect();
    if let (false, Ok(value)) = (applied.is_empty(), HeaderValue::from_str(&applied.join(", "))) {
        headers.insert("preference-applied", value);
        headers.append(header::VARY, HeaderValue::from_static("Prefer"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(axum::http::HeaderName::from_static(name), value.parse().unwrap())])
    }

    #[test]
    fn a_hop_ends_before_the_client_gives_up() {
        let hop = Duration::from_secs(85);
        let time = |timeout: &str| hop_time(hop, &with("x-stainless-read-timeout", timeout)).as_secs_f64();
        assert_eq!(time("600"), 85.0);
        assert_eq!(time("60.0"), 55.0);
        assert_eq!(time("10"), 7.5);
        assert_eq!(time("0.001"), 0.1, "no storm of hops");
        for odd in ["", "None", "-1", "NaN", "inf", "1e300"] {
            assert_eq!(time(odd), 85.0, "{odd}");
        }
        assert_eq!(hop_time(hop, &HeaderMap::new()), hop);
        let short = Duration::from_millis(50);
        assert_eq!(hop_time(short, &with("x-stainless-read-timeout", "0.001")), short);
    }

    #[test]
    fn preferences_are_read_and_echoed() {
        let prefer = Prefer::read(&with("prefer", "respond-async, wait=10; foo, handling=lenient"));
        assert_eq!(prefer, Prefer { respond_async: true, wait_s: Some(10) });
        assert_eq!(Prefer::read(&with("prefer", "wait=900")).wait_s, Some(85));
        assert_eq!(Prefer::read(&with("prefer", "wait=soon")), Prefer::default());
        let mut headers = HeaderMap::new();
        applied(&mut headers, true, Some(10));
        assert_eq!(headers["preference-applied"], "respond-async, wait=10");
    }
}
