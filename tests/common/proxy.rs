//! A TCP proxy like those before rented machines: it cuts every answer that takes too long.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

use super::beside;

/// Cuts a connection when its answer is not complete `limit` after its request came. One request a connection.
pub(crate) struct CuttingProxy {
    pub(crate) url: String,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    requests: AtomicUsize,
    cuts: AtomicUsize,
}

impl CuttingProxy {
    pub(crate) async fn start(upstream: &str, limit: Duration) -> Self {
        let upstream: SocketAddr = upstream.trim_start_matches("http://").parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let counts = Arc::new(Counts::default());
        let shared = counts.clone();
        beside(async move {
            while let Ok((client, _)) = listener.accept().await {
                beside(relay(client, upstream, limit, shared.clone()));
            }
        });
        Self { url, counts }
    }

    /// Requests so far.
    pub(crate) fn requests(&self) -> usize {
        self.counts.requests.load(Ordering::SeqCst)
    }

    /// Answers cut so far.
    pub(crate) fn cuts(&self) -> usize {
        self.counts.cuts.load(Ordering::SeqCst)
    }
}

async fn relay(mut client: TcpStream, upstream: SocketAddr, limit: Duration, counts: Arc<Counts>) {
    let Ok(mut server) = TcpStream::connect(upstream).await else { return };
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let mut deadline = None;
    let (mut up, mut down) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    loop {
        let cut = async {
            match deadline {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            read = from_client.read(&mut up) => match read {
                Ok(n) if n > 0 => {
                    if deadline.is_none() {
                        counts.requests.fetch_add(1, Ordering::SeqCst);
                        deadline = Some(Instant::now() + limit);
                    }
                    if to_server.write_all(&up[..n]).await.is_err() { return; }
                }
                _ => return,
            },
            read = from_server.read(&mut down) => match read {
                Ok(n) if n > 0 => if to_client.write_all(&down[..n]).await.is_err() { return; },
                _ => return,
            },
            () = cut => {
                counts.cuts.fetch_add(1, Ordering::SeqCst);
                return;
            }
        }
    }
}
