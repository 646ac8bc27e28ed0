//! What clients and nodes say to each other under [`CLIENT_ALPN`](crate::CLIENT_ALPN): layouts simple enough to be
//! written by hand in any language. Nothing here is read before [`Hello`] has been checked, whose layout is fixed.
//!
//! ```text
//! first stream     client → node   hello: magic "TNRYCLI1" · key length u16 · key, padded with zeros to 256 bytes
//!                  node → client   Welcome or Failed
//! other streams    client → node   Ask or Resume
//!                  node → client   Accepted · Piece … · Done, or Failed at any point
//! frame            kind u8 · length u32 · body; little endian
//! ```
//!
//! A piece is one event of the HTTP API's stream (the JSON behind `data:`), with the range of tokens it carries. So a
//! client knows exactly what it has, and says so when it goes on elsewhere: a token is neither lost nor repeated.

/// Longest API key.
pub const KEY_BYTES_MAX: usize = 256;
/// Bytes of a hello.
pub const HELLO_BYTES: usize = 8 + 2 + KEY_BYTES_MAX;
/// Largest body of a request, as over HTTP.
pub const BODY_BYTES_MAX: usize = 1 << 20;
/// Largest frame: a body and what stands before it; pieces are far smaller.
pub const FRAME_BYTES_MAX: usize = BODY_BYTES_MAX + 64;
/// Longest resume token.
pub const TOKEN_BYTES_MAX: usize = 512;
/// Choices of one answer.
pub const CHOICES_MAX: usize = 64;

const MAGIC: [u8; 8] = *b"TNRYCLI1";
/// Bytes before the body of a frame.
const HEADER_BYTES: usize = 5;

/// Why bytes are not what belongs here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientFrameError {
    /// Not our hello.
    #[error("this is no hello of {}", String::from_utf8_lossy(&MAGIC))]
    Hello,
    /// A frame that has no place here.
    #[error("frame of kind {found}, which is not expected here")]
    Kind {
        /// Kind found.
        found: u8,
    },
    /// Larger than any may be.
    #[error("frame of {found} bytes, limit {max}")]
    Length {
        /// Length claimed.
        found: usize,
        /// The limit.
        max: usize,
    },
    /// Shorter or longer than what it holds, or holding nonsense.
    #[error("frame of kind {kind} does not hold what it says: {what}")]
    Body {
        /// Which kind.
        kind: u8,
        /// What is wrong.
        what: &'static str,
    },
}

/// The first bytes of a client.
#[derive(Clone, PartialEq, Eq)]
pub struct Hello {
    /// The API key.
    pub key: String,
}

// === impl Hello ===

impl Hello {
    /// Its bytes; a key that is too long gives one that no node accepts.
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut out = [0; HELLO_BYTES];
        let key = &self.key.as_bytes()[..self.key.len().min(KEY_BYTES_MAX)];
        out[..8].copy_from_slice(&MAGIC);
        out[8..10].copy_from_slice(&(key.len() as u16).to_le_bytes());
        out[10..10 + key.len()].copy_from_slice(key);
        out
    }

    /// # Errors
    /// When they are anything else.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Self, ClientFrameError> {
        let length = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
        let key = bytes[10..].get(..length).ok_or(ClientFrameError::Hello)?;
        let is_padded = bytes[10 + length..].iter().all(|byte| *byte == 0);
        let key = std::str::from_utf8(key).map_err(|_| ClientFrameError::Hello)?;
        if bytes[..8] != MAGIC || !is_padded || key.is_empty() {
            return Err(ClientFrameError::Hello);
        }
        Ok(Self { key: key.to_owned() })
    }
}

/// Which call of the HTTP API a body is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `POST /v1/chat/completions`
    Chat,
    /// `POST /v1/completions`
    Completions,
}

/// What a client has of one choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Have {
    /// Tokens: the next one is number `next`.
    pub next: u32,
    /// The piece that opens the choice, which carries no token.
    pub opened: bool,
    /// The piece that ends it.
    pub ended: bool,
}

