//! What a node that has no certificate yet says under [`JOIN_ALPN`](crate::JOIN_ALPN), and what it is told.
//!
//! ```text
//! ask      magic "TNRYJIN1" · secret of the invitation 32 · public key 32 · fingerprint of the cluster key that the
//!          node holds already, or zeros, 32 · name length u8 · name, padded with zeros to 63 bytes
//! answer   kind u8 · Admitted: cluster key 32 · certificate length u16 · certificate · authority length u16 · authority
//!          (PEM) · Refused: reason u8
//! ```
//!
//! One ask of a fixed size and one answer per connection; nobody has proved anything before, so there is nothing to
//! parse but this.

use shared::id::{NAME_BYTES_MAX, NodeId};

/// Bytes of an [`Ask`].
pub const ASK_BYTES: usize = 8 + 3 * 32 + 1 + NAME_BYTES_MAX;
/// Largest [`Answer`]: certificates here take less than a kilobyte.
pub const ANSWER_BYTES_MAX: usize = 16 << 10;

const MAGIC: [u8; 8] = *b"TNRYJIN1";
const ADMITTED: u8 = 1;
const REFUSED: u8 = 2;

/// The bytes are not what belongs here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not what a joining node and the authority say to each other")]
pub struct NotJoining;

/// Somebody with an invitation asks to be let in. No `Debug`: it holds the invitation's secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Ask {
    /// Who asks.
    pub node: NodeId,
    /// Secret of the invitation.
    pub secret: [u8; 32],
    /// The public key to be certified (Ed25519).
    pub key: [u8; 32],
    /// Fingerprint of the cluster key in its data folder, if there is one.
    pub holds: Option<[u8; 32]>,
}

// === impl Ask ===

impl Ask {
    /// Its bytes.
    pub fn encode(&self) -> [u8; ASK_BYTES] {
        let name = self.node.as_str().as_bytes();
        let parts: [&[u8]; 6] =
            [&MAGIC, &self.secret, &self.key, &self.holds.unwrap_or_default(), &[name.len() as u8], name];
        let mut out = [0; ASK_BYTES];
        let mut at = 0;
        for part in parts {
            out[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        out
    }

    /// # Errors
    /// When they are anything else.
    pub fn decode(bytes: &[u8; ASK_BYTES]) -> Result<Self, NotJoining> {
        let mut rest: &[u8] = bytes;
        let magic: [u8; 8] = take(&mut rest)?;
        let (secret, key, holds) = (take(&mut rest)?, take(&mut rest)?, take(&mut rest)?);
        let [length] = take(&mut rest)?;
        let (name, padding) = rest.split_at_checked(usize::from(length)).ok_or(NotJoining)?;
        if magic != MAGIC || padding.iter().any(|byte| *byte != 0) {
            return Err(NotJoining);
        }
        let node = std::str::from_utf8(name).ok().and_then(|name| name.parse().ok()).ok_or(NotJoining)?;
        Ok(Self { node, secret, key, holds: (holds != [0; 32]).then_some(holds) })
    }
}

/// Why a node is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The invitation was never given, or has been used.
    Unknown,
    /// The invitation is too old.
    Expired,
    /// The invitation is for another node.
    OtherNode,
    /// The node holds the key of another cluster.
    OtherCluster,
    /// The authority could not do it; its log says why.
    Internal,
}

// === impl Reason ===

impl Reason {
    /// All of them; the position is the byte.
    const ALL: [Self; 5] = [Self::Unknown, Self::Expired, Self::OtherNode, Self::OtherCluster, Self::Internal];
}

/// What a joining node is told. No `Debug` outside tests: it holds the cluster key.
#[derive(Clone, PartialEq, Eq)]
#[cfg_attr(test, derive(Debug))]
pub enum Answer {
    /// It is in.
    Admitted {
        /// The secret that all nodes of the cluster share.
        cluster_key: [u8; 32],
        /// The node's certificate, PEM.
        certificate: String,
        /// The authority's certificate, PEM.
        ca: String,
    },
    /// It is not.
    Refused(Reason),
}

// === impl Answer ===

impl Answer {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Admitted { cluster_key, certificate, ca } => {
                let mut out = [&[ADMITTED][..], cluster_key].concat();
                for text in [certificate, ca] {
                    out.extend_from_slice(&(text.len() as u16).to_le_bytes());
                    out.extend_from_slice(text.as_bytes());
                }
                out
            }
            Self::Refused(reason) => vec![REFUSED, *reason as u8],
        }
    }

    /// # Errors
    /// When they are anything else.
    pub fn decode(mut bytes: &[u8]) -> Result<Self, NotJoining> {
        let rest = &mut bytes;
        let answer = match take(rest)? {
            [ADMITTED] => {
                let cluster_key = take(rest)?;
                let (certificate, ca) = (text(rest)?, text(rest)?);
                Self::Admitted { cluster_key, certificate, ca }
            }
            [REFUSED] => {
                let [reason] = take(rest)?;
                Self::Refused(*Reason::ALL.get(usize::from(reason)).ok_or(NotJoining)?)
            }
            _ => return Err(NotJoining),
        };
        if rest.is_empty() { Ok(answer) } else { Err(NotJoining) }
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], NotJoining> {
    let (taken, rest) = bytes.split_first_chunk::<N>().ok_or(NotJoining)?;
    *bytes = rest;
    Ok(*taken)
}

