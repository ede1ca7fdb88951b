//! Bad input: a 4xx with a code, and where a field is at fault, its name. Whatever is sent, the queue works afterwards.

use reqwest::Method;
use serde_json::{Value, json};

use crate::common::{Api, Site, echo, echo_job, with};

fn site() -> Site {
    Site::new()
        .server("body_bytes_max", "64KiB")
        .model("a", echo("custom", &[] as &[&str]))
        .model("t", echo("text", &[] as &[&str]))
        .model("i", echo("image", &[] as &[&str]))
        .model("s", echo("audio", &[] as &[&str]))
}

/// What is sent, and what must come back; `param` is `None` where no field is at fault.
struct Case {
    what: &'static str,
    path: &'static str,
    body: Vec<u8>,
    status: u16,
    code: &'static str,
    param: Option<&'static str>,
}

fn case(
    what: &'static str,
    path: &'static str,
    body: impl Into<Vec<u8>>,
    (status, code, param): (u16, &'static str, Option<&'static str>),
) -> Case {
    Case { what, path, body: body.into(), status, code, param }
}

fn chat(more: Value) -> String {
    with(json!({"model": "t", "messages": [{"role": "user", "content": "x"}]}), more).to_string()
}

fn job(more: Value) -> String {
    with(echo_job("a", json!({})), more).to_string()
}

fn cases() -> Vec<Case> {
    const JOBS: &str = "/v1/jobs";
    const CHAT: &str = "/v1/chat/completions";
    let invalid = |param| (400, "invalid_request", Some(param));
    let not_json = (400, "invalid_json", None);
    let deep = format!(
        "{{\"endpoint\":\"/echo\",\"body\":{{\"model\":\"a\",\"x\":{}1{}}}}}",
        "[".repeat(10_000),
        "]".repeat(10_000)
    );
    vec![
        case("no JSON", JOBS, "{endpoint: no}", not_json),
        case("half a body", JOBS, "{\"endpoint\": ", not_json),
        case("no body", CHAT, "", not_json),
        case("a list", JOBS, "[1, 2]", (400, "invalid_request", None)),
        case("text", CHAT, "\"hi\"", (400, "invalid_request", None)),
        case("not UTF-8", JOBS, b"{\"endpoint\": \"\xff\xfe\"}".to_vec(), not_json),
        case("a raw NUL", JOBS, b"{\"endpoint\": \"\0\"}".to_vec(), not_json),
        case("nested too deep", JOBS, deep, not_json),
        case("an unknown field", JOBS, job(json!({"priorty": 3})), invalid("priorty")),
        case("no model", JOBS, json!({"endpoint": "/echo", "body": {}}).to_string(), invalid("body.model")),
        case(
            "a model that is no text",
            JOBS,
            json!({"endpoint": "/echo", "body": {"model": 7}}).to_string(),
            invalid("body.model"),
        ),
        case(
            "an unknown model",
            JOBS,
            echo_job("nobody", json!({})).to_string(),
            (404, "model_not_found", Some("body.model")),
        ),
        case("no endpoint", JOBS, json!({"body": {"model": "a"}}).to_string(), invalid("endpoint")),
        case("no body field", JOBS, json!({"endpoint": "/echo"}).to_string(), invalid("body")),
        case(
            "an endpoint of another model",
            JOBS,
            json!({"endpoint": "/echo", "body": {"model": "t"}}).to_string(),
            invalid("body.model"),
        ),
        case("a priority too high", JOBS, job(json!({"priority": 11})), invalid("priority")),
        case("a priority that is no number", JOBS, job(json!({"priority": "high"})), invalid("priority")),
        case("a negative priority", JOBS, job(json!({"priority": -1})), invalid("priority")),
        case("a broken priority", JOBS, job(json!({"priority": 1.5})), invalid("priority")),
        case("no time at all", JOBS, job(json!({"timeout_s": 0})), invalid("timeout_s")),
        case("a negative deadline", JOBS, job(json!({"deadline_s": -5})), invalid("deadline_s")),
        case("a deadline beyond time", JOBS, job(json!({"deadline_s": 1e300})), invalid("deadline_s")),
        case("no attempts", JOBS, job(json!({"max_attempts": 0})), invalid("max_attempts")),
        case("metadata that is no object", JOBS, job(json!({"metadata": [1]})), invalid("metadata")),
        case("metadata that is no text", JOBS, job(json!({"metadata": {"a": 1}})), invalid("metadata")),
        case(
            "a model of another kind",
            CHAT,
            json!({"model": "i", "messages": [{"role": "user", "content": "x"}]}).to_string(),
            invalid("model"),
        ),
        case("an unknown model", CHAT, chat(json!({"model": "nobody"})), (404, "model_not_found", Some("model"))),
        case("a model named NUL", CHAT, chat(json!({"model": "\0"})), (404, "model_not_found", Some("model"))),
        case("no messages", CHAT, json!({"model": "t"}).to_string(), invalid("messages")),
        case("messages that are none", CHAT, chat(json!({"messages": []})), invalid("messages")),
        case("a stream that is no yes or no", CHAT, chat(json!({"stream": "yes"})), invalid("stream")),
        case("an unknown tier", CHAT, chat(json!({"service_tier": "gold"})), invalid("service_tier")),
        case("no prompt", "/v1/images/generations", json!({"model": "i"}).to_string(), invalid("prompt")),
        case(
            "too many images",
            "/v1/images/generations",
            json!({"model": "i", "prompt": "x", "n": 11}).to_string(),
            invalid("n"),
        ),
        case(
            "an unknown form",
            "/v1/images/generations",
            json!({"model": "i", "prompt": "x", "response_format": "jpg"}).to_string(),
            invalid("response_format"),
        ),
        case(
            "streamed images",
            "/v1/images/generations",
            json!({"model": "i", "prompt": "x", "stream": true}).to_string(),
            (400, "unsupported_parameter", Some("stream")),
        ),
        case(
            "an unknown sound format",
            "/v1/audio/speech",
            json!({"model": "s", "input": "x", "response_format": "midi"}).to_string(),
            invalid("response_format"),
        ),
        case("no input", "/v1/audio/speech", json!({"model": "s"}).to_string(), invalid("input")),
        case("nothing in bulk", "/v1/jobs/bulk", json!({"requests": []}).to_string(), invalid("requests")),
        case("bulk that is no list", "/v1/jobs/bulk", json!({"requests": "x"}).to_string(), invalid("requests")),
        case(
            "too many in bulk",
            "/v1/jobs/bulk",
            json!({"requests": vec![json!({}); 1001]}).to_string(),
            invalid("requests"),
        ),
        case(
            "too large a body",
            JOBS,
            job(json!({"metadata": {"x": "y".repeat(70_000)}})),
            (413, "payload_too_large", None),
        ),
    ]
}

