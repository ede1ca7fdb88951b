//! Says what an engine's answer or complaint means for a job. Pure: bytes in, a verdict out.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::error::Category;
use serde_json::{Value, json};

use crate::domain::worker::Outcome;
use crate::domain::{ErrorCode, JobError, JobKind};
use crate::worker::assemble::is_finished;
use crate::worker::plain::plain;

/// Longest message of an engine that is kept, in bytes.
pub(super) const MESSAGE_LIMIT_BYTES: usize = 2048;
/// Longest body of an engine's refusal that is kept with the job, in bytes.
const BODY_LIMIT_BYTES: usize = 16 << 10;

/// A failed attempt, before it is an [`Outcome`].
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Failure {
    pub(super) error: Box<JobError>,
    pub(super) retriable: bool,
}

impl Failure {
    /// A failure without param or details.
    pub(super) fn new(code: ErrorCode, message: impl Into<String>, retriable: bool) -> Self {
        Self { error: Box::new(JobError::new(code, message, retriable)), retriable }
    }

    /// The answer is not what its endpoint promises; the same request would get the same again.
    pub(super) fn invalid_output(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidOutput, message, false)
    }

    /// The engine failed on this job, and another try may do better.
    pub(super) fn worker_error(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::WorkerError, message, true)
    }

    /// The same failure after part of the answer has been passed on: no second attempt may follow.
    pub(super) fn after_output(self) -> Self {
        Self { retriable: false, ..self }
    }
}

impl From<Failure> for Outcome {
    fn from(failure: Failure) -> Self {
        Outcome::Failed { error: *failure.error, retriable: failure.retriable }
    }
}

/// An engine's complaint in whatever shape it came.
#[derive(Debug, Default)]
struct Complaint {
    status: u16,
    code: String,
    kind: String,
    message: String,
    param: Option<String>,
}

impl Complaint {
    /// `error` is an OpenAI error object, FastAPI's `{"detail"}`, an error line of ours, or a text.
    fn read(status: u16, error: &Value) -> Self {
        let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let message = match error {
            Value::String(text) => text.clone(),
            _ if error.get("message").is_some() => text("message"),
            _ => match error.get("detail") {
                Some(Value::String(detail)) => detail.clone(),
                Some(detail) => detail.to_string(),
                None => String::new(),
            },
        };
        Self {
            status,
            code: text("code"),
            kind: text("type"),
            message: cut(message, MESSAGE_LIMIT_BYTES),
            param: error.get("param").and_then(Value::as_str).map(str::to_owned),
        }
    }

    fn is_about_context_length(&self) -> bool {
        let message = self.message.to_ascii_lowercase();
        (400..500).contains(&self.status)
            && (self.code == "context_length_exceeded"
                || self.kind == "context_length_exceeded"
                || self.kind == "exceed_context_size_error"
                || message.contains("context length")
                || message.contains("context size"))
    }

    /// Engines that know no code for it say so in words: torch, CUDA and ROCm, vLLM, llama.cpp.
    fn is_out_of_memory(&self) -> bool {
        let message = self.message.to_ascii_lowercase();
        let says_so = message.contains("out of memory") || message.contains("outofmemory");
        self.code == "worker_oom" || self.status == 507 || (self.status >= 500 && says_so)
    }

    fn judge(self, details: Value) -> Failure {
        let status = self.status;
        let (code, retriable) = if self.is_out_of_memory() {
            (ErrorCode::WorkerOom, true)
        } else if self.is_about_context_length() {
            (ErrorCode::ContextLengthExceeded, false)
        } else if self.code == "invalid_request" && status < 500 {
            (ErrorCode::InvalidRequest, false)
        } else if matches!(status, 408 | 425 | 429 | 499) || status >= 500 {
            (ErrorCode::WorkerError, true)
        } else {
            (ErrorCode::UpstreamRejected, false)
        };
        let message = if self.message.is_empty() {
            format!("the engine answered with status {status} and no message")
        } else {
            self.message
        };
        let mut failure = Failure::new(code, message, retriable);
        failure.error.param = self.param;
        failure.error.details = Some(details);
        failure
    }
}

