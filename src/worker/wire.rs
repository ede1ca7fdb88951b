//! HTTP/1.1 to workers on loopback: a pool of kept-alive connections whose driver runs inside the caller's own task.
//!
//! hyper's connection is a future of its own that is usually spawned. Here the caller polls it together with the exchange,
//! which saves two task switches per call, closes the connection at once when the caller is dropped, and tells exactly
//! whether a pooled connection was still open when a request was about to be written on it.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1::{Connection, SendRequest, handshake};
use hyper::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Idle connections kept per worker.
const IDLE_PER_WORKER: usize = 256;
/// Idle connections are dropped after this; uvicorn and cpp-httplib close theirs after 5 s.
const IDLE_LIMIT: Duration = Duration::from_millis(3500);
/// A reused connection that closes without a byte within this time of the request was closed by an idle timer, not by
/// the request; see [`Pool::call`].
const STALE_WINDOW: Duration = Duration::from_millis(100);

/// The connection was refused, reset or ended early. As text it has all that is known, for the log.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {detail}")]
pub(super) struct Lost {
    /// In plain words, for callers.
    pub(super) what: &'static str,
    /// As the HTTP library and the system say it.
    detail: String,
    /// Nobody listens on the port.
    pub(super) is_refused: bool,
    /// Whether the request may have reached the worker.
    pub(super) reached: bool,
}

impl Lost {
    fn new(what: &'static str, error: &dyn std::error::Error) -> Self {
        let mut detail = error.to_string();
        let mut source = error.source();
        while let Some(inner) = source {
            detail.push_str(": ");
            detail.push_str(&inner.to_string());
            source = inner.source();
        }
        Self { what, detail, is_refused: false, reached: true }
    }
}

/// What is asked of a worker. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    /// Verb.
    pub(super) method: Method,
    /// Path and query.
    pub(super) path: String,
    /// Everything but `host` and `content-length`.
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
    /// Empty for GET.
    pub(super) body: Bytes,
}

impl Ask {
    /// A GET without headers.
    pub(super) fn get(path: &str) -> Self {
        Self { method: Method::GET, path: path.to_owned(), headers: Vec::new(), body: Bytes::new() }
    }

    fn request(&self, authority: &str) -> Result<Request<Full<Bytes>>, Lost> {
        let mut request =
            Request::builder().method(self.method.clone()).uri(self.path.as_str()).header(HOST, authority);
        if let Some(headers) = request.headers_mut() {
            headers.extend(self.headers.iter().cloned());
        }
        request.body(Full::new(self.body.clone())).map_err(|e| Lost::new("the request cannot be built", &e))
    }
}

/// One connection with its driver.
struct Conn {
    sender: SendRequest<Full<Bytes>>,
    /// `None` once it has ended. It must be dropped then: it may hold a request that it never took up, and only its drop
    /// tells the sender so.
    driver: Option<Connection<TokioIo<TcpStream>, Full<Bytes>>>,
    /// The end of the last answer's body, if it was not read to the end: usually the last, empty chunk.
    rest: Option<Incoming>,
    idle_since: Instant,
}

impl Conn {
    async fn open(authority: &str) -> Result<Self, Lost> {
        let stream = TcpStream::connect(authority).await.map_err(|e| Lost {
            is_refused: e.kind() == std::io::ErrorKind::ConnectionRefused,
            reached: false,
            ..Lost::new("cannot connect to the worker", &e)
        })?;
        stream.set_nodelay(true).map_err(|e| Lost::new("cannot set TCP_NODELAY", &e))?;
        let (sender, driver) =
            handshake(TokioIo::new(stream)).await.map_err(|e| Lost::new("cannot speak HTTP to the worker", &e))?;
        Ok(Self { sender, driver: Some(driver), rest: None, idle_since: Instant::now() })
    }

    fn drive(&mut self, cx: &mut Context<'_>) {
        drive(&mut self.driver, cx);
    }

    /// Whether another request can be written now. Looks at the socket without waiting.
    async fn is_usable(&mut self) -> bool {
        poll_fn(|cx| {
            self.drive(cx);
            while let Some(rest) = self.rest.as_mut() {
                match Pin::new(rest).poll_frame(cx) {
                    Poll::Ready(None) => self.rest = None,
                    Poll::Ready(Some(Ok(_))) => {}
                    Poll::Ready(Some(Err(_))) | Poll::Pending => return Poll::Ready(false),
                }
                self.drive(cx);
            }
            Poll::Ready(self.driver.is_some() && self.sender.is_ready())
        })
        .await
    }

    async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, hyper::Error> {
        let mut answer = pin!(self.sender.send_request(request));
        let driver = &mut self.driver;
        poll_fn(|cx| {
            if let Poll::Ready(done) = answer.as_mut().poll(cx) {
                return Poll::Ready(done);
            }
            drive(driver, cx);
            answer.as_mut().poll(cx)
        })
        .await
    }
}

/// Lets the driver do what it can, and drops it at its end.
fn drive<D: Future + Unpin>(driver: &mut Option<D>, cx: &mut Context<'_>) {
    if driver.as_mut().is_some_and(|driver| Pin::new(driver).poll(cx).is_ready()) {
        *driver = None;
    }
}

/// An answer whose body is still to be read. Dropping it closes the connection, which cancels the request.
pub(super) struct Reply {
    /// HTTP status.
    pub(super) status: u16,
    headers: HeaderMap,
    conn: Conn,
    body: Incoming,
    ended: bool,
}

