//! Which adapters have requests that wait or run now, for `vllm:lora_requests_info`: schedulers in front of
//! several nodes send a request to where its adapter is in use already.
//!
//! Every request of an adapter holds an [`InUse`] from admission to its end, so the names held here are bounded
//! by the requests in flight.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use shared::id::{AdapterName, BaseName};
use shared::request::Envelope;

/// Most adapter names in one label: a label of some 16 KiB.
const NAMES_MAX: usize = 256;

/// Requests of one adapter.
#[derive(Debug, Clone, Copy, Default)]
struct Requests {
    waiting: usize,
    running: usize,
}

type Uses = BTreeMap<(BaseName, AdapterName), Requests>;

static IN_USE: Mutex<Uses> = Mutex::new(BTreeMap::new());

/// One request's use of an adapter; ends when it is dropped.
#[derive(Debug)]
pub struct InUse {
    key: (BaseName, AdapterName),
    running: bool,
}

// === impl InUse ===

impl InUse {
    /// A request waits for its turn; `None` if it needs no adapter.
    pub fn waiting(envelope: &Envelope) -> Option<Self> {
        let name = envelope.adapter.as_ref()?.name.clone();
        let key = (envelope.base.clone(), name);
        IN_USE.lock().entry(key.clone()).or_default().waiting += 1;
        Some(Self { key, running: false })
    }

    /// It entered the batch.
    pub fn run(&mut self) {
        if !std::mem::replace(&mut self.running, true)
            && let Some(requests) = IN_USE.lock().get_mut(&self.key)
        {
            requests.waiting -= 1;
            requests.running += 1;
        }
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut uses = IN_USE.lock();
        let Some(requests) = uses.get_mut(&self.key) else { return };
        if self.running {
            requests.running -= 1;
        } else {
            requests.waiting -= 1;
        }
        if requests.waiting + requests.running == 0 {
            uses.remove(&self.key);
        }
    }
}

/// Names of a base's adapters with running and with waiting requests, each separated by commas.
pub fn adapters_in_use(base: &BaseName) -> (String, String) {
    let uses = IN_USE.lock();
    let names = |has: fn(&Requests) -> bool| {
        let of_base = uses.iter().filter(|((of, _), requests)| of == base && has(requests));
        of_base.take(NAMES_MAX).map(|((_, name), _)| name.to_string()).collect::<Vec<_>>().join(",")
    };
    (names(|requests| requests.running > 0), names(|requests| requests.waiting > 0))
}
