//! Coming in for the first time: a node with nothing but a name, an invitation and its cluster's file.
//!
//! It dials the nodes one after the other; the one with the authority on its machine answers under
//! [`wire::JOIN_ALPN`], the others do not speak it, so the invitation's secret reaches nobody else. [`Token`] names
//! the authority, and nobody else is believed. Called by `tenantry ctl join`; `door` is the answering side.

mod bounds;
mod door;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use quinn::{ClientConfig, ConnectionError, Endpoint};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use shared::id::NodeId;
use shared::seal::{ClusterKey, SealError};
use tokio::time::timeout;
use wire::join::{ANSWER_BYTES_MAX, Answer, Ask, Reason};
use zeroize::Zeroizing;

use crate::endpoint;
use crate::pki::{Admission, CLUSTER_KEY, NodeKey, PkiError, Token, certificate, node_name};
use crate::stream::{NO_PROTOCOL, StreamError, alert, code, why};
use crate::tls;

pub(crate) use door::Door;

/// A node that does not answer within this time is passed over.
const DIAL_WAIT_MAX: Duration = Duration::from_secs(3);
/// The authority has answered within this time, or something is wrong with it.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(10);

/// Why a node is not in.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The node's own key or data folder.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The cluster key that is in the data folder already.
    #[error(transparent)]
    ClusterKey(#[from] SealError),
    /// None of the nodes has the authority, or none is up.
    #[error(
        "no node could let {node} in: {}; hint: start the node that has the authority's folder ([cluster] ca) on its \
         machine",
        tried.join("; ")
    )]
    Nobody {
        /// Who wanted to join.
        node: NodeId,
        /// What each node said.
        tried: Vec<String>,
    },
    /// The authority says no.
    #[error("node {by} did not let {node} in: {}", why_not(*reason))]
    Refused {
        /// Who wanted to join.
        node: NodeId,
        /// Who answered.
        by: NodeId,
        /// Why not.
        reason: Reason,
    },
    /// The invitation was used, but what came of it is lost or makes no sense.
    #[error(
        "lost the answer of node {by}: {why}; hint: try again, and if the invitation has been used, ask for \
             a new one"
    )]
    Lost {
        /// Who should have answered.
        by: NodeId,
        /// What happened.
        why: String,
    },
    /// No socket.
    #[error("cannot open a UDP socket: {0}")]
    Socket(#[from] io::Error),
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
}

fn why_not(reason: Reason) -> &'static str {
    match reason {
        Reason::Unknown => {
            "the invitation was never given or has been used; hint: ask for a new one with `tenantry ctl ca invite`"
        }
        Reason::Expired => "the invitation is too old; hint: ask for a new one with `tenantry ctl ca invite`",
        Reason::OtherNode => "the invitation is for another node; hint: `tenantry ctl ca list` shows for which",
        Reason::OtherCluster => {
            "its data folder holds another cluster key, so it has served alone or elsewhere; hint: join with an empty \
             data folder"
        }
        Reason::Internal => "it could not; hint: see its log",
    }
}