/// From client to node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// A new request.
    New {
        /// Chosen by the client: the same key asked again is the same request.
        idempotency_key: u128,
        /// Which call.
        endpoint: Endpoint,
        /// Its JSON; answered as a stream whatever it says about that.
        body: Vec<u8>,
    },
    /// Go on with one that another node had accepted.
    Resume {
        /// Its id.
        request: u128,
        /// From [`Answer::Accepted`].
        token: Vec<u8>,
        /// What has arrived, by choice.
        have: Vec<Have>,
    },
}

/// One event of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Choice index.
    pub choice: u32,
    /// Number of the first token it carries, or of the next one if it carries none.
    pub first: u32,
    /// Tokens it carries.
    pub n_tokens: u32,
    /// It opens the choice.
    pub opens: bool,
    /// It ends the choice.
    pub ends: bool,
    /// The event: JSON as behind `data:` over HTTP.
    pub json: Vec<u8>,
}

/// From node to client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The key is good.
    Welcome {
        /// The node that speaks.
        node: String,
    },
    /// The request runs, and can be resumed at any node.
    Accepted {
        /// Its id.
        request: u128,
        /// Proves that it was this client's; holds no secret of ours.
        token: Vec<u8>,
    },
    /// More of the answer.
    Piece(Piece),
    /// The event that belongs to no choice (usage). At most one, behind all pieces; repeated after a resume.
    Extra {
        /// The event.
        json: Vec<u8>,
    },
    /// All is said.
    Done,
    /// Refused or failed; nothing follows.
    Failed {
        /// As over HTTP.
        status: u16,
        /// Earliest sensible retry; 0 for none.
        retry_after_ms: u32,
        /// The error, JSON as over HTTP.
        json: Vec<u8>,
    },
}

const NEW: u8 = 1;
const RESUME: u8 = 2;
const WELCOME: u8 = 16;
const ACCEPTED: u8 = 17;
const PIECE: u8 = 18;
const EXTRA: u8 = 19;
const DONE: u8 = 20;
const FAILED: u8 = 21;

/// A frame whose body is yet to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawFrame {
    kind: u8,
    body: Vec<u8>,
}

/// Cuts a stream into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
}

// === impl Decoder ===

impl Decoder {
    /// Takes what it needs from the front of `bytes`; a frame when one is complete.
    ///
    /// # Errors
    /// As soon as a length is beyond what any frame may have.
    pub fn feed(&mut self, bytes: &mut &[u8]) -> Result<Option<RawFrame>, ClientFrameError> {
        loop {
            let wanted = match self.bytes.first_chunk::<HEADER_BYTES>() {
                None => HEADER_BYTES,
                Some([_, length @ ..]) => {
                    let length = u32::from_le_bytes(*length) as usize;
                    if length > FRAME_BYTES_MAX {
                        return Err(ClientFrameError::Length { found: length, max: FRAME_BYTES_MAX });
                    }
                    HEADER_BYTES + length
                }
            };
            // Without a whole header there are fewer bytes than it takes.
            if self.bytes.len() == wanted {
                let bytes = std::mem::take(&mut self.bytes);
                return Ok(Some(RawFrame { kind: bytes[0], body: bytes[HEADER_BYTES..].to_vec() }));
            }
            let taken = bytes.split_off(..bytes.len().min(wanted - self.bytes.len())).unwrap_or_default();
            if taken.is_empty() {
                return Ok(None);
            }
            self.bytes.extend_from_slice(taken);
        }
    }

    /// Nothing is left over.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

fn frame(kind: u8, parts: &[&[u8]], out: &mut Vec<u8>) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    out.push(kind);
    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    parts.iter().for_each(|part| out.extend_from_slice(part));
}

/// Reads fixed-width values off the front of a body.
struct Body<'a> {
    kind: u8,
    rest: &'a [u8],
}

impl<'a> Body<'a> {
    fn wrong(&self, what: &'static str) -> ClientFrameError {
        ClientFrameError::Body { kind: self.kind, what }
    }

