//! A light load generator: keep-alive connections on one thread, requests made beforehand, answers read and counted.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::LocalSet;

use crate::measure::{Counters, Run, us};
use crate::ours::{body, model, models};

/// Ids that are kept for polls.
const IDS_MAX: usize = 20_000;

/// Makes the n-th request of the run.
type Next = Box<dyn Fn(usize) -> Rc<[u8]> + Send>;

/// A kind of load.
pub(crate) struct Load {
    pub(crate) connections: usize,
    /// Jobs that one request submits or asks for.
    pub(crate) jobs: usize,
    expected: u16,
    next: Next,
}

impl Load {
    /// `POST /v1/jobs`
    pub(crate) fn single(connections: usize) -> Self {
        let requests: Vec<Vec<u8>> = (0..models()).map(|n| post("/v1/jobs", &item(n.cast_signed()))).collect();
        Self {
            connections,
            jobs: 1,
            expected: 202,
            next: Box::new(move |n| Rc::from(&requests[n % requests.len()][..])),
        }
    }

    /// `POST /v1/jobs/bulk`
    pub(crate) fn bulk(connections: usize, jobs: usize) -> Self {
        let items: Vec<String> = (0..jobs).map(|n| item(i64::try_from(n).unwrap_or(0))).collect();
        let request = post("/v1/jobs/bulk", &format!(r#"{{"requests":[{}]}}"#, items.join(",")));
        Self { connections, jobs, expected: 202, next: Box::new(move |_| Rc::from(&request[..])) }
    }

    /// `GET /v1/jobs/{id}`, the ids by turns.
    pub(crate) fn poll(connections: usize, ids: Vec<String>) -> Self {
        let requests: Vec<Vec<u8>> = ids.iter().map(|id| get(&format!("/v1/jobs/{id}"))).collect();
        Self {
            connections,
            jobs: 1,
            expected: 200,
            next: Box::new(move |n| Rc::from(&requests[n % requests.len()][..])),
        }
    }

    /// Runs it on a thread of its own. Also returns ids of jobs that were submitted.
    pub(crate) async fn run(self, server: SocketAddr, limit: Duration) -> anyhow::Result<(Run, Vec<String>)> {
        let load = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            LocalSet::new().block_on(&runtime, self.drive(server, limit))
        };
        tokio::task::spawn_blocking(load).await?
    }

    async fn drive(self, server: SocketAddr, limit: Duration) -> anyhow::Result<(Run, Vec<String>)> {
        let shared = Rc::new(RefCell::new((0_usize, Vec::new(), Vec::new())));
        let mut connections = Vec::new();
        for _ in 0..self.connections {
            connections.push(Connection::open(server).await?);
        }
        let load = Rc::new(self);
        let (begun, before) = (Instant::now(), Counters::now());
        let tasks: Vec<_> = connections
            .into_iter()
            .map(|mut connection| {
                let (load, shared) = (load.clone(), shared.clone());
                tokio::task::spawn_local(async move {
                    while begun.elapsed() < limit {
                        let n = {
                            let mut shared = shared.borrow_mut();
                            shared.0 += 1;
                            shared.0
                        };
                        let request = (load.next)(n);
                        let call = Instant::now();
                        let status = connection.call(&request).await?;
                        let took = us(call.elapsed());
                        anyhow::ensure!(
                            status == load.expected,
                            "the server answers {status}: {}",
                            String::from_utf8_lossy(&connection.read).chars().take(600).collect::<String>()
                        );
                        let (_, calls, ids) = &mut *shared.borrow_mut();
                        calls.push(took);
                        if load.expected == 202 && load.jobs == 1 && ids.len() < IDS_MAX {
                            ids.extend(
                                connection.header("location").and_then(|at| at.rsplit('/').next().map(str::to_owned)),
                            );
                        }
                    }
                    anyhow::Ok(())
                })
            })
            .collect();
        for task in tasks {
            task.await??;
        }
        let took = begun.elapsed();
        let (_, calls, ids) = shared.take();
        Ok((Run::new((calls.len() * load.jobs) as u64, took, calls, Counters::now().since(before)), ids))
    }
}

fn item(number: i64) -> String {
    format!(r#"{{"endpoint":"/v1/chat/completions","body":{}}}"#, body(&model(number)))
}

fn post(path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}")
        .into_bytes()
}

fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: bench\r\n\r\n").into_bytes()
}

/// One keep-alive connection.
pub(crate) struct Connection {
    stream: TcpStream,
    /// The latest answer, head and body.
    read: Vec<u8>,
    head: usize,
}

impl Connection {
    pub(crate) async fn open(server: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(server).await.with_context(|| format!("cannot connect to {server}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, read: Vec::with_capacity(16 << 10), head: 0 })
    }

    pub(crate) async fn get(&mut self, path: &str) -> anyhow::Result<(u16, &[u8])> {
        let status = self.call(&get(path)).await?;
        Ok((status, &self.read[self.head..]))
    }

    /// Sends a request and reads its answer whole.
    async fn call(&mut self, request: &[u8]) -> anyhow::Result<u16> {
        self.stream.write_all(request).await?;
        self.read.clear();
        let mut whole = None;
        loop {
            anyhow::ensure!(self.stream.read_buf(&mut self.read).await? > 0, "the server closed the connection");
            if whole.is_none()
                && let Some(head) = self.read.windows(4).position(|four| four == b"\r\n\r\n")
            {
                self.head = head + 4;
                let length: usize = match self.header("content-length") {
                    Some(length) => length.parse()?,
                    None => 0,
                };
                whole = Some(self.head + length);
            }
            if whole.is_some_and(|whole| self.read.len() >= whole) {
                let status = std::str::from_utf8(self.read.get(9..12).unwrap_or_default())?;
                return Ok(status.parse()?);
            }
        }
    }

    fn header(&self, name: &str) -> Option<&str> {
        let head = std::str::from_utf8(&self.read[..self.head]).ok()?;
        head.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}
