//! Where a client is in a streamed answer: the event id of server-sent events, which a client sends back as
//! `Last-Event-ID` to go on after its connection or its node was lost.
//!
//! ```text
//! 00c0…ffee/17,3e,-    request id / what has arrived of each choice: tokens, `e` when it ended, `-` before it opened
//! ```

use std::fmt;
use std::str::FromStr;

use ::wire::client::{CHOICES_MAX, Have, Piece};
use shared::error::RequestError;
use shared::id::RequestId;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// Which answer.
    pub request: RequestId,
    /// What of it has arrived, by choice.
    pub have: Vec<Have>,
}

// === impl Position ===

impl Position {
    /// The client gets this piece.
    pub fn pass(&mut self, piece: &Piece) {
        let index = piece.choice as usize;
        if self.have.len() <= index {
            self.have.resize(index + 1, Have::default());
        }
        let have = &mut self.have[index];
        have.next = have.next.max(piece.first + piece.n_tokens);
        have.opened |= piece.opens || piece.n_tokens > 0;
        have.ended |= piece.ends;
    }

    /// The `Last-Event-ID` of a client.
    ///
    /// # Errors
    /// 400 for anything that this node did not write.
    pub fn parse(text: &str) -> Result<Self, RequestError> {
        text.parse().map_err(|NotAPosition| {
            let message = "this is no event id of ours; hint: send the id of the last event unchanged";
            RequestError::field("invalid_value", "Last-Event-ID", message)
        })
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/", self.request)?;
        for (index, have) in self.have.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            match have {
                Have { opened: false, ended: false, next: 0 } => write!(f, "{comma}-")?,
                Have { next, ended, .. } => write!(f, "{comma}{next}{}", if *ended { "e" } else { "" })?,
            }
        }
        Ok(())
    }
}

/// The text is none of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotAPosition;

impl FromStr for Position {
    type Err = NotAPosition;

    fn from_str(text: &str) -> Result<Self, NotAPosition> {
        let (request, list) = text.split_once('/').ok_or(NotAPosition)?;
        let is_id = request.len() == 32 && request.bytes().all(|byte| byte.is_ascii_hexdigit());
        let request = u128::from_str_radix(request, 16).ok().filter(|_| is_id).ok_or(NotAPosition)?;
        let choice = |text: &str| {
            if text == "-" {
                return Ok(Have::default());
            }
            let (number, ended) = text.strip_suffix('e').map_or((text, false), |number| (number, true));
            let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
            let next = number.parse().ok().filter(|_| is_number).ok_or(NotAPosition)?;
            Ok(Have { next, opened: true, ended })
        };
        let have = if list.is_empty() { Vec::new() } else { list.split(',').map(choice).collect::<Result<_, _>>()? };
        if have.len() > CHOICES_MAX { Err(NotAPosition) } else { Ok(Self { request: RequestId(request), have }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_read_as_it_was_written() {
        let mut position = Position { request: RequestId(0xc0ffee), have: Vec::new() };
        let piece = |choice, first, n_tokens, opens, ends| Piece { choice, first, n_tokens, opens, ends, json: vec![] };
        for piece in [piece(0, 0, 0, true, false), piece(2, 0, 0, true, false), piece(0, 0, 17, false, false)] {
            position.pass(&piece);
        }
        position.pass(&piece(2, 0, 3, false, true));
        let text = position.to_string();
        assert_eq!(text, format!("{:032x}/17,-,3e", 0xc0ffee_u32));
        assert_eq!(Position::parse(&text).expect("ours"), position);
    }

    #[test]
    fn what_we_did_not_write_is_refused() {
        let id = "0".repeat(32);
        for wrong in ["", "x", &id, &format!("{id}/+1"), &format!("{id}/1,"), &format!("{id}/ee"), "0/1"] {
            assert_eq!(Position::parse(wrong).expect_err(wrong).code, "invalid_value");
        }
        let many = vec!["1"; CHOICES_MAX + 1].join(",");
        assert!(Position::parse(&format!("{id}/{many}")).is_err());
    }
}
