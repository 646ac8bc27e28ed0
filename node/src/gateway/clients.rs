//! The door for the client library over QUIC: the same requests as over HTTP, answered in pieces that say which tokens
//! they carry, so that a client can go on at another node.

use std::net::SocketAddr;
use std::sync::Arc;

use ::wire::client::{Answer, Ask, Endpoint};
use axum::Router;
use peer::clients::{AnswerSink, ClientService, Failure};
use quinn::Connection;
use shared::error::RequestError;
use shared::id::RequestId;

use super::backend::{Backend, Refused};
use super::generate::{Generate, Started};
use super::http3;
use super::json;
use super::limits::Pace;
use super::reply;
use super::request::FromHeaders;
use super::stream::{Part, Sink, pump};

/// Answers clients over QUIC.
pub struct ClientDoor<B> {
    backend: Arc<B>,
    pace: Pace,
    /// The HTTP API, for those who speak HTTP/3.
    router: Router,
}

// === impl ClientDoor ===

impl<B: Backend> ClientDoor<B> {
    /// A door to `backend`, and to the HTTP API before it.
    pub fn new(backend: Arc<B>, router: Router) -> Self {
        Self { backend, pace: Pace::default(), router }
    }

    async fn begin(&self, who: &B::Who, ask: Ask) -> Result<Started, RequestError> {
        let backend = self.backend.as_ref();
        let (idempotency_key, endpoint, body) = match ask {
            Ask::New { idempotency_key, endpoint, body } => (idempotency_key, endpoint, body),
            Ask::Resume { request, have, .. } => {
                return Started::resume(backend, who, RequestId(request), have).await;
            }
        };
        let object = json::parse_object(&body)?;
        let id = backend.request_id(who, &idempotency_key.to_le_bytes());
        let from_headers = FromHeaders { timeout: None, id: Some(id), digest: digest(endpoint, &body) };
        drop(body);
        let generate = Generate::parse(backend, who, endpoint, &object, from_headers)?;
        drop(object);
        generate.start(backend, who).await.map_err(|Refused { error, .. }| error)
    }
}

fn digest(endpoint: Endpoint, body: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[endpoint as u8]).update(body);
    *hasher.finalize().as_bytes()
}

impl<B: Backend> ClientService for ClientDoor<B> {
    type Tenant = B::Who;

    fn authenticate(&self, key: &str) -> Result<B::Who, Failure> {
        self.backend.authenticate(key).map_err(|error| failure(&error))
    }

    async fn ask(&self, who: Arc<B::Who>, _from: SocketAddr, ask: Ask, answers: AnswerSink) {
        let mut pieces = Pieces(Some(answers));
        let started = match self.begin(&who, ask).await {
            Ok(started) => started,
            Err(error) => {
                // Whoever is gone does not need the news.
                let _ = pieces.send(vec![Part::Failed(error), Part::Done]).await;
                return;
            }
        };
        let Started { flow, answering, have, resumable } = started;
        if let Some(request) = resumable {
            let accepted = Answer::Accepted { request: request.0, token: Vec::new() };
            if !pieces.say(&[accepted]).await {
                return;
            }
        }
        let backend = Arc::clone(&self.backend);
        pump(backend, answering.shape, flow, Vec::new(), have, self.pace.keep_alive, pieces).await;
    }

    async fn http3(&self, connection: Connection) {
        http3::serve(connection, self.router.clone()).await;
    }
}

/// A refusal in the words of the HTTP API.
fn failure(error: &RequestError) -> Failure {
    let retry_after_ms = error.retry_after.map_or(0, |after| u32::try_from(after.as_millis()).unwrap_or(u32::MAX));
    let json = serde_json::to_vec(&reply::error_body(error)).expect("an error body is plain JSON");
    Failure { status: reply::status(error.kind).as_u16(), retry_after_ms, json }
}

/// Parts as answers; `None` when all is said.
struct Pieces(Option<AnswerSink>);

impl Pieces {
    async fn say(&mut self, answers: &[Answer]) -> bool {
        match &mut self.0 {
            Some(sink) => sink.send(answers).await.is_ok(),
            None => false,
        }
    }
}

impl Sink for Pieces {
    async fn send(&mut self, parts: Vec<Part>) -> bool {
        let (mut answers, mut is_over) = (Vec::with_capacity(parts.len()), false);
        for part in parts {
            match part {
                Part::Piece(piece) => answers.push(Answer::Piece(piece)),
                Part::Extra(json) => answers.push(Answer::Extra { json }),
                Part::Failed(error) => {
                    answers.push(failure(&error).into());
                    is_over = true;
                }
                Part::Done if is_over => {}
                Part::Done => {
                    answers.push(Answer::Done);
                    is_over = true;
                }
                // The connection itself is kept alive.
                Part::Waiting => {}
            }
        }
        let sent = self.say(&answers).await;
        if sent
            && is_over
            && let Some(sink) = self.0.take()
        {
            sink.finish();
        }
        sent
    }

    async fn gone(&self) {
        match &self.0 {
            Some(sink) => sink.gone().await,
            None => std::future::pending().await,
        }
    }
}
