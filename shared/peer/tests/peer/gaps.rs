//! Q4: pieces of streams with holes between them, each alone in a packet as large as may be, on as many streams as a
//! client has. What waits for the rest must not keep the packets. The door is a process of its own, to weigh it.

use std::any::Any;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use quinn::TransportConfig;
use quinn_proto::congestion::{Controller, ControllerFactory};
use quinn_proto::{Connection, ConnectionHandle, DatagramEvent, Dir, EndpointConfig, Event, StreamId};
use shared::clock::{Clock, SystemClock};
use tokio::time::timeout;
use wire::client::Hello;

use crate::door::{self, Teller, ask, dialling, greet, guest, papers, question, read_whole};
use crate::fixture::{Folder, loopback};

const FOLDER: &str = "TENANTRY_TEST_DOOR_FOLDER";
const SOON: Duration = Duration::from_secs(5);

/// Streams of a client at once.
const STREAMS: usize = 32;

/// Pieces on each: just below what makes quinn close the connection.
const PIECES: usize = 1000;

/// Bytes of a packet.
const PACKET_BYTES: u16 = 1200;

/// Not a test: the other process. Does nothing when run as a test.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_other_process_keeps_the_door() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let door = door::serving(&papers(&PathBuf::from(folder)), loopback(), &Arc::new(Teller::default()));
    println!("\nat {}", door.local_addr().expect("bound"));
    std::future::pending::<()>().await;
}

struct Process(Child, SocketAddr);

