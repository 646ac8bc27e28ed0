//! What a handler leaves unread of a small request body is read and dropped, so that its connection can be used
//! again. An HTTP/1 connection with unread bytes has to close, and a client that sends its next request on it
//! meets a broken connection instead of an answer: after a 401, a 404, or a GET with a body. A layer around
//! every route of both ports; larger bodies are not worth reading and end their connection.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::Request;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;

/// Most that is read for nobody: the bodies of ordinary requests, and little work for whoever sends without a key.
const LEFTOVER_BYTES_MAX: u64 = 64 * 1024;
/// Longest wait for them.
const LEFTOVER_WAIT_MAX: Duration = Duration::from_secs(1);

/// `router`, with its requests' bodies read to their end when they are small.
pub fn layered(router: Router) -> Router {
    router.layer(axum::middleware::map_request(async |request: Request| {
        request.map(|inner| Body::new(Unread { inner, left: LEFTOVER_BYTES_MAX, ended: false }))
    }))
}

/// A body that is read to its end after its reader has let go of it.
struct Unread {
    inner: Body,
    /// Bytes that may still come.
    left: u64,
    /// Nothing follows, or nothing that is worth waiting for.
    ended: bool,
}

impl HttpBody for Unread {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                let bytes = frame.data_ref().map_or(0, Bytes::len) as u64;
                self.ended = bytes > self.left;
                self.left = self.left.saturating_sub(bytes);
            }
            Poll::Ready(None | Some(Err(_))) => self.ended = true,
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        let small = self.inner.size_hint().lower() <= self.left;
        if self.ended || self.inner.is_end_stream() || !small {
            return;
        }
        let (mut inner, mut left) = (std::mem::take(&mut self.inner), self.left);
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(tokio::time::timeout(LEFTOVER_WAIT_MAX, async move {
            while let Some(Ok(frame)) = inner.frame().await {
                let bytes = frame.data_ref().map_or(0, Bytes::len) as u64;
                let Some(rest) = left.checked_sub(bytes) else { return };
                left = rest;
            }
        }));
    }
}