impl Reply {
    /// The media type without parameters, in lower case; empty if there is none.
    pub(super) fn media_type(&self) -> String {
        let full = self.content_type();
        let media = full.split(';').next().unwrap_or_default();
        media.trim().to_ascii_lowercase()
    }

    /// The whole `content-type`.
    pub(super) fn content_type(&self) -> &str {
        self.headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default()
    }

    /// The next piece of the body; `None` at its end.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, Lost> {
        while !self.ended {
            let (conn, body) = (&mut self.conn, &mut self.body);
            let frame = poll_fn(|cx| {
                if let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(cx) {
                    return Poll::Ready(frame);
                }
                conn.drive(cx);
                Pin::new(&mut *body).poll_frame(cx)
            })
            .await;
            match frame {
                None => self.ended = true,
                Some(Err(error)) => {
                    return Err(Lost::new("its connection broke in the middle of the answer", &error));
                }
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data()
                        && !data.is_empty()
                    {
                        return Ok(Some(data));
                    }
                }
            }
        }
        Ok(None)
    }

    /// The rest of the body if it has at most `limit_bytes`, else `None`.
    pub(super) async fn whole(&mut self, limit_bytes: usize) -> Result<Option<Bytes>, Lost> {
        let Some(first) = self.chunk().await? else {
            return Ok(Some(Bytes::new()));
        };
        if first.len() > limit_bytes {
            return Ok(None);
        }
        let Some(second) = self.chunk().await? else {
            return Ok(Some(first)); // The usual case: nothing is copied.
        };
        let expected = self.body.size_hint().lower().try_into().unwrap_or(0usize).min(limit_bytes);
        let mut all = Vec::with_capacity(first.len() + second.len() + expected);
        all.extend_from_slice(&first);
        let mut next = Some(second);
        while let Some(piece) = next {
            if all.len() + piece.len() > limit_bytes {
                return Ok(None);
            }
            all.extend_from_slice(&piece);
            next = self.chunk().await?;
        }
        Ok(Some(all.into()))
    }
}

/// Kept-alive connections to workers. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Pool {
    idle: Arc<Mutex<HashMap<String, Vec<Conn>>>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").finish_non_exhaustive()
    }
}

impl Pool {
    /// Sends `ask` to `authority` (`127.0.0.1:8001`) and waits for the answer's head.
    ///
    /// A worker closes idle connections by its own timer, and that may cross with a request just written. Such a request
    /// is sent again on a fresh connection, but only if it cannot have run: the connection was a reused one, it closed
    /// without a single byte within [`STALE_WINDOW`], and the worker still accepts a fresh connection. A worker that died
    /// on the request refuses that one, and the caller learns that the worker is lost.
    pub(super) async fn call(&self, authority: &str, ask: &Ask) -> Result<Reply, Lost> {
        let mut reached = false;
        while let Some(mut conn) = self.take(authority) {
            if !conn.is_usable().await {
                continue;
            }
            let sent = Instant::now();
            match conn.send(ask.request(authority)?).await {
                Ok(head) => return Ok(reply(head, conn)),
                Err(error) if error.is_canceled() => {} // Never written.
                Err(error) if sent.elapsed() < STALE_WINDOW && closed_silently(&error) => {
                    reached = true;
                    break;
                }
                Err(error) => return Err(Lost::new("its connection broke before it answered", &error)),
            }
        }
        let mut conn = Conn::open(authority).await.map_err(|lost| Lost { reached, ..lost })?;
        match conn.send(ask.request(authority)?).await {
            Ok(head) => Ok(reply(head, conn)),
            Err(error) => Err(Lost::new("its connection broke before it answered", &error)),
        }
    }

    /// Keeps the reply's connection for the next call. The unread end of its body, if any, is read then.
    pub(super) fn give_back(&self, authority: &str, reply: Reply) {
        let mut conn = reply.conn;
        if conn.driver.is_none() {
            return;
        }
        conn.rest = (!reply.ended).then_some(reply.body);
        conn.idle_since = Instant::now();
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // Workers come and go; nobody asks any more for the connections of one that is gone.
        idle.retain(|other, conns| {
            let newest = conns.last().map(|c| c.idle_since);
            other == authority || newest.is_some_and(|at| at.elapsed() <= IDLE_LIMIT)
        });
        let conns = match idle.get_mut(authority) {
            Some(conns) => conns,
            None => idle.entry(authority.to_owned()).or_default(),
        };
        if conns.len() < IDLE_PER_WORKER {
            conns.push(conn);
        }
    }

    /// The connection used last, since it is the likeliest to be open; drops what is too old.
    fn take(&self, authority: &str) -> Option<Conn> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let conns = idle.get_mut(authority)?;
        let old = conns.partition_point(|c| c.idle_since.elapsed() > IDLE_LIMIT);
        let dropped: Vec<Conn> = conns.drain(..old).collect();
        let taken = conns.pop();
        drop(idle);
        drop(dropped);
        taken
    }
}

fn reply(head: Response<Incoming>, conn: Conn) -> Reply {
    let (head, body) = head.into_parts();
    Reply { status: head.status.as_u16(), headers: head.headers, ended: body.is_end_stream(), conn, body }
}

/// Whether the connection ended without a byte of an answer, as opposed to a malformed one.
fn closed_silently(error: &hyper::Error) -> bool {
    use std::io::ErrorKind;
    let io = std::error::Error::source(error).and_then(|s| s.downcast_ref::<std::io::Error>());
    error.is_incomplete_message()
        || error.is_closed()
        || io.is_some_and(|e| matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe))
}
