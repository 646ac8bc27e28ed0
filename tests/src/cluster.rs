//! Several real nodes of one cluster as processes, and clients that stream from them while nodes come and go.
//!
//! Used by the end-to-end tests and by `scripts/chaos`; knows nothing of a node's insides.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use client::{Client, ClientConfig, Endpoint, Event, NodeAddress};
use peer::Authority;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};
use shared::clock::{Clock, SystemClock};

use crate::namespaces::Namespaces;
use crate::network::Network;
use crate::operator::agent;
use crate::process::{NodePlace, NodeProcess, NodeSpec, write_config, write_config_as};

/// Running nodes of one cluster file. Killed when dropped.
#[derive(Debug)]
pub struct Cluster {
    /// In the order of the file: `a`, `b`, `c` …
    pub nodes: Vec<NodeProcess>,
    folder: PathBuf,
}

/// What one streamed completion brought.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Streamed {
    /// Token ids, in order of arrival.
    pub ids: Vec<u32>,
    /// Id of the last event: what to send to go on.
    pub last_event: Option<String>,
    /// Why it ended, as the last chunk says; `None` when it broke off.
    pub finish: Option<String>,
    /// What went wrong.
    pub error: Option<String>,
    /// From sending the request to the first token.
    pub first: Duration,
    /// Between the arrivals of tokens.
    pub gaps: Vec<Duration>,
}

/// A streamed completion under way.
#[derive(Debug)]
pub struct Streaming {
    n_tokens: Arc<AtomicUsize>,
    thread: JoinHandle<Streamed>,
}

// === impl Cluster ===

impl Cluster {
    /// Starts `n` nodes in `folder` and waits until all are ready.
    pub fn start(folder: &Path, spec: &NodeSpec, n: usize) -> Self {
        Self::start_with(folder, spec, &vec![""; n])
    }

    /// The same with further lines in the table of each node.
    pub fn start_with(folder: &Path, spec: &NodeSpec, lines: &[&str]) -> Self {
        let mut places = NodePlace::cluster(lines.len());
        places.iter_mut().zip(lines).for_each(|(place, lines)| place.lines = format!("{lines}\n"));
        write_config(folder, spec, &places);
        Self::launch(folder, places)
    }

    /// Starts `n` nodes, each in a network namespace of its own.
    pub fn start_in(namespaces: &Namespaces, folder: &Path, spec: &NodeSpec, n: usize) -> Self {
        let mut places = NodePlace::cluster(n);
        places.iter_mut().enumerate().for_each(|(n, place)| namespaces.place(n, place));
        write_config(folder, spec, &places);
        Self::launch(folder, places)
    }

    fn launch(folder: &Path, places: Vec<NodePlace>) -> Self {
        let_in(folder, &places);
        let mut nodes: Vec<NodeProcess> = places.into_iter().map(|place| NodeProcess::launch(folder, place)).collect();
        nodes.iter_mut().for_each(NodeProcess::wait_ready);
        Self { nodes, folder: folder.to_owned() }
    }

    /// Nodes whose cluster files differ, one for each of `specs`; the first one's is also everybody else's.
    pub fn start_unlike(folder: &Path, specs: &[NodeSpec]) -> Self {
        let places = NodePlace::cluster(specs.len());
        write_config(folder, &specs[0], &places);
        for (place, spec) in places.iter().zip(specs) {
            write_config_as(&folder.join(format!("cluster-{}.toml", place.name)), spec, &places);
        }
        let_in(folder, &places);
        let mut nodes: Vec<NodeProcess> = places.into_iter().map(|place| NodeProcess::launch(folder, place)).collect();
        nodes.iter_mut().for_each(NodeProcess::wait_ready);
        Self { nodes, folder: folder.to_owned() }
    }

    /// Starts `n` nodes with relays between them, whose packets can be cut off, lost and delayed.
    pub fn start_apart(folder: &Path, spec: &NodeSpec, n: usize) -> (Self, Network) {
        let places = NodePlace::cluster(n);
        let addresses: Vec<SocketAddr> =
            places.iter().map(|place| place.peer.expect("a node of a cluster has one")).collect();
        let network = Network::between(&addresses);
        write_config(folder, spec, &places);
        for (me, place) in places.iter().enumerate() {
            let mut seen = places.clone();
            for (other, place) in seen.iter_mut().enumerate().filter(|(other, _)| *other != me) {
                place.peer = Some(network.front(me, other));
            }
            write_config_as(&folder.join(format!("cluster-{}.toml", place.name)), spec, &seen);
        }
        (Self::launch(folder, places), network)
    }

    /// Where the cluster file is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A configuration of the client library that knows all nodes and begins at node `door`.
    pub fn library(&self, door: usize, key: &str) -> ClientConfig {
        let n = self.nodes.len();
        let address = |at: usize| {
            let place = self.nodes[at % n].place();
            let name = peer::pki::node_name(&place.name.parse().expect("a node's name"));
            NodeAddress { address: place.quic.expect("nodes of a cluster have one"), name }
        };
        let nodes = (door..door + n).map(address).collect();
        let root = self.folder.join(self.nodes[0].place().data()).join("ca.pem");
        let roots = vec![CertificateDer::from_pem_file(root).expect("the authority's certificate")];
        ClientConfig { nodes, key: key.to_owned(), roots }
    }