impl Process {
    fn run(folder: &Folder) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "gaps::the_other_process_keeps_the_door", "--nocapture"])
            .env(FOLDER, &folder.0)
            .stdout(Stdio::piped())
            .spawn()
            .expect("a second process");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let address = lines.map(|line| line.expect("text")).find_map(|line| line.strip_prefix("at ")?.parse().ok());
        Self(child, address.expect("it comes up"))
    }

    /// Bytes that it has in memory.
    fn weight(&self) -> u64 {
        let statm = fs::read_to_string(format!("/proc/{}/statm", self.0.id())).expect("Linux");
        let pages: u64 = statm.split(' ').nth(1).expect("a second field").parse().expect("a number");
        pages * 4096
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends whatever there is, whatever the network makes of it.
#[derive(Clone)]
struct Reckless;

impl Controller for Reckless {
    fn on_congestion_event(&mut self, _: Instant, _: Instant, _: bool, _: u64) {}
    fn on_mtu_update(&mut self, _: u16) {}
    fn window(&self) -> u64 {
        1 << 40
    }
    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }
    fn initial_window(&self) -> u64 {
        1 << 40
    }
    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

impl ControllerFactory for Reckless {
    fn build(self: Arc<Self>, _: Instant, _: u16) -> Box<dyn Controller> {
        Box::new(Self)
    }
}

/// A client that decides packet by packet what is sent. Its clock is its own, so that nothing is paced or repeated.
struct Attacker {
    socket: UdpSocket,
    endpoint: quinn_proto::Endpoint,
    connection: Connection,
    handle: ConnectionHandle,
    to: SocketAddr,
    now: Instant,
}

impl Attacker {
    fn new(folder: &Folder, to: SocketAddr) -> Self {
        let mut transport = TransportConfig::default();
        transport
            .congestion_controller_factory(Arc::new(Reckless))
            .pad_to_mtu(true)
            .initial_mtu(PACKET_BYTES)
            .mtu_discovery_config(None)
            .packet_threshold(u32::MAX);
        let config = dialling(&papers(&folder.0), transport);
        let socket = UdpSocket::bind(("127.0.0.1", 0)).expect("a free port");
        socket.set_read_timeout(Some(Duration::from_millis(20))).expect("set");
        let mut endpoint = quinn_proto::Endpoint::new(Arc::new(EndpointConfig::default()), None, false, None);
        let now = SystemClock.now();
        let (handle, connection) = endpoint.connect(now, config, to, door::NAME).expect("valid");
        Self { socket, endpoint, connection, handle, to, now }
    }

    /// The next packet, if there is one.
    fn packet(&mut self) -> Option<Vec<u8>> {
        self.now += Duration::from_micros(10);
        let mut packet = Vec::new();
        self.connection.poll_transmit(self.now, 1, &mut packet).map(|_| packet)
    }

    /// Sends what is to be sent and takes in what came, until `is` says so.
    fn until<T>(&mut self, what: &str, mut is: impl FnMut(&mut Connection) -> Option<T>) -> T {
        let mut buffer = [0; 2048];
        for _ in 0..200 {
            while let Some(packet) = self.packet() {
                self.socket.send_to(&packet, self.to).expect("sent");
            }
            if let Ok((n_bytes, from)) = self.socket.recv_from(&mut buffer) {
                self.now += Duration::from_micros(10);
                let data = BytesMut::from(&buffer[..n_bytes]);
                let event = self.endpoint.handle(self.now, from, None, None, data, &mut Vec::new());
                if let Some(DatagramEvent::ConnectionEvent(_, event)) = event {
                    self.connection.handle_event(event);
                }
            }
            while let Some(event) = self.connection.poll_endpoint_events() {
                if let Some(event) = self.endpoint.handle_event(self.handle, event) {
                    self.connection.handle_event(event);
                }
            }
            if let Some(found) = is(&mut self.connection) {
                return found;
            }
        }
        panic!("{what} did not come true");
    }

    /// Gets in with a good key and opens every stream that it may have.
    fn enter(&mut self) -> Vec<StreamId> {
        self.until("connected", |connection| {
            std::iter::from_fn(|| connection.poll()).find(|event| matches!(event, Event::Connected))
        });
        let first = self.connection.streams().open(Dir::Bi).expect("one stream");
        let mut send = self.connection.send_stream(first);
        send.write(&Hello { key: door::KEY.into() }.encode()).expect("written");
        send.finish().expect("finished");
        let mut streams = Vec::new();
        self.until("every stream", |connection| {
            streams.extend(std::iter::from_fn(|| connection.streams().open(Dir::Bi)));
            (streams.len() >= STREAMS - 1).then_some(())
        });
        streams
    }

    /// A byte in a packet of its own.
    fn byte(&mut self, stream: StreamId, byte: u8) -> Vec<u8> {
        let n_bytes = self.connection.send_stream(stream).write(&[byte]).expect("written");
        assert_eq!(n_bytes, 1);
        self.packet().expect("a packet")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pieces_with_holes_between_them_hold_less_than_8_mib() {
    let folder = Folder::new();
    let papers = papers(&folder.0);
    let process = Process::run(&folder);
    // A connection of the usual kind is there before, so that what any connection takes is not counted.
    let (endpoint, config) = (guest(), dialling(&papers, TransportConfig::default()));
    let connection = endpoint.connect_with(config, process.1, door::NAME).expect("valid").await.expect("connected");
    assert!(greet(&connection).await);
    timeout(SOON, read_whole(ask(&connection, 20).await, 20)).await.expect("served");

    let mut attacker = Attacker::new(&folder, process.1);
    let streams = attacker.enter();
    let before = process.weight();
    // A question's own bytes, so that no stream is given up for nonsense.
    let question = question(1);
    let (mut most, mut n_sent, mut bytes_sent) = (0, 0_usize, 0);
    for piece in 0..PIECES {
        for stream in &streams {
            let byte = |at: usize| question[at % question.len()];
            // Lost: it is made and not sent.
            let _ = attacker.byte(*stream, byte(2 * piece));
            let packet = attacker.byte(*stream, byte(2 * piece + 1));
            bytes_sent += attacker.socket.send_to(&packet, attacker.to).expect("sent");
            n_sent += 1;
            if n_sent.is_multiple_of(20) {
                std::thread::sleep(Duration::from_micros(500));
            }
            if n_sent.is_multiple_of(1000) {
                most = process.weight().max(most);
            }
        }
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    most = process.weight().max(most);
    let more = most.saturating_sub(before);
    println!("{n_sent} pieces in {bytes_sent} bytes on {} streams: {} KiB more in memory", streams.len(), more >> 10);
    assert!(bytes_sent > 30 << 20, "packets are full: {bytes_sent} bytes");
    assert!(more <= 8 << 20, "{more} bytes");
    timeout(SOON, read_whole(ask(&connection, 20).await, 20)).await.expect("others are served");
}
