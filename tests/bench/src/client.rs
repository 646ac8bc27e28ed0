//! One HTTP/1.1 connection to the server: asks one request at a time and times the events of the answer.

use std::time::Instant;

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use shared::clock::{Clock, SystemClock};
use tokio::net::TcpStream;

use crate::events::Scanner;
use crate::report::Ending;

/// What one request met. Times count from the sending.
#[derive(Debug, Default)]
pub struct Answer {
    /// When texts came.
    pub texts_at: Vec<Instant>,
    /// Prompt tokens as the server counted them.
    pub prompt_tokens: u64,
    /// Answer tokens as the server counted them, else texts.
    pub output_tokens: u64,
    /// How it ended; `None` while it runs.
    pub ending: Option<Ending>,
}

/// A connection that is opened when it is needed and kept while it lasts.
#[derive(Debug)]
pub struct Client {
    /// `host:port`.
    authority: String,
    path: String,
    sender: Option<SendRequest<Full<Bytes>>>,
}

// === impl Client ===

impl Client {
    /// For requests to `http://authority/path`. Opens nothing yet.
    pub fn new(authority: &str, path: &str) -> Self {
        Self { authority: authority.to_owned(), path: path.to_owned(), sender: None }
    }

    /// Asks and fills `answer` while the answer comes, so that a caller who stops waiting keeps what came.
    pub async fn ask(&mut self, key: &str, body: Bytes, answer: &mut Answer) {
        let ending = match self.exchange(key, body, answer).await {
            Ok(ending) => ending,
            Err(error) => {
                self.sender = None;
                Ending::Failed(format!("{error:#}"))
            }
        };
        answer.ending = Some(ending);
    }

    async fn exchange(&mut self, key: &str, body: Bytes, answer: &mut Answer) -> Result<Ending> {
        let (mut sender, was_kept) = match self.kept().await {
            Some(sender) => (sender, true),
            None => (self.connect().await?, false),
        };
        let response = match sender.send_request(self.request(key, body.clone())?).await {
            Ok(response) => response,
            // Servers may close a connection that was kept at any time; that says nothing about the request.
            Err(_) if was_kept => {
                sender = self.connect().await?;
                sender.send_request(self.request(key, body)?).await.context("send")?
            }
            Err(error) => return Err(error).context("send"),
        };
        let status = response.status();
        let outcome =
            if status.is_success() { stream(response.into_body(), answer).await } else { refused(response).await };
        self.sender = Some(sender);
        outcome
    }

    /// The connection of the last request, if the server has not closed it.
    async fn kept(&mut self) -> Option<SendRequest<Full<Bytes>>> {
        let mut sender = self.sender.take()?;
        sender.ready().await.ok()?;
        Some(sender)
    }

    fn request(&self, key: &str, body: Bytes) -> Result<Request<Full<Bytes>>> {
        let mut request = Request::post(&self.path)
            .header("host", &self.authority)
            .header("content-type", "application/json")
            .body(Full::new(body))
            .context("make a request")?;
        if !key.is_empty() {
            let value = format!("Bearer {key}").parse().context("a key is a header value")?;
            request.headers_mut().insert("authorization", value);
        }
        Ok(request)
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>> {
        let socket = TcpStream::connect(&self.authority).await.context("connect")?;
        socket.set_nodelay(true).context("set no delay")?;
        let (sender, connection) = handshake(TokioIo::new(socket)).await.context("shake hands")?;
        // The task ends with the connection; what goes wrong there fails the request that uses it.
        tokio::spawn(connection);
        Ok(sender)
    }
}

async fn stream(mut body: Incoming, answer: &mut Answer) -> Result<Ending> {
    let mut scanner = Scanner::default();
    while let Some(frame) = body.frame().await {
        let frame = frame.context("read")?;
        let Some(bytes) = frame.data_ref() else { continue };
        let n_texts = scanner.take(bytes);
        if n_texts > 0 {
            let now = SystemClock.now();
            answer.texts_at.extend(std::iter::repeat_n(now, n_texts));
        }
        answer.output_tokens = scanner.seen().completion_tokens.unwrap_or(answer.texts_at.len() as u64);
        answer.prompt_tokens = scanner.seen().prompt_tokens.unwrap_or(0);
    }
    let seen = scanner.seen();
    Ok(match &seen.error {
        Some(error) => Ending::Failed(error.clone()),
        None if seen.done => Ending::Finished,
        None => Ending::Failed("the stream ended without its end mark".to_owned()),
    })
}

/// Status and the head of the body, which is short or not worth reading.
async fn refused(response: hyper::Response<Incoming>) -> Result<Ending> {
    let status = response.status();
    let body = response.into_body().collect().await.context("read a refusal")?.to_bytes();
    let words = String::from_utf8_lossy(&body[..body.len().min(160)]).into_owned();
    Ok(Ending::Failed(format!("status {}: {words}", status.as_u16())))
}
