//! HTTP to one worker: sends a job, turns what comes back into [`Progress`] and one [`Outcome`].

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::domain::Token;
use crate::domain::worker::{Outcome, Progress};

/// Membership in a run, sent as `x-roundhouse-run: <id>;n=<count>`.
#[derive(Clone, Debug)]
pub struct RunTag {
    /// Unique within this server's life.
    pub id: String,
    /// Jobs in the run.
    pub count: usize,
}

/// One job for a worker.
#[derive(Clone, Debug)]
pub struct Call {
    /// `http://127.0.0.1:8001`
    pub base_url: String,
    /// `/v1/chat/completions`
    pub endpoint: String,
    /// Sent as `x-request-id`.
    pub token: Token,
    /// Forwarded JSON.
    pub body: Bytes,
    /// Whether the body asks for a stream: then the answer is SSE, relayed chunk by chunk and assembled.
    pub stream: bool,
    /// Membership in a run of more than one.
    pub run: Option<RunTag>,
    /// Longest time for the whole attempt.
    pub timeout: Duration,
}

/// A pooled HTTP client for workers. Cheap to clone.
#[derive(Clone, Debug)]
pub struct WorkerClient {
    http: reqwest::Client,
}

impl WorkerClient {
    /// Builds the pool.
    pub fn new() -> Result<Self, reqwest::Error> {
        Ok(Self {
            http: reqwest::Client::builder()
                .no_proxy()
                .tcp_nodelay(true)
                .build()?,
        })
    }

    /// Sends the job and returns how it ended. Progress goes to `progress` in order; a full channel is waited for (its
    /// reader never blocks on clients). When `stop` is cancelled, the connection is closed at once: `Outcome::Stopped`.
    pub async fn run(
        &self,
        call: Call,
        progress: mpsc::Sender<Progress>,
        stop: CancellationToken,
    ) -> Outcome {
        let _ = (&self.http, call, progress, stop);
        unimplemented!()
    }
}
