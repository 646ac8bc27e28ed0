//! Going on with a request whose entry node died, or whose client lost it: from the record that another node keeps.
//!
//! The client says what it has. The engine begins a token before that, or where the record ends, so that everything the
//! client lacks is computed anew, log-probabilities and all; what it has is only told to the gateway, whose text goes on
//! from there. The tokens are the same wherever they are computed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use ::wire::client::Have;
use ::wire::node::JournalRecord;
use coordinator::auth::{AuthError, AuthedTenant, Scope};
use coordinator::journal::records::Found;
use serde::{Deserialize, Serialize};
use shared::error::{ErrorKind, RequestError};
use shared::id::RequestId;
use shared::request::{Emitted, EmittedChoice, Envelope};
use shared::token::{FinishReason, TokenEvent};
use tokio::sync::mpsc;

use super::serve::{EVENTS_WAITING_MAX, Serving, other_content};
use super::{App, running};
use crate::cluster::place;
use crate::gateway::backend::{CancelOnDrop, Events, RECORD_SILENT, Resumed};
use crate::metering::{Tap, UsageRecord};
use crate::metrics;

/// What this node adds to a record besides the request and its tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    /// API key used, public part.
    pub(super) key: String,
    /// Where usage rolls up.
    pub(super) cost_center: Option<String>,
    /// Model as the client named it.
    pub(super) model: String,
    /// How the gateway answers, in its own format.
    pub(super) answering: Vec<u8>,
}

// === impl Kept ===

impl Kept {
    /// For a record.
    pub(super) fn write(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("it is plain text and bytes")
    }

    /// From a record.
    ///
    /// # Errors
    /// When it is of a node that writes it otherwise.
    pub(super) fn read(record: &JournalRecord) -> Result<Self, RequestError> {
        serde_json::from_slice(&record.answer).map_err(|error| {
            tracing::error!(%error, request_id = %record.envelope.id, "the record of a request cannot be read");
            RequestError::internal()
        })
    }
}

impl App {
    /// See [`crate::gateway::backend::Backend::resume`].
    pub(super) async fn go_on(
        &self,
        who: &AuthedTenant,
        request: RequestId,
        have: &[Have],
    ) -> Result<Resumed, RequestError> {
        who.require(Scope::Infer)?;
        let contract = self.registry.snapshot().contract(who).ok_or(AuthError::Invalid)?;
        let cluster = self.cluster.as_ref().ok_or_else(stream_gone)?;
        let Found { record, is_one_silent } = cluster.take_record(request, contract.region.as_deref()).await;
        // Somebody else's is as unknown as none.
        let own = record.filter(|record| record.envelope.route.tenant == contract.tenant);
        let record = own.ok_or_else(if is_one_silent { record_silent } else { stream_gone })?;
        self.check_open()?;
        let kept = Kept::read(&record)?;
        let text = self.text(&record.envelope.base)?;
        if record.envelope.pin.hash.is_some_and(|hash| hash != text.info.hash) {
            // Its tokens are not spelled by the text that is here.
            return Err(other_content(&record.envelope.base));
        }
        metrics::resumed(&contract.tenant);
        tracing::info!(request_id = %request, tenant_id = %contract.tenant, "a request goes on here");

        let n = record.envelope.generation.n;
        let held = self.hold(request);
        let envelope = Envelope { cache_secret: *who.cache_secret(), ..record.envelope };
        let Rest { emitted, seen, is_complete } = rest(record.emitted, n, have);
        let envelope = Arc::new(envelope);
        let serving = if is_complete {
            let (_, events) = mpsc::channel(EVENTS_WAITING_MAX);
            Serving { events, cancel: CancelOnDrop::new(|| {}) }
        } else {
            let answer = kept.write();
            cluster.forward(Envelope::clone(&envelope), &contract, emitted, record.attempt, Some(answer))
        };
        let Kept { key, cost_center, model, answering } = kept;
        // Its rates were paid where it began.
        let (journal, clock) = (self.journal.clone(), Arc::clone(&self.clock));
        let tap = Tap::new(Arc::clone(&envelope), key, cost_center, Box::new(|_| {}), journal, clock);
        let mut events = Events::new(serving.events, Box::new(tap)).after(seen).until(self.stop.subscribe());
        events.hold(held, n);
        let numerics = self.numerics(&text, &envelope, &place(&envelope.base, &contract));
        let running = running(&text, numerics, model, &envelope, events, None, serving.cancel);
        Ok(Resumed { running, answering })
    }
}

