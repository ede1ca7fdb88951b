//! Asking a worker how it is: `GET /health`, or `GET /v1/models` of a server that has no `/health`.

use std::time::Duration;

use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::domain::worker::{HostCopy, PhaseTime};
use crate::worker::verdict::cut;
use crate::worker::wire::{Ask, Lost, Pool};

/// Most that is read of an answer, in bytes.
const LIMIT_BYTES: usize = 256 << 10;

/// Where vLLM is told to do something in all its processes (`VLLM_SERVER_DEV_MODE=1`).
const RELOAD: &str = "/collective_rpc";

/// Longest name of a phase, in bytes.
const PHASE_LIMIT: usize = 80;

/// Longest note about parking, in bytes.
const NOTE_LIMIT: usize = 400;

/// How a worker says it is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Health {
    /// Takes jobs; where the time of its load went, if it says so, and for how long nobody has waited for the pass that it runs.
    Ready { memory: Memory, phases: Vec<PhaseTime>, given_up_ms: Option<i64> },
    /// Lives and takes no jobs now: loading or asleep.
    NotYet { phase: Option<String>, percent: Option<f64>, memory: Memory },
    /// A spare process, one that was taken over among them, that still imports; an error: it says why that failed.
    Importing(Result<(), String>),
    /// Says that it has failed and why; `oom`: its device ran out of memory.
    Failed { why: String, oom: bool },
    /// Another worker answers on this port.
    Stranger,
    /// No answer, or one that says nothing good.
    Silent(String),
    /// Nobody listens on the port: it has not got that far, or it is gone.
    Refused,
}

/// What it says of its memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory {
    /// What it takes on each GPU, in bytes.
    pub(super) device_bytes: Option<u64>,
    pub(super) host: HostCopy,
}

/// Asks the worker that listens on one port.
#[derive(Clone, Debug)]
pub(super) struct Doctor {
    pool: Pool,
    authority: String,
    mark: String,
}

/// The body of `/health` of a worker of ours. Stock servers answer without `instance`.
#[derive(Deserialize)]
struct Body {
    status: String,
    instance: Option<String>,
    phase: Option<String>,
    percent: Option<f64>,
    error: Option<String>,
    code: Option<String>,
    device_bytes: Option<u64>,
    host_bytes: Option<u64>,
    can_park: Option<bool>,
    park_note: Option<String>,
    can_reread: Option<bool>,
    given_up_ms: Option<i64>,
    #[serde(default)]
    importing: bool,
    #[serde(default)]
    phases: Vec<PhaseTime>,
}

impl Doctor {
    /// `mark` is what the worker has to give back as its `instance`.
    pub(super) fn new(port: u16, mark: &str) -> Self {
        Self { pool: Pool::default(), authority: format!("127.0.0.1:{port}"), mark: mark.to_owned() }
    }

    /// One question; no answer within `limit` is [`Health::Silent`].
    pub(super) async fn ask(&self, limit: Duration) -> Health {
        match tokio::time::timeout(limit, self.exchange()).await {
            Ok(health) => health,
            Err(_) => Health::Silent(format!("no answer within {} s", limit.as_secs_f64())),
        }
    }

    /// Has it go to sleep, which it is to say itself afterwards; an error says why it does not sleep. `bare`: without a copy in
    /// host memory, if it can read its weights again.
    pub(super) async fn put_to_sleep(&self, bare: bool) -> Result<(), String> {
        if bare && !self.is_ours().await? {
            // FastAPI answers 405 to the wrong method, 404 where there is nothing.
            let (status, _) = self.get(RELOAD).await.map_err(|lost| self.plain(RELOAD, &lost))?;
            if status == 404 {
                return Err(format!("it has no {RELOAD}, by which vLLM reads its weights again"));
            }
        }
        self.tell(if bare { "/sleep?level=2" } else { "/sleep?level=1" }).await?;
        let answer = self.get("/is_sleeping").await.map_err(|lost| self.plain("/is_sleeping", &lost))?;
        let says: Value = serde_json::from_slice(&answer.1).unwrap_or_default();
        let sleeps = answer.0 == 200 && says.get("is_sleeping") == Some(&Value::Bool(true));
        if sleeps { Ok(()) } else { Err(format!("/is_sleeping answers with status {} that it is awake", answer.0)) }
    }

    /// Wakes it; it may need some more time to be ready.
    pub(super) async fn wake_up(&self) -> Result<(), String> {
        self.tell("/wake_up").await
    }

