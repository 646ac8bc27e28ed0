//! One answer, from however many nodes it takes.

use std::time::Duration;

use quinn::Connection;
use tokio::time::{Instant, sleep};
use wire::client::{Answer, Ask, Piece};

use crate::connection::{Answers, Client, ClientError, Setback, refused};
use crate::have::{Arrived, Verdict};

/// How long an answer can be resumed; the nodes keep it no longer.
const RESUME_MAX: Duration = Duration::from_secs(60);
/// Pause before all nodes are tried again; doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// What an answer consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// More of a choice; JSON as behind `data:` over HTTP.
    Piece(Piece),
    /// What belongs to no choice, such as usage.
    Extra(Vec<u8>),
}

/// The answer to one question. Dropping it cancels the request.
pub struct Stream {
    client: Client,
    ask: Ask,
    accepted: Option<(u128, Vec<u8>)>,
    arrived: Arrived,
    has_extra: bool,
    is_done: bool,
    live: Option<(Connection, Answers)>,
    /// Since when nothing new has come, once something went wrong.
    stuck: Option<Stuck>,
    n_resumed: u32,
}

struct Stuck {
    since: Instant,
    n_attempts: usize,
}

// === impl Stream ===

impl Stream {
    pub(crate) fn new(client: Client, ask: Ask) -> Self {
        Self {
            client,
            ask,
            accepted: None,
            arrived: Arrived::default(),
            has_extra: false,
            is_done: false,
            live: None,
            stuck: None,
            n_resumed: 0,
        }
    }

    /// How often the answer went on at another node, or at the same one anew.
    pub fn n_resumed(&self) -> u32 {
        self.n_resumed
    }

    /// The id of the request, as soon as the cluster has accepted it.
    pub fn request(&self) -> Option<u128> {
        self.accepted.as_ref().map(|(request, _)| *request)
    }

    /// What comes next; `None` when all is said. Each token comes once and in order, whatever happens to nodes.
    ///
    /// # Errors
    /// When the cluster refuses, or no node could be reached for a minute.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        while !self.is_done {
            let setback = match self.advance().await {
                Ok(Some(event)) => {
                    self.stuck = None;
                    return Ok(Some(event));
                }
                Ok(None) => continue,
                Err(setback) => setback,
            };
            if let Some((connection, _)) = self.live.take() {
                self.client.0.leave(&connection).await;
            }
            match setback {
                Setback::Final(error) => {
                    self.is_done = true;
                    return Err(error);
                }
                Setback::Transient(why) => self.pause(why).await?,
            }
        }
        Ok(None)
    }

    /// One step towards the next event.
    async fn advance(&mut self) -> Result<Option<Event>, Setback> {
        let answers = match &mut self.live {
            Some((_, answers)) => answers,
            live => {
                let ask = match &self.accepted {
                    None => self.ask.clone(),
                    Some((request, token)) => {
                        let have = self.arrived.choices().to_vec();
                        Ask::Resume { request: *request, token: token.clone(), have }
                    }
                };
                let opened = self.client.0.open(&ask).await?;
                self.n_resumed += u32::from(self.stuck.is_some() && self.accepted.is_some());
                &mut live.insert(opened).1
            }
        };
        match answers.next().await? {
            Some(Answer::Accepted { request, token }) => {
                self.accepted = Some((request, token));
                Ok(None)
            }
            Some(Answer::Piece(piece)) => match self.arrived.take(&piece) {
                Verdict::New => Ok(Some(Event::Piece(piece))),
                Verdict::Repeated => Ok(None),
                Verdict::Misfit => Err(Setback::Transient(format!("a piece does not fit: choice {}", piece.choice))),
            },
            Some(Answer::Extra { json }) => {
                let is_new = !std::mem::replace(&mut self.has_extra, true);
                Ok(is_new.then_some(Event::Extra(json)))
            }
            Some(Answer::Done) => {
                self.is_done = true;
                Ok(None)
            }
            // Nobody remembers it: asked anew it is the same request, and what is here is passed over.
            Some(Answer::Failed { status: 404, .. }) if self.accepted.is_some() => {
                self.accepted = None;
                Err(Setback::Transient("no node remembers the request".into()))
            }
            Some(Answer::Failed { status, retry_after_ms, json }) => Err(refused(status, retry_after_ms, json)),
            Some(Answer::Welcome { .. }) => Err(Setback::Transient("a welcome in place of an answer".into())),
            None => Err(Setback::Transient("the node ended the stream early".into())),
        }
    }

    /// Waits before the next attempt, not at all while there are nodes that were not tried; gives up in the end.
    async fn pause(&mut self, why: String) -> Result<(), ClientError> {
        tracing::debug!(why, "trying another node");
        let stuck = self.stuck.get_or_insert_with(|| Stuck { since: Instant::now(), n_attempts: 0 });
        stuck.n_attempts += 1;
        let waited = stuck.since.elapsed();
        if waited > RESUME_MAX {
            self.is_done = true;
            return Err(ClientError::Unreachable { waited, why });
        }
        let n_rounds = stuck.n_attempts / self.client.0.n_nodes();
        if n_rounds > 0 {
            sleep((PAUSE_MIN * (1 << (n_rounds - 1).min(10))).min(PAUSE_MAX)).await;
        }
        Ok(())
    }
}
