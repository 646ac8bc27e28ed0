//! Q1: early data is refused, and what somebody recorded on the way does nothing when it is sent again.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quinn::TransportConfig;
use tokio::time::{sleep, timeout};
use wire::node::{Request, Response};

use crate::door::{self, Teller, ask, dialling, greet, guest, papers, read_whole};
use crate::fixture::{Folder, join, loopback, node, serving};

const SOON: Duration = Duration::from_secs(5);

/// Somebody on the way between a client and `to`, who passes packets on and keeps a copy of what the client sends.
struct Recorder {
    address: SocketAddr,
    to: SocketAddr,
    out: Arc<UdpSocket>,
    recorded: Arc<Mutex<Vec<Vec<u8>>>>,
    stop: Arc<AtomicBool>,
}

impl Recorder {
    fn before(to: SocketAddr) -> Self {
        let bind = || {
            let socket = UdpSocket::bind(("127.0.0.1", 0)).expect("a free port");
            socket.set_read_timeout(Some(Duration::from_millis(50))).expect("set");
            Arc::new(socket)
        };
        let (inside, out) = (bind(), bind());
        let recorder = Self {
            address: inside.local_addr().expect("bound"),
            to,
            out: out.clone(),
            recorded: Arc::default(),
            stop: Arc::default(),
        };
        let client: Arc<Mutex<Option<SocketAddr>>> = Arc::default();
        let (recorded, stop) = (recorder.recorded.clone(), recorder.stop.clone());
        let (from, towards) = (inside.clone(), out.clone());
        let seen = client.clone();
        std::thread::spawn(move || {
            let mut packet = [0; 65536];
            while !stop.load(Ordering::SeqCst) {
                let Ok((n_bytes, address)) = from.recv_from(&mut packet) else { continue };
                *seen.lock().expect("no panic") = Some(address);
                recorded.lock().expect("no panic").push(packet[..n_bytes].to_vec());
                let _ = towards.send_to(&packet[..n_bytes], to);
            }
        });
        let stop = recorder.stop.clone();
        std::thread::spawn(move || {
            let mut packet = [0; 65536];
            while !stop.load(Ordering::SeqCst) {
                let Ok((n_bytes, _)) = out.recv_from(&mut packet) else { continue };
                if let Some(client) = *client.lock().expect("no panic") {
                    let _ = inside.send_to(&packet[..n_bytes], client);
                }
            }
        });
        recorder
    }

    /// Sends all that was recorded again, from the same address and from another one. Returns how many packets.
    async fn replay(&self) -> usize {
        let recorded = self.recorded.lock().expect("no panic").clone();
        let other = UdpSocket::bind(("127.0.0.1", 0)).expect("a free port");
        for socket in [&*self.out, &other] {
            for packet in &recorded {
                socket.send_to(packet, self.to).expect("sent");
                sleep(Duration::from_millis(1)).await;
            }
        }
        2 * recorded.len()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn early_data_is_refused_and_recorded_questions_are_not_asked_again() {
    let folder = Folder::new();
    let papers = papers(&folder.0);
    let teller = Arc::new(Teller::default());
    let door = door::serving(&papers, loopback(), &teller);
    let recorder = Recorder::before(door.local_addr().expect("bound"));
    let endpoint = guest();
    // One configuration: it keeps the tickets of the first connection for the second.
    let config = dialling(&papers, TransportConfig::default());
    for round in 1..=2 {
        let connecting = endpoint.connect_with(config.clone(), recorder.address, door::NAME).expect("valid");
        let connecting = match connecting.into_0rtt() {
            Ok(_) => panic!("round {round}: early data was offered"),
            Err(connecting) => connecting,
        };
        let connection = timeout(SOON, connecting).await.expect("in time").expect("connected");
        assert!(greet(&connection).await);
        read_whole(ask(&connection, 3).await, 3).await;
        assert_eq!(teller.asked.load(Ordering::SeqCst), round);
        // While the connection lives and after it.
        assert!(recorder.replay().await > 10);
        connection.close(0_u32.into(), b"");
        sleep(Duration::from_millis(200)).await;
        assert!(recorder.replay().await > 10);
        sleep(Duration::from_millis(300)).await;
        assert_eq!(teller.asked.load(Ordering::SeqCst), round, "a recorded question was asked again");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recorded_calls_between_nodes_are_not_made_again() {
    let folder = Folder::new();
    let (a, b) = (join(&folder.0, "a"), join(&folder.0, "b"));
    let nowhere: SocketAddr = ([127, 0, 0, 1], 1).into();
    let parts = loopback();
    let recorder = Recorder::before(parts.socket.local_addr().expect("bound"));
    let (_net_a, echo) = serving(&a, &[("b", nowhere)], parts);
    let (net_b, _) = serving(&b, &[("a", recorder.address)], loopback());
    timeout(SOON, net_b.connected(&node("a"))).await.expect("connected");
    let work = crate::fixture::start(&shared::clock::SystemClock, 3, 1, shared::request::Emitted::default());
    let mut exchange = net_b.start(&node("a"), &work, SOON).await.expect("taken on");
    while exchange.recv().await.expect("alive").is_some() {}
    let answer = net_b.call(&node("a"), &Request::DrainNotice { epoch: 1 }, SOON).await;
    assert!(matches!(answer, Ok(Response::Done)));
    assert!(recorder.replay().await > 10);
    net_b.close().await;
    sleep(Duration::from_millis(200)).await;
    assert!(recorder.replay().await > 10);
    sleep(Duration::from_millis(300)).await;
    assert_eq!(echo.started.load(Ordering::SeqCst), 1, "recorded work was started again");
    assert_eq!(echo.hellos.load(Ordering::SeqCst), 1, "a recorded hello was heard again");
}
