//! The worker client against a server that sends exactly the bytes a test wants.

#![expect(clippy::unwrap_used, reason = "a test may panic in its helpers too")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use roundhouse::domain::worker::{Answer, Outcome, Progress};
use roundhouse::domain::{ErrorCode, JobError, JobId, Token};
use roundhouse::lifecycle::Tasks;
use roundhouse::worker::client::{Call, RunTag, WorkerClient};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

/// What the server does for one request, in order.
#[derive(Clone)]
enum Act {
    Send(Vec<u8>),
    /// Ends the connection.
    Close,
    /// Ends the connection and accepts no other one.
    Die,
    /// Waits until the client has closed the connection.
    AwaitClose,
}

struct Server {
    url: String,
    requests: Mutex<Vec<String>>,
    connections: AtomicUsize,
    client_closed: Notify,
    dead: CancellationToken,
}

impl Server {
    /// Follows `scripts`, one per request in order of arrival.
    async fn start(scripts: Vec<Vec<Act>>) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Arc::new(Self {
            url: format!("http://{}", listener.local_addr().unwrap()),
            requests: Mutex::default(),
            connections: AtomicUsize::default(),
            client_closed: Notify::new(),
            dead: CancellationToken::new(),
        });
        let (tasks, state) = (Tasks::new(), server.clone());
        let scripts = Arc::new(scripts);
        tasks.clone().spawn("server", async move {
            let listener = listener;
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    () = state.dead.cancelled() => break,
                };
                state.connections.fetch_add(1, Ordering::SeqCst);
                let (stream, _) = accepted.unwrap();
                let (state, scripts) = (state.clone(), scripts.clone());
                tasks.spawn("connection", async move {
                    state.serve(stream, &scripts).await;
                });
            }
        });
        server
    }

    async fn serve(&self, mut stream: TcpStream, scripts: &[Vec<Act>]) {
        while let Some(request) = read_request(&mut stream).await {
            let at = {
                let mut requests = self.requests.lock().unwrap();
                requests.push(request);
                requests.len() - 1
            };
            for act in &scripts[at] {
                match act {
                    Act::Send(bytes) => stream.write_all(bytes).await.unwrap(),
                    Act::Close => return,
                    Act::Die => {
                        self.dead.cancel();
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        return;
                    }
                    Act::AwaitClose => {
                        let count = stream.read(&mut [0; 16]).await.unwrap_or(0);
                        assert_eq!(count, 0, "more was sent");
                        self.client_closed.notify_one();
                        return;
                    }
                }
            }
        }
    }

    fn request(&self, at: usize) -> String {
        self.requests.lock().unwrap()[at].clone()
    }

    fn counts(&self) -> (usize, usize) {
        let connections = self.connections.load(Ordering::SeqCst);
        (connections, self.requests.lock().unwrap().len())
    }
}

/// Head and body; `None` at the end of the connection.
async fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let count = stream.read(&mut buffer).await.ok().filter(|n| *n > 0)?;
        bytes.extend_from_slice(&buffer[..count]);
        let text = String::from_utf8(bytes.clone()).unwrap();
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        let length = head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
        if body.len() == length.unwrap_or(0) {
            return Some(text);
        }
    }
}

fn whole(status: u16, content_type: &str, body: &[u8]) -> Act {
    let mut bytes =
        format!("HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n\r\n", body.len())
            .into_bytes();
    bytes.extend_from_slice(body);
    Act::Send(bytes)
}

fn head(content_type: &str) -> Act {
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\n\r\n");
    Act::Send(head.into_bytes())
}

fn chunk(data: &str) -> Act {
    Act::Send(format!("{:x}\r\n{data}\r\n", data.len()).into_bytes())
}

fn end() -> Act {
    Act::Send(b"0\r\n\r\n".to_vec())
}

fn call(server: &Server, endpoint: &str, stream: bool) -> Call {
    call_to(&server.url, endpoint, stream)
}

