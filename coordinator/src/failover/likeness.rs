//! Who computes the same tokens: an answer is a function of the request, of its base's content, and of the arithmetic.
//!
//! Asked by [`super`] for every node that a request might go to. Nodes say of themselves what they serve; hosts check
//! again what they are sent.

use shared::error::{ErrorKind, RequestError};
use shared::request::BasePin;
use wire::node::ServedBase;

/// Whether a node that says this of the base may be given a request bound to `pin`. One of which nothing is known may.
pub fn may_go_on(pin: &BasePin, said: Option<&ServedBase>) -> bool {
    let Some(said) = said else { return true };
    let numerics = pin.numerics.as_ref();
    pin.hash.is_none_or(|hash| hash == said.hash) && numerics.is_none_or(|numerics| *numerics == said.numerics_id)
}

/// Told to a client whose answer nobody can go on with unchanged.
pub fn no_like_node() -> RequestError {
    let message = "the nodes left for this tenant serve another content of the base, or compute it with other \
                   arithmetic: what they would go on with is not the same answer; hint: send the request again";
    RequestError::new(ErrorKind::Unavailable, "no_like_node", message)
}
