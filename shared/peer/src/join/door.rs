//! Where nodes join: the side of the node with the authority. One ask of a fixed size, one answer, a few at once.
//!
//! Called by [`mod@crate::serve`] for connections under [`wire::JOIN_ALPN`], which nobody has authenticated, and for
//! nodes that are in and whose certificate is due.

use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quinn::Connection;
use rustls::pki_types::CertificateDer;
use shared::clock::Clock;
use shared::hash::ContentHash;
use shared::id::NodeId;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use wire::join::{ASK_BYTES, Answer, Ask, Reason};
use zeroize::Zeroizing;

use super::bounds::Bounds;
use crate::pki::authority::Applicant;
use crate::pki::{Authority, PkiError, Token};
use crate::refusal::{Refusal, Refusals};
use crate::stream::code;

/// From the handshake to the answer; the ask is one packet.
const JOIN_WAIT_MAX: Duration = Duration::from_secs(3);
/// Invitations redeemed at once: each writes a file or two.
const PLACES: usize = 4;

/// The authority as the network sees it.
pub(crate) struct Door {
    authority: Arc<Authority>,
    bounds: Mutex<Bounds>,
    places: Semaphore,
}

// === impl Door ===

impl Door {
    pub(crate) fn new(authority: Authority) -> Self {
        Self { authority: Arc::new(authority), bounds: Mutex::default(), places: Semaphore::new(PLACES) }
    }

    /// Serves one connection to its end.
    pub(crate) async fn attend(&self, connection: &Connection, clock: &dyn Clock, refusals: &Refusals) {
        let address = connection.remote_address();
        if !self.bounds.lock().expect("no holder panics").may(address.ip(), clock.now()) {
            refusals.note(Refusal::TooMany, &address, &"bad invitations within a minute");
            connection.close(code::REFUSED, b"too many bad invitations from this address, wait a minute");
            return;
        }
        if timeout(JOIN_WAIT_MAX, self.exchange(connection, clock, refusals)).await.is_err() {
            self.refuse(address.ip(), clock);
            refusals.note(Refusal::Protocol, &address, &"too slow to join");
            connection.close(code::REFUSED, b"too slow");
        }
    }

    async fn exchange(&self, connection: &Connection, clock: &dyn Clock, refusals: &Refusals) {
        let address = connection.remote_address();
        let Ok((mut send, mut receive)) = connection.accept_bi().await else { return };
        let bytes = Zeroizing::new(receive.read_to_end(ASK_BYTES).await.unwrap_or_default());
        let ask = bytes.first_chunk().filter(|_| bytes.len() == ASK_BYTES).and_then(|bytes| Ask::decode(bytes).ok());
        let Some(ask) = ask else {
            self.refuse(address.ip(), clock);
            refusals.note(Refusal::Protocol, &address, &"no invitation");
            connection.close(code::PROTOCOL, b"no invitation");
            return;
        };
        let answer = match self.redeem(&ask, clock).await {
            Ok(answer) => {
                tracing::info!(target: "audit", node = %ask.node, from = %address, "let a node in by invitation");
                answer
            }
            Err(PkiError::Refused(reason)) => {
                self.refuse(address.ip(), clock);
                refusals.note(reason, &address, &format_args!("as node {}", ask.node));
                Answer::Refused(told(reason))
            }
            Err(error) => {
                tracing::error!(%error, node = %ask.node, "cannot let a node in");
                Answer::Refused(Reason::Internal)
            }
        };
        let sent = send.write_all(&Zeroizing::new(answer.encode())).await;
        // Closed only once the other end has it all: it closes first.
        if sent.is_ok() && send.finish().is_ok() {
            let _ = send.stopped().await;
            connection.closed().await;
        }
    }

    async fn redeem(&self, ask: &Ask, clock: &dyn Clock) -> Result<Answer, PkiError> {
        let _place = self.places.acquire().await.expect("it is never closed");
        let (authority, ask, now) = (self.authority.clone(), ask.clone(), clock.wall());
        let redeemed = tokio::task::spawn_blocking(move || {
            let token = Token { secret: ask.secret, authority: authority.fingerprint() };
            let applicant = Applicant { node: &ask.node, key: &ask.key, holds: ask.holds.map(ContentHash) };
            authority.redeem(&token, applicant, now)
        });
        let admission = redeemed.await.expect("redeeming does not panic")?;
        let cluster_key = *admission.cluster_key.reveal();
        Ok(Answer::Admitted { cluster_key, certificate: admission.certificate, ca: admission.ca })
    }

    /// A new certificate for a node that is in, which has shown the present one.
    pub(crate) async fn renew(
        &self,
        node: NodeId,
        shown: CertificateDer<'static>,
        now: Duration,
    ) -> Result<String, PkiError> {
        let _place = self.places.acquire().await.expect("it is never closed");
        let authority = self.authority.clone();
        let renewed = tokio::task::spawn_blocking(move || authority.renew(&node, &shown, now));
        renewed.await.expect("renewing does not panic")
    }

    fn refuse(&self, from: IpAddr, clock: &dyn Clock) {
        self.bounds.lock().expect("no holder panics").failed(from, clock.now());
    }
}

/// What the other end learns: it holds an invitation, or the name of a file.
fn told(reason: Refusal) -> Reason {
    match reason {
        Refusal::TokenExpired => Reason::Expired,
        Refusal::OtherNode => Reason::OtherNode,
        Refusal::OtherCluster => Reason::OtherCluster,
        _ => Reason::Unknown,
    }
}
