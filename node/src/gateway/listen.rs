//! A router on a socket, with bounds on what a connection may cost before a request exists: number, header
//! size and time, HTTP/2 streams, and how long a client may refuse to read. Called by the supervisor for the
//! client port; the admin port uses it too. Certificates are the caller's business.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum_server::Handle;
use axum_server::accept::Accept;
use axum_server::tls_rustls::{RustlsAcceptor, RustlsConfig};
use hyper_util::rt::TokioTimer;
use parking_lot::Mutex;
use shared::config::ClientsConfig;
use shared::error::{ErrorKind, RequestError};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};

use super::limits::STALL_MAX;
use super::{leftover, reply};

/// Bounds of a listener.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Connections open at once; more are refused. Each costs a file descriptor and up to 64 KiB.
    pub connections_max: usize,
    /// Of these, from one address.
    pub per_address_max: usize,
    /// A client that takes no byte for this long is cut.
    pub stall: Duration,
    /// Request headers must be complete within this time; also how long an idle connection is kept.
    pub header_wait: Duration,
}

impl Bounds {
    /// The configured numbers with the usual waits.
    pub fn new(clients: &ClientsConfig) -> Self {
        Self {
            connections_max: clients.connections,
            per_address_max: clients.connections_per_address,
            stall: STALL_MAX,
            // Longer than clients keep idle connections.
            header_wait: Duration::from_secs(30),
        }
    }
}

/// Bytes of request headers (HTTP/1: with the request line; hyper answers 431 beyond, and for over 100 headers).
const HEADER_BYTES_MAX: usize = 64 * 1024;
/// Requests at once on one HTTP/2 connection.
const STREAMS_MAX: u32 = 64;
/// HTTP/2 pings a silent peer this often.
const PING_EVERY: Duration = Duration::from_secs(20);

/// Serves until `handle` is told to stop. With `tls` the port speaks only TLS; the certificate can be reloaded
/// through it while serving.
///
/// # Errors
/// When the listener cannot be used.
pub async fn serve(
    listener: std::net::TcpListener,
    tls: Option<RustlsConfig>,
    handle: Handle<SocketAddr>,
    bounds: Bounds,
    router: Router,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let router = leftover::layered(router);
    let guard = Guard { open: Arc::default(), bounds, tls: tls.is_some() };
    let mut server = axum_server::from_tcp(listener)?.handle(handle);
    let http = server.http_builder();
    http.http1().timer(TokioTimer::new()).header_read_timeout(bounds.header_wait).max_buf_size(HEADER_BYTES_MAX);
    http.http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_EVERY)
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEADER_BYTES_MAX as u32);
    match tls {
        Some(config) => {
            server.acceptor(RustlsAcceptor::new(config).acceptor(guard)).serve(router.into_make_service()).await
        }
        None => server.acceptor(guard).serve(router.into_make_service()).await,
    }
}

/// Accepts connections up to a number, in all and per address, and wraps them in [`Guarded`].
#[derive(Clone)]
struct Guard {
    open: Arc<Mutex<Open>>,
    bounds: Bounds,
    tls: bool,
}

/// Connections that are open.
#[derive(Debug, Default)]
struct Open {
    n: usize,
    by_address: HashMap<IpAddr, usize>,
}

/// One open connection; closed when dropped.
struct Place {
    open: Arc<Mutex<Open>>,
    address: IpAddr,
}

/// What a connection over a bound gets on a plain port; within TLS nothing can be said before the handshake.
fn refusal() -> String {
    let message = "too many connections are open on this port or from this address; hint: reuse connections";
    let error = RequestError::new(ErrorKind::Unavailable, "too_many_connections", message);
    let body = serde_json::to_string(&reply::error_body(&error)).expect("strings are JSON");
    format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

impl Guard {
    fn place(&self, address: IpAddr) -> Option<Place> {
        let mut open = self.open.lock();
        let of_address = open.by_address.get(&address).copied().unwrap_or_default();
        if open.n >= self.bounds.connections_max || of_address >= self.bounds.per_address_max {
            return None;
        }
        open.n += 1;
        open.by_address.insert(address, of_address + 1);
        Some(Place { open: Arc::clone(&self.open), address })
    }

    fn guarded(&self, stream: TcpStream) -> io::Result<Guarded> {
        // A client that spells its IPv4 address as IPv6 is still the same one.
        let address = stream.peer_addr()?.ip().to_canonical();
        let Some(place) = self.place(address) else {
            crate::metrics::connection_refused();
            if !self.tls {
                // The send buffer of a fresh connection holds it; if not, closing says enough.
                let _ = stream.try_write(refusal().as_bytes());
            }
            return Err(io::Error::new(io::ErrorKind::ConnectionRefused, "too many connections"));
        };
        stream.set_nodelay(true)?;
        Ok(Guarded { stream, stall: self.bounds.stall, waiting: None, _place: place })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.open.lock();
        open.n -= 1;
        if let Some(count) = open.by_address.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                open.by_address.remove(&self.address);
            }
        }
    }
}

impl<S> Accept<TcpStream, S> for Guard {
    type Stream = Guarded;
    type Service = S;
    type Future = std::future::Ready<io::Result<(Guarded, S)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        std::future::ready(self.guarded(stream).map(|guarded| (guarded, service)))
    }
}

/// A connection whose writes fail when the peer takes nothing for `stall`.
struct Guarded {
    stream: TcpStream,
    stall: Duration,
    /// Runs while a write waits.
    waiting: Option<Pin<Box<Sleep>>>,
    _place: Place,
}

impl Guarded {
    fn watch(&mut self, cx: &mut Context<'_>, wrote: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if wrote.is_ready() {
            self.waiting = None;
            return wrote;
        }
        let stall = self.stall;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep(stall)));
        waiting.as_mut().poll(cx).map(|()| Err(io::Error::new(io::ErrorKind::TimedOut, "the peer reads nothing")))
    }
}

impl AsyncRead for Guarded {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.watch(cx, wrote)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.watch(cx, wrote)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