    fn take(&mut self, n_bytes: usize) -> Result<&'a [u8], ClientFrameError> {
        self.rest.split_off(..n_bytes).ok_or(self.wrong("it is too short"))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ClientFrameError> {
        Ok(self.take(N)?.try_into().expect("as many bytes were taken"))
    }

    fn u8(&mut self) -> Result<u8, ClientFrameError> {
        Ok(self.array::<1>()?[0])
    }

    fn u16(&mut self) -> Result<u16, ClientFrameError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, ClientFrameError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u128(&mut self) -> Result<u128, ClientFrameError> {
        Ok(u128::from_le_bytes(self.array()?))
    }

    /// A bit for each flag; others must be 0.
    fn flags<const N: usize>(&mut self) -> Result<[bool; N], ClientFrameError> {
        let bits = self.u8()?;
        if bits >> N != 0 {
            return Err(self.wrong("a flag has no meaning"));
        }
        Ok(std::array::from_fn(|bit| bits >> bit & 1 == 1))
    }

    /// What is left.
    fn all(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.rest).to_vec()
    }

    fn end<T>(&self, value: T) -> Result<T, ClientFrameError> {
        if self.rest.is_empty() { Ok(value) } else { Err(self.wrong("it is too long")) }
    }
}

fn bits(flags: [bool; 2]) -> [u8; 1] {
    [u8::from(flags[0]) | u8::from(flags[1]) << 1]
}

// === impl Ask ===

impl Ask {
    /// Appends its frame to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::New { idempotency_key, endpoint, body } => {
                let endpoint = match endpoint {
                    Endpoint::Chat => 0,
                    Endpoint::Completions => 1,
                };
                frame(NEW, &[&idempotency_key.to_le_bytes(), &[endpoint], body], out);
            }
            Self::Resume { request, token, have } => {
                let mut list = Vec::with_capacity(have.len() * 5);
                for have in have {
                    list.extend_from_slice(&have.next.to_le_bytes());
                    list.extend_from_slice(&bits([have.opened, have.ended]));
                }
                let (token_len, n_choices) = (token.len() as u16, have.len() as u16);
                let parts: [&[u8]; 5] =
                    [&request.to_le_bytes(), &token_len.to_le_bytes(), token, &n_choices.to_le_bytes(), &list];
                frame(RESUME, &parts, out);
            }
        }
    }

    /// # Errors
    /// When the frame is no question, or holds nonsense.
    pub fn decode(frame: &RawFrame) -> Result<Self, ClientFrameError> {
        let mut body = Body { kind: frame.kind, rest: &frame.body };
        match frame.kind {
            NEW => {
                let idempotency_key = body.u128()?;
                let endpoint = match body.u8()? {
                    0 => Endpoint::Chat,
                    1 => Endpoint::Completions,
                    _ => return Err(body.wrong("there is no such call")),
                };
                let json = body.all();
                if json.len() > BODY_BYTES_MAX {
                    return Err(ClientFrameError::Length { found: json.len(), max: BODY_BYTES_MAX });
                }
                Ok(Self::New { idempotency_key, endpoint, body: json })
            }
            RESUME => {
                let request = body.u128()?;
                let token_len = usize::from(body.u16()?);
                if token_len > TOKEN_BYTES_MAX {
                    return Err(body.wrong("the token is too long"));
                }
                let token = body.take(token_len)?.to_vec();
                let n_choices = usize::from(body.u16()?);
                if n_choices > CHOICES_MAX {
                    return Err(body.wrong("there are too many choices"));
                }
                let have = (0..n_choices).map(|_| {
                    let next = body.u32()?;
                    let [opened, ended] = body.flags()?;
                    Ok(Have { next, opened, ended })
                });
                let have = have.collect::<Result<_, ClientFrameError>>()?;
                body.end(Self::Resume { request, token, have })
            }
            found => Err(ClientFrameError::Kind { found }),
        }
    }
}

// === impl Answer ===

