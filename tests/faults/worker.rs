//! A worker that is there at once: answers any path with the prompt and the attempt, after `delay_ms`.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};

/// Set for a process that is to be the worker.
const WORKER: &str = "FAULTS_WORKER";

/// Not a test of its own: the worker.
#[test]
fn the_worker() {
    if std::env::var_os(WORKER).is_some() {
        serve();
    }
}

/// An entry of `models:` that starts this binary as a worker; `limit`: jobs at once.
pub(crate) fn entry(limit: u32) -> Value {
    json!({
        "type": "custom",
        "command": [std::env::current_exe().unwrap(), "--exact", "worker::the_worker", "--nocapture", "{port}"],
        "env": {WORKER: "1"},
        "endpoint": "/echo",
        "gpus": 0,
        "startup_time": 1,
        "limit": limit,
        "max_batch": 1,
        "port": super::common::free_port(),
    })
}

/// A submission for it. What comes back has `prompt` and the attempt in it.
pub(crate) fn job(prompt: &str, more: Value) -> Value {
    let body = super::common::with(json!({"model": "fast", "prompt": prompt}), more);
    json!({"endpoint": "/echo", "body": body, "metadata": {"who": prompt}})
}

/// Serves until the process is ended; its port is the last word of its command line.
fn serve() {
    let port: u16 = std::env::args().next_back().unwrap().parse().unwrap();
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    for stream in listener.incoming().map_while(Result::ok) {
        std::thread::spawn(move || drop(connection(stream)));
    }
}

fn connection(mut stream: TcpStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let mut first = String::new();
        if reader.read_line(&mut first)? == 0 {
            return Ok(());
        }
        let (mut len, mut request_id) = (0, String::new());
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => len = value.parse().unwrap(),
                "x-request-id" => value.clone_into(&mut request_id),
                _ => {}
            }
        }
        let mut body = vec![0; len];
        reader.read_exact(&mut body)?;
        let answer =
            if first.starts_with("GET ") { json!({"status": "ok"}) } else { work(&body, &request_id) }.to_string();
        write!(
            stream,
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{answer}",
            answer.len()
        )?;
    }
}

fn work(body: &[u8], request_id: &str) -> Value {
    let body: Value = serde_json::from_slice(body).unwrap();
    if let Some(ms) = body["delay_ms"].as_u64() {
        std::thread::sleep(Duration::from_millis(ms));
    }
    json!({"prompt": body["prompt"], "token": request_id})
}
