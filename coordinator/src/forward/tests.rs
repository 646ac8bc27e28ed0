//! What other nodes are told of a request whose adapter could not be loaded where it began.

use shared::id::RequestId;
use shared::request::AdapterPin;
use shared::token::FinishReason;

use super::*;
use crate::journal::tests::{envelope, table};
use crate::testing::now;

/// A node without the adapter, which breaks off after a token, and one that finishes whatever it is given.
#[derive(Default)]
struct Script {
    starts: Mutex<Vec<Start>>,
    /// By the time they were sent: what the client had heard by then, and the request as the record has it.
    records: Mutex<Vec<JournalRecord>>,
}

struct Events(std::vec::IntoIter<Result<Option<Answer>, Lost>>);

impl Run for Events {
    async fn recv(&mut self) -> Result<Option<Answer>, Lost> {
        self.0.next().unwrap_or(Ok(None))
    }
}

fn token(seq: u32) -> TokenEvent {
    TokenEvent::Token { choice: 0, seq, id: 100 + seq, logprobs: None }
}

impl Carrier for Script {
    type Run = Events;

    async fn start(&self, _: &NodeId, start: Start) -> Result<Events, Lost> {
        let began = |fell_back| TokenEvent::Started {
            queue_wait: Duration::ZERO,
            cached_tokens: 0,
            fell_back,
            adapter_hit: None,
        };
        let ended = TokenEvent::Finished { choice: 0, reason: FinishReason::Length, compute: Duration::ZERO };
        let (events, breaks) = match start.attempt {
            1 => (vec![began(true), token(0)], true),
            _ => (vec![began(start.envelope.fell_back), token(1), ended], false),
        };
        let attempt = start.attempt;
        let mut answers: Vec<Result<Option<Answer>, Lost>> =
            events.into_iter().map(|event| Ok(Some(Answer::Event { attempt, event }))).collect();
        if breaks {
            answers.push(Err(Lost("it broke off".to_owned())));
        }
        lock(&self.starts).push(start);
        Ok(Events(answers.into_iter()))
    }

    async fn keep(&self, _: &NodeId, request: Request) -> Result<Response, Lost> {
        if let Request::JournalOpen(record) = request {
            // Late enough that the beginning of the answer comes before.
            tokio::time::sleep(Duration::from_millis(20)).await;
            lock(&self.records).push(*record);
        }
        Ok(Response::Done)
    }
}

#[tokio::test]
async fn a_request_that_began_on_the_base_goes_on_there_at_every_node() {
    let carrier = Arc::new(Script::default());
    let routed = Tables::new(table(3, 0, &[]));
    let forwarder = Forwarder::new(Arc::clone(&carrier), routed, Arc::new(shared::clock::SystemClock));
    let pin = AdapterPin { name: "acme-support-smollm2-v1.0.0".parse().expect("a name"), hash: ContentHash([7; 32]) };
    let envelope = Envelope { id: RequestId(9), adapter: Some(pin), ..envelope(now(), &[1, 2]) };
    let place = Place::anywhere("smollm2".parse().expect("a base"));
    let journey = Journey { envelope, place, emitted: Emitted::default(), attempt: 0 };
    // No token is delivered before the record is right: there is room for the beginning only.
    let (sink, mut events) = mpsc::channel(1);
    let carried = forwarder.forward_kept(journey, vec![1], sink);
    let heard = async {
        let first = events.recv().await;
        assert!(matches!(first, Some(TokenEvent::Started { fell_back: true, .. })), "{first:?}");
        let known = lock(&carrier.records).last().map(|record| record.envelope.fell_back);
        assert_eq!(known, Some(true), "whoever goes on knows it before the client does");
        let mut rest = Vec::new();
        while let Some(event) = events.recv().await {
            rest.push(event);
        }
        rest
    };
    let ((), rest) = tokio::join!(carried, heard);
    assert_eq!(rest[..2], [token(0), token(1)]);
    let starts = lock(&carrier.starts);
    let told: Vec<_> =
        starts.iter().map(|start| (start.envelope.adapter.is_some(), start.envelope.fell_back)).collect();
    assert_eq!(told, [(true, false), (false, true)]);
    let records = lock(&carrier.records);
    assert!(records.iter().skip(1).all(|record| record.envelope.adapter.is_none()), "{records:?}");
}