fn call_to(url: &str, endpoint: &str, stream: bool) -> Call {
    Call {
        base_url: url.to_owned(),
        endpoint: endpoint.to_owned(),
        token: Token { id: JobId::new(1_700_000_000_000, 5, 7), attempt: 2 },
        body: Bytes::from_static(b"{\"prompt\":\"x\"}"),
        stream,
        run: None,
        timeout: Duration::from_secs(20),
    }
}

/// Runs a call to its end; gives what was told on the way.
async fn run(client: &WorkerClient, call: Call) -> (Outcome, Vec<Progress>) {
    let (sender, mut told) = mpsc::channel(64);
    let outcome = client.run(call, sender, CancellationToken::new()).await;
    let mut all = Vec::new();
    while let Some(progress) = told.recv().await {
        all.push(progress);
    }
    (outcome, all)
}

fn answer(outcome: Outcome) -> Answer {
    match outcome {
        Outcome::Answered(answer) => answer,
        other => panic!("no answer: {other:?}"),
    }
}

fn failure(outcome: Outcome) -> (ErrorCode, bool, JobError) {
    match outcome {
        Outcome::Failed { error, retriable } => (error.code, retriable, error),
        other => panic!("no failure: {other:?}"),
    }
}

fn json_of(answer: &Answer) -> Value {
    serde_json::from_slice(&answer.body).unwrap()
}

const CHAT: &str = "/v1/chat/completions";
const CHAT_ANSWER: &str = r#"{"id":"c","choices":[{"index":0,"message":{"role":"assistant","content":"4"},"finish_reason":"stop"}],"usage":{"total_tokens":3}}"#;

#[tokio::test]
async fn a_stock_server_answers_in_json() {
    let server = Server::start(vec![vec![whole(200, "application/json; charset=utf-8", CHAT_ANSWER.as_bytes())]]).await;
    let mut call = call(&server, CHAT, false);
    call.run = Some(RunTag { id: "r7".into(), count: 4 });
    let (outcome, told) = run(&WorkerClient::new(), call).await;
    let answer = answer(outcome);
    assert_eq!(answer.status, 200);
    assert_eq!(answer.content_type, "application/json; charset=utf-8");
    assert_eq!(answer.body, CHAT_ANSWER);
    assert_eq!(answer.usage, Some(json!({"total_tokens": 3})));
    assert!(told.is_empty());

    let request = server.request(0).to_lowercase();
    let id = JobId::new(1_700_000_000_000, 5, 7);
    for line in [
        "post /v1/chat/completions http/1.1".to_owned(),
        "content-type: application/json".to_owned(),
        "accept: application/x-ndjson".to_owned(),
        format!("x-request-id: {id}.2"),
        "x-roundhouse-run: r7;n=4".to_owned(),
        format!("host: {}", server.url.trim_start_matches("http://")),
    ] {
        assert!(request.contains(&line), "{line} in {request}");
    }
    assert!(request.ends_with("{\"prompt\":\"x\"}"));
}

