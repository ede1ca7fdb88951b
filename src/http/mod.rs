//! The HTTP faces: native jobs (`jobs`), the OpenAI shim (`openai`), operations (`ops`). `error` alone turns errors into
//! a status and a body; `auth` says who asks; `prepare` turns bodies into jobs; `waiters` knows who still waits.

use std::ops::Deref;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use axum::Router;
use axum::body::HttpBody as _;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::FutureExt as _;
use tokio::time::Instant;

use crate::clock::Clock;
use crate::config::ServerSettings;
use crate::domain::{ErrorCode, Job, JobId, Millis, ModelSpec};
use crate::http::auth::{ApiKeys, Caller, Signer};
use crate::http::error::ApiError;
use crate::http::prepare::Models;
use crate::http::waiters::Waiters;
use crate::lifecycle::Tasks;
use crate::scheduler::handle::Handle;
use crate::store::read::Reader;
use crate::store::snapshots::Durability;

pub mod auth;
pub mod body;
pub mod controls;
pub mod decisions;
pub mod error;
pub mod idempotency;
pub mod jobs;
pub mod metrics;
pub mod openai;
pub mod ops;
pub mod prepare;
pub mod server;
pub mod submit;
pub mod usage;
pub mod view;
pub mod waiters;
mod worker_metrics;

pub use server::serve;

/// The job a response is about.
pub const JOB_ID: HeaderName = HeaderName::from_static("x-roundhouse-job-id");
/// A refused request whose body is longer may be refused before all of it was read. Then the connection is closed, and has
/// to say so, or the client's next request is lost on it.
const UNREAD_BYTES_MAX: u64 = 8 * 1024;
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const PROCESSING_MS: HeaderName = HeaderName::from_static("openai-processing-ms");

tokio::task_local! {
    /// Whether the request being handled is a HEAD: the framework runs the GET's handler and drops the body.
    static IS_HEAD: bool;
}

/// What the faces are built from.
pub struct Parts {
    /// The scheduler.
    pub handle: Handle,
    /// The store's reads.
    pub reader: Reader,
    /// By the order of `models.yaml`.
    pub models: Vec<ModelSpec>,
    /// Hops, limits, URLs.
    pub server: ServerSettings,
    /// Most sync calls that may wait at once.
    pub waiting_sync_max: usize,
    /// Who may ask.
    pub keys: ApiKeys,
    /// Spawning and stopping.
    pub tasks: Tasks,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Signs artifact URLs.
    pub url_secret: [u8; 32],
    /// How safe accepted jobs are.
    pub durability: Durability,
    /// What a GPU costs for an hour.
    pub gpu_hourly_cost: Option<f64>,
}

/// What every handler has. Cheap to clone.
#[derive(Clone)]
pub struct AppState {
    shared: Arc<Shared>,
}

/// What an edit of models.yaml changes while the server runs.
#[derive(Clone)]
pub(crate) struct Live {
    pub(crate) models: Arc<Models>,
    pub(crate) waiting_sync_max: usize,
    pub(crate) gpu_hourly_cost: Option<f64>,
    /// Why the last edit was refused.
    pub(crate) refused: Option<String>,
}

/// See [`Parts`].
pub struct Shared {
    pub(crate) handle: Handle,
    pub(crate) reader: Reader,
    live: RwLock<Arc<Live>>,
    pub(crate) server: ServerSettings,
    pub(crate) keys: ApiKeys,
    pub(crate) tasks: Tasks,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) signer: Signer,
    pub(crate) waiters: Waiters,
    pub(crate) fetched: jobs::artifacts::Fetched,
    pub(crate) started_at: Millis,
    pub(crate) durability: Durability,
    requests: AtomicU64,
}

