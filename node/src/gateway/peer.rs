//! The door for other nodes: requests that they admitted, to be run here.
//!
//! TLS has proved by then that a node of this cluster speaks. Admission, rates and metering happened where the client
//! is; checked again is what this node can know by itself: the tenant exists and is served, its contract is at least
//! the one the request was admitted under, and nothing in the request belongs to another tenant.

use std::sync::Arc;
use std::time::Duration;

use coordinator::failover::HAND_OVER;
use coordinator::registry::snapshot::{Snapshot, TenantView};
use coordinator::route::Arrival;
use peer::{EventSink, PeerService};
use shared::cluster::Heartbeat;
use shared::error::{ErrorKind, RequestError};
use shared::id::NodeId;
use shared::request::{Emitted, Envelope};
use shared::tenant::TenantState;
use shared::token::TokenEvent;
use wire::node::{Answer, Hello, Request, Response, Start};

use crate::app::App;
use crate::app::serve::Serving;
use crate::cluster::{ClusterNode, place};
use crate::gateway::backend::node_stopping;
use crate::prewarm;

/// Longest wait for a contract that the sender knows and this node does not yet: a change reaches every node within
/// some heartbeats, or the node is cut off and should not serve it.
const CONTRACT_WITHIN: Duration = Duration::from_millis(500);
/// Events of one request sent in one go: a step gives each of its choices one.
const EVENTS_AT_ONCE: usize = 32;

impl App {
    /// Runs a request that `from` admitted.
    ///
    /// # Errors
    /// When this node stops or cannot run it, and when the request names what its tenant does not own.
    pub async fn take_on(
        &self,
        from: &NodeId,
        mut envelope: Envelope,
        emitted: Emitted,
        attempt: u32,
    ) -> Result<Serving, RequestError> {
        // Usage is recorded where the client is: this node may compute for others while it cannot.
        self.check_works()?;
        let tenant = &envelope.route.tenant;
        let foreign_pin = envelope.adapter.as_ref().is_some_and(|pin| pin.name.client != *tenant);
        if foreign_pin {
            tracing::error!(%from, tenant_id = %tenant, request_id = %envelope.id, "a node sent a request with another tenant's adapter");
            return Err(RequestError::internal());
        }
        let view = self.contract_of(&envelope).await?;
        if view.contract().state == TenantState::Suspended {
            return Err(RequestError::new(ErrorKind::Forbidden, "tenant_suspended", "this tenant is suspended"));
        }
        // What this node knows itself it takes from nobody.
        envelope.cache_secret = *view.cache_secret();
        self.serve(Arc::new(envelope), emitted, attempt).await
    }

    /// The tenant, with a contract not older than the one the request was admitted under.
    async fn contract_of(&self, envelope: &Envelope) -> Result<Arc<TenantView>, RequestError> {
        let tenant = &envelope.route.tenant;
        let find = |snapshot: &Snapshot| {
            let view = snapshot.tenant(tenant)?;
            (view.contract().epoch >= envelope.contract_epoch).then(|| Arc::clone(view))
        };
        if let Some(view) = find(&self.registry().snapshot()) {
            return Ok(view);
        }
        let mut snapshots = self.registry().subscribe();
        let known = tokio::time::timeout(CONTRACT_WITHIN, snapshots.wait_for(|snapshot| find(snapshot).is_some()));
        let found = known.await.ok().and_then(Result::ok).and_then(|snapshot| find(&snapshot));
        found.ok_or_else(|| {
            let message = "this node does not know the tenant's contract yet; hint: retry, another node will answer";
            RequestError::new(ErrorKind::Unavailable, "contract_unknown", message).retry_after(Duration::from_secs(1))
        })
    }
}

/// Answers the other nodes.
pub struct PeerDoor {
    app: Arc<App>,
    cluster: Arc<ClusterNode>,
}

// === impl PeerDoor ===

impl PeerDoor {
    /// A door to `app`.
    pub fn new(app: Arc<App>, cluster: Arc<ClusterNode>) -> Self {
        Self { app, cluster }
    }