/// Joins: certifies the key in `data`, the node's data folder, and puts there what the cluster gives, after which
/// [`Identity::load`](crate::Identity::load) finds it. `hosts` are the nodes of the cluster's file with their peer
/// addresses, tried in this order. `now` is wall time since the Unix epoch. Returns who let it in.
///
/// # Errors
/// See [`JoinError`]. A different cluster key in `data` stays, and the invitation is not used up then.
pub async fn join(
    node: &NodeId,
    token: &Token,
    data: &Path,
    hosts: &[(NodeId, SocketAddr)],
    now: Duration,
) -> Result<NodeId, JoinError> {
    let key_path = data.join(CLUSTER_KEY);
    let held = if key_path.exists() { Some(ClusterKey::load(&key_path)?) } else { None };
    let key = NodeKey::load_or_create(data)?.public();
    let holds = held.map(|key| key.fingerprint().0);
    let ask = Ask { node: node.clone(), secret: token.secret, key, holds };
    let mut client = ClientConfig::new(Arc::new(tls::joining(token.authority, now)?));
    client.transport_config(endpoint::dialling());
    let mut tried = Vec::new();
    for (host, address) in hosts.iter().filter(|(host, _)| host != node) {
        match ask_at(host, *address, client.clone(), &ask).await? {
            Err(why) => tried.push(format!("{host} ({address}) {why}")),
            Ok(Answer::Refused(reason)) => {
                return Err(JoinError::Refused { node: node.clone(), by: host.clone(), reason });
            }
            Ok(Answer::Admitted { cluster_key, certificate, ca }) => {
                let cluster_key = ClusterKey::from_bytes(Zeroizing::new(cluster_key));
                let admission = Admission { node: node.clone(), certificate, ca, cluster_key };
                let sound = check(&admission, token, &key, now);
                sound.map_err(|why| JoinError::Lost { by: host.clone(), why })?;
                admission.store(data)?;
                return Ok(host.clone());
            }
        }
    }
    if tried.is_empty() {
        tried.push("the cluster's file names no other node with a peer address".to_owned());
    }
    Err(JoinError::Nobody { node: node.clone(), tried })
}

/// Asks one node; the inner error means that it has not seen the invitation.
async fn ask_at(
    host: &NodeId,
    address: SocketAddr,
    client: ClientConfig,
    ask: &Ask,
) -> Result<Result<Answer, String>, JoinError> {
    let any = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let endpoint = Endpoint::client(SocketAddr::new(any, 0))?;
    let connecting = match endpoint.connect_with(client, address, &node_name(host)) {
        Ok(connecting) => connecting,
        Err(error) => return Ok(Err(error.to_string())),
    };
    let connection = match timeout(DIAL_WAIT_MAX, connecting).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return Ok(Err(in_words(&error))),
        Err(_) => return Ok(Err("does not answer".to_owned())),
    };
    let exchange = async {
        let (mut send, mut receive) = connection.open_bi().await?;
        send.write_all(&Zeroizing::new(ask.encode())[..]).await?;
        let _ = send.finish();
        receive.read_to_end(ANSWER_BYTES_MAX).await.map_err(|error| match error {
            quinn::ReadToEndError::Read(error) => error.into(),
            quinn::ReadToEndError::TooLong => StreamError::BrokenOff(code::PROTOCOL),
        })
    };
    let lost = |why: String| JoinError::Lost { by: host.clone(), why };
    let answer = match timeout(ANSWER_WAIT_MAX, exchange).await {
        Ok(Ok(bytes)) => Answer::decode(&Zeroizing::new(bytes)).map_err(|error| lost(error.to_string()))?,
        Ok(Err(StreamError::Connection(_))) => return Err(lost(why(&connection))),
        Ok(Err(error)) => return Err(lost(error.to_string())),
        Err(_) => return Err(lost(format!("nothing came within {} s", ANSWER_WAIT_MAX.as_secs()))),
    };
    connection.close(code::BYE, b"done");
    endpoint.wait_idle().await;
    Ok(Ok(answer))
}

/// What a node that cannot be asked says, in words for people.
fn in_words(error: &ConnectionError) -> String {
    match (error, alert(error)) {
        (ConnectionError::TimedOut, _) => "does not answer".to_owned(),
        (_, Some(NO_PROTOCOL)) => "does not have the authority".to_owned(),
        (_, Some(48)) => "belongs to another authority than the invitation".to_owned(),
        _ => error.to_string(),
    }
}

/// The authority was believed for its certificate; this finds mistakes.
fn check(admission: &Admission, token: &Token, key: &[u8; 32], now: Duration) -> Result<(), String> {
    let parse = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| "it is no certificate");
    let (ours, ca) = (parse(&admission.certificate)?, parse(&admission.ca)?);
    if certificate::fingerprint(&ca) != token.authority {
        return Err("it is the certificate of another authority".to_owned());
    }
    if certificate::read(&ours).is_none_or(|facts| facts.key != *key) {
        return Err("it is the certificate of another key".to_owned());
    }
    certificate::check(&ours, &ca, &admission.node, now).map_err(|error| error.to_string())
}
