//! What of an answer has arrived: decides of every piece whether it is new, was there, or does not fit.

use wire::client::{CHOICES_MAX, Have, Piece};

/// What to do with a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is what comes next.
    New,
    /// It was there; a node repeated it.
    Repeated,
    /// Something before it is missing, or it overlaps: the node that sent it is wrong about what is here.
    Misfit,
}

/// What has arrived, by choice.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Arrived(Vec<Have>);

// === impl Arrived ===

impl Arrived {
    /// What to tell the next node.
    pub fn choices(&self) -> &[Have] {
        &self.0
    }

    /// Judges a piece, and takes it in if it is new.
    pub fn take(&mut self, piece: &Piece) -> Verdict {
        let index = piece.choice as usize;
        if index >= CHOICES_MAX {
            return Verdict::Misfit;
        }
        if self.0.len() <= index {
            self.0.resize(index + 1, Have::default());
        }
        let have = &mut self.0[index];
        let Some(end) = piece.first.checked_add(piece.n_tokens) else { return Verdict::Misfit };
        let brings_tokens = piece.n_tokens > 0 && piece.first >= have.next;
        let brings_more = brings_tokens || (piece.opens && !have.opened) || (piece.ends && !have.ended);
        if !brings_more && end <= have.next {
            return Verdict::Repeated;
        }
        if piece.first != have.next || have.ended || (piece.opens && have.opened) {
            return Verdict::Misfit;
        }
        have.next = end;
        have.opened |= piece.opens;
        have.ended |= piece.ends;
        Verdict::New
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(choice: u32, first: u32, n_tokens: u32, opens: bool, ends: bool) -> Piece {
        Piece { choice, first, n_tokens, opens, ends, json: Vec::new() }
    }

    #[test]
    fn every_piece_is_taken_once_and_in_order() {
        let mut arrived = Arrived::default();
        let pieces = [
            piece(0, 0, 0, true, false),
            piece(1, 0, 0, true, false),
            piece(0, 0, 2, false, false),
            piece(1, 0, 1, false, false),
            piece(0, 2, 1, false, true),
            piece(1, 1, 0, false, true),
        ];
        for piece in &pieces {
            assert_eq!(arrived.take(piece), Verdict::New, "{piece:?}");
        }
        let whole = arrived.clone();
        for piece in &pieces {
            assert_eq!(arrived.take(piece), Verdict::Repeated, "{piece:?}");
        }
        assert_eq!(arrived, whole);
        let ended = |next| Have { next, opened: true, ended: true };
        assert_eq!(arrived.choices(), [ended(3), ended(1)]);
    }

    #[test]
    fn gaps_overlaps_and_what_follows_the_end_do_not_fit() {
        let mut arrived = Arrived::default();
        assert_eq!(arrived.take(&piece(0, 1, 1, false, false)), Verdict::Misfit, "token 0 is missing");
        assert_eq!(arrived.take(&piece(0, 0, 3, true, false)), Verdict::New);
        assert_eq!(arrived.take(&piece(0, 2, 2, false, false)), Verdict::Misfit, "token 2 is there, 3 is not");
        assert_eq!(arrived.take(&piece(0, 3, 1, true, false)), Verdict::Misfit, "it was opened");
        assert_eq!(arrived.take(&piece(0, 4, 0, false, true)), Verdict::Misfit, "it ends behind a gap");
        assert_eq!(arrived.take(&piece(0, 3, 0, false, true)), Verdict::New);
        assert_eq!(arrived.take(&piece(0, 3, 1, false, false)), Verdict::Misfit, "it has ended");
        assert_eq!(arrived.take(&piece(64, 0, 1, false, false)), Verdict::Misfit, "there are no such choices");
        assert_eq!(arrived.take(&piece(1, u32::MAX, 2, false, false)), Verdict::Misfit, "beyond counting");
    }
}