    /// The run, or what the sender is told instead.
    async fn open(&self, from: &NodeId, start: Start) -> Result<Serving, Answer> {
        let Start { envelope, attempt, epoch, emitted } = start;
        let table = self.cluster.coordinator().tables().borrow().clone();
        let snapshot = self.app.registry().snapshot();
        let place = snapshot.tenant(&envelope.route.tenant).map(|view| place(&envelope.base, view.contract()));
        let arrival = place.map(|place| table.on_arrival(&place, &envelope.route.tenant, epoch));
        match arrival {
            Some(Arrival::Moved { epoch, to }) => return Err(Answer::Moved { epoch, to: vec![to] }),
            Some(Arrival::Refuse) => return Err(Answer::Refused(node_stopping())),
            Some(Arrival::Serve) | None => {}
        }
        self.app.take_on(from, envelope, emitted, attempt).await.map_err(Answer::Refused)
    }

    /// Passes events on until the end, until nobody waits, or until this node leaves.
    async fn pass_on(&self, mut serving: Serving, attempt: u32, mut sink: EventSink) {
        let gone = sink.gone();
        let leaving = self.cluster.leaving();
        tokio::pin!(gone, leaving);
        let mut events = Vec::with_capacity(EVENTS_AT_ONCE);
        loop {
            tokio::select! {
                n_events = serving.events.recv_many(&mut events, EVENTS_AT_ONCE) => if n_events == 0 {
                    return sink.finish();
                },
                () = &mut gone => return,
                () = &mut leaving => {
                    let message = "this node leaves; the request goes on elsewhere";
                    let event = TokenEvent::Failed(RequestError::new(ErrorKind::Unavailable, HAND_OVER, message));
                    return self.last_word(sink, Answer::Event { attempt, event }).await;
                }
            }
            let answers: Vec<Answer> = events.drain(..).map(|event| Answer::Event { attempt, event }).collect();
            if sink.send(&answers).await.is_err() {
                return;
            }
        }
    }

    async fn last_word(&self, mut sink: EventSink, answer: Answer) {
        // Whoever is gone does not need the news.
        if sink.send(&[answer]).await.is_ok() {
            sink.finish();
        }
    }
}

impl PeerService for PeerDoor {
    async fn call(&self, from: NodeId, request: Request) -> Response {
        match request {
            Request::Raft { bytes, .. } => Response::Raft { bytes: self.app.registry().on_raft(&from, &bytes).await },
            Request::Admin { bytes } => Response::Admin { bytes: self.app.registry().on_forwarded(&bytes).await },
            Request::Warm { epoch, base, adapter } => {
                prewarm::on_hint(&self.app, epoch, &base, &adapter);
                Response::Done
            }
            // The notice comes with the heartbeat, too, which says more.
            Request::DrainNotice { .. } => Response::Done,
            Request::JournalOpen(record) => done(self.cluster.keep(&from, *record)),
            Request::JournalPut(deltas) => done(self.cluster.keep_more(&from, &deltas)),
            Request::JournalTake { id } => Response::Journal(self.cluster.hand_out(id).map(Box::new)),
            Request::Probe { id, .. } => Response::Probe(self.app.progress(id)),
            Request::Residents => Response::Residents(self.app.residents()),
            Request::BaseText { text, offset } => {
                self.app.texts().piece(text, offset).map_or_else(Response::Refused, Response::BaseText)
            }
        }
    }

    async fn start(&self, from: NodeId, start: Start, sink: EventSink) {
        let _guest = self.cluster.guest();
        let attempt = start.attempt;
        match self.open(&from, start).await {
            Ok(serving) => self.pass_on(serving, attempt, sink).await,
            Err(answer) => self.last_word(sink, answer).await,
        }
    }

    fn heartbeat(&self, from: &NodeId, heartbeat: Heartbeat) {
        self.cluster.coordinator().heard(from, heartbeat);
    }

    fn hello(&self, from: &NodeId, hello: &Hello) {
        self.cluster.coordinator().serves(from, hello.bases.as_slice().into());
    }
}

fn done(outcome: Result<(), RequestError>) -> Response {
    outcome.map_or_else(Response::Refused, |()| Response::Done)
}