/// The engine answered with a status that is no success.
pub(super) fn refused(status: u16, body: &[u8]) -> Failure {
    let parsed: Option<Value> = serde_json::from_slice(body).ok();
    let error = match &parsed {
        Some(Value::Object(map)) => match map.get("error") {
            Some(error @ (Value::Object(_) | Value::String(_))) => error,
            _ => parsed.as_ref().unwrap_or(&Value::Null),
        },
        _ => &Value::Null,
    };
    let mut complaint = Complaint::read(status, error);
    let text = || cut(String::from_utf8_lossy(body).into_owned(), BODY_LIMIT_BYTES);
    if complaint.message.is_empty() && parsed.is_none() {
        complaint.message = cut(text().trim().to_owned(), MESSAGE_LIMIT_BYTES);
    }
    let kept = match parsed {
        Some(body_json) if body.len() <= BODY_LIMIT_BYTES => body_json,
        _ => text().into(),
    };
    complaint.judge(json!({"status": status, "body": kept}))
}

/// The `error` object of a stream's error frame. vLLM puts the status into `code`.
pub(super) fn frame_error(error: &Value) -> Failure {
    let number = |key: &str| error.get(key).and_then(Value::as_u64);
    let status = number("code")
        .or_else(|| number("status"))
        .and_then(|s| u16::try_from(s).ok())
        .unwrap_or_else(|| status_of(error));
    Complaint::read(status, error).judge(json!({"status": status, "body": error}))
}

/// Our workers' error frames carry no status: it follows from their code.
fn status_of(error: &Value) -> u16 {
    match error.get("code").and_then(Value::as_str) {
        Some("invalid_request" | "context_length_exceeded") => 400,
        Some("worker_oom") => 507,
        Some("cancelled") => 499,
        _ => 500,
    }
}

/// An NDJSON error line of our workers.
pub(super) fn line_error(
    status: Option<u16>,
    code: Option<&str>,
    message: Option<&str>,
    param: Option<&str>,
) -> Failure {
    let line = json!({"code": code, "message": message, "param": param});
    let status = status.unwrap_or_else(|| status_of(&line));
    Complaint::read(status, &line).judge(json!({"status": status}))
}

#[derive(Deserialize)]
struct TextAnswer {
    #[serde(default)]
    choices: Vec<TextChoice>,
    #[serde(default)]
    usage: Option<Value>,
}

#[derive(Deserialize)]
struct TextChoice {
    #[serde(default)]
    index: u64,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct ImageAnswer<'a> {
    #[serde(default, borrow)]
    data: Vec<Image<'a>>,
    #[serde(default)]
    usage: Option<Value>,
}

#[derive(Deserialize)]
struct Image<'a> {
    // Borrowed when it can be: an image has megabytes, and base64 has no escapes.
    #[serde(default, borrow)]
    b64_json: Option<std::borrow::Cow<'a, str>>,
    #[serde(default, borrow)]
    url: Option<std::borrow::Cow<'a, str>>,
}

#[derive(Deserialize)]
struct AnyAnswer {
    #[serde(default)]
    usage: Option<Value>,
}

/// Checks a whole answer against what its endpoint promises; gives its usage.
pub(super) fn check(endpoint: &str, media_type: &str, body: &[u8]) -> Result<Option<Value>, Failure> {
    let is_json = media_type == "application/json" || media_type.ends_with("+json");
    match JobKind::of_endpoint(endpoint) {
        JobKind::Chat | JobKind::Completion => check_text(body),
        JobKind::Image => check_image(body),
        _ if body.is_empty() => Err(Failure::invalid_output(format!("the engine's answer to {endpoint} is empty"))),
        _ if is_json => {
            serde_json::from_slice::<serde::de::IgnoredAny>(body).map_err(|e| not_as_promised("JSON", body, &e))?;
            // An array is JSON too, it only has no usage.
            let is_object = body.trim_ascii_start().first() == Some(&b'{');
            let answer = is_object.then(|| serde_json::from_slice::<AnyAnswer>(body).ok());
            Ok(answer.flatten().and_then(|a| a.usage))
        }
        _ => Ok(None),
    }
}

