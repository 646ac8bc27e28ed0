//! Invitations: one node, one use, a few minutes.
//!
//! The authority keeps only the hash of a token, as the name of a file; using an invitation removes that file, and
//! of several who try at once the file system lets one succeed. The token also carries the fingerprint of the
//! authority, so that whoever joins knows whom to believe.

use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use shared::id::NodeId;

use super::authority::{Admission, Applicant, Authority, Entry, files};
use super::{PkiError, write_private};
use crate::refusal::Refusal;

/// How long an invitation is good for, unless said otherwise.
pub const TOKEN_TTL: Duration = Duration::from_secs(600);

const PREFIX: &str = "tj1";

/// An invitation, spelled `tj1_SECRET_AUTHORITY` with 64 hex digits each. Never shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    pub(crate) secret: [u8; 32],
    /// Fingerprint of the authority's certificate.
    pub authority: [u8; 32],
}

// === impl Token ===

impl Token {
    /// Under which the authority keeps it.
    fn name(&self) -> String {
        blake3::Hash::from(blake3::derive_key("tenantry 2026 join token", &self.secret)).to_string()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (secret, authority) = (blake3::Hash::from(self.secret), blake3::Hash::from(self.authority));
        write!(f, "{PREFIX}_{secret}_{authority}")
    }
}

/// The text is no invitation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is no invitation; hint: copy the whole line that `tenantry ctl ca invite` printed")]
pub struct NotAToken;

impl FromStr for Token {
    type Err = NotAToken;

    fn from_str(text: &str) -> Result<Self, NotAToken> {
        let mut parts = text.trim().split('_');
        if parts.next() != Some(PREFIX) {
            return Err(NotAToken);
        }
        let mut part = || -> Result<[u8; 32], NotAToken> {
            let hash = blake3::Hash::from_hex(parts.next().ok_or(NotAToken)?).map_err(|_| NotAToken)?;
            Ok(*hash.as_bytes())
        };
        let token = Self { secret: part()?, authority: part()? };
        if parts.next().is_some() { Err(NotAToken) } else { Ok(token) }
    }
}

impl Authority {
    /// Invites a node until `ttl` from `now` (wall time since the Unix epoch). Invitations that are too old go.
    ///
    /// # Errors
    /// When the invitation cannot be stored.
    pub fn invite(&self, node: &NodeId, now: Duration, ttl: Duration) -> Result<Token, PkiError> {
        for (name, text) in files(&self.invitations())? {
            if parse(&text).is_some_and(|entry| now >= entry.until) {
                let _ = fs::remove_file(self.invitations().join(name));
            }
        }
        let mut secret = [0_u8; 32];
        getrandom::fill(&mut secret).expect("the operating system provides randomness");
        let token = Token { secret, authority: self.fingerprint() };
        let record = format!("{node} {}\n", (now + ttl).as_secs());
        write_private(&self.invitations().join(token.name()), &record)?;
        Ok(token)
    }

    /// Uses an invitation up and certifies the key of the node it was for.
    ///
    /// # Errors
    /// [`PkiError::Refused`] for an invitation that was never given, has been used, is too old, or is for another
    /// node, and for a node that holds another cluster's key. The last two leave the invitation as it is.
    pub fn redeem(&self, token: &Token, applicant: Applicant<'_>, now: Duration) -> Result<Admission, PkiError> {
        let refused = |reason| Err(PkiError::Refused(reason));
        let path = self.invitations().join(token.name());
        let record = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return refused(Refusal::TokenUnknown),
            read => read.map_err(io_error("read", path.clone()))?,
        };
        let entry = parse(&record).ok_or(PkiError::Malformed { path: path.clone(), expected: "invitation" })?;
        if now < entry.until {
            if entry.node != *applicant.node {
                return refused(Refusal::OtherNode);
            }
            if applicant.holds.is_some_and(|held| !self.is_key(&held)) {
                return refused(Refusal::OtherCluster);
            }
        }
        // Whoever removes the file has used the invitation.
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return refused(Refusal::TokenUnknown),
            removed => removed.map_err(io_error("remove", path))?,
        }
        if now >= entry.until {
            return refused(Refusal::TokenExpired);
        }
        self.certify(&entry.node, applicant.key, now)
    }

    fn invitations(&self) -> PathBuf {
        self.folder.join("invitations")
    }
}

/// The record of an invitation: for whom, until when.
pub(super) fn parse(record: &str) -> Option<Entry> {
    let (node, until) = record.trim().split_once(' ')?;
    Some(Entry { node: node.parse().ok()?, until: Duration::from_secs(until.parse().ok()?) })
}

fn io_error(action: &'static str, path: PathBuf) -> impl FnOnce(io::Error) -> PkiError {
    move |source| PkiError::Io { action, path, source }
}
