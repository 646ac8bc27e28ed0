//! Parts of an answer as server-sent events over HTTP.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderValue, Response};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::backend::Backend;
use super::flow::Arrival;
use super::generate::Started;
use super::limits::{FRAMES_AHEAD_MAX, Pace};
use super::position::Position;
use super::reply::{self, error_body};
use super::stream::{Part, Sink, pump};

/// The streaming response. `first` is what has already arrived.
pub fn respond<B: Backend>(backend: Arc<B>, started: Started, first: Vec<Arrival>, pace: Pace) -> Response<Body> {
    let Started { mut flow, answering, have, resumable } = started;
    let (frames, receiver) = mpsc::channel(FRAMES_AHEAD_MAX);
    let cut = Arc::new(AtomicBool::new(false));
    let mut response = Response::new(body(receiver, cut.clone()));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    reply::set(headers, "x-accel-buffering", "no");
    flow.look_ahead(&first);
    flow.headers(headers);
    let position = resumable.map(|request| Position { request, have: have.clone() });
    let sink = Frames { frames, cut, stall: pace.stall, position };
    tokio::spawn(pump(backend, answering.shape, flow, first, have, pace.keep_alive, sink));
    response
}

/// Frames as a body. A stream that was cut ends in an error, so that no client takes it for complete.
fn body(frames: mpsc::Receiver<Bytes>, cut: Arc<AtomicBool>) -> Body {
    Body::from_stream(stream::unfold((frames, cut, false), |(mut frames, cut, over)| async move {
        if over {
            return None;
        }
        match frames.recv().await {
            Some(frame) => Some((Ok(frame), (frames, cut, false))),
            None if cut.load(Ordering::Acquire) => {
                let error = io::Error::new(io::ErrorKind::TimedOut, "the client read too slowly");
                Some((Err(error), (frames, cut, true)))
            }
            None => None,
        }
    }))
}

struct Frames {
    frames: mpsc::Sender<Bytes>,
    cut: Arc<AtomicBool>,
    stall: Duration,
    /// What the client has after each event, for those that can be gone on with.
    position: Option<Position>,
}

impl Frames {
    fn write(&mut self, out: &mut BytesMut, part: Part) {
        match part {
            Part::Piece(piece) => {
                if let Some(position) = &mut self.position {
                    position.pass(&piece);
                    out.put_slice(format!("id: {position}\n").as_bytes());
                }
                data(out, &piece.json);
            }
            Part::Extra(json) => data(out, &json),
            Part::Failed(error) => {
                let json = serde_json::to_vec(&error_body(&error)).expect("an error body is plain JSON");
                data(out, &json);
            }
            Part::Done => data(out, b"[DONE]"),
            Part::Waiting => out.put_slice(b": keep-alive\n\n"),
        }
    }
}

fn data(out: &mut BytesMut, payload: &[u8]) {
    out.reserve(payload.len() + 8);
    out.put_slice(b"data: ");
    out.put_slice(payload);
    out.put_slice(b"\n\n");
}

impl Sink for Frames {
    async fn send(&mut self, parts: Vec<Part>) -> bool {
        let mut out = BytesMut::new();
        for part in parts {
            self.write(&mut out, part);
        }
        match timeout(self.stall, self.frames.send(out.freeze())).await {
            Ok(sent) => sent.is_ok(),
            Err(_) => {
                crate::metrics::stream_cut("slow_reader");
                self.cut.store(true, Ordering::Release);
                false
            }
        }
    }

    async fn gone(&self) {
        self.frames.closed().await;
    }
}
