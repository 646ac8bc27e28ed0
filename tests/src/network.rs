//! A bad network between the nodes of a cluster: every node reaches every other through a UDP relay of its own, which
//! can be cut, lose packets and delay them. In user space, so it needs no rights; on loopback only.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use shared::clock::{Clock, SystemClock};

/// Largest UDP packet.
const PACKET_BYTES: usize = 65_536;
/// A relay looks this often whether it is to end.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What the packets of one pair of nodes meet.
#[derive(Debug, Default)]
struct Weather {
    /// From the node with the smaller number to the other, and back.
    is_cut: [AtomicBool; 2],
    /// Of a million packets so many are lost.
    lost_ppm: AtomicU32,
    delay_us: AtomicU32,
    n_packets: AtomicU64,
    /// The relays end.
    is_over: AtomicBool,
}

/// The relays between nodes `0..n`.
#[derive(Debug)]
pub struct Network {
    /// By the smaller and the larger number of a pair.
    weather: HashMap<(usize, usize), Arc<Weather>>,
    /// Where node `.0` finds node `.1`.
    fronts: HashMap<(usize, usize), SocketAddr>,
}

// === impl Network ===

impl Network {
    /// Relays between nodes that listen at these addresses.
    ///
    /// # Panics
    /// When loopback has no more ports.
    pub fn between(nodes: &[SocketAddr]) -> Self {
        let (mut weather, mut fronts) = (HashMap::new(), HashMap::new());
        for from in 0..nodes.len() {
            for to in (0..nodes.len()).filter(|to| *to != from) {
                let weather: &Arc<Weather> = weather.entry(pair(from, to)).or_default();
                let front = relay(nodes[to], weather, [way(from, to), way(to, from)]).expect("loopback has ports");
                fronts.insert((from, to), front);
            }
        }
        Self { weather, fronts }
    }

    /// Where node `from` finds node `to`.
    pub fn front(&self, from: usize, to: usize) -> SocketAddr {
        self.fronts[&(from, to)]
    }

    /// No packet passes between two nodes, or all do again.
    pub fn cut(&self, one: usize, other: usize, is_cut: bool) {
        self.cut_one_way(one, other, is_cut);
        self.cut_one_way(other, one, is_cut);
    }

    /// No packet of node `from` reaches node `to`, or all do again. What comes the other way is not touched.
    pub fn cut_one_way(&self, from: usize, to: usize, is_cut: bool) {
        self.weather[&pair(from, to)].is_cut[way(from, to)].store(is_cut, Ordering::Relaxed);
    }

    /// Between all nodes, this share of the packets is lost and the rest comes late.
    pub fn make_bad(&self, lost: f64, delay: Duration) {
        for weather in self.weather.values() {
            weather.lost_ppm.store((lost * 1e6) as u32, Ordering::Relaxed);
            weather.delay_us.store(u32::try_from(delay.as_micros()).unwrap_or(u32::MAX), Ordering::Relaxed);
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.weather.values().for_each(|weather| weather.is_over.store(true, Ordering::Relaxed));
    }
}

fn pair(one: usize, other: usize) -> (usize, usize) {
    (one.min(other), one.max(other))
}

/// Which of a pair's two ways this is.
fn way(from: usize, to: usize) -> usize {
    usize::from(from > to)
}

impl Weather {
    /// When a packet may go on its way; `None` is never. Which ones are lost is a function of how many there were.
    fn passes(&self, way: usize) -> Option<Instant> {
        let n = self.n_packets.fetch_add(1, Ordering::Relaxed);
        let dice = blake3::hash(&n.to_le_bytes());
        let dice = u32::from_le_bytes(*dice.as_bytes().first_chunk().expect("32 bytes")) % 1_000_000;
        let is_lost = self.is_cut[way].load(Ordering::Relaxed) || dice < self.lost_ppm.load(Ordering::Relaxed);
        let delay = Duration::from_micros(u64::from(self.delay_us.load(Ordering::Relaxed)));
        (!is_lost).then(|| SystemClock.now() + delay)
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }
}

/// A relay to `target`: what comes to its front goes on from a socket per sender, and answers go back.
fn relay(target: SocketAddr, weather: &Arc<Weather>, [there, back]: [usize; 2]) -> io::Result<SocketAddr> {
    let front = Arc::new(socket()?);
    let address = front.local_addr()?;
    let weather = Arc::clone(weather);
    std::thread::spawn(move || {
        let mut backs: HashMap<SocketAddr, mpsc::Sender<(Instant, Vec<u8>)>> = HashMap::new();
        let mut buffer = vec![0; PACKET_BYTES];
        while !weather.is_over() {
            let Ok((n_bytes, sender)) = front.recv_from(&mut buffer) else { continue };
            let Some(due) = weather.passes(there) else { continue };
            let onward = backs.entry(sender).or_insert_with(|| {
                let socket = Arc::new(socket().expect("loopback has ports"));
                let (onward, front) = (deliver(Arc::clone(&socket), target), Arc::clone(&front));
                let weather = Arc::clone(&weather);
                std::thread::spawn(move || return_answers(&socket, deliver(front, sender), &weather, back));
                onward
            });
            let _ = onward.send((due, buffer[..n_bytes].to_vec()));
        }
    });
    Ok(address)
}

fn socket() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.set_read_timeout(Some(LOOK_EVERY))?;
    Ok(socket)
}

fn return_answers(socket: &UdpSocket, home: mpsc::Sender<(Instant, Vec<u8>)>, weather: &Weather, way: usize) {
    let mut buffer = vec![0; PACKET_BYTES];
    while !weather.is_over() {
        let Ok((n_bytes, _)) = socket.recv_from(&mut buffer) else { continue };
        if let Some(due) = weather.passes(way) {
            let _ = home.send((due, buffer[..n_bytes].to_vec()));
        }
    }
}

/// Sends packets when they are due, in order.
fn deliver(by: Arc<UdpSocket>, to: SocketAddr) -> mpsc::Sender<(Instant, Vec<u8>)> {
    let (sender, receiver) = mpsc::channel::<(Instant, Vec<u8>)>();
    std::thread::spawn(move || {
        for (due, packet) in receiver {
            std::thread::sleep(due.saturating_duration_since(SystemClock.now()));
            let _ = by.send_to(&packet, to);
        }
    });
    sender
}