    /// Wakes it from a sleep without a copy: a worker of ours reads its weights again by itself, and may make a copy of
    /// `park_bytes` again; vLLM has to be told.
    pub(super) async fn wake_bare(&self, park_bytes: Option<u64>) -> Result<(), String> {
        if self.is_ours().await? {
            return self.tell(&format!("/wake_up?park_bytes={}", park_bytes.unwrap_or(0))).await;
        }
        self.tell("/wake_up?tags=weights").await?;
        self.tell_with(RELOAD, Some(&json!({"method": "reload_weights"}))).await?;
        self.tell("/wake_up?tags=kv_cache").await
    }

    /// Whether its `/health` is in the shape of our workers' (with `instance`), whatever it says.
    async fn is_ours(&self) -> Result<bool, String> {
        let (_, body) = self.get("/health").await.map_err(|lost| self.plain("/health", &lost))?;
        let says: Value = serde_json::from_slice(&body).unwrap_or_default();
        Ok(says.get("instance").is_some())
    }

    /// Has a spare process become the worker that `order` describes; an error says why it does not.
    pub(super) async fn take_over(&self, order: &Value) -> Result<(), String> {
        self.tell_with("/take_over", Some(order)).await
    }

    async fn tell(&self, path: &str) -> Result<(), String> {
        self.tell_with(path, None).await
    }

    async fn tell_with(&self, path: &str, body: Option<&Value>) -> Result<(), String> {
        let body = body.map(|body| bytes::Bytes::from(body.to_string())).unwrap_or_default();
        let ask = Ask { method: Method::POST, body, ..Ask::get(path) };
        let mut reply = self.pool.call(&self.authority, &ask).await.map_err(|lost| self.plain(path, &lost))?;
        let status = reply.status;
        let body = reply.whole(LIMIT_BYTES).await.map_err(|lost| self.plain(path, &lost))?.unwrap_or_default();
        if (200..300).contains(&status) {
            self.pool.give_back(&self.authority, reply);
            return Ok(());
        }
        let text = cut(String::from_utf8_lossy(&body).into_owned(), 400);
        Err(format!("{path} answers with status {status}: {text}"))
    }

    /// How it was lost, for callers; what the library and the system say of it is for the log.
    fn plain(&self, path: &str, lost: &Lost) -> String {
        tracing::warn!(worker = self.authority, path, "no answer: {lost}");
        format!("{}, when it was asked for {path}", lost.what)
    }

    async fn exchange(&self) -> Health {
        match self.get("/health").await {
            Ok((404, _)) => match self.get("/v1/models").await {
                Ok((200, _)) => well(),
                Ok((status, _)) => {
                    Health::Silent(format!("/health answers with status 404 and /v1/models with status {status}"))
                }
                Err(lost) => unheard(&lost),
            },
            Ok((status, body)) => read(status, &body, &self.mark),
            Err(lost) => unheard(&lost),
        }
    }

    async fn get(&self, path: &str) -> Result<(u16, bytes::Bytes), Lost> {
        let mut reply = self.pool.call(&self.authority, &Ask::get(path)).await?;
        let status = reply.status;
        let body = reply.whole(LIMIT_BYTES).await?;
        self.pool.give_back(&self.authority, reply);
        Ok((status, body.unwrap_or_default()))
    }
}

/// A server that says no more than that it takes jobs.
fn well() -> Health {
    Health::Ready { memory: Memory::default(), phases: Vec::new(), given_up_ms: None }
}

fn unheard(lost: &Lost) -> Health {
    if lost.is_refused {
        return Health::Refused;
    }
    // It is asked again and again.
    tracing::debug!("a health probe is not answered: {lost}");
    Health::Silent(lost.what.to_owned())
}