fn check_text(body: &[u8]) -> Result<Option<Value>, Failure> {
    let answer: TextAnswer = serde_json::from_slice(body).map_err(|e| not_as_promised("text", body, &e))?;
    if answer.choices.is_empty() {
        return Err(Failure::invalid_output("the engine's answer has no `choices`"));
    }
    for choice in &answer.choices {
        match choice.finish_reason.as_deref() {
            Some(reason) if is_finished(reason) => {}
            Some(reason) => {
                return Err(Failure::worker_error(format!(
                    "choice {} ended with finish_reason `{}`",
                    choice.index,
                    cut(reason.to_owned(), 80)
                )));
            }
            None => {
                return Err(Failure::worker_error(format!("choice {} has no finish_reason", choice.index)));
            }
        }
    }
    Ok(answer.usage)
}

fn check_image(body: &[u8]) -> Result<Option<Value>, Failure> {
    let answer: ImageAnswer = serde_json::from_slice(body).map_err(|e| not_as_promised("images", body, &e))?;
    let has_content = |image: &Image| {
        let is_there = |text: &Option<std::borrow::Cow<str>>| text.as_ref().is_some_and(|t| !t.is_empty());
        is_there(&image.b64_json) || is_there(&image.url)
    };
    if answer.data.is_empty() || !answer.data.iter().all(has_content) {
        return Err(Failure::invalid_output(
            "the engine's answer has no `data`, or an image without `b64_json` and `url`",
        ));
    }
    Ok(answer.usage)
}

/// How much of an answer is shown, in characters.
const SHOWN: usize = 60;

/// serde's message names the place and the expected type; it does not quote long texts of ours.
fn not_as_promised(what: &str, body: &[u8], error: &serde_json::Error) -> Failure {
    let place = format!("line {} column {}", error.line(), error.column());
    Failure::invalid_output(match error.classify() {
        _ if body.trim_ascii().is_empty() => "the engine's answer is empty".to_owned(),
        Category::Syntax => format!("the engine's answer is not JSON: {} ({place})", beginning(body)),
        Category::Eof => format!("the engine's answer ends before its JSON does: {} ({place})", beginning(body)),
        other => format!("the engine's answer is not as promised ({what}): {other:?} at {place}"),
    })
}

/// How an answer begins, for a person: a few characters, none that a terminal would obey.
fn beginning(body: &[u8]) -> String {
    let head = String::from_utf8_lossy(&body[..body.len().min(4 * SHOWN)]);
    let plain: String = head.chars().map(|c| if c.is_control() { ' ' } else { c }).take(SHOWN).collect();
    format!("it begins with `{}`", plain.trim())
}

