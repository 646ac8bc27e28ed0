//! `kill -9` of a peer, in a process of its own: noticed without a word, and at once when it is back.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use peer::{EndpointParts, Identity};
use shared::clock::{Clock, SystemClock};
use shared::request::Emitted;
use tokio::time::timeout;

use crate::fixture::{Folder, join, loopback, node, serving, start};

const FOLDER: &str = "TENANTRY_TEST_PEER_FOLDER";
const ADDRESS: &str = "TENANTRY_TEST_PEER_ADDRESS";

/// Not a test: the other process. Does nothing when run as a test.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_other_process_serves_until_it_is_killed() {
    let (Ok(folder), Ok(address)) = (std::env::var(FOLDER), std::env::var(ADDRESS)) else { return };
    let identity = Identity::load(node("b"), &PathBuf::from(folder).join("b")).expect("an identity");
    let parts = EndpointParts::bind(address.parse().expect("an address")).expect("the port is free");
    let _serving = serving(&identity, &[("a", ([127, 0, 0, 1], 1).into())], parts);
    println!("\nready");
    std::future::pending::<()>().await;
}

struct Process(Child);

impl Process {
    fn run(folder: &Folder, address: SocketAddr) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "killed::the_other_process_serves_until_it_is_killed", "--nocapture"])
            .env(FOLDER, &folder.0)
            .env(ADDRESS, address.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a second process");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        assert!(output.lines().any(|line| line.expect("text") == "ready"), "it comes up");
        Self(child)
    }

    fn kill(&mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("gone");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How long the end of a running stream takes to be noticed, and in which words; `restart` right after the kill.
async fn noticed(restart: bool) -> (Duration, String) {
    let folder = Folder::new();
    let a = join(&folder.0, "a");
    join(&folder.0, "b");
    // Below the ports that the system hands out, so that nobody takes it while the process is away.
    let address: SocketAddr = ([127, 0, 0, 1], 20_000 + (std::process::id() % 10_000) as u16).into();
    let mut process = Process::run(&folder, address);
    let (net, _) = serving(&a, &[("b", address)], loopback());
    timeout(Duration::from_secs(5), net.connected(&node("b"))).await.expect("connected");
    let endless = start(&SystemClock, u32::MAX / 2, 1, Emitted::default());
    let mut exchange = net.start(&node("b"), &endless, Duration::from_secs(5)).await.expect("taken on");
    for _ in 0..100 {
        exchange.recv().await.expect("alive").expect("a token");
    }
    process.kill();
    let killed_at = SystemClock.now();
    let _second = restart.then(|| Process::run(&folder, address));
    let up_at = SystemClock.now();
    let error = loop {
        match exchange.recv().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream was never finished"),
            Err(error) => break error,
        }
    };
    let took = SystemClock.now().saturating_duration_since(if restart { up_at } else { killed_at });
    if restart {
        timeout(Duration::from_secs(5), net.connected(&node("b"))).await.expect("found again");
    }
    (took, error.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_peer_is_noticed_within_a_second_and_a_half() {
    let (took, error) = noticed(false).await;
    println!("noticed after {} ms: {error}", took.as_millis());
    assert!(took < Duration::from_millis(1500), "{} ms: {error}", took.as_millis());
    assert!(error.contains("timed out"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_came_back_says_that_it_has_forgotten() {
    let (took, error) = noticed(true).await;
    println!("noticed {} ms after it was back: {error}", took.as_millis());
    assert!(took < Duration::from_millis(700), "{} ms: {error}", took.as_millis());
    assert!(error.contains("reset by peer"), "{error}");
}