impl Deref for AppState {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl AppState {
    /// Connects the faces with what is behind them.
    pub fn new(parts: Parts) -> Self {
        let Parts {
            handle,
            reader,
            models,
            server,
            waiting_sync_max,
            keys,
            tasks,
            clock,
            url_secret,
            durability,
            gpu_hourly_cost,
        } = parts;
        let canceller = handle.clone();
        let cancel: waiters::Cancel = Arc::new(move |id| {
            let handle = canceller.clone();
            Box::pin(async move { cancel_abandoned(&handle, id).await })
        });
        let waiters = Waiters::new(cancel, tasks.clone(), server.hop_grace, server.disconnect_grace);
        let started_at = clock.now();
        Self {
            shared: Arc::new(Shared {
                handle,
                reader,
                live: RwLock::new(Arc::new(Live {
                    models: Arc::new(Models::new(models)),
                    waiting_sync_max,
                    gpu_hourly_cost,
                    refused: None,
                })),
                server,
                keys,
                tasks,
                clock,
                signer: Signer::new(url_secret),
                waiters,
                fetched: jobs::artifacts::Fetched::default(),
                started_at,
                durability,
                requests: AtomicU64::new(0),
            }),
        }
    }

    pub(crate) fn live(&self) -> Arc<Live> {
        self.live.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn models(&self) -> Arc<Models> {
        self.live().models.clone()
    }

    fn edit(&self, change: impl FnOnce(&mut Live)) {
        let mut live = self.live.write().unwrap_or_else(PoisonError::into_inner);
        change(Arc::make_mut(&mut live));
    }

    /// From now on requests are for these models.
    pub fn reload(&self, models: Vec<ModelSpec>, waiting_sync_max: usize, gpu_hourly_cost: Option<f64>) {
        let models = Arc::new(Models::new(models));
        self.edit(|live| *live = Live { models, waiting_sync_max, gpu_hourly_cost, refused: None });
    }

    /// models.yaml was edited and is wrong: `/readyz` and `/v1/models` say so, with its problems, until it is mended.
    pub fn refuse_edit(&self, problems: &str) {
        self.edit(|live| live.refused = Some(problems.to_owned()));
    }

    /// What is in models.yaml is right.
    pub fn accept_edit(&self) {
        self.edit(|live| live.refused = None);
    }

    /// After a restart: the caller of this live sync job may come back by its next hop.
    pub fn expect_hop(&self, id: JobId) {
        self.waiters.expect_hop(id);
    }

    /// Notes that a job's answer is handed out whole by the request being handled; a HEAD hands out nothing.
    pub(crate) fn delivered(&self, id: JobId) {
        if !IS_HEAD.try_with(|is_head| *is_head).unwrap_or(false) {
            self.handle.delivered(id);
        }
    }

    /// The job, if there is one that this caller may see.
    pub(crate) async fn job(&self, caller: &Caller, id: JobId) -> Result<Job, ApiError> {
        let job = self.reader.job(id).await?;
        caller.may_see(&job)?;
        Ok(job)
    }

    fn admit(&self, request: &Request) -> Result<Caller, ApiError> {
        let path = request.uri().path();
        let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
        if is_read && path == "/health" {
            return Ok(Caller::signed());
        }
        let by_key = self.keys.check(request.headers());
        let is_artifact = is_read && path.starts_with("/v1/jobs/") && path.contains("/artifacts/");
        match (by_key, request.uri().query()) {
            (Err(no_key), Some(query)) if is_artifact => match self.signer.check(path, query, self.clock.now() / 1_000)
            {
                Some(signed) => signed.map(|()| Caller::signed()),
                None => Err(no_key),
            },
            (by_key, _) => by_key,
        }
    }

    /// Unique within this server's life, and unlikely to be another's.
    fn request_id(&self) -> String {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        format!("req_{:x}-{number:x}", self.started_at)
    }
}

async fn cancel_abandoned(handle: &Handle, id: JobId) {
    match handle.cancel(id, ErrorCode::ClientDisconnected).await {
        Ok(job) => tracing::info!(job.id = %id, job.state = %job.state, "nobody waits for this sync job any more"),
        Err(error) => tracing::warn!(job.id = %id, "a job nobody waits for could not be cancelled: {error}"),
    }
}

/// All paths. Unknown ones and wrong methods are answered with the same error body as everything else.
pub fn router(state: AppState) -> Router {
    Router::new()
        .route("/v1/jobs", post(jobs::create).get(jobs::list))
        .route("/v1/jobs/bulk", post(jobs::bulk::create))
        .route("/v1/jobs/{id}", get(jobs::get))
        .route("/v1/jobs/{id}/events", get(jobs::events::get))
        .route("/v1/jobs/{id}/response", get(jobs::response::get))
        .route("/v1/jobs/{id}/artifacts", get(jobs::artifacts::list))
        .route("/v1/jobs/{id}/artifacts/{artifact}", get(jobs::artifacts::get))
        .route("/v1/jobs/{id}/cancel", post(jobs::cancel))
        .route("/v1/jobs/{id}/retry", post(jobs::retry))
        .route("/v1/queue", get(ops::queue))
        .route("/v1/queue/decisions", get(decisions::list))
        .route("/v1/queue/{word}", post(controls::queue))
        .route("/v1/usage", get(usage::get))
        .route("/v1/models", get(ops::models))
        .route("/v1/models/{*name}", get(ops::model).post(controls::model_by_hand))
        .route("/v1/workers", get(ops::workers))
        .route("/v1/chat/completions", post(openai::call))
        .route("/v1/completions", post(openai::call))
        .route("/v1/images/generations", post(openai::call))
        .route("/v1/audio/speech", post(openai::call))
        .route("/v1/audio/generations", post(openai::call))
        .route("/health", get(ops::health))
        .route("/readyz", get(ops::ready))
        .route("/metrics", get(ops::metrics))
        .fallback(|| async { ApiError::not_found("the path") })
        .method_not_allowed_fallback(|| async {
            ApiError::new(ErrorCode::MethodNotAllowed, "this path is not served with this method; see the Allow header")
        })
        .layer(middleware::from_fn_with_state(state.clone(), edge))
        .with_state(state)
}

/// The framework's own refusals, for example of a path that is not UTF-8, as an error of ours.
fn unreadable(response: &Response) -> Option<ApiError> {
    let status = response.status();
    let is_error = status.is_client_error() || status.is_server_error();
    is_error.then(|| ApiError::new(ErrorCode::InvalidRequest, "the request's path or query cannot be read"))
}

/// The outermost layer: who asks, errors as bodies, ids and times as headers. A handler that panics fails one request.
async fn edge(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let path = request.uri().path().to_owned();
    let may_be_unread = request.body().size_hint().upper().is_none_or(|bytes| bytes > UNREAD_BYTES_MAX);
    let mut response = match state.admit(&request) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            let is_head = request.method() == Method::HEAD;
            let handled = IS_HEAD.scope(is_head, AssertUnwindSafe(next.run(request)).catch_unwind()).await;
            handled.unwrap_or_else(|_| {
                tracing::error!(http.path = path, "a request's handler panicked");
                ApiError::new(ErrorCode::InternalError, "the server failed on this request; its log says why")
                    .into_response()
            })
        }
        Err(error) => error.into_response(),
    };
    if let Some(error) = error::taken_from(&mut response).or_else(|| unreadable(&response)) {
        let allow = response.headers_mut().remove(header::ALLOW);
        response = error.render(&path);
        allow.and_then(|allow| response.headers_mut().insert(header::ALLOW, allow));
    }
    let is_refusal = response.status().is_client_error();
    let headers = response.headers_mut();
    if is_refusal && may_be_unread {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if !headers.contains_key(REQUEST_ID) {
        let id = headers.get(JOB_ID).cloned().or_else(|| HeaderValue::from_str(&state.request_id()).ok());
        id.and_then(|id| headers.insert(REQUEST_ID, id));
    }
    if error::is_openai(&path) {
        headers.insert(PROCESSING_MS, HeaderValue::from(u64::try_from(began.elapsed().as_millis()).unwrap_or(0)));
    }
    response
}
