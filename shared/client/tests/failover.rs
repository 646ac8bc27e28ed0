//! Two nodes behind the real door, one of which vanishes without a word: the answer arrives whole, once, in order.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use client::{Client, ClientConfig, ClientError, Endpoint, Event, NodeAddress};
use peer::clients::{self, AnswerSink, ClientBounds, ClientService, Failure};
use peer::pki::NodeKey;
use peer::{Ca, EndpointParts};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use shared::clock::{Clock, SystemClock};
use tokio::runtime::Runtime;
use wire::client::{Answer, Ask, Have, Piece};

const KEY: &str = "tk_test";
const NAME: &str = "nodes.example";
const N_TOKENS: u32 = 60;

/// What the nodes of a cluster share: which requests there are.
#[derive(Default)]
struct Cluster {
    requests: Mutex<BTreeMap<u128, u128>>,
    n_started: AtomicUsize,
    n_resumed: AtomicUsize,
}

struct Node {
    cluster: Arc<Cluster>,
    pause: Duration,
}

fn failure(status: u16, json: &str) -> Failure {
    Failure { status, retry_after_ms: 0, json: json.into() }
}

/// Choice `choice` has 60 tokens, two in each piece but the first; it opens, and ends, with pieces of their own.
fn pieces(choice: u32, have: Have) -> Vec<Piece> {
    let piece = |first, n_tokens, opens, ends| {
        let json = format!("{{\"choice\":{choice},\"from\":{first},\"tokens\":{n_tokens}}}").into_bytes();
        Piece { choice, first, n_tokens, opens, ends, json }
    };
    let mut all = Vec::new();
    if !have.opened {
        all.push(piece(have.next, 0, true, false));
    }
    let mut at = have.next;
    while at < N_TOKENS {
        let n_tokens = if at == 0 { 1 } else { 2.min(N_TOKENS - at) };
        all.push(piece(at, n_tokens, false, false));
        at += n_tokens;
    }
    if !have.ended {
        all.push(piece(N_TOKENS, 0, false, true));
    }
    all
}

impl ClientService for Node {
    type Tenant = String;

    fn authenticate(&self, key: &str) -> Result<String, Failure> {
        if key == KEY { Ok("acme".into()) } else { Err(failure(401, "{\"error\":\"invalid_api_key\"}")) }
    }

    async fn ask(&self, tenant: Arc<String>, _: SocketAddr, ask: Ask, mut answers: AnswerSink) {
        assert_eq!(*tenant, "acme");
        let (request, have) = match ask {
            Ask::New { body, .. } if body == b"refuse" => {
                let _ = answers.send(&[failure(400, "{\"error\":\"invalid_body\"}").into()]).await;
                return answers.finish();
            }
            Ask::New { idempotency_key, .. } => {
                self.cluster.n_started.fetch_add(1, Ordering::SeqCst);
                let mut requests = self.cluster.requests.lock().expect("no panic");
                let next = requests.len() as u128;
                (*requests.entry(idempotency_key).or_insert(next), vec![Have::default(); 2])
            }
            Ask::Resume { request, token, have } => {
                assert_eq!(token, request.to_le_bytes(), "what was given out");
                self.cluster.n_resumed.fetch_add(1, Ordering::SeqCst);
                let mut have = have;
                have.resize(2, Have::default());
                (request, have)
            }
        };
        let accepted = Answer::Accepted { request, token: request.to_le_bytes().to_vec() };
        let mut gone = answers.send(&[accepted]).await.is_err();
        let (mut first, mut second) = (pieces(0, have[0]).into_iter(), pieces(1, have[1]).into_iter());
        loop {
            let both: Vec<Answer> = first.next().into_iter().chain(second.next()).map(Answer::Piece).collect();
            if both.is_empty() || gone {
                break;
            }
            tokio::time::sleep(self.pause).await;
            gone = answers.send(&both).await.is_err();
        }
        let usage = Answer::Extra { json: b"{\"usage\":1}".to_vec() };
        if !gone && answers.send(&[usage, Answer::Done]).await.is_ok() {
            answers.finish();
        }
    }

    async fn http3(&self, connection: quinn::Connection) {
        connection.close(0_u32.into(), b"not here");
    }
}

/// A node in a runtime of its own, so that it can vanish.
struct Process(Option<Runtime>);