fn text(bytes: &mut &[u8]) -> Result<String, NotJoining> {
    let length = usize::from(u16::from_le_bytes(take(bytes)?));
    let text = bytes.split_off(..length).ok_or(NotJoining)?;
    String::from_utf8(text.to_vec()).map_err(|_| NotJoining)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn answers() -> impl Strategy<Value = Answer> {
        prop_oneof![
            (any::<[u8; 32]>(), "[ -~\n]{0,900}", "[ -~\n]{0,900}")
                .prop_map(|(cluster_key, certificate, ca)| Answer::Admitted { cluster_key, certificate, ca }),
            (0..Reason::ALL.len()).prop_map(|at| Answer::Refused(Reason::ALL[at])),
        ]
    }

    proptest! {
        #[test]
        fn what_is_asked_is_what_is_heard(
            secret: [u8; 32],
            key: [u8; 32],
            holds: Option<[u8; 32]>,
            name in "[a-z][a-z0-9]{0,62}",
            at in 0..ASK_BYTES,
            bit in 0..8,
        ) {
            let holds = holds.filter(|holds| *holds != [0; 32]);
            let ask = Ask { node: name.parse().expect("a name"), secret, key, holds };
            let bytes = ask.encode();
            prop_assert!(Ask::decode(&bytes).expect("our own") == ask);
            let mut changed = bytes;
            changed[at] ^= 1_u8 << bit;
            prop_assert!(Ask::decode(&changed).map_or(true, |heard| heard != ask));
        }

        #[test]
        fn answers_come_through_and_whatever_else_arrives_does_no_harm(
            answer in answers(),
            cut in 0_usize..100,
            noise in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let bytes = answer.encode();
            prop_assert!(bytes.len() <= ANSWER_BYTES_MAX);
            prop_assert!(Answer::decode(&bytes).expect("our own") == answer);
            prop_assert!(Answer::decode(&bytes[..bytes.len() - 1 - cut.min(bytes.len() - 1)]).is_err());
            prop_assert!(Answer::decode(&[&bytes[..], &[0]].concat()).is_err());
            let _ = Answer::decode(&noise);
        }
    }

    #[test]
    fn reasons_keep_their_numbers() {
        for (byte, reason) in (0..).zip(Reason::ALL) {
            assert_eq!(Answer::Refused(reason).encode(), [REFUSED, byte]);
        }
    }
}