#[tokio::test]
async fn bad_bodies_are_refused_with_code_and_param() {
    let server = site().start().await;
    let api = &server.api;
    let mut wrong = Vec::new();
    for Case { what, path, body, status, code, param } in cases() {
        let reply = api.try_send(Method::POST, path, Some(body)).await;
        let reply = reply.unwrap_or_else(|error| panic!("{path}, {what}: {error:?}"));
        let error: Value = serde_json::from_slice(&reply.body).unwrap_or_default();
        let got = (reply.status, error["error"]["code"].as_str(), error["error"]["param"].as_str());
        let has_words = error["error"]["message"].as_str().is_some_and(|message| !message.is_empty());
        if got != (status, Some(code), param) || !has_words || error["status"] != status {
            wrong.push(format!("{path}, {what}: {}", reply.text()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(api.get("/v1/jobs").await.is(200).json()["data"], json!([]), "nothing of it became a job");
    works(api).await;
}

#[tokio::test]
async fn bad_requests_are_refused_whatever_is_wrong_with_them() {
    let server = site().start().await;
    let api = &server.api;
    for (method, path) in [
        (Method::PUT, "/v1/jobs"),
        (Method::GET, "/v1/jobs/bulk/"),
        (Method::DELETE, "/v1/queue"),
        (Method::GET, "/v1/chat/completions"),
        (Method::POST, "/health"),
        (Method::PATCH, "/v1/models"),
    ] {
        let reply = api.send(method.clone(), path, None).await;
        assert!([404, 405].contains(&reply.status), "{method} {path}: {} {}", reply.status, reply.text());
        assert!(
            ["not_found", "method_not_allowed"].contains(&reply.code().as_str()),
            "{method} {path}: {}",
            reply.text()
        );
    }
    api.send(Method::PUT, "/v1/jobs", None).await.refused(405, "method_not_allowed");
    for path in ["/", "/v2/jobs", "/v1", "/v1/job", "/v1/%00", "/v1/jobs/%ff", "/v1/jobs/..%2f..%2fetc", "//v1/jobs"] {
        let reply = api.get(path).await;
        assert!((400..500).contains(&reply.status), "{path}: {} {}", reply.status, reply.text());
        assert!(!reply.code().is_empty(), "{path}: {}", reply.text());
    }
    let multipart = api.header("content-type", "multipart/form-data; boundary=x");
    multipart.send(Method::POST, "/v1/jobs", Some(b"--x--".to_vec())).await.refused(415, "unsupported_media_type");
    for query in ["wait=x", "wait=-1", "until=never&wait=1"] {
        let id = api.submit_echo("a", json!({})).await;
        api.get(&format!("/v1/jobs/{id}?{query}")).await.refused(400, "invalid_request");
    }
    // One that is much too large, and not read: the answer arrives all the same.
    for path in ["/v1/jobs", "/v1/chat/completions"] {
        let reply = api.send(Method::POST, path, Some(vec![b' '; 20_000_000])).await;
        reply.refused(413, "payload_too_large");
        // Nor is the next request lost on a connection that is being closed.
        api.get("/v1/jobs").await.is(200);
    }
    let native = api.get("/v1/jobs/job_x").await.is(404);
    assert_eq!(native.header("content-type"), "application/problem+json");
    let shim = api.post("/v1/chat/completions", &json!({})).await.is(400);
    assert_eq!(shim.header("content-type"), "application/json");
    works(api).await;
}

#[tokio::test]
async fn raw_garbage_on_the_socket_harms_nobody() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let server = site().start().await;
    let address = server.api.base.trim_start_matches("http://").to_owned();
    let garbage: [&[u8]; 5] = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"\0\0\0\0\r\n\r\n",
    ];
    for bytes in garbage {
        let mut socket = tokio::net::TcpStream::connect(&address).await.unwrap();
        // The server may have hung up already.
        let _ = socket.write_all(bytes).await;
        let _ = socket.shutdown().await;
        let mut answer = Vec::new();
        let _ = crate::common::within(crate::common::LIMIT, "an end", socket.read_to_end(&mut answer)).await;
        assert!(!answer.starts_with(b"HTTP/1.1 2"), "{:?}", String::from_utf8_lossy(&answer));
    }
    // A body that is promised and not sent.
    let mut socket = tokio::net::TcpStream::connect(&address).await.unwrap();
    socket.write_all(b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"endpoint\"").await.unwrap();
    drop(socket);
    assert_eq!(server.api.get("/v1/jobs").await.is(200).json()["data"], json!([]));
    works(&server.api).await;
}

/// Odd, and all right.
#[tokio::test]
async fn odd_but_valid_input_goes_through_unharmed() {
    let server = site().start().await;
    let api = &server.api;
    let text = "\u{0000}\u{FEFF}\u{202E}\u{1F682}' OR 1=1; --\"\\";
    let request = json!({"endpoint": "/echo", "body": {"model": "a", "text": text, "big": 1.5e300, "__proto__": {}}, "metadata": {"k": text}});
    let id = api.submit(&request).await;
    api.succeeded(&id).await;
    let answer = api.get(&format!("/v1/jobs/{id}/response")).await.is(200).json();
    assert_eq!(answer["body"]["text"], text);
    assert_eq!(api.job(&id).await["metadata"]["k"], text);
    let chunked = format!("\u{feff}{}", echo_job("a", json!({})));
    api.send(Method::POST, "/v1/jobs", Some(chunked.into_bytes())).await.is(202);
    works(api).await;
}

/// The queue is as well as ever.
async fn works(api: &Api) {
    api.get("/readyz").await.is(200);
    let id = api.submit_echo("a", json!({})).await;
    api.succeeded(&id).await;
}