/// A body with `status` and `instance` is one of our workers' and decides; of any other server, the HTTP status does.
fn read(status: u16, body: &[u8], mark: &str) -> Health {
    let value: Value = serde_json::from_slice(body).unwrap_or_default();
    let is_ours = value.get("instance").is_some();
    if let Some(body) = is_ours.then(|| serde_json::from_value::<Body>(value).ok()).flatten() {
        if body.instance.as_deref() != Some(mark) {
            return Health::Stranger;
        }
        let phase = body.phase.map(|phase| cut(phase, PHASE_LIMIT));
        let named = |told: PhaseTime| PhaseTime { phase: cut(told.phase, PHASE_LIMIT), ms: told.ms };
        let note = body.park_note.map(|note| cut(note, NOTE_LIMIT));
        let host = HostCopy { bytes: body.host_bytes, can_park: body.can_park, note, can_reread: body.can_reread };
        let memory = Memory { device_bytes: body.device_bytes, host };
        return match body.status.as_str() {
            "ready" if status == 200 => {
                let phases = body.phases.into_iter().map(named).collect();
                Health::Ready { memory, phases, given_up_ms: body.given_up_ms }
            }
            "failed" => {
                let why = cut(body.error.or(phase).unwrap_or_else(|| "no reason given".into()), 400);
                let oom = body.code.as_deref() == Some("worker_oom");
                if body.importing { Health::Importing(Err(why)) } else { Health::Failed { why, oom } }
            }
            _ if body.importing => Health::Importing(Ok(())),
            _ => Health::NotYet { phase, percent: body.percent, memory },
        };
    }
    match status {
        200..=299 => well(),
        _ => Health::Silent(format!("/health answers with status {status}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready(memory: Memory) -> Health {
        Health::Ready { memory, phases: Vec::new(), given_up_ms: None }
    }

    #[test]
    fn our_workers_are_told_by_their_instance() {
        let ask = |status: u16, word: &str, instance: Value| {
            let body =
                json!({"status": word, "phase": "weights", "percent": 40.0, "instance": instance, "error": "no file"});
            read(status, body.to_string().as_bytes(), "id:1")
        };
        assert_eq!(ask(200, "ready", "id:1".into()), ready(Memory::default()));
        let tells =
            br#"{"status": "ready", "instance": "m", "device_bytes": 7, "given_up_ms": 3, "phases": [{"phase": "read", "ms": 9}]}"#;
        let phases = vec![PhaseTime { phase: "read".into(), ms: 9 }];
        let memory = Memory { device_bytes: Some(7), ..Memory::default() };
        assert_eq!(read(200, tells, "m"), Health::Ready { memory, phases, given_up_ms: Some(3) });
        let tells =
            br#"{"status": "ready", "instance": "m", "host_bytes": 5, "can_park": false, "park_note": "no room", "can_reread": true}"#;
        let note = Some("no room".into());
        let host = HostCopy { bytes: Some(5), can_park: Some(false), note, can_reread: Some(true) };
        assert_eq!(read(200, tells, "m"), ready(Memory { device_bytes: None, host }));
        let memory = Memory::default();
        let not_yet = Health::NotYet { phase: Some("weights".into()), percent: Some(40.0), memory };
        assert_eq!(ask(503, "loading", "id:1".into()), not_yet);
        assert_eq!(ask(503, "asleep", "id:1".into()), not_yet);
        assert_eq!(ask(503, "ready", "id:1".into()), not_yet, "ready but stopping");
        assert_eq!(ask(503, "failed", "id:1".into()), Health::Failed { why: "no file".into(), oom: false });
        let imports = |word: &str| {
            let body =
                json!({"status": word, "instance": "m", "phase": "import", "importing": true, "error": "no wheel"});
            read(503, body.to_string().as_bytes(), "m")
        };
        assert_eq!(imports("loading"), Health::Importing(Ok(())));
        assert_eq!(imports("failed"), Health::Importing(Err("no wheel".into())));
        let oom = br#"{"status": "failed", "instance": "m", "error": "no room", "code": "worker_oom"}"#;
        assert_eq!(read(503, oom, "m"), Health::Failed { why: "no room".into(), oom: true });
        assert_eq!(ask(200, "ready", "id:2".into()), Health::Stranger);
        let coloured = br#"{"status": "loading", "instance": "m", "phase": "\u001b[31mread\u0007"}"#;
        let not_yet = Health::NotYet { phase: Some("read ".into()), percent: None, memory: Memory::default() };
        assert_eq!(read(503, coloured, "m"), not_yet, "a terminal obeys nothing of it");
        assert_eq!(ask(200, "ready", Value::Null), Health::Stranger, "started by hand");
    }

    #[tokio::test]
    async fn a_lost_connection_is_told_in_plain_words() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let doctor = Doctor::new(listener.local_addr().unwrap().port(), "m");
        let broken = async {
            let (mut it, _) = listener.accept().await.unwrap();
            it.read_buf(&mut Vec::with_capacity(4096)).await.unwrap();
            it.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab").await.unwrap();
        };
        let words = "its connection broke in the middle of the answer";
        let (said, ()) = tokio::join!(doctor.wake_up(), broken);
        assert_eq!(said, Err(format!("{words}, when it was asked for /wake_up")));
        let broken = async {
            let (mut it, _) = listener.accept().await.unwrap();
            it.read_buf(&mut Vec::with_capacity(4096)).await.unwrap();
            it.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab").await.unwrap();
        };
        let (said, ()) = tokio::join!(doctor.ask(Duration::from_secs(60)), broken);
        assert_eq!(said, Health::Silent(words.to_owned()));
    }

    #[test]
    fn stock_servers_are_told_by_their_status() {
        assert_eq!(read(200, b"", "m"), ready(Memory::default()));
        assert_eq!(read(200, br#"{"status":"ok"}"#, "m"), ready(Memory::default()));
        assert!(matches!(read(503, br#"{"error":{"message":"Loading model"}}"#, "m"), Health::Silent(_)));
    }
}
