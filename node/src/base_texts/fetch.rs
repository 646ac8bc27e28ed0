//! A base's text from one of the nodes that have it, in pieces: what comes is believed when its hash is the one asked for.
//!
//! Called by [`super`] for a text that hosts have announced. It decides when an answer is hopeless and the next node is
//! asked; what is done with the text is not its affair.

use std::future::Future;

use model::text::TEXT_BYTES_MAX;
use shared::hash::ContentHash;
use shared::id::NodeId;
use wire::node::{TEXT_PIECE_BYTES, TextPiece};

/// Where pieces come from: the other nodes.
pub(super) trait Source: Sync {
    /// A piece of a text, from this offset on.
    fn piece(
        &self,
        host: &NodeId,
        text: ContentHash,
        offset: u64,
    ) -> impl Future<Output = Result<TextPiece, FetchError>> + Send;
}

/// Why there is no text yet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum FetchError {
    /// Nobody to ask.
    #[error("no node that has it is connected; hint: start a node that hosts the base")]
    NoHost,
    /// The node did not answer, or refused.
    #[error("node {host}: {reason}")]
    Answer {
        /// Who was asked.
        host: NodeId,
        /// What happened.
        reason: String,
    },
    /// Larger than any may be.
    #[error("{total} bytes, the limit is {max}")]
    Large {
        /// Size announced.
        total: u64,
        /// Limit.
        max: u64,
    },
    /// Pieces that do not make one text.
    #[error("a piece of {piece} bytes at {offset} of {total}")]
    Piece {
        /// Bytes of the piece.
        piece: usize,
        /// Where it was to begin.
        offset: usize,
        /// Size announced with it.
        total: u64,
    },
    /// Another text.
    #[error("what came has the hash {found}, asked for was {wanted}")]
    Hash {
        /// Of what came.
        found: ContentHash,
        /// Asked for.
        wanted: ContentHash,
    },
}

/// Fetches a text, from the first of `hosts` that gives it.
///
/// # Errors
/// What the last of them did.
pub(super) async fn fetch(source: &impl Source, hosts: &[NodeId], text: ContentHash) -> Result<Vec<u8>, FetchError> {
    let mut last = FetchError::NoHost;
    for host in hosts {
        match fetch_from(source, host, text).await {
            Ok(bytes) => return Ok(bytes),
            Err(error) => {
                tracing::debug!(%host, %error, "a base's text did not come");
                last = error;
            }
        }
    }
    Err(last)
}

async fn fetch_from(source: &impl Source, host: &NodeId, text: ContentHash) -> Result<Vec<u8>, FetchError> {
    let mut pieces = Pieces::default();
    loop {
        let piece = source.piece(host, text, pieces.bytes.len() as u64).await?;
        if pieces.add(piece)? {
            break;
        }
    }
    match ContentHash::of(&pieces.bytes) {
        found if found == text => Ok(pieces.bytes),
        found => Err(FetchError::Hash { found, wanted: text }),
    }
}

/// What has come of a text. Holds no more than came, and no more than a text may have.
#[derive(Debug, Default)]
struct Pieces {
    bytes: Vec<u8>,
    total: Option<u64>,
}

