//! A request that is sent twice is the same request (core).
//!
//! Its id is a function of tenant and key, so that nothing has to be looked up or kept for it: whichever node gets the
//! second sending asks for the record of that id as for any client that comes back, goes on from it, and the client has
//! the whole answer once. For as long as the record is kept, a minute behind its end.

use shared::error::{ErrorKind, RequestError};
use shared::id::{RequestId, TenantId};
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
