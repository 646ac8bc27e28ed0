//! Node to node over QUIC: who a peer is (certificates of the cluster's own CA), connections, exchanges.
//!
//! Knows messages ([`wire`]) but no policy: whom to call, what to retry and who owns a tenant is decided by the
//! coordinator and the node. Reading order: [`pki`] (who is who), [`endpoint`] (sockets and their bounds), [`net`]
//! (asking others), [`serve`](mod@serve) (being asked), [`join`](mod@join) (coming in for the first time), [`refusal`] (who
//! was turned away), [`clients`] (the other door).
//!
//! Every node dials every other and asks on the connection it dialled; what it accepts it only serves. So no two
//! ends have to agree which connection of two to keep, at the price of two keep-alives per pair.

#![forbid(unsafe_code)]

pub mod pki;
mod badge;
mod tls;
pub mod endpoint;
mod stream;
pub mod net;
mod renew;
pub mod serve;
pub mod join;
pub mod refusal;
pub mod clients;

pub use endpoint::EndpointParts;
pub use join::{JoinError, join};
pub use net::{Exchange, PeerError, PeerNet, PeerNetConfig};
pub use pki::{Authority, Ca, Identity};
pub use refusal::{Refusal, Refusals};
pub use serve::{EventSink, PeerService, serve};
