//! A router on a socket, with bounds on what a connection may cost before a request exists: number, header
//! size and time, HTTP/2 streams, and how long a client may refuse to read. Called by the supervisor for the
//! client port; the admin port uses it too. Certificates are the caller's business.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum_server::Handle;
use axum_server::accept::Accept;
use axum_server::tls_rustls::{RustlsAcceptor, RustlsConfig};
use hyper_util::rt::TokioTimer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};

use super::limits::STALL_MAX;

/// Bounds of a listener.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Connections open at once; more are closed at once. Each costs a file descriptor and up to 64 KiB.
    pub connections_max: usize,
    /// A client that takes no byte for this long is cut.
    pub stall: Duration,
    /// Request headers must be complete within this time; also how long an idle connection is kept.
    pub header_wait: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        // 4096 × 64 KiB is 256 MiB at the very worst; 30 s is longer than clients keep idle connections.
        Self { connections_max: 4096, stall: STALL_MAX, header_wait: Duration::from_secs(30) }
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
    let guard = Guard { open: Arc::new(Semaphore::new(bounds.connections_max)), stall: bounds.stall };
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

/// Accepts connections up to a number and wraps them in [`Guarded`].
#[derive(Clone)]
struct Guard {
    open: Arc<Semaphore>,
    stall: Duration,
}

impl<S> Accept<TcpStream, S> for Guard {
    type Stream = Guarded;
    type Service = S;
    type Future = std::future::Ready<io::Result<(Guarded, S)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        let permit = self.open.clone().try_acquire_owned().map_err(|_| {
            crate::metrics::connection_refused();
            io::Error::new(io::ErrorKind::ConnectionRefused, "too many connections")
        });
        let guarded = permit.and_then(|permit| {
            stream.set_nodelay(true)?;
            Ok((Guarded { stream, stall: self.stall, waiting: None, _permit: permit }, service))
        });
        std::future::ready(guarded)
    }
}

/// A connection whose writes fail when the peer takes nothing for `stall`.
struct Guarded {
    stream: TcpStream,
    stall: Duration,
    /// Runs while a write waits.
    waiting: Option<Pin<Box<Sleep>>>,
    _permit: OwnedSemaphorePermit,
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
