//! Q3: clients that take their answers slowly or not at all, in simulated time.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use peer::EndpointParts;
use quinn::{IdleTimeout, TransportConfig, VarInt};
use simnet::SimSocket;
use tokio::time::sleep;

use crate::door::{self, Teller, ask, dialling, greet, guest_on, papers};
use crate::fixture::Folder;

const PORT: u16 = 8080;

async fn parts(port: u16, seed: u8) -> EndpointParts {
    let socket = SimSocket::bind(port).await.expect("the port is free");
    EndpointParts { socket, runtime: Arc::new(quinn::TokioRuntime), rng_seed: Some([seed; 32]) }
}

/// A guest that grants `window` bytes and takes `n_bytes` a second of an endless answer, for a minute. Returns after how
/// long it was cut, if it was, and the most bytes that the network held for it at the node or on the way.
fn minute(window: u32, n_bytes: usize) -> (Option<Duration>, u64) {
    let folder = Folder::new();
    let papers = Rc::new(papers(&folder.0));
    let teller = Arc::new(Teller::default());
    let mut sim = turmoil::Builder::new()
        .rng_seed(1)
        .simulation_duration(Duration::from_secs(90))
        .tick_duration(Duration::from_millis(5))
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(5))
        .udp_capacity(100_000)
        .build();
    let (host_papers, host_teller) = (papers.clone(), teller.clone());
    sim.host("node", move || {
        let (papers, teller) = (host_papers.clone(), host_teller.clone());
        async move {
            let _door = door::serving(&papers, parts(PORT, 1).await, &teller);
            std::future::pending::<()>().await;
            Ok(())
        }
    });
    let held = Rc::new(RefCell::new(0));
    let (most, counter) = (held.clone(), teller.clone());
    sim.client("guest", async move {
        let endpoint = guest_on(parts(9000, 2).await);
        let mut transport = TransportConfig::default();
        transport
            .stream_receive_window(VarInt::from_u32(window))
            .keep_alive_interval(Some(Duration::from_secs(5)))
            .max_idle_timeout(Some(IdleTimeout::try_from(Duration::from_secs(30)).expect("valid")));
        let address = (turmoil::lookup("node"), PORT).into();
        let connecting = endpoint.connect_with(dialling(&papers, transport), address, door::NAME);
        let connection = connecting.expect("valid").await.expect("connected");
        assert!(greet(&connection).await);
        let mut receive = ask(&connection, u32::MAX).await;
        let mut n_taken = 0_u64;
        for _ in 0..60 {
            sleep(Duration::from_secs(1)).await;
            let mut buffer = vec![0; n_bytes];
            if n_bytes > 0 && receive.read_exact(&mut buffer).await.is_err() {
                break;
            }
            n_taken += n_bytes as u64;
            let held = counter.taken.load(Ordering::SeqCst).saturating_sub(n_taken);
            let mut most = most.borrow_mut();
            *most = held.max(*most);
        }
        Ok(())
    });
    sim.run().expect("no host fails");
    let cut = teller.cut.lock().expect("no panic").first().copied();
    let held = *held.borrow();
    (cut, held)
}

#[test]
fn a_client_that_takes_too_little_is_cut_and_holds_next_to_nothing() {
    for (window, n_bytes, from_s, to_s) in
        [(1000, 0, 10, 11), (1 << 20, 0, 10, 11), (200, 8, 10, 16), (200, 32, 15, 30)]
    {
        let (cut, held) = minute(window, n_bytes);
        println!("window {window}, {n_bytes} bytes/s: cut after {cut:?}, {held} bytes held");
        let cut = cut.unwrap_or_else(|| panic!("window {window}, {n_bytes} bytes/s: not cut")).as_secs();
        assert!((from_s..=to_s).contains(&cut), "window {window}, {n_bytes} bytes/s: cut after {cut} s");
        assert!(held <= 1 << 20, "{held} bytes held");
    }
}

#[test]
fn a_client_that_keeps_up_with_64_bytes_a_second_is_served_for_as_long_as_it_likes() {
    let (cut, held) = minute(400, 200);
    assert!(cut.is_none(), "cut after {cut:?}");
    assert!(held <= 1 << 20, "{held} bytes held");
}
