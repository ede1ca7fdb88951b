//! Handing jobs to the scheduler without losing sight of a caller who leaves in the middle.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;

use crate::domain::{ErrorCode, Face, Job, NewJob};
use crate::http::AppState;
use crate::http::error::ApiError;
use crate::http::waiters::{Guard, Role, Waiters};
use crate::lifecycle::Tasks;
use crate::scheduler::handle::{Accepted, Position, SubmitError};
use crate::scheduler::hub::JobWatch;
use crate::store::IdempotencyKey;

/// An accepted job.
#[derive(Debug)]
pub struct Submitted {
    /// As committed.
    pub job: Job,
    /// Subscribed before anything could happen to it.
    pub watch: JobWatch,
    /// Where it stood when it was accepted.
    pub position: Option<Position>,
    /// It was accepted before, under the same idempotency key.
    pub replayed: bool,
}

/// Submits one job. A sync one comes with the guard of its caller.
pub async fn submit(
    state: &AppState,
    job: NewJob,
    key: Option<IdempotencyKey>,
) -> Result<(Submitted, Option<Guard>), ApiError> {
    let face = job.face;
    let handle = state.handle.clone();
    let future: Submitting = Box::pin(async move { handle.submit(vec![job], key).await });
    let Accepted { jobs, watch, position, replayed } = match face {
        Face::Async => future.await?,
        Face::Sync => {
            let (tasks, waiters) = (state.tasks.clone(), state.waiters.clone());
            Watched { future: Some(future), tasks, waiters }.await?
        }
    };
    let (Some(job), Some(watch)) = (jobs.into_iter().next(), watch) else {
        return Err(ApiError::new(ErrorCode::InternalError, "the scheduler accepted no job"));
    };
    let guard = (job.face == Face::Sync && face == Face::Sync).then(|| state.waiters.wait(job.id, Role::Caller));
    Ok((Submitted { job, watch, position, replayed }, guard))
}

type Submitting = BoxFuture<'static, Result<Accepted, SubmitError>>;

/// A submission whose caller may leave before the commit: then it is finished beside, and the job counts as abandoned.
struct Watched {
    future: Option<Submitting>,
    tasks: Tasks,
    waiters: Waiters,
}

impl Future for Watched {
    type Output = Result<Accepted, SubmitError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(future) = &mut self.future else {
            return Poll::Pending;
        };
        let polled = future.as_mut().poll(context);
        if polled.is_ready() {
            self.future = None;
        }
        polled
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let Some(future) = self.future.take() else {
            return;
        };
        if tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        let waiters = self.waiters.clone();
        self.tasks.spawn("submission of a lost caller", async move {
            for job in future.await.into_iter().flat_map(|accepted| accepted.jobs) {
                drop(waiters.wait(job.id, Role::Caller));
            }
        });
    }
}
