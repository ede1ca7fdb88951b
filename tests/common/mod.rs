//! What whole-system tests share: the real binary on a fresh data dir with echo workers, a client, a look at processes,
//! and a proxy that cuts answers. Nothing here sleeps where something can be awaited.
#![allow(dead_code, unused_imports, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a helper that fails ends its test, and says why")]

mod clib;
mod client;
mod procs;
mod proxy;
mod server;

pub(crate) use clib::compiled;
pub(crate) use client::{Api, EventStream, Frame, Reply, check_history, echo_job, is_terminal};
pub(crate) use procs::Proc;
pub(crate) use proxy::CuttingProxy;
pub(crate) use server::{Server, Site, echo, free_port, python, with};

use std::future::Future;
use std::time::Duration;

/// Longest that anything awaited may take; generous, since the machine may be busy with other tests.
pub(crate) const LIMIT: Duration = Duration::from_secs(90);

/// Awaits something that must happen.
pub(crate) async fn within<T>(limit: Duration, what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(limit, future).await {
        Ok(value) => value,
        Err(_) => panic!("not within {} s: {what}", limit.as_secs_f64()),
    }
}

/// Looks again and again until `look` finds something, for what cannot be awaited.
pub(crate) async fn eventually<T, F>(limit: Duration, what: &str, mut look: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let poll = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    within(limit, what, poll).await
}

/// Runs something beside the test.
#[expect(clippy::disallowed_methods, reason = "tests have no shutdown to be tracked for")]
pub(crate) fn beside<T: Send + 'static>(
    future: impl Future<Output = T> + Send + 'static,
) -> tokio::task::JoinHandle<T> {
    tokio::spawn(future)
}
