//! Q2 and Q5: first packets from addresses that never go on, and streams that are opened and reset.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, ClientConfig, Endpoint, EndpointConfig, TransportConfig, UdpPoller};
use shared::clock::{Clock, SystemClock};
use tokio::time::{sleep, timeout};

use crate::door::{self, Teller, ask, dialling, dialling_as, greet, guest, papers, read_whole};
use crate::fixture::{Folder, join, loopback, node, serving};

const SOON: Duration = Duration::from_secs(5);

/// Packets of one address.
#[derive(Debug, Clone, Copy, Default)]
struct Traffic {
    bytes_in: u64,
    bytes_out: u64,
    n_retries: u64,
}

/// A socket that counts, by address.
struct Counting {
    inner: Arc<dyn AsyncUdpSocket>,
    traffic: Mutex<BTreeMap<SocketAddr, Traffic>>,
}

impl fmt::Debug for Counting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Counting(..)")
    }
}

impl AsyncUdpSocket for Counting {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)?;
        let mut traffic = self.traffic.lock().expect("no panic");
        let of = traffic.entry(transmit.destination).or_default();
        of.bytes_out += transmit.contents.len() as u64;
        // A long header of type Retry (RFC 9000, section 17.2.5).
        of.n_retries += u64::from(transmit.contents[0] & 0xf0 == 0xf0);
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let polled = self.inner.poll_recv(cx, bufs, meta);
        if let Poll::Ready(Ok(n)) = polled {
            let mut traffic = self.traffic.lock().expect("no panic");
            for meta in &meta[..n] {
                traffic.entry(meta.addr).or_default().bytes_in += meta.len as u64;
            }
        }
        polled
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

fn counted() -> (peer::EndpointParts, Arc<Counting>) {
    let parts = loopback();
    let counting = Arc::new(Counting { inner: parts.socket.clone(), traffic: Mutex::default() });
    (peer::EndpointParts { socket: counting.clone(), ..parts }, counting)
}

/// Whether an address is one of those that never go on.
fn is_stranger(address: &SocketAddr) -> bool {
    matches!(address, SocketAddr::V4(address) if address.ip().octets()[1] == 1)
}

/// Sends `n` first packets of handshakes that never go on, from many addresses, while `handshake` is done again and
/// again. Returns how long each of these took.
async fn flood<F: Future<Output = ()>>(
    n: usize,
    to: SocketAddr,
    config: ClientConfig,
    name: &str,
    handshake: impl Fn() -> F,
) -> Vec<Duration> {
    let name = name.to_owned();
    let flooding = std::thread::spawn(move || {
        let sockets: Vec<UdpSocket> =
            (0..250).map(|last| UdpSocket::bind((format!("127.1.0.{}", last + 1), 0)).expect("a free port")).collect();
        let mut strangers = quinn_proto::Endpoint::new(Arc::new(EndpointConfig::default()), None, false, None);
        // Twenty at a time, ten thousand in five seconds: more than the socket's buffer holds would be lost in it.
        for number in 0..n {
            if number % 20 == 0 {
                std::thread::sleep(Duration::from_millis(10));
            }
            let now: Instant = SystemClock.now();
            let (_, mut connection) = strangers.connect(now, config.clone(), to, &name).expect("valid");
            let mut packet = Vec::new();
            let _ = connection.poll_transmit(now, 1, &mut packet).expect("a first packet");
            let _ = sockets[number % sockets.len()].send_to(&packet, to);
        }
    });
    let mut took = Vec::new();
    while !flooding.is_finished() {
        let began = SystemClock.now();
        timeout(SOON, handshake()).await.expect("a real client gets in");
        took.push(SystemClock.now() - began);
        sleep(Duration::from_millis(10)).await;
    }
    flooding.join().expect("no panic");
    took.sort();
    took
}

