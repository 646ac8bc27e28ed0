//! A request that is sent twice is the same request (core).
//!
//! Its id is a function of tenant and key, so that nothing has to be looked up or kept for it: whichever node gets the
//! second sending asks for the record of that id as for any client that comes back, goes on from it, and the client has
//! the whole answer once. For as long as the record is kept, a minute behind its end.
//!
//! Of sendings that come while there is no record yet, or while the first is still being answered, one is answered:
//! [`Claims`] are what a node answers itself, [`ruling`] says what to do about those of other nodes. Each claims first
//! and asks then, so of two at least one sees the other; of those that see each other the one at the node with the
//! smaller name goes on. Nodes that do not reach each other may both answer: the same tokens, billed once.

use std::collections::BTreeMap;

use shared::error::{ErrorKind, RequestError};
use shared::id::{NodeId, RequestId, TenantId};
use shared::request::{Envelope, Sampling};

/// The purpose of the hash.
const PURPOSE: &str = "tenantry 2026 request id of an idempotency key v1";

/// Gives requests with keys their ids. Made from the cluster's secret: ids of others cannot be guessed.
#[derive(Clone)]
pub struct RequestIds([u8; 32]);

impl RequestIds {
    /// For a cluster's secret.
    pub fn derive(secret: &[u8]) -> Self {
        Self(blake3::derive_key(PURPOSE, secret))
    }

    /// The id of a tenant's request with this key.
    pub fn of(&self, tenant: &TenantId, key: &[u8]) -> RequestId {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        // Names hold no colon.
        hasher.update(tenant.as_str().as_bytes()).update(b":").update(key);
        let hash = hasher.finalize();
        RequestId(u128::from_le_bytes(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes")))
    }
}

impl std::fmt::Debug for RequestIds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RequestIds(…)")
    }
}

/// Whether what is asked now is what was asked under this key before.
///
/// # Errors
/// 422 `idempotency_key_reused` when it is not.
pub fn same(before: &Envelope, now: &Envelope) -> Result<(), RequestError> {
    let (a, b) = (&*before.generation, &*now.generation);
    // A seed that the client left open is drawn anew each time.
    let sampling = |sampling: &Sampling| Sampling { seed: 0, ..sampling.clone() };
    let same = before.route == now.route
        && before.base == now.base
        && (&a.prompt, a.n, a.max_tokens, a.min_tokens, a.ignore_eos)
            == (&b.prompt, b.n, b.max_tokens, b.min_tokens, b.ignore_eos)
        && (&a.stop_token_ids, &a.stop, &a.logprobs, &a.prompt_logprobs, &a.grammar)
            == (&b.stop_token_ids, &b.stop, &b.logprobs, &b.prompt_logprobs, &b.grammar)
        && sampling(&a.sampling) == sampling(&b.sampling);
    if same {
        return Ok(());
    }
    let message = "this idempotency key was used for another request; hint: use a new key for a new request";
    Err(RequestError::new(ErrorKind::Unprocessable, "idempotency_key_reused", message))
}

/// How far a node has got with a request that it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stance {
    /// It asks the others whether they answer it.
    Asking,
    /// It answers it.
    Answering,
}

/// The requests that clients of this node are waiting for.
#[derive(Debug, Clone, Default)]
pub struct Claims(BTreeMap<RequestId, (Stance, u32)>);

/// What to do with a request that was claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ruling {
    /// Nobody else answers it.
    Begin,
    /// Others ask, too, and will give way: ask them again.
    AskAgain,
    /// Another node answers it.
    GiveWay,
}

// === impl Claims ===

impl Claims {
    /// Claims a request; false when a client of this node is waiting for it already.
    pub fn ask(&mut self, id: RequestId) -> bool {
        let is_new = !self.0.contains_key(&id);
        if is_new {
            self.0.insert(id, (Stance::Asking, 1));
        }
        is_new
    }

    /// Nobody else answers what was claimed.
    pub fn grant(&mut self, id: RequestId) {
        if let Some((stance, _)) = self.0.get_mut(&id) {
            *stance = Stance::Answering;
        }
    }

    /// A client comes back for its request, which nobody can refuse.
    pub fn go_on(&mut self, id: RequestId) {
        let (stance, n_clients) = self.0.entry(id).or_insert((Stance::Answering, 0));
        (*stance, *n_clients) = (Stance::Answering, *n_clients + 1);
    }

    /// A client waits no longer: once for each [`Self::ask`] that was true and each [`Self::go_on`].
    pub fn release(&mut self, id: RequestId) {
        if let Some((_, n_clients)) = self.0.get_mut(&id) {
            *n_clients -= 1;
            if *n_clients == 0 {
                self.0.remove(&id);
            }
        }
    }

    /// What another node is told that asks.
    pub fn stance(&self, id: RequestId) -> Option<Stance> {
        self.0.get(&id).map(|(stance, _)| *stance)
    }
}

/// What node `me` does with a request it has claimed when these others have, too.
pub fn ruling<'a>(me: &NodeId, others: impl IntoIterator<Item = (&'a NodeId, Stance)>) -> Ruling {
    let mut ruling = Ruling::Begin;
    for (other, stance) in others {
        if stance == Stance::Answering || other < me {
            return Ruling::GiveWay;
        }
        ruling = Ruling::AskAgain;
    }
    ruling
}

/// Told to a client whose request is being answered already, on another of its connections.
pub fn in_use() -> RequestError {
    let message = "a request with this idempotency key is being answered right now; hint: retry in a moment, the answer will be the same";
    RequestError::new(ErrorKind::Conflict, "idempotency_key_in_use", message)
        .retry_after(std::time::Duration::from_secs(1))
}
