//! Frames on QUIC streams: a thin shell around [`wire::Decoder`].

use bytes::{Buf, Bytes};
use quinn::crypto::rustls::HandshakeData;
use quinn::{Connection, ConnectionError, ReadError, RecvStream, VarInt, WriteError};
use wire::Version;
use wire::frame::{Decoder, Frame, FrameError, Kind};

/// Codes that close connections and streams.
pub(crate) mod code {
    use quinn::VarInt;

    /// A node goes away on purpose.
    pub(crate) const BYE: VarInt = VarInt::from_u32(0);
    /// Nobody waits for the rest.
    pub(crate) const CANCELLED: VarInt = VarInt::from_u32(1);
    /// The rest will not come.
    pub(crate) const BROKEN_OFF: VarInt = VarInt::from_u32(2);
    /// Bytes that are no frames of ours.
    pub(crate) const PROTOCOL: VarInt = VarInt::from_u32(3);
    /// Not who may come in.
    pub(crate) const REFUSED: VarInt = VarInt::from_u32(4);
}

/// What ends a stream before its time.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum StreamError {
    #[error("{0}")]
    Connection(#[from] ConnectionError),
    #[error("the peer broke off (code {0})")]
    BrokenOff(VarInt),
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl From<ReadError> for StreamError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Reset(code) => Self::BrokenOff(code),
            ReadError::ConnectionLost(error) => Self::Connection(error),
            // Streams are read in order, by their only owner, after the handshake.
            ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => {
                Self::BrokenOff(code::BROKEN_OFF)
            }
        }
    }
}

impl From<WriteError> for StreamError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Stopped(code) => Self::BrokenOff(code),
            WriteError::ConnectionLost(error) => Self::Connection(error),
            WriteError::ClosedStream | WriteError::ZeroRttRejected => Self::BrokenOff(code::BROKEN_OFF),
        }
    }
}

/// Bytes taken from quinn at once.
const CHUNK_BYTES: usize = 64 * 1024;

/// The receiving side of a stream. Dropping it tells the sender that nobody waits for the rest.
pub(crate) struct Frames {
    stream: RecvStream,
    decoder: Decoder,
    chunk: Bytes,
}

// === impl Frames ===

impl Frames {
    pub(crate) fn new(version: Version, stream: RecvStream, kinds: &'static [Kind]) -> Self {
        Self { stream, decoder: Decoder::speaking(version, kinds), chunk: Bytes::new() }
    }

    /// The next frame; `None` at the end of the stream. May be dropped and called again.
    pub(crate) async fn next(&mut self) -> Result<Option<Frame>, StreamError> {
        loop {
            let mut rest: &[u8] = &self.chunk;
            let fed = self.decoder.feed(&mut rest);
            let n_taken = self.chunk.len() - rest.len();
            self.chunk.advance(n_taken);
            if let Some(frame) = fed? {
                return Ok(Some(frame));
            }
            match self.stream.read_chunk(CHUNK_BYTES, true).await? {
                Some(chunk) => self.chunk = chunk.bytes,
                None => {
                    self.decoder.finish()?;
                    return Ok(None);
                }
            }
        }
    }

    /// The one frame of a stream.
    pub(crate) async fn only(&mut self) -> Result<Frame, StreamError> {
        let frame = self.next().await?.ok_or(FrameError::Truncated { missing: wire::frame::HEADER_BYTES })?;
        match self.next().await? {
            None => Ok(frame),
            Some(more) => Err(FrameError::Trailing { n_bytes: more.body.len() }.into()),
        }
    }

    /// Tells the sender that nobody waits for the rest.
    pub(crate) fn stop(&mut self) {
        let _ = self.stream.stop(code::CANCELLED);
    }
}

/// The protocol that TLS agreed on.
pub(crate) fn protocol(connection: &Connection) -> Vec<u8> {
    let shown = connection.handshake_data().and_then(|data| data.downcast::<HandshakeData>().ok());
    shown.and_then(|data| data.protocol).unwrap_or_default()
}

/// The TLS alert that ended a handshake, from this end or the other.
pub(crate) fn alert(error: &ConnectionError) -> Option<u64> {
    /// Where alerts are among QUIC's codes (RFC 9001, section 4.8).
    const ALERTS: std::ops::Range<u64> = 0x100..0x200;
    let code = match error {
        ConnectionError::TransportError(error) => u64::from(error.code),
        ConnectionError::ConnectionClosed(close) => u64::from(close.error_code),
        _ => return None,
    };
    ALERTS.contains(&code).then(|| code - ALERTS.start)
}

/// The other end speaks none of the protocols that were offered.
pub(crate) const NO_PROTOCOL: u64 = 120;

/// Why a connection is over, in words for logs.
pub(crate) fn why(connection: &Connection) -> String {
    connection.close_reason().map_or_else(|| "still open".to_owned(), |reason| reason.to_string())
}