/// What strangers sent and got; panics when an address got more than three times what it sent.
fn judge(what: &str, counting: &Counting, took: &[Duration]) {
    let traffic = counting.traffic.lock().expect("no panic").clone();
    let strangers: Vec<&Traffic> =
        traffic.iter().filter(|(address, _)| is_stranger(address)).map(|(_, of)| of).collect();
    let sum = |count: fn(&Traffic) -> u64| strangers.iter().map(|of| count(of)).sum::<u64>();
    let (bytes_in, bytes_out, n_retries) = (sum(|of| of.bytes_in), sum(|of| of.bytes_out), sum(|of| of.n_retries));
    let worst = strangers.iter().map(|of| of.bytes_out as f64 / of.bytes_in.max(1) as f64).fold(0.0, f64::max);
    let p99 = took[(took.len() * 99 / 100).min(took.len() - 1)];
    println!(
        "{what}: {bytes_in} bytes in, {bytes_out} out (worst address {worst:.2} times), {n_retries} retries, {} \
         handshakes meanwhile, p99 {} ms",
        took.len(),
        p99.as_millis()
    );
    assert!(worst <= 3.0, "{what}: an address got {worst:.2} times what it sent");
    assert!(n_retries > 1000, "{what}: {n_retries} were made to prove their address");
    assert!(p99 < Duration::from_millis(500), "{what}: a handshake took {p99:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn first_packets_that_go_nowhere_are_not_amplified_and_keep_no_client_out() {
    let folder = Folder::new();
    let papers = papers(&folder.0);
    let (parts, counting) = counted();
    let door = door::serving(&papers, parts, &Arc::new(Teller::default()));
    let (endpoint, address) = (guest(), door.local_addr().expect("bound"));
    let config = dialling(&papers, TransportConfig::default());
    let took = flood(10_000, address, config.clone(), door::NAME, || async {
        let connecting = endpoint.connect_with(config.clone(), address, door::NAME).expect("valid");
        let connection = connecting.await.expect("connected");
        assert!(greet(&connection).await);
        connection.close(0_u32.into(), b"");
    });
    judge("clients' port", &counting, &took.await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn first_packets_that_go_nowhere_keep_no_node_out() {
    let folder = Folder::new();
    let (a, b) = (join(&folder.0, "a"), join(&folder.0, "b"));
    let (parts, counting) = counted();
    let address = parts.socket.local_addr().expect("bound");
    let (_net, _) = serving(&a, &[("b", ([127, 0, 0, 1], 1).into())], parts);
    let strange = papers(&folder.0.join("strange"));
    let config = dialling_as(&strange, TransportConfig::default(), wire::Version::NEWEST.alpn());
    let name = peer::pki::node_name(&node("a"));
    let took = flood(10_000, address, config, &name, || async {
        let (net, _) = serving(&b, &[("a", address)], loopback());
        net.connected(&node("a")).await;
    });
    judge("nodes' port", &counting, &took.await);
}

/// CPU time of all threads of a name, in ticks of a hundredth of a second.
fn ticks(name: &str) -> u64 {
    let mut ticks = 0;
    for task in std::fs::read_dir("/proc/self/task").expect("Linux") {
        let stat = std::fs::read_to_string(task.expect("an entry").path().join("stat")).unwrap_or_default();
        let Some((head, rest)) = stat.split_once(") ") else { continue };
        if head.split_once('(').is_some_and(|(_, found)| found == name) {
            let fields: Vec<&str> = rest.split(' ').collect();
            ticks += fields[11].parse::<u64>().expect("utime") + fields[12].parse::<u64>().expect("stime");
        }
    }
    ticks
}

/// Opens a hundred thousand streams and resets each at once.
async fn reset_streams(endpoint: Endpoint, config: ClientConfig, address: SocketAddr, count: &AtomicUsize) {
    let connection = endpoint.connect_with(config, address, door::NAME).expect("valid").await.expect("connected");
    assert!(greet(&connection).await);
    while count.load(Ordering::Relaxed) < 100_000 {
        let (mut send, mut receive) = connection.open_bi().await.expect("it is slowed down, not cut");
        let _ = (send.reset(0_u32.into()), receive.stop(0_u32.into()));
        count.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_opens_and_resets_streams_is_slowed_down_and_no_other() {
    let folder = Folder::new();
    let papers = papers(&folder.0);
    let teller = Arc::new(Teller::default());
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(1).thread_name("q5-door").enable_all().build().expect("a runtime");
    let told = teller.clone();
    let door = runtime.spawn(async move { (door::serving(&papers, loopback(), &told), papers) });
    let (door, papers) = door.await.expect("a door");
    let address = door.local_addr().expect("bound");
    let (endpoint, config) = (guest(), dialling(&papers, TransportConfig::default()));
    let other = endpoint.connect_with(config.clone(), address, door::NAME).expect("valid").await.expect("connected");
    assert!(greet(&other).await);
    let (before, began) = (ticks("q5-door"), SystemClock.now());
    let count = AtomicUsize::new(0);
    let flooding = timeout(Duration::from_secs(4), reset_streams(endpoint.clone(), config, address, &count));
    let asking = async {
        let mut slowest = Duration::ZERO;
        for _ in 0..30 {
            let began = SystemClock.now();
            timeout(SOON, read_whole(ask(&other, 20).await, 20)).await.expect("served");
            slowest = slowest.max(SystemClock.now() - began);
            sleep(Duration::from_millis(100)).await;
        }
        slowest
    };
    let (flooded, slowest) = tokio::join!(flooding, asking);
    let n_streams = count.load(Ordering::Relaxed);
    let (took, used) = (SystemClock.now() - began, ticks("q5-door") - before);
    let share = used as f64 / 100.0 / took.as_secs_f64();
    println!(
        "{n_streams} streams, CPU {:.1} % of a core, slowest answer to another client {} ms",
        100.0 * share,
        slowest.as_millis()
    );
    assert!(flooded.is_err() && n_streams < 1000, "{n_streams} streams were taken within 4 s");
    assert!(share < 0.2, "{:.1} % of a core", 100.0 * share);
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    assert_eq!(teller.asked.load(Ordering::SeqCst), 30);
    runtime.shutdown_background();
}