    /// What the log of every node says, for the message of a failing test.
    pub fn logs(&self) -> String {
        self.nodes.iter().map(|node| format!("--- node {}\n{}\n", node.name(), node.log())).collect()
    }
}

/// Lets every node in by an authority in `folder`.
fn let_in(folder: &Path, places: &[NodePlace]) {
    let now = SystemClock.wall();
    let authority = Authority::found(&folder.join("ca"), &[], now).expect("an authority");
    for place in places {
        let name = place.name.parse().expect("a node's name");
        authority.admit_here(&name, &folder.join(place.data()), now).expect("let in");
    }
}

// === impl Streaming ===

impl Streaming {
    /// Sends a completion with `"stream": true` to this node.
    pub fn start(node: &NodeProcess, key: &str, body: &Value) -> Self {
        Self::go_on(node, key, body, None)
    }

    /// Asks for the rest of a stream behind this event.
    pub fn go_on(node: &NodeProcess, key: &str, body: &Value, last_event: Option<String>) -> Self {
        Self::at(&node.url(), key, body, last_event)
    }

    /// The same at a node known by its URL only.
    pub fn at(url: &str, key: &str, body: &Value, last_event: Option<String>) -> Self {
        let (url, key, mut body) = (format!("{url}/v1/completions"), key.to_owned(), body.clone());
        body["stream"] = json!(true);
        body["return_token_ids"] = json!(true);
        let n_tokens = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&n_tokens);
        Self { n_tokens, thread: std::thread::spawn(move || stream(&url, &key, &body, last_event, &counter)) }
    }

    /// The same through the client library.
    pub fn by_library(config: ClientConfig, body: &Value) -> Self {
        let mut body = body.clone();
        body["return_token_ids"] = json!(true);
        let n_tokens = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&n_tokens);
        Self { n_tokens, thread: std::thread::spawn(move || stream_over_quic(config, &body, &counter)) }
    }

    /// Tokens that have arrived.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens.load(Ordering::Relaxed)
    }

    /// Whether it ended, well or not.
    pub fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the end.
    pub fn join(self) -> Streamed {
        self.thread.join().expect("a reader does not panic")
    }
}

fn stream_over_quic(config: ClientConfig, body: &Value, counter: &AtomicUsize) -> Streamed {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut streamed = Streamed::default();
        let (sent, mut last) = (SystemClock.now(), None);
        let client = Client::new(config).expect("a valid configuration");
        let mut stream = client.ask(Endpoint::Completions, body.to_string().into_bytes());
        loop {
            match stream.next().await {
                Ok(Some(Event::Piece(piece))) => {
                    let event = serde_json::from_slice(&piece.json).expect("an event is JSON");
                    streamed.take(&event, sent, &mut last);
                    counter.store(streamed.ids.len(), Ordering::Relaxed);
                }
                Ok(Some(Event::Extra(_))) => {}
                Ok(None) => return streamed,
                Err(error) => {
                    streamed.error = Some(error.to_string());
                    return streamed;
                }
            }
        }
    })
}

impl Streamed {
    /// Takes in one event.
    fn take(&mut self, event: &Value, sent: Instant, last: &mut Option<Instant>) {
        if !event["error"].is_null() {
            self.error = Some(event["error"].to_string());
        }
        let choice = &event["choices"][0];
        let ids = choice["token_ids"].as_array().into_iter().flatten();
        let before = self.ids.len();
        self.ids.extend(ids.map(|id| id.as_u64().expect("an id") as u32));
        if self.ids.len() > before {
            let now = SystemClock.now();
            match last.replace(now) {
                Some(last) => self.gaps.push(now - last),
                None => self.first = now - sent,
            }
        }
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.finish = Some(reason.to_owned());
        }
    }
}

fn stream(url: &str, key: &str, body: &Value, last_event: Option<String>, counter: &AtomicUsize) -> Streamed {
    let mut streamed = Streamed::default();
    let sent = SystemClock.now();
    let request = agent().post(url).header("authorization", format!("Bearer {key}"));
    let request = last_event.into_iter().fold(request, |request, id| request.header("last-event-id", id));
    let response = match request.header("content-type", "application/json").send(body.to_string()) {
        Ok(response) if response.status() == 200 => response,
        Ok(response) => {
            streamed.error = Some(crate::process::read(response).text);
            return streamed;
        }
        Err(error) => {
            streamed.error = Some(error.to_string());
            return streamed;
        }
    };
    let mut last = None;
    for line in BufReader::new(response.into_body().into_reader()).lines() {
        let line = match line {
            Ok(line) => line,
            Err(error) => {
                streamed.error = Some(error.to_string());
                break;
            }
        };
        if let Some(id) = line.strip_prefix("id: ") {
            streamed.last_event = Some(id.to_owned());
        }
        let Some(data) = line.strip_prefix("data: ").filter(|data| *data != "[DONE]") else { continue };
        let event: Value = serde_json::from_str(data).expect("an event is JSON");
        streamed.take(&event, sent, &mut last);
        counter.store(streamed.ids.len(), Ordering::Relaxed);
    }
    streamed
}