impl Process {
    fn vanish(&mut self) {
        self.0.take().expect("it runs").shutdown_background();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

struct Scene {
    folder: PathBuf,
    cluster: Arc<Cluster>,
    nodes: Vec<(Process, SocketAddr)>,
    config: ClientConfig,
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn scene(pause: Duration) -> Scene {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let folder = std::env::temp_dir().join(format!("tenantry-client-{}-{number}", std::process::id()));
    let now = SystemClock.wall();
    let ca = Ca::load_or_create(&folder.join("ca"), now).expect("an authority");
    let public = NodeKey::load_or_create(&folder).expect("a key").public();
    let certificate = ca.certify(NAME, &public, now, Duration::from_secs(600)).expect("certified");
    let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).expect("PEM");
    let key = std::fs::read(folder.join("peer.key")).expect("stored");
    let cluster = Arc::new(Cluster::default());
    let nodes: Vec<(Process, SocketAddr)> = ["a", "b"]
        .into_iter()
        .map(|name| {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
            let runtime = runtime.expect("a runtime");
            let service = Arc::new(Node { cluster: cluster.clone(), pause });
            let key = PrivateKeyDer::from_pem_slice(&key).expect("PEM");
            let chain = vec![certificate.clone()];
            let (tell, told) = std::sync::mpsc::channel();
            runtime.spawn(async move {
                let parts = EndpointParts::bind(([127, 0, 0, 1], 0).into()).expect("a free port");
                let endpoint = clients::open(chain, key, parts).expect("a door");
                tell.send(endpoint.local_addr().expect("bound")).expect("it is waited for");
                let bounds = ClientBounds { connections: 16, bodies: 4 };
                clients::serve(endpoint, name.parse().expect("a name"), service, bounds).await;
            });
            let address = told.recv().expect("it comes up");
            (Process(Some(runtime)), address)
        })
        .collect();
    let addresses = nodes.iter().map(|(_, address)| NodeAddress { address: *address, name: NAME.into() });
    let roots = vec![CertificateDer::from_pem_slice(ca.pem().as_bytes()).expect("PEM")];
    let config = ClientConfig { nodes: addresses.collect(), key: KEY.into(), roots };
    Scene { folder, cluster, nodes, config }
}

/// Reads an answer to its end and checks that it is whole. `at` is called with the number of pieces so far.
async fn read(stream: &mut client::Stream, mut at: impl FnMut(usize)) -> usize {
    let mut next = [0_u32; 2];
    let (mut opened, mut ended, mut n_extras, mut n_pieces) = (0, 0, 0, 0);
    while let Some(event) = stream.next().await.expect("answered") {
        match event {
            Event::Piece(piece) => {
                n_pieces += 1;
                let next = &mut next[piece.choice as usize];
                assert_eq!(piece.first, *next, "no token is lost or repeated");
                *next += piece.n_tokens;
                opened += usize::from(piece.opens);
                ended += usize::from(piece.ends);
            }
            Event::Extra(_) => n_extras += 1,
        }
        at(n_pieces);
    }
    assert_eq!((next, opened, ended, n_extras), ([N_TOKENS; 2], 2, 2, 1));
    n_pieces
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_arrives_whole() {
    let scene = scene(Duration::ZERO);
    let client = Client::new(scene.config.clone()).expect("a client");
    let mut stream = client.ask(Endpoint::Chat, b"{}".to_vec());
    let n_pieces = read(&mut stream, |_| {}).await;
    // One that opens, one that ends, one of one token, and pairs.
    assert_eq!((n_pieces, stream.n_resumed()), (2 * (1 + 1 + 30 + 1), 0));
    assert_eq!(scene.cluster.n_resumed.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_go_on_at_another_node_when_theirs_vanishes() {
    let mut scene = scene(Duration::from_millis(20));
    let client = Client::new(scene.config.clone()).expect("a client");
    let streams: Vec<_> = (0..8)
        .map(|_| {
            let mut stream = client.ask(Endpoint::Completions, b"{}".to_vec());
            tokio::spawn(async move {
                let (mut last, mut gap) = (SystemClock.now(), Duration::ZERO);
                read(&mut stream, |_| {
                    let now = SystemClock.now();
                    gap = gap.max(now - last);
                    last = now;
                })
                .await;
                (stream.n_resumed(), gap)
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(200)).await;
    scene.nodes[0].0.vanish();
    let mut longest = Duration::ZERO;
    for stream in streams {
        let (n_resumed, gap) = stream.await.expect("whole");
        assert_eq!(n_resumed, 1, "each met the end of its node");
        longest = longest.max(gap);
    }
    println!("longest gap {} ms", longest.as_millis());
    assert!(longest < Duration::from_secs(3), "{longest:?}");
    assert_eq!(scene.cluster.n_started.load(Ordering::SeqCst), 8, "resumed, not started anew");
    assert_eq!(scene.cluster.n_resumed.load(Ordering::SeqCst), 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_away_from_the_start_is_passed_over() {
    let mut scene = scene(Duration::ZERO);
    scene.nodes[0].0.vanish();
    let client = Client::new(scene.config.clone()).expect("a client");
    read(&mut client.ask(Endpoint::Chat, b"{}".to_vec()), |_| {}).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_are_told_and_not_tried_elsewhere() {
    let scene = scene(Duration::ZERO);
    let client = Client::new(scene.config.clone()).expect("a client");
    let mut stream = client.ask(Endpoint::Chat, b"refuse".to_vec());
    let refused = stream.next().await.expect_err("refused");
    assert!(matches!(&refused, ClientError::Refused { status: 400, json, .. } if json.starts_with(b"{\"error\"")));
    assert!(stream.next().await.expect("nothing follows").is_none());
    let wrong = ClientConfig { key: "tk_wrong".into(), ..scene.config.clone() };
    let client = Client::new(wrong).expect("a client");
    let refused = client.ask(Endpoint::Chat, b"{}".to_vec()).next().await.expect_err("no such key");
    assert!(matches!(refused, ClientError::Refused { status: 401, .. }), "{refused}");
    let nobody = ClientConfig { nodes: Vec::new(), ..scene.config.clone() };
    assert!(matches!(Client::new(nobody), Err(ClientError::Config(_))));
}
