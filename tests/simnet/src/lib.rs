//! A UDP socket of turmoil's simulated network, as quinn wants one: so that QUIC runs in simulations.
//!
//! Used by tests of `peer` and by the cluster simulator. Goes with `quinn::TokioRuntime`, whose timers and clock are
//! tokio's and therefore the simulation's. No segmentation, no congestion marks, no path discovery: one call, one
//! datagram.

#![forbid(unsafe_code)]

use std::fmt;
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use turmoil::net::UdpSocket;

type Readable = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// What becomes of packets that a socket sends, beyond what turmoil does to its links: drawn from a seed.
#[derive(Debug, Clone, Copy)]
pub struct Weather {
    /// Share of packets that are lost.
    pub loss: f64,
    /// Share of packets that arrive twice.
    pub duplicates: f64,
    /// Where the dice start; every socket its own.
    pub seed: u64,
}

// === impl Weather ===

impl Weather {
    /// Every packet arrives once.
    pub const CLEAR: Self = Self { loss: 0.0, duplicates: 0.0, seed: 0 };

    /// How often the next packet is sent.
    fn copies(&mut self) -> u32 {
        if self.roll() < self.loss { 0 } else { 1 + u32::from(self.roll() < self.duplicates) }
    }

    /// A number from 0 to 1 (splitmix64).
    fn roll(&mut self) -> f64 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.seed ^ (self.seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// A simulated socket.
pub struct SimSocket {
    socket: Arc<UdpSocket>,
    address: SocketAddr,
    weather: Mutex<Weather>,
    /// Waits for the next datagram on behalf of the endpoint's driver.
    readable: Mutex<Option<Readable>>,
}

// === impl SimSocket ===

impl SimSocket {
    /// Binds to a port of the simulated host this is called on.
    ///
    /// # Errors
    /// When the port is taken.
    pub async fn bind(port: u16) -> io::Result<Arc<Self>> {
        Self::bind_in(port, Weather::CLEAR).await
    }

    /// As [`Self::bind`], where packets get lost or doubled.
    ///
    /// # Errors
    /// When the port is taken.
    pub async fn bind_in(port: u16, weather: Weather) -> io::Result<Arc<Self>> {
        let socket = Arc::new(UdpSocket::bind(("0.0.0.0", port)).await?);
        let address = socket.local_addr()?;
        Ok(Arc::new(Self { socket, address, weather: Mutex::new(weather), readable: Mutex::new(None) }))
    }
}

impl fmt::Debug for SimSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimSocket({})", self.address)
    }
}

impl AsyncUdpSocket for SimSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let copies = self.weather.lock().expect("no holder panics").copies();
        for _ in 0..copies {
            match self.socket.try_send_to(transmit.contents, transmit.destination) {
                // To a host that is down: on a real network nobody would say so.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                sent => drop(sent?),
            }
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut waiting = self.readable.lock().expect("no holder panics");
        loop {
            match self.socket.try_recv_from(&mut bufs[0]) {
                Ok((n_bytes, from)) => {
                    meta[0] = RecvMeta { addr: from, len: n_bytes, stride: n_bytes, ecn: None, dst_ip: None };
                    return Poll::Ready(Ok(1));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
            let readable = waiting.get_or_insert_with(|| {
                let socket = self.socket.clone();
                Box::pin(async move { socket.readable().await })
            });
            match readable.as_mut().poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(ready) => {
                    *waiting = None;
                    ready?;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
