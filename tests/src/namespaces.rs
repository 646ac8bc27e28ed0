//! A network of the kernel's own between nodes: each runs in a network namespace, joined by a bridge, and a way from one
//! to another can be cut. Unlike the relays of [`crate::network`] it needs rights, and loses packets of both directions
//! by themselves, below everything that nodes know of.
//!
//! A way is cut by an entry in the sender's neighbour table that names hardware nobody has: its packets go out and
//! reach no one, and nothing tells the sender. The program runs in a network and a mount namespace of its own
//! ([`crate::disk::again_apart`]), so that whatever it leaves behind ends with it.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Command, ExitStatus, Stdio};

use crate::disk::{again_apart, is_apart};
use crate::process::NodePlace;

/// Hardware that nobody has.
const NOBODY: &str = "02:00:00:00:00:01";
/// The line with which a cluster file begins that lets clients in by plain HTTP beyond loopback.
pub const PLAIN_HTTP: &str = "insecure = true";

/// Namespaces of nodes `0..n`.
#[derive(Debug)]
pub struct Namespaces {
    n: usize,
}

/// Runs this very program with these arguments where it may make namespaces. `None` when it was started so, or cannot
/// be.
pub fn again_with_namespaces(words: &[&str]) -> Option<ExitStatus> {
    again_apart(&["--map-root-user", "--mount", "--net"], words)
}

// === impl Namespaces ===

impl Namespaces {
    /// Makes them; there is one set of them at a time.
    ///
    /// # Errors
    /// When this program was not started by [`again_with_namespaces`], or `ip` fails.
    pub fn new(n: usize) -> io::Result<Self> {
        if !is_apart() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        // Names of namespaces are files there, and the real folder is not this program's.
        run("mount", "-t tmpfs tmpfs /run")?;
        ip("link set lo up")?;
        ip("link add bridge type bridge")?;
        ip(&format!("addr add {}/24 dev bridge", address(n)))?;
        ip("link set bridge up")?;
        for node in 0..n {
            let name = name(node);
            ip(&format!("netns add {name}"))?;
            ip(&format!("link add {name} type veth peer name eth0 netns {name}"))?;
            ip(&format!("link set {name} master bridge up"))?;
            ip(&format!("-n {name} addr add {}/24 dev eth0", address(node)))?;
            ip(&format!("-n {name} link set lo up"))?;
            ip(&format!("-n {name} link set eth0 up"))?;
        }
        Ok(Self { n })
    }

    /// Puts a node into its namespace.
    pub fn place(&self, node: usize, place: &mut NodePlace) {
        assert!(node < self.n, "{node} of {}", self.n);
        let there = |old: SocketAddr| SocketAddr::from((address(node), old.port()));
        (place.http, place.admin) = (there(place.http), there(place.admin));
        (place.peer, place.quic) = (place.peer.map(there), place.quic.map(there));
        place.namespace = Some(name(node));
    }

    /// No packet of node `from` reaches node `to`, or all do again.
    ///
    /// # Panics
    /// When `ip` fails.
    pub fn cut_one_way(&self, from: usize, to: usize, is_cut: bool) {
        let (from, to) = (name(from), address(to));
        let done = if is_cut {
            ip(&format!("-n {from} neigh replace {to} lladdr {NOBODY} nud permanent dev eth0"))
        } else {
            ip(&format!("-n {from} neigh del {to} dev eth0"))
        };
        done.expect("neighbours of an own namespace can be changed");
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        // What cannot be removed ends with this program.
        for node in 0..self.n {
            let _ = ip(&format!("netns del {}", name(node)));
        }
        let _ = ip("link del bridge");
        let _ = run("umount", "/run");
    }
}

fn name(node: usize) -> String {
    format!("node{node}")
}

fn address(node: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, u8::try_from(node + 1).expect("a handful of nodes"))
}

fn ip(words: &str) -> io::Result<()> {
    run("ip", words)
}

fn run(program: &str, words: &str) -> io::Result<()> {
    let output = Command::new(program).args(words.split_whitespace()).stdout(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{program} {words}: {}", said.trim())))
}
