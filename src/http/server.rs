//! The listener and its connections. In the soft stage idle connections close; what runs may finish, and new connections
//! have one request each, until the hard stage: who polls for a result still gets it, and who submits is told why not.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use futures_util::FutureExt as _;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tower::ServiceExt as _;

use crate::http::openai::LAST_WORD;
use crate::lifecycle::Tasks;

/// Longest time for a request's head, and of an idle connection. Longer than clients and proxies keep theirs, so that it
/// is them who close, and no request crosses a closing connection.
const HEAD_WITHIN: Duration = Duration::from_secs(90);
/// Pause after the listener failed, for example for lack of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// How often it is said that the listener still fails.
const SAY_EVERY: Duration = Duration::from_secs(60);
/// So long after its last failure it is over: without descriptors, each that comes free lets one caller in.
const CALM: Duration = Duration::from_secs(10);
/// When the server begins to stop, a connection that looks idle may have a request on its way: so long it is waited for.
const LINGER: Duration = Duration::from_millis(200);
/// Beyond [`LAST_WORD`]: time for the last words of the hard stage to be written.
const WRITTEN_WITHIN: Duration = Duration::from_millis(200);

/// Serves until the hard stage. Connections are tasks of `tasks`.
pub async fn serve(listener: TcpListener, router: Router, tasks: Tasks) {
    let mut failing = Failing::default();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = tasks.hard().cancelled() => return,
        };
        match accepted {
            Ok((stream, _)) => {
                if let Some(failures) = failing.works() {
                    tracing::info!(failures, "connections are accepted again");
                }
                let connection = connection(stream, router.clone(), tasks.clone());
                tasks.spawn("connection", connection);
            }
            Err(error) => {
                if let Some(failures) = failing.fails() {
                    tracing::warn!(failures, "connections cannot be accepted, and wait: {error}");
                }
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// What the log says of a listener that fails: that it begins, now and then that it goes on, and that it is over.
#[derive(Debug, Default)]
struct Failing {
    /// When it was last said; `None`: it does not fail.
    said_at: Option<Instant>,
    last_at: Option<Instant>,
    failures: u64,
}

impl Failing {
    /// It failed; how often it has since it began, if that is to be said.
    fn fails(&mut self) -> Option<u64> {
        self.failures += 1;
        self.last_at = Some(Instant::now());
        let is_due = self.said_at.is_none_or(|at| at.elapsed() >= SAY_EVERY);
        is_due.then(|| {
            self.said_at = Some(Instant::now());
            self.failures
        })
    }

    /// It did not fail; how often it had, if that is to be said to be over.
    fn works(&mut self) -> Option<u64> {
        self.last_at.filter(|at| at.elapsed() >= CALM)?;
        Some(std::mem::take(self).failures)
    }
}

async fn connection(stream: TcpStream, router: Router, tasks: Tasks) {
    // Small frames of a stream leave at once. Without it the connection still works.
    let _ = stream.set_nodelay(true);
    // A body that panics ends its connection, not the server.
    if AssertUnwindSafe(exchange(stream, router, tasks)).catch_unwind().await.is_err() {
        tracing::error!("a connection's task panicked");
    }
}

async fn exchange(stream: TcpStream, router: Router, tasks: Tasks) {
    let service = router.map_request(|request: Request<Incoming>| request.map(Body::new));
    // One that came in the soft stage must not be shut down before its request has been read.
    let is_late = tasks.soft().is_cancelled();
    let connection = http1::Builder::new()
        .keep_alive(!is_late)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    tokio::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => return ignore(ended),
        () = tasks.soft().cancelled(), if !is_late => {
            tokio::select! {
                ended = connection.as_mut() => return ignore(ended),
                () = tokio::time::sleep(LINGER) => {}
                () = tasks.hard().cancelled() => {}
            }
            connection.as_mut().graceful_shutdown();
        }
        () = tasks.hard().cancelled() => {}
    }
    tokio::select! {
        ended = connection.as_mut() => ignore(ended),
        () = tasks.hard().cancelled() => {
            // Streams see the hard stage, too, and end with a last word. Who has not asked for anything yet is not waited for.
            connection.as_mut().graceful_shutdown();
            let _ = tokio::time::timeout(LAST_WORD + WRITTEN_WITHIN, connection).await;
        }
    }
}

/// Clients break connections all the time; their waiters know what that means.
fn ignore(ended: Result<(), hyper::Error>) {
    if let Err(error) = ended {
        tracing::debug!("a connection ended early: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn that_connections_fail_is_said_when_it_begins_now_and_then_and_when_it_is_over() {
        let mut failing = Failing::default();
        assert_eq!(failing.works(), None, "no news");
        assert_eq!(failing.fails(), Some(1));
        for _ in 0..99 {
            tokio::time::advance(SAY_EVERY / 100).await;
            assert_eq!(failing.fails(), None, "it is known");
            assert_eq!(failing.works(), None, "one descriptor has come free");
        }
        tokio::time::advance(SAY_EVERY / 100).await;
        assert_eq!(failing.fails(), Some(101), "still");
        tokio::time::advance(CALM).await;
        assert_eq!((failing.works(), failing.works()), (Some(101), None));
        assert_eq!(failing.fails(), Some(1), "again");
    }
}
