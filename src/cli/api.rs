//! A small client of the server's HTTP API.

use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;

use super::{ServerArgs, environment};

/// Longest wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Longest text of an error that is no JSON, in characters.
const ERROR_CHARS_MAX: usize = 300;

/// A server and the key for it.
#[derive(Debug)]
pub(super) struct Server {
    http: reqwest::Client,
    base: String,
    key: Option<String>,
}

impl ServerArgs {
    /// A client with the key of the environment. Fails if the address is of no use.
    pub(super) fn connect(&self) -> anyhow::Result<Server> {
        Server::new(&self.server, environment("ROUNDHOUSE_API_KEY").filter(|key| !key.is_empty()))
    }
}

impl Server {
    pub(super) fn new(base: &str, key: Option<String>) -> anyhow::Result<Self> {
        let base = base.trim_end_matches('/').to_owned();
        if !base.starts_with("http://") {
            bail!(
                "--server: `{base}` must start with http://; on the server's own machine that is http://127.0.0.1:9000"
            );
        }
        // A proxy of the environment is meant for the world outside.
        let http = reqwest::Client::builder().timeout(TIMEOUT).no_proxy().build().context("cannot set up HTTP")?;
        Ok(Self { http, base, key })
    }

    pub(super) async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.send(self.http.get(format!("{}{path}", self.base))).await
    }

    pub(super) async fn post(&self, path: &str) -> anyhow::Result<Value> {
        self.send(self.http.post(format!("{}{path}", self.base))).await
    }

    pub(super) async fn post_json(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.send(self.http.post(format!("{}{path}", self.base)).json(body)).await
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> anyhow::Result<Value> {
        let request = match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        let answer = request.send().await.with_context(|| {
            format!("no answer from {}; is `roundhouse serve` running there? (--server names another)", self.base)
        })?;
        let status = answer.status();
        let body = answer.text().await.with_context(|| format!("the answer of {} broke off", self.base))?;
        if status.as_u16() == 401 {
            bail!("{} wants an API key: set ROUNDHOUSE_API_KEY", self.base);
        }
        if !status.is_success() {
            bail!("{} answered {status}: {}", self.base, error_text(&body));
        }
        if body.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&body).with_context(|| format!("{} answered no JSON; is it Roundhouse?", self.base))
    }
}

/// The message of an error body, else its beginning.
fn error_text(body: &str) -> String {
    let json: Option<Value> = serde_json::from_str(body).ok();
    let message = json.as_ref().and_then(|json| json.pointer("/error/message")?.as_str());
    message.map_or_else(|| body.chars().take(ERROR_CHARS_MAX).collect(), str::to_owned)
}
