//! One sending at a time of a request that may be sent twice: the shell around [`coordinator::journal::idempotency`].
//!
//! The gateway claims a request before it looks for its record or begins it, and holds the claim until the last event
//! has been taken or the client is gone. Other nodes ask over the peer door whether it is held here.

use std::time::Duration;

use coordinator::journal::idempotency::{Ruling, Stance, in_use, ruling};
use shared::error::RequestError;
use shared::id::RequestId;
use wire::node::Progress;

use super::App;
use crate::gateway::backend::CancelOnDrop;

/// Before others that ask as well are asked again: they need one answer of this node to give way.
const AGAIN_AFTER: Duration = Duration::from_millis(5);
/// Rounds of asking: a second of pauses, far above what giving way takes.
const ROUNDS_MAX: u32 = 200;

impl App {
    /// Claims a request for a client that may have sent it elsewhere, too.
    ///
    /// # Errors
    /// 409 while another connection of the client is being answered, here or at another node.
    pub(super) async fn claim_once(&self, id: RequestId) -> Result<CancelOnDrop, RequestError> {
        if !self.claims.lock().ask(id) {
            return Err(in_use());
        }
        let claim = self.release_on_drop(id);
        let Some(cluster) = self.cluster() else { return Ok(claim) };
        for _ in 0..ROUNDS_MAX {
            let others = cluster.stances(id).await;
            match ruling(&self.node().name, others.iter().map(|(node, stance)| (node, *stance))) {
                Ruling::Begin => {
                    self.claims.lock().grant(id);
                    return Ok(claim);
                }
                Ruling::AskAgain => tokio::time::sleep(AGAIN_AFTER).await,
                Ruling::GiveWay => return Err(in_use()),
            }
        }
        Err(in_use())
    }

    /// A client goes on with a request: nobody else begins it meanwhile.
    pub(super) fn hold(&self, id: RequestId) -> CancelOnDrop {
        self.claims.lock().go_on(id);
        self.release_on_drop(id)
    }

    /// What another node is told that asks for a request.
    pub fn progress(&self, id: RequestId) -> Progress {
        let stance = self.claims.lock().stance(id);
        Progress { known: stance.is_some(), running: stance == Some(Stance::Answering), n_tokens: 0 }
    }

    fn release_on_drop(&self, id: RequestId) -> CancelOnDrop {
        let claims = std::sync::Arc::clone(&self.claims);
        CancelOnDrop::new(move || claims.lock().release(id))
    }
}
