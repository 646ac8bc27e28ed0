//! Keeping this node's certificate good: when a third of its time is left, the node with the authority is asked for
//! another one, for the same name and key, until it comes.
//!
//! Started by [`PeerNet::new`]; a node whose certificate has ended reaches nobody any more and has to join again.

use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use shared::id::NodeId;
use tokio::time::sleep;
use wire::node::{Opening, Renewal};

use crate::badge::Badge;
use crate::net::{Inner, PeerNet};
use crate::pki::certificate::{self, Facts};
use crate::pki::{Identity, NODE_VALIDITY};

/// Shortest pause between two looks at the certificate.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// Longest pause: wall clocks are set right at times.
const PAUSE_MAX: Duration = Duration::from_secs(3600);
/// The authority has answered within this time: it writes a file or none.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(10);
const _: () = assert!(NODE_VALIDITY.as_secs() > 100 * PAUSE_MAX.as_secs());

/// Renews what `badge` shows.
pub(crate) struct Renewer {
    pub(crate) net: Weak<Inner>,
    pub(crate) badge: Arc<Badge>,
    pub(crate) ca: CertificateDer<'static>,
    pub(crate) data: PathBuf,
}

// === impl Renewer ===

impl Renewer {
    pub(crate) async fn run(self) {
        loop {
            let Some(net) = self.net.upgrade().map(PeerNet) else { return };
            let Some(mut facts) = certificate::read(&self.badge.certificate()) else { return };
            if facts.is_due(net.0.clock.wall()) {
                match self.renew(&net).await {
                    Ok(renewed) => {
                        facts = renewed;
                        tracing::info!(target: "audit", until_s = facts.until.as_secs(), "renewed the certificate");
                    }
                    Err(why) => {
                        let left = facts.until.saturating_sub(net.0.clock.wall());
                        tracing::warn!(left_s = left.as_secs(), why, "cannot renew the certificate yet");
                    }
                }
            }
            let now = net.0.clock.wall();
            drop(net);
            sleep(pause(&facts, now)).await;
        }
    }

    async fn renew(&self, net: &PeerNet) -> Result<Facts, String> {
        let pem = self.ask(net).await?;
        let renewed = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| error.to_string())?;
        let (old, now) = (certificate::read(&self.badge.certificate()), net.0.clock.wall());
        certificate::check(&renewed, &self.ca, &net.0.hello.node, now).map_err(|error| error.to_string())?;
        let facts = certificate::read(&renewed).filter(|facts| old.is_some_and(|old| old.key == facts.key));
        let facts = facts.ok_or("the authority certified another key")?;
        let data = self.data.clone();
        let stored = tokio::task::spawn_blocking(move || Identity::store_certificate(&data, &pem)).await;
        stored.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        self.badge.replace(renewed);
        Ok(facts)
    }

    /// A new certificate (PEM) from the authority, here or elsewhere.
    async fn ask(&self, net: &PeerNet) -> Result<String, String> {
        if let Some(door) = net.0.door.get() {
            let renewed = door.renew(net.0.hello.node.clone(), self.badge.certificate(), net.0.clock.wall()).await;
            return renewed.map_err(|error| error.to_string());
        }
        let mut why = "no node with the authority is connected".to_owned();
        // One that got the authority since it was connected has not said so: it is asked last.
        let has_authority = |node: &&NodeId| net.hello_of(node).is_some_and(|hello| hello.has_authority);
        let (said, others): (Vec<_>, Vec<_>) = net.0.peers().partition(has_authority);
        for node in said.into_iter().chain(others.into_iter().filter(|node| net.is_connected(node))) {
            match net.ask(node, &Opening::Renew, ANSWER_WAIT_MAX).await {
                Ok(Renewal::Certificate(pem)) => return Ok(pem),
                Ok(Renewal::Refused(error)) => why = format!("node {node}: {}", error.message),
                Err(error) => why = error.to_string(),
            }
        }
        Err(why)
    }
}

/// Until the next look: when the certificate will be due; if it is, often enough to try hundreds of
/// times.
fn pause(facts: &Facts, now: Duration) -> Duration {
    let pause = if facts.is_due(now) {
        facts.until.saturating_sub(now) / 1024
    } else {
        (facts.until.saturating_sub(facts.until.saturating_sub(facts.from) / 3)).saturating_sub(now)
    };
    pause.clamp(PAUSE_MIN, PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_due_when_a_third_is_left_and_looked_at_when_it_is() {
        let seconds = Duration::from_secs;
        let facts = Facts { from: seconds(1000), until: seconds(10_000), key: [0; 32] };
        let table = [(1000, false, 3600), (6990, false, 10), (7000, false, 1), (7001, true, 2), (9990, true, 1)];
        for (now, is_due, pause_s) in table {
            assert_eq!(facts.is_due(seconds(now)), is_due, "{now}");
            assert_eq!(pause(&facts, seconds(now)).as_secs(), pause_s, "{now}");
        }
        assert!(facts.is_due(seconds(20_000)));
        assert_eq!(pause(&facts, seconds(20_000)), PAUSE_MIN);
    }
}