impl App {
    /// Writes the usage of another node's request, which may have died before it could: what its record holds was
    /// delivered. Counted in no metric: that node's are gone with it, and this one computed nothing.
    pub fn bill_for_another(&self, record: JournalRecord) {
        let Ok(Kept { key, cost_center, .. }) = Kept::read(&record) else { return };
        let at_ms = u64::try_from(self.clock.wall().as_millis()).unwrap_or(u64::MAX);
        self.journal.append(&UsageRecord::of_another(&record.envelope, &record.emitted, key, cost_center, at_ms));
    }
}

fn stream_gone() -> RequestError {
    let message = "nobody remembers this request; hint: it may have ended more than a minute ago, send it again";
    RequestError::new(ErrorKind::NotFound, "stream_gone", message)
}

fn record_silent() -> RequestError {
    let message = "a node that may remember this request does not answer; hint: come back in a moment";
    RequestError::new(ErrorKind::Unavailable, RECORD_SILENT, message).retry_after(Duration::from_secs(1))
}

/// What is left to do of a request.
struct Rest {
    /// Where the engine begins.
    emitted: Emitted,
    /// What the client has seen before, as the gateway needs it.
    seen: VecDeque<TokenEvent>,
    /// Nothing is left.
    is_complete: bool,
}

fn rest(mut record: Emitted, n: u32, have: &[Have]) -> Rest {
    record.0.resize(n as usize, EmittedChoice::default());
    let mut seen = VecDeque::new();
    for (choice, emitted) in (0_u32..).zip(&mut record.0) {
        let have = have.get(choice as usize).copied().unwrap_or_default();
        emitted.finished &= have.ended;
        if !emitted.finished {
            // One token is computed again, so that the engine never begins behind the end.
            let known = emitted.tokens.len().min(have.next as usize);
            emitted.tokens.truncate(known.saturating_sub(1));
        }
        let token = |(seq, &id): (u32, &u32)| TokenEvent::Token { choice, seq, id, logprobs: None };
        seen.extend((0_u32..).zip(&emitted.tokens).map(token));
        if emitted.finished {
            // The client knows why it ended.
            seen.push_back(TokenEvent::Finished { choice, reason: FinishReason::Stop, compute: Duration::ZERO });
        }
    }
    let is_complete = record.0.iter().all(|choice| choice.finished);
    Rest { emitted: record, seen, is_complete }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(tokens: &[u32], finished: bool) -> EmittedChoice {
        EmittedChoice { tokens: tokens.to_vec(), finished }
    }

    fn have(next: u32, ended: bool) -> Have {
        Have { next, opened: true, ended }
    }

    #[test]
    fn the_engine_begins_before_what_the_client_has_or_where_the_record_ends() {
        // The client is behind the record, ahead of it, has none, has all but the end, has all.
        let record = vec![
            choice(&[1, 2, 3, 4], false),
            choice(&[1, 2], false),
            choice(&[1, 2], false),
            choice(&[1, 2], true),
            choice(&[1, 2], true),
        ];
        let client = [have(3, false), have(5, false), have(0, false), have(2, false), have(2, true)];
        let Rest { emitted, seen, is_complete } = rest(Emitted(record), 5, &client);
        let tokens: Vec<usize> = emitted.0.iter().map(|choice| choice.tokens.len()).collect();
        assert_eq!(tokens, [2, 1, 0, 1, 2]);
        assert_eq!(emitted.0.iter().filter(|choice| choice.finished).count(), 1);
        assert_eq!(seen.len(), 2 + 1 + 1 + 2 + 1, "tokens, and one end");
        assert!(!is_complete);
    }

    #[test]
    fn nothing_is_left_when_the_client_has_every_end() {
        assert!(rest(Emitted(vec![choice(&[1], true)]), 1, &[have(1, true)]).is_complete);
        assert!(!rest(Emitted(vec![choice(&[1], true)]), 1, &[have(1, false)]).is_complete);
        assert!(!rest(Emitted(Vec::new()), 1, &[]).is_complete);
    }
}