#[tokio::test]
async fn connections_are_kept_after_each_kind_of_answer() {
    let sse = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
    let server = Server::start(vec![
        vec![whole(200, "application/json", CHAT_ANSWER.as_bytes())],
        vec![whole(400, "application/json", b"{\"error\":{\"message\":\"no\"}}")],
        vec![head("text/event-stream"), chunk(sse), end()],
        vec![head("application/x-ndjson"), chunk(&format!("{{\"type\":\"result\",\"json\":{CHAT_ANSWER}}}\n")), end()],
        vec![whole(200, "application/json", CHAT_ANSWER.as_bytes())],
    ])
    .await;
    let client = WorkerClient::new();
    for at in 0..5 {
        let (outcome, _) = run(&client, call(&server, CHAT, at == 2)).await;
        assert_eq!(matches!(outcome, Outcome::Answered(_)), at != 1, "{at}");
        // Let the last, empty chunk arrive: the next call must not find it missing.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(server.counts(), (1, 5));
}

#[tokio::test]
async fn our_workers_tell_progress_and_a_result() {
    let lines = format!(
        "{}\n{}\n\n{}\n",
        r#"{"type":"progress","step":1,"total":4}"#,
        r#"{"type":"progress","step":4,"total":4}"#,
        r#"{"type":"result","content_type":"application/json","json":{"data":[{"b64_json":"AA=="}], "usage":{"n":1}}}"#,
    );
    let mut script = vec![head("application/x-ndjson")];
    script.extend(lines.as_bytes().chunks(7).map(|piece| chunk(std::str::from_utf8(piece).unwrap())));
    script.push(end());
    let server = Server::start(vec![script]).await;
    let (outcome, told) = run(&WorkerClient::new(), call(&server, "/v1/images/generations", false)).await;
    assert_eq!(told, [Progress::Step { step: 1, total: 4 }, Progress::Step { step: 4, total: 4 }]);
    let answer = answer(outcome);
    assert_eq!(answer.body, r#"{"data":[{"b64_json":"AA=="}], "usage":{"n":1}}"#);
    assert_eq!(answer.content_type, "application/json");
    assert_eq!(answer.usage, Some(json!({"n": 1})));
}

#[tokio::test]
async fn our_workers_send_bytes_in_base64() {
    let line = r#"{"type":"result","content_type":"audio/wav","body_b64":"UklGRg=="}"#;
    // Without a line end, as the last line may come.
    let server = Server::start(vec![vec![head("application/x-ndjson"), chunk(line), end()]]).await;
    let (outcome, _) = run(&WorkerClient::new(), call(&server, "/v1/audio/speech", false)).await;
    let answer = answer(outcome);
    assert_eq!((&answer.body[..], answer.content_type.as_str()), (&b"RIFF"[..], "audio/wav"));
}

#[tokio::test]
async fn error_lines_have_their_own_codes() {
    let cases = [
        (r#"{"type":"error","status":507,"code":"worker_oom","message":"oom"}"#, ErrorCode::WorkerOom, true),
        (
            r#"{"type":"error","status":400,"code":"invalid_request","message":"odd","param":"size"}"#,
            ErrorCode::InvalidRequest,
            false,
        ),
        (r#"{"type":"error","status":500,"code":"worker_error","message":"x"}"#, ErrorCode::WorkerError, true),
        (r#"{"type":"error","status":499,"code":"cancelled","message":"x"}"#, ErrorCode::WorkerError, true),
    ];
    for (line, code, retriable) in cases {
        let server = Server::start(vec![vec![head("application/x-ndjson"), chunk(&format!("{line}\n")), end()]]).await;
        let (outcome, _) = run(&WorkerClient::new(), call(&server, "/echo", false)).await;
        let (got, got_retriable, error) = failure(outcome);
        assert_eq!((got, got_retriable), (code, retriable), "{line}");
        if code == ErrorCode::InvalidRequest {
            assert_eq!(error.param.as_deref(), Some("size"));
            assert_eq!(error.details, Some(json!({"status": 400})));
        }
    }
}

#[tokio::test]
async fn lines_without_a_result_are_a_failure() {
    let server = Server::start(vec![vec![
        head("application/x-ndjson"),
        chunk("{\"type\":\"progress\",\"step\":1,\"total\":2}\n"),
        end(),
    ]])
    .await;
    let (outcome, _) = run(&WorkerClient::new(), call(&server, "/echo", false)).await;
    assert_eq!(failure(outcome).0, ErrorCode::WorkerError);
}

fn delta(content: &str, finish: Option<&str>) -> String {
    json!({"id": "c", "created": 1, "model": "m", "choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish}]})
        .to_string()
}

const ROLE: &str =
    r#"{"id":"c","created":1,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}"#;

/// A stream of these payloads, in network pieces of `size` bytes.
fn stream(payloads: &[&str], size: usize) -> Vec<Act> {
    let text: String = payloads.iter().map(|p| format!(": comment\r\n\r\ndata: {p}\r\n\r\n")).collect();
    let mut acts = vec![head("text/event-stream; charset=utf-8")];
    acts.extend(text.as_bytes().chunks(size).map(|piece| chunk(std::str::from_utf8(piece).unwrap())));
    acts.push(end());
    acts
}

#[tokio::test]
async fn a_stream_is_passed_on_as_it_came_and_assembled() {
    let usage = r#"{"id":"c","choices":[],"usage":{"total_tokens":9}}"#;
    let (first, second, last) = (delta("Hel", None), delta("lo", None), delta("", Some("stop")));
    let payloads = [ROLE, &first, &second, &last, usage, "[DONE]"];
    for size in [1 << 20, 11] {
        let server = Server::start(vec![stream(&payloads, size)]).await;
        let (outcome, told) = run(&WorkerClient::new(), call(&server, CHAT, true)).await;
        let expected: Vec<Progress> =
            payloads[..5].iter().map(|p| Progress::Chunk(Bytes::copy_from_slice(p.as_bytes()))).collect();
        assert_eq!(told, expected);
        let answer = answer(outcome);
        assert_eq!(answer.content_type, "application/json");
        assert_eq!(answer.usage, Some(json!({"total_tokens": 9})));
        let body = json_of(&answer);
        assert_eq!(body["object"], "chat.completion");
        assert_eq!(
            body["choices"],
            json!([{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "logprobs": null, "finish_reason": "stop"}])
        );
        assert!(server.request(0).contains("accept: text/event-stream"));
    }
}

#[tokio::test]
async fn a_stream_that_fails_may_be_tried_again_only_before_its_first_content() {
    let error = r#"{"error":{"message":"EngineCore encountered an issue","code":500}}"#;
    let content = delta("Hel", None);
    let aborted = delta("", Some("abort"));
    let cases: [(&[&str], bool, usize); 6] = [
        (&[ROLE, error, "[DONE]"], true, 0),
        (&[ROLE, &content, error, "[DONE]"], false, 2),
        (&[ROLE, "[DONE]"], true, 0),
        (&[ROLE, &content, "[DONE]"], false, 2),
        (&[ROLE, &content, &aborted, "[DONE]"], false, 2),
        (&[ROLE, &aborted, "[DONE]"], true, 0),
    ];
    for (payloads, retriable, passed_on) in cases {
        let server = Server::start(vec![stream(payloads, 1 << 20)]).await;
        let (outcome, told) = run(&WorkerClient::new(), call(&server, CHAT, true)).await;
        let (code, got, _) = failure(outcome);
        assert_eq!((code, got, told.len()), (ErrorCode::WorkerError, retriable, passed_on), "{payloads:?}");
    }
}

#[tokio::test]
async fn an_answer_without_a_good_finish_reason_is_a_failure() {
    let body = CHAT_ANSWER.replace("\"stop\"", "\"abort\"");
    let server = Server::start(vec![vec![whole(200, "application/json", body.as_bytes())]]).await;
    let (outcome, _) = run(&WorkerClient::new(), call(&server, CHAT, false)).await;
    let (code, retriable, error) = failure(outcome);
    assert_eq!((code, retriable), (ErrorCode::WorkerError, true));
    assert!(error.message.contains("`abort`"));
}

#[tokio::test]
async fn a_broken_connection_means_a_lost_worker() {
    let half = Act::Send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{".to_vec());
    let scripts: [Vec<Act>; 4] = [
        vec![Act::Close],
        vec![half, Act::Close],
        vec![head("application/x-ndjson"), chunk("{\"type\":\"progress\",\"step\":1,\"total\":2}\n"), Act::Close],
        vec![head("text/event-stream"), chunk(&format!("data: {}\n\n", delta("a", None))), Act::Close],
    ];
    let (before, within) =
        ("its connection broke before it answered", "its connection broke in the middle of the answer");
    for (script, expected) in scripts.into_iter().zip([before, within, within, within]) {
        let server = Server::start(vec![script]).await;
        let (outcome, _) = run(&WorkerClient::new(), call(&server, CHAT, false)).await;
        let Outcome::WorkerLost { reason, .. } = outcome else { panic!("{outcome:?}") };
        assert_eq!(reason, expected, "in plain words, without those of the HTTP library");
        assert_eq!(server.counts(), (1, 1), "a fresh connection is not tried twice");
    }
}

#[tokio::test]
async fn a_refused_connection_means_a_lost_worker() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = Server::start(vec![]).await;
    let mut call = call(&server, CHAT, false);
    call.base_url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let (outcome, _) = run(&WorkerClient::new(), call).await;
    let Outcome::WorkerLost { reason, .. } = outcome else { panic!("{outcome:?}") };
    assert!(reason.contains("cannot connect"), "{reason}");
}

#[tokio::test]
async fn a_connection_closed_while_idle_is_replaced() {
    let good = whole(200, "application/json", CHAT_ANSWER.as_bytes());
    let server = Server::start(vec![vec![good.clone(), Act::Close], vec![good]]).await;
    let client = WorkerClient::new();
    answer(run(&client, call(&server, CHAT, false)).await.0);
    tokio::time::sleep(Duration::from_millis(30)).await;
    answer(run(&client, call(&server, CHAT, false)).await.0);
    assert_eq!(server.counts(), (2, 2));
}

/// More stale connections than a task may look at before it has to yield: at some point their end is not seen in time.
#[tokio::test]
async fn any_number_of_connections_may_be_stale() {
    const CONNECTIONS: usize = 200;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let Act::Send(hello) = whole(200, "application/json", CHAT_ANSWER.as_bytes()) else {
        unreachable!("whole() sends")
    };
    let serve = async {
        let mut streams = Vec::new();
        while streams.len() < CONNECTIONS {
            let (mut stream, _) = listener.accept().await.unwrap();
            read_request(&mut stream).await.unwrap();
            streams.push(stream);
        }
        for stream in &mut streams {
            stream.write_all(&hello).await.unwrap();
        }
        streams
    };
    let client = WorkerClient::new();
    let calls = join_all((0..CONNECTIONS).map(|_| run(&client, call_to(&url, CHAT, false))));
    let (streams, answered) = tokio::join!(serve, calls);
    assert!(answered.into_iter().all(|(outcome, _)| answer(outcome).status == 200));

    drop(streams);
    tokio::time::sleep(Duration::from_millis(30)).await;
    let again = async {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            if read_request(&mut stream).await.is_some() {
                stream.write_all(&hello).await.unwrap();
                return stream;
            }
        }
    };
    let call = call_to(&url, CHAT, false);
    let both = async { tokio::join!(again, run(&client, call)) };
    let (_stream, (outcome, _)) = tokio::time::timeout(Duration::from_secs(20), both).await.expect("it hangs");
    assert_eq!(answer(outcome).status, 200);
}

#[tokio::test]
async fn a_close_that_crosses_a_request_is_tried_again_if_the_worker_lives() {
    let good = whole(200, "application/json", CHAT_ANSWER.as_bytes());
    // The second request is read and the connection closed without a byte, as an idle timer would.
    let server = Server::start(vec![vec![good.clone()], vec![Act::Close], vec![good]]).await;
    let client = WorkerClient::new();
    answer(run(&client, call(&server, CHAT, false)).await.0);
    answer(run(&client, call(&server, CHAT, false)).await.0);
    assert_eq!(server.counts(), (2, 3));
}

#[tokio::test]
async fn a_worker_that_died_on_a_reused_connection_is_lost() {
    let good = whole(200, "application/json", CHAT_ANSWER.as_bytes());
    let server = Server::start(vec![vec![good], vec![Act::Die]]).await;
    let client = WorkerClient::new();
    answer(run(&client, call(&server, CHAT, false)).await.0);
    let (outcome, _) = run(&client, call(&server, CHAT, false)).await;
    assert!(matches!(outcome, Outcome::WorkerLost { .. }), "{outcome:?}");
    assert_eq!(server.counts(), (1, 2), "the job ran once");
}

#[tokio::test]
async fn a_refusal_keeps_status_and_body() {
    let body = br#"{"error":{"message":"no such field","type":"BadRequestError","param":"x","code":400}}"#;
    let server = Server::start(vec![vec![whole(422, "application/json", body)]]).await;
    let (outcome, _) = run(&WorkerClient::new(), call(&server, CHAT, false)).await;
    let (code, retriable, error) = failure(outcome);
    assert_eq!((code, retriable), (ErrorCode::UpstreamRejected, false));
    assert_eq!(error.param.as_deref(), Some("x"));
    let details = error.details.unwrap();
    assert_eq!(details["status"], 422);
    assert_eq!(details["body"]["error"]["message"], "no such field");
}

#[tokio::test]
async fn time_up_and_stop_close_the_connection() {
    for stopped in [false, true] {
        let server = Server::start(vec![vec![head("application/x-ndjson"), Act::AwaitClose]]).await;
        let mut call = call(&server, "/echo", false);
        let stop = CancellationToken::new();
        call.timeout = Duration::from_millis(if stopped { 20_000 } else { 200 });
        let (sender, _told) = mpsc::channel(1);
        let client = WorkerClient::new();
        if stopped {
            let asked = async {
                while server.counts().1 == 0 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                stop.cancel();
            };
            let (outcome, ()) = tokio::join!(client.run(call, sender, stop.clone()), asked);
            assert_eq!(outcome, Outcome::Stopped);
        } else {
            let (code, retriable, error) = failure(client.run(call, sender, stop).await);
            assert_eq!((code, retriable), (ErrorCode::ExecutionTimeout, true));
            assert!(error.message.contains("0.2 s"), "{}", error.message);
        }
        tokio::time::timeout(Duration::from_secs(5), server.client_closed.notified())
            .await
            .expect("the connection is closed");
    }
}

#[tokio::test]
async fn a_job_stopped_before_it_starts_is_not_sent() {
    let server = Server::start(vec![]).await;
    let stop = CancellationToken::new();
    stop.cancel();
    let (sender, _told) = mpsc::channel(1);
    let outcome = WorkerClient::new().run(call(&server, CHAT, false), sender, stop).await;
    assert_eq!(outcome, Outcome::Stopped);
    assert_eq!(server.counts(), (0, 0));
}

#[tokio::test]
async fn a_full_channel_is_waited_for_and_a_closed_one_ignored() {
    let contents: Vec<String> = (0..50).map(|at| delta(&format!("{at} "), None)).collect();
    let last = delta("", Some("stop"));
    let mut payloads: Vec<&str> = contents.iter().map(String::as_str).collect();
    payloads.extend([last.as_str(), "[DONE]"]);
    let script = stream(&payloads, 1 << 20);
    let server = Server::start(vec![script.clone(), script]).await;
    let client = WorkerClient::new();

    let (sender, mut told) = mpsc::channel(1);
    let reader = async {
        let mut count = 0;
        while told.recv().await.is_some() {
            count += 1;
            tokio::task::yield_now().await;
        }
        count
    };
    let running = client.run(call(&server, CHAT, true), sender, CancellationToken::new());
    let (outcome, count) = tokio::join!(running, reader);
    answer(outcome);
    assert_eq!(count, 51);

    let (sender, told) = mpsc::channel(1);
    drop(told);
    let outcome = client.run(call(&server, CHAT, true), sender, CancellationToken::new()).await;
    answer(outcome);
}