impl Answer {
    /// Appends its frame to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Welcome { node } => frame(WELCOME, &[node.as_bytes()], out),
            Self::Accepted { request, token } => frame(ACCEPTED, &[&request.to_le_bytes(), token], out),
            Self::Piece(piece) => {
                let numbers = [piece.choice, piece.first, piece.n_tokens].map(u32::to_le_bytes);
                let flags = bits([piece.opens, piece.ends]);
                frame(PIECE, &[numbers.as_flattened(), &flags, &piece.json], out);
            }
            Self::Extra { json } => frame(EXTRA, &[json], out),
            Self::Done => frame(DONE, &[], out),
            Self::Failed { status, retry_after_ms, json } => {
                frame(FAILED, &[&status.to_le_bytes(), &retry_after_ms.to_le_bytes(), json], out);
            }
        }
    }

    /// # Errors
    /// When the frame is no answer, or holds nonsense.
    pub fn decode(frame: &RawFrame) -> Result<Self, ClientFrameError> {
        let mut body = Body { kind: frame.kind, rest: &frame.body };
        match frame.kind {
            WELCOME => {
                let node = String::from_utf8(body.all()).map_err(|_| body.wrong("the name is not UTF-8"))?;
                Ok(Self::Welcome { node })
            }
            ACCEPTED => {
                let (request, token) = (body.u128()?, body.all());
                if token.len() > TOKEN_BYTES_MAX {
                    return Err(body.wrong("the token is too long"));
                }
                Ok(Self::Accepted { request, token })
            }
            PIECE => {
                let (choice, first, n_tokens) = (body.u32()?, body.u32()?, body.u32()?);
                let [opens, ends] = body.flags()?;
                if choice as usize >= CHOICES_MAX {
                    return Err(body.wrong("there are too many choices"));
                }
                Ok(Self::Piece(Piece { choice, first, n_tokens, opens, ends, json: body.all() }))
            }
            EXTRA => Ok(Self::Extra { json: body.all() }),
            DONE => body.end(Self::Done),
            FAILED => {
                let (status, retry_after_ms) = (body.u16()?, body.u32()?);
                Ok(Self::Failed { status, retry_after_ms, json: body.all() })
            }
            found => Err(ClientFrameError::Kind { found }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn asks() -> impl Strategy<Value = Ask> {
        let endpoint = prop_oneof![Just(Endpoint::Chat), Just(Endpoint::Completions)];
        let have =
            (any::<u32>(), any::<bool>(), any::<bool>()).prop_map(|(next, opened, ended)| Have { next, opened, ended });
        prop_oneof![
            (any::<u128>(), endpoint, vec(any::<u8>(), 0..300))
                .prop_map(|(idempotency_key, endpoint, body)| Ask::New { idempotency_key, endpoint, body }),
            (any::<u128>(), vec(any::<u8>(), 0..TOKEN_BYTES_MAX), vec(have, 0..CHOICES_MAX))
                .prop_map(|(request, token, have)| Ask::Resume { request, token, have }),
        ]
    }

    fn answers() -> impl Strategy<Value = Answer> {
        let json = || vec(any::<u8>(), 0..300);
        let piece = (0..CHOICES_MAX as u32, any::<u32>(), any::<u32>(), any::<bool>(), any::<bool>(), json());
        prop_oneof![
            "[a-z]{1,63}".prop_map(|node| Answer::Welcome { node }),
            (any::<u128>(), vec(any::<u8>(), 0..TOKEN_BYTES_MAX))
                .prop_map(|(request, token)| Answer::Accepted { request, token }),
            piece.prop_map(|(choice, first, n_tokens, opens, ends, json)| {
                Answer::Piece(Piece { choice, first, n_tokens, opens, ends, json })
            }),
            json().prop_map(|json| Answer::Extra { json }),
            Just(Answer::Done),
            (any::<u16>(), any::<u32>(), json()).prop_map(|(status, retry_after_ms, json)| Answer::Failed {
                status,
                retry_after_ms,
                json
            }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_said_is_what_is_heard(
            asks in vec(asks(), 0..4),
            answers in vec(answers(), 0..8),
            size in 1_usize..500,
        ) {
            let mut stream = Vec::new();
            asks.iter().for_each(|ask| ask.encode(&mut stream));
            answers.iter().for_each(|answer| answer.encode(&mut stream));
            let mut decoder = Decoder::default();
            let mut frames = Vec::new();
            for mut piece in stream.chunks(size) {
                while let Some(frame) = decoder.feed(&mut piece).expect("our own frames") {
                    frames.push(frame);
                }
            }
            prop_assert!(decoder.is_empty());
            prop_assert_eq!(frames.len(), asks.len() + answers.len());
            let (first, second) = frames.split_at(asks.len());
            let heard: Vec<Ask> = first.iter().map(|frame| Ask::decode(frame).expect("a question")).collect();
            prop_assert_eq!(heard, asks);
            let heard: Vec<Answer> = second.iter().map(|frame| Answer::decode(frame).expect("an answer")).collect();
            prop_assert_eq!(heard, answers);
        }

        #[test]
        fn whatever_arrives_does_no_harm(bytes in vec(any::<u8>(), 0..400), kind: u8) {
            let mut rest: &[u8] = &bytes;
            let mut decoder = Decoder::default();
            while let Ok(Some(frame)) = decoder.feed(&mut rest) {
                let _ = (Ask::decode(&frame), Answer::decode(&frame));
            }
            let frame = RawFrame { kind: kind % 24, body: bytes };
            let _ = (Ask::decode(&frame), Answer::decode(&frame));
        }

        #[test]
        fn keys_come_through_and_other_hellos_do_not(key in "[ -~]{1,256}", at in 0_usize..HELLO_BYTES, bit in 0..8) {
            let bytes = Hello { key: key.clone() }.encode();
            prop_assert_eq!(Hello::decode(&bytes).expect("our own").key, key.clone());
            let mut changed = bytes;
            changed[at] ^= 1_u8 << bit;
            prop_assert!(Hello::decode(&changed).map_or(true, |hello| hello.key != key));
        }
    }

    #[test]
    fn a_giant_length_is_refused_with_its_first_bytes() {
        let mut bytes: &[u8] = &[NEW, 0xff, 0xff, 0xff, 0xff];
        let refused = Decoder::default().feed(&mut bytes).expect_err("too long");
        assert_eq!(refused, ClientFrameError::Length { found: u32::MAX as usize, max: FRAME_BYTES_MAX });
    }

    /// The bytes of version 1, spelled out by hand.
    #[test]
    fn the_bytes_of_version_1_stay_what_they_are() {
        let mut out = Vec::new();
        Ask::New { idempotency_key: 0x0102, endpoint: Endpoint::Completions, body: b"{}".to_vec() }.encode(&mut out);
        assert_eq!(out, [&[1, 19, 0, 0, 0, 2, 1][..], &[0; 14], &[1], b"{}"].concat());
        out.clear();
        let have = vec![Have { next: 5, opened: true, ended: false }, Have { next: 6, opened: true, ended: true }];
        Ask::Resume { request: 3, token: b"ab".to_vec(), have }.encode(&mut out);
        let numbers = [&[2, 0][..], b"ab", &[2, 0, 5, 0, 0, 0, 1, 6, 0, 0, 0, 3]].concat();
        assert_eq!(out, [&[2, 32, 0, 0, 0, 3][..], &[0; 15], &numbers].concat());
        out.clear();
        Answer::Piece(Piece { choice: 1, first: 2, n_tokens: 3, opens: false, ends: true, json: b"{}".to_vec() })
            .encode(&mut out);
        assert_eq!(out, [&[18, 15, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 2][..], b"{}"].concat());
        out.clear();
        Answer::Failed { status: 429, retry_after_ms: 1000, json: b"{}".to_vec() }.encode(&mut out);
        assert_eq!(out, [&[21, 8, 0, 0, 0, 0xad, 1, 0xe8, 3, 0, 0][..], b"{}"].concat());
        out.clear();
        Answer::Done.encode(&mut out);
        assert_eq!(out, [20, 0, 0, 0, 0]);
    }
}
