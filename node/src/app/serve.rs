//! Hops 5 and 6 on the node that does the work: run an admitted request here, from what its client has already.
//!
//! [`App::admit`](super::App) comes here. Nothing is admitted, counted or metered here: that happened where the client
//! is, which may be another node: its requests come here through [`crate::gateway::peer`].

use std::sync::Arc;
use std::time::Duration;

use queue::Item;
use scheduler::source::CancelFlag;
use shared::adapter::Residency;
use shared::error::{ErrorKind, RequestError};
use shared::id::{BaseName, RequestId};
use shared::request::{Emitted, Envelope};
use shared::tenant::Fallback;
use shared::token::TokenEvent;
use tokio::sync::mpsc;

use super::App;
use crate::engine_source::Payload;
use crate::gateway::backend::CancelOnDrop;

/// Events of one request that may wait for its reader: some seconds of the fastest stream. A full channel
/// parks the request in the engine.
pub const EVENTS_WAITING_MAX: usize = 256;

/// A request that waits for its turn or runs.
pub struct Serving {
    /// What the engine says.
    pub events: mpsc::Receiver<TokenEvent>,
    /// Ends the request when dropped.
    pub cancel: CancelOnDrop,
}

/// A request that was encoded for another model of the same name.
pub(super) fn other_content(base: &BaseName) -> RequestError {
    let message = format!(
        "the base {base} has another content at the node that was to go on with this request; hint: send it again"
    );
    RequestError::new(ErrorKind::Unavailable, "other_content", message).retry_after(Duration::from_secs(1))
}

impl App {
    /// Puts a request into this node's queue. `attempt` counts the nodes that tried before.
    ///
    /// # Errors
    /// When the base is not here or another one than the request was made for, its grammar does not compile, or the queue is full.
    pub async fn serve(
        &self,
        envelope: Arc<Envelope>,
        emitted: Emitted,
        attempt: u32,
    ) -> Result<Serving, RequestError> {
        let room = self.room(&envelope.base)?;
        let info = &room.text.info;
        if envelope.pin.hash.is_some_and(|hash| hash != info.hash) {
            return Err(other_content(&envelope.base));
        }
        // Whose tokens are the first, his are the rest.
        let begun_by = envelope.pin.numerics.as_ref().filter(|_| !emitted.is_empty());
        if begun_by.is_some_and(|numerics| *numerics != info.numerics_id()) {
            let message = "this node computes with other arithmetic than the one that began this answer";
            return Err(RequestError::new(ErrorKind::Unavailable, "other_numerics", message));
        }
        let tenant = &envelope.route.tenant;
        let snapshot = self.registry.snapshot();
        let fallback = snapshot.tenant(tenant).map_or(Fallback::Refuse, |view| view.contract().fallback);
        let grammar = match &envelope.generation.grammar {
            // Remembered where the request was admitted a moment ago.
            Some(grammar) => {
                let compiled = room.text.grammars.compile(tenant, grammar).await;
                Some(compiled.map_err(|error| error.to_request_error("response_format"))?)
            }
            None => None,
        };
        let adapter = envelope.adapter.as_ref().map(|pin| pin.adapter());
        if adapter.is_some() && attempt <= 1 {
            self.prewarmer.on_request(self.clock.wall(), &envelope.route);
        }
        let adapter_hit = adapter.as_ref().map(|adapter| room.cache.residency(&adapter.id()) == Residency::Ready);
        // Two attempts at one request may meet here, the older one on its way out.
        let id = RequestId(envelope.id.0.wrapping_add(u128::from(attempt)));
        let item = Item { id, ..Item::of(&envelope, &emitted) };
        let deadline = envelope.deadline;
        let (sink, events) = mpsc::channel(EVENTS_WAITING_MAX);
        let cancel = CancelFlag::default();
        let payload = Payload { envelope, emitted, grammar, sink, cancel: cancel.clone(), fallback, adapter_hit };
        let ticket = room.queue.submit(self.clock.now(), item, payload)?;
        // Its weights are fetched while it waits.
        if let Some(adapter) = adapter {
            room.cache.want(&adapter, deadline);
        }
        let cancel = CancelOnDrop::new(move || {
            cancel.cancel();
            drop(ticket);
        });
        Ok(Serving { events, cancel })
    }
}