impl Pieces {
    /// The next piece; true when it was the last.
    fn add(&mut self, TextPiece { total, bytes }: TextPiece) -> Result<bool, FetchError> {
        if total > TEXT_BYTES_MAX {
            return Err(FetchError::Large { total, max: TEXT_BYTES_MAX });
        }
        let so_far = self.bytes.len() + bytes.len();
        // An empty piece would be asked for again for ever.
        let fits = (1..=TEXT_PIECE_BYTES).contains(&bytes.len()) && so_far as u64 <= total;
        if !fits || *self.total.get_or_insert(total) != total {
            return Err(FetchError::Piece { piece: bytes.len(), offset: self.bytes.len(), total });
        }
        self.bytes.extend_from_slice(&bytes);
        Ok(so_far as u64 == total)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Answers by the host's name and the offset.
    struct Hosts<F>(F, AtomicUsize);

    impl<F: Fn(&str, usize) -> Result<TextPiece, String> + Sync> Source for Hosts<F> {
        async fn piece(&self, host: &NodeId, _: ContentHash, offset: u64) -> Result<TextPiece, FetchError> {
            assert!(self.1.fetch_add(1, Ordering::Relaxed) < 1000, "it asks for ever");
            let answer = (self.0)(&host.to_string(), offset as usize);
            answer.map_err(|reason| FetchError::Answer { host: host.clone(), reason })
        }
    }

    fn text() -> Vec<u8> {
        (0..2_500_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
    }

    fn piece(text: &[u8], offset: usize) -> TextPiece {
        let end = text.len().min(offset + TEXT_PIECE_BYTES);
        TextPiece { total: text.len() as u64, bytes: text[offset..end].to_vec() }
    }

    async fn ask(
        hosts: &[&str],
        wanted: &[u8],
        answer: impl Fn(&str, usize) -> Result<TextPiece, String> + Sync,
    ) -> Result<Vec<u8>, FetchError> {
        let hosts: Vec<NodeId> = hosts.iter().map(|host| host.parse().expect("a name")).collect();
        fetch(&Hosts(answer, AtomicUsize::new(0)), &hosts, ContentHash::of(wanted)).await
    }

    #[tokio::test]
    async fn a_text_comes_in_pieces_and_whole() {
        let text = text();
        assert_eq!(ask(&["a"], &text, |_, offset| Ok(piece(&text, offset))).await, Ok(text.clone()));
        assert_eq!(ask(&[], &text, |_, _| Err("nobody".into())).await, Err(FetchError::NoHost));
    }

    #[tokio::test]
    async fn answers_that_lead_nowhere_are_left_after_the_first_of_them() {
        let text = text();
        let mut other = text.clone();
        other[2_000_000] ^= 1;
        let n_asked = AtomicUsize::new(0);
        let of = |bytes: Vec<u8>, total: u64| -> Result<TextPiece, String> { Ok(TextPiece { total, bytes }) };
        let cut_off = |at: usize| if at == 0 { Ok(piece(&text, 0)) } else { Err("lost".to_owned()) };
        let lying = |at: usize| -> Result<TextPiece, String> { Ok(piece(&other, at)) };
        type Hostile<'a> = Box<dyn Fn(usize) -> Result<TextPiece, String> + Sync + 'a>;
        let hostile: [(&str, usize, Hostile<'_>); 8] = [
            ("too-large", 1, Box::new(|_| of(vec![1], TEXT_BYTES_MAX + 1))),
            ("endless", 1, Box::new(|_| of(Vec::new(), 10))),
            ("nothing", 1, Box::new(|_| of(Vec::new(), 0))),
            ("swollen", 1, Box::new(|_| of(vec![0; TEXT_PIECE_BYTES + 1], TEXT_BYTES_MAX))),
            ("overflowing", 1, Box::new(|_| of(vec![0; 11], 10))),
            ("growing", 2, Box::new(|at| of(vec![0; 5], 10 + at as u64))),
            ("cut-off", 2, Box::new(cut_off)),
            ("lying", 3, Box::new(lying)),
        ];
        for (name, n_calls, answer) in &hostile {
            n_asked.store(0, Ordering::Relaxed);
            let count = |_: &str, offset: usize| {
                n_asked.fetch_add(1, Ordering::Relaxed);
                answer(offset)
            };
            let error = ask(&[*name], &text, count).await.expect_err(name);
            assert_eq!(n_asked.load(Ordering::Relaxed), *n_calls, "{name}: {error}");
            match *name {
                "too-large" => assert!(matches!(error, FetchError::Large { .. }), "{error}"),
                "cut-off" => assert!(matches!(error, FetchError::Answer { .. }), "{error}"),
                "lying" => assert!(matches!(error, FetchError::Hash { .. }), "{error}"),
                _ => assert!(matches!(error, FetchError::Piece { .. }), "{error}"),
            }
        }
        // Behind all of them somebody is honest.
        let mut hosts: Vec<&str> = hostile.iter().map(|(name, ..)| *name).collect();
        hosts.push("honest");
        let came = ask(&hosts, &text, |host, offset| match hostile.iter().find(|(name, ..)| *name == host) {
            Some((.., answer)) => answer(offset),
            None => Ok(piece(&text, offset)),
        });
        assert_eq!(came.await, Ok(text.clone()));
    }
}
