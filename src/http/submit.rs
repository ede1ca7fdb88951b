//! Handing jobs to the scheduler without losing sight of a caller who leaves in the middle.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;

use crate::domain::{ErrorCode, Face, NewJob};
use crate::http::AppState;
use crate::http::error::ApiError;
use crate::http::waiters::{Guard, Role, Waiters};
use crate::lifecycle::Tasks;
use crate::scheduler::handle::{SubmitError, Submitted};

/// Submits one job. A sync one comes with the guard of its caller.
pub async fn submit(state: &AppState, job: NewJob) -> Result<(Submitted, Option<Guard>), ApiError> {
    let face = job.face;
    let handle = state.handle.clone();
    let future: Submitting = Box::pin(async move { handle.submit(vec![job]).await });
    let submitted = match face {
        Face::Async => future.await?,
        Face::Sync => {
            let (tasks, waiters) = (state.tasks.clone(), state.waiters.clone());
            Watched { future: Some(future), tasks, waiters }.await?
        }
    };
    let submitted = submitted
        .into_iter()
        .next()
        .ok_or_else(|| ApiError::new(ErrorCode::InternalError, "the scheduler accepted no job"))?;
    let guard = (face == Face::Sync).then(|| state.waiters.wait(submitted.job.id, Role::Caller));
    Ok((submitted, guard))
}

type Submitting = BoxFuture<'static, Result<Vec<Submitted>, SubmitError>>;

/// A submission whose caller may leave before the commit: then it is finished beside, and the job counts as abandoned.
struct Watched {
    future: Option<Submitting>,
    tasks: Tasks,
    waiters: Waiters,
}

impl Future for Watched {
    type Output = Result<Vec<Submitted>, SubmitError>;

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
            for submitted in future.await.into_iter().flatten() {
                drop(waiters.wait(submitted.job.id, Role::Caller));
            }
        });
    }
}