/// Cuts at a character's border; what a terminal would obey is left out.
pub(super) fn cut(text: String, limit_bytes: usize) -> String {
    let mut text = match plain(&text) {
        Cow::Owned(text) => text,
        Cow::Borrowed(_) => text,
    };
    if text.len() > limit_bytes {
        let at = (0..=limit_bytes).rev().find(|i| text.is_char_boundary(*i));
        text.truncate(at.unwrap_or(0));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_json_is_shown_by_its_first_characters() {
        let said = |endpoint: &str, body: &[u8]| {
            let failure = check(endpoint, "application/json", body).unwrap_err();
            assert_eq!(failure.error.code, ErrorCode::InvalidOutput);
            failure.error.message
        };
        let page = format!("<html>\r\n\u{1b}[2J{}", "x".repeat(1_000));
        for endpoint in ["/v1/chat/completions", "/v1/images/generations", "/v1/custom"] {
            let message = said(endpoint, page.as_bytes());
            assert!(
                message.starts_with("the engine's answer is not JSON: it begins with `<html>   [2Jxxx"),
                "{message}"
            );
            assert!(message.len() < 150 && message.ends_with("` (line 1 column 1)"), "{message}");
        }
        let cut_off = said("/v1/chat/completions", br#"{"choices": ["#);
        assert!(cut_off.contains("ends before its JSON does: it begins with `{\"choices\": [`"), "{cut_off}");
        assert!(said("/v1/chat/completions", b"\xff\xfe").contains("is not JSON"));
        assert_eq!(said("/v1/chat/completions", b" "), "the engine's answer is empty");
        assert!(said("/v1/chat/completions", b"[1]").contains("is not as promised (text)"));
    }

    fn code_of(failure: &Failure) -> (ErrorCode, bool) {
        assert_eq!(failure.error.retryable, failure.retriable);
        (failure.error.code, failure.retriable)
    }

    #[test]
    fn statuses() {
        let cases = [
            (400, ErrorCode::UpstreamRejected, false),
            (404, ErrorCode::UpstreamRejected, false),
            (422, ErrorCode::UpstreamRejected, false),
            (429, ErrorCode::WorkerError, true),
            (499, ErrorCode::WorkerError, true),
            (500, ErrorCode::WorkerError, true),
            (503, ErrorCode::WorkerError, true),
            (507, ErrorCode::WorkerOom, true),
        ];
        for (status, code, retriable) in cases {
            let failure = refused(status, br#"{"error":{"message":"no","type":"x","code":"y"}}"#);
            assert_eq!(code_of(&failure), (code, retriable), "{status}");
            assert_eq!(failure.error.message, "no");
            assert_eq!(
                failure.error.details,
                Some(json!({"status": status, "body": {"error": {"message": "no", "type": "x", "code": "y"}}}))
            );
        }
    }

    #[test]
    fn context_length_in_engines_words() {
        for body in [
            r#"{"error":{"message":"This model's maximum context length is 2048 tokens.","type":"BadRequestError","param":null,"code":400}}"#,
            r#"{"object":"error","message":"the model's context length is only 2048 tokens","code":400}"#,
            r#"{"error":{"message":"the request exceeds the available context size","type":"exceed_context_size_error"}}"#,
            r#"{"error":{"message":"too long","code":"context_length_exceeded"}}"#,
        ] {
            let failure = refused(400, body.as_bytes());
            assert_eq!(code_of(&failure), (ErrorCode::ContextLengthExceeded, false), "{body}");
        }
    }

    #[test]
    fn out_of_memory_in_engines_words() {
        for (status, text, is_oom) in [
            (500, "CUDA out of memory. Tried to allocate 2.00 GiB.", true),
            (500, "torch.OutOfMemoryError: HIP", true),
            (503, "CUDA error: out of memory", true),
            (400, "a poem about a robot that runs out of memory", false),
            (500, "the memory of this engine is fine", false),
        ] {
            let failure = refused(status, json!({"error": {"message": text}}).to_string().as_bytes());
            assert_eq!(failure.error.code == ErrorCode::WorkerOom, is_oom, "{status} {text}");
            let line = line_error(Some(status), Some("worker_error"), Some(text), None);
            assert_eq!(line.error.code == ErrorCode::WorkerOom, is_oom, "{status} {text}");
        }
    }

    #[test]
    fn bodies_that_are_no_error_objects() {
        assert_eq!(refused(404, br#"{"detail":"Not Found"}"#).error.message, "Not Found");
        assert_eq!(refused(500, b"Internal Server Error").error.message, "Internal Server Error");
        assert_eq!(refused(502, b"").error.message, "the engine answered with status 502 and no message");
        let long = refused(400, &vec![b'x'; 100_000]);
        assert!(long.error.message.len() < 3000);
        assert!(serde_json::to_string(&long.error.details).unwrap().len() < 20_000);
    }

    #[test]
    fn our_lines_and_frames() {
        let line = line_error(Some(400), Some("invalid_request"), Some("size is odd"), Some("size"));
        assert_eq!(code_of(&line), (ErrorCode::InvalidRequest, false));
        assert_eq!(line.error.param.as_deref(), Some("size"));
        assert_eq!(code_of(&line_error(None, Some("worker_oom"), None, None)), (ErrorCode::WorkerOom, true));
        assert_eq!(code_of(&line_error(Some(500), Some("worker_error"), None, None)), (ErrorCode::WorkerError, true));
        let frame = frame_error(&json!({"message": "EngineCore", "code": 500}));
        assert_eq!(code_of(&frame), (ErrorCode::WorkerError, true));
        let frame = frame_error(&json!({"message": "bad", "code": 400}));
        assert_eq!(code_of(&frame), (ErrorCode::UpstreamRejected, false));
        let frame = frame_error(&json!({"message": "bad", "code": "invalid_request"}));
        assert_eq!(code_of(&frame), (ErrorCode::InvalidRequest, false));
    }

    #[test]
    fn text_needs_a_finish_reason() {
        let check = |body: Value| check("/v1/chat/completions", "application/json", body.to_string().as_bytes());
        let good =
            json!({"choices": [{"index": 0, "finish_reason": "stop", "message": {}}], "usage": {"total_tokens": 3}});
        assert_eq!(check(good), Ok(Some(json!({"total_tokens": 3}))));
        for bad in [
            json!({"choices": [{"index": 0, "finish_reason": "abort"}]}),
            json!({"choices": [{"index": 0, "finish_reason": null}]}),
            json!({"choices": [{"finish_reason": "stop"}, {"index": 1}]}),
        ] {
            let failure = check(bad.clone()).unwrap_err();
            assert_eq!(code_of(&failure), (ErrorCode::WorkerError, true), "{bad}");
        }
        for bad in [json!({"choices": []}), json!({}), json!([])] {
            let failure = check(bad.clone()).unwrap_err();
            assert_eq!(code_of(&failure), (ErrorCode::InvalidOutput, false), "{bad}");
        }
    }

    #[test]
    fn images_need_content() {
        let check = |body: &str| check("/v1/images/generations", "application/json", body.as_bytes());
        assert_eq!(check(r#"{"created":1,"data":[{"b64_json":"AA=="}]}"#), Ok(None));
        assert_eq!(check(r#"{"data":[{"url":"http:\/\/x"}],"usage":{"a":1}}"#), Ok(Some(json!({"a": 1}))));
        for bad in
            [r#"{"data":[]}"#, r#"{"data":[{"b64_json":""}]}"#, r#"{"data":[{"b64_json":"AA=="},{}]}"#, "{}", "PNG", ""]
        {
            assert_eq!(code_of(&check(bad).unwrap_err()), (ErrorCode::InvalidOutput, false), "{bad}");
        }
    }

    #[test]
    fn other_endpoints_need_a_body() {
        assert_eq!(check("/v1/audio/speech", "audio/wav", b"RIFF"), Ok(None));
        assert!(check("/v1/audio/speech", "audio/wav", b"").is_err());
        assert_eq!(check("/echo", "application/json", b"[1]"), Ok(None));
        assert!(check("/echo", "application/json", b"{").is_err());
    }

    #[test]
    fn cuts_between_characters() {
        assert_eq!(cut("aé".into(), 2), "a…");
        assert_eq!(cut("aé".into(), 3), "aé");
        assert_eq!(cut("\u{1b}[31mred\u{1b}[0m\n\0\0x".into(), 5), "red\n …", "a terminal obeys nothing of it");
    }
}
