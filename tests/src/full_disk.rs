//! What a cluster does while one node's disk is full, from a load and a disk to a line per invariant. Used by the
//! end-to-end tests with a tiny model and by `scripts/chaos` with the real one.

use std::collections::BTreeMap;
use std::time::Duration;

use model::adapter::AdapterFiles;
use serde_json::{Value, json};
use shared::clock::{Clock, SystemClock};

use crate::bills::{self, Tokens};
use crate::cluster::{Cluster, Streamed, Streaming};
use crate::disk::SmallDisk;
use crate::operator;
use crate::process::{Answer, NodeProcess};

/// Requests through the full node, and changes through it and another one.
const TRIES: usize = 12;
/// Longest wait for a node to be well again once there is room.
const WELL_WITHIN: Duration = Duration::from_secs(20);

/// Longest wait for the bills of what was delivered.
const BILLED_WITHIN: Duration = Duration::from_secs(3);

/// An invariant and whether it held.
#[derive(Debug)]
pub struct Line {
    /// In words, with numbers.
    pub what: String,
    /// Whether it did.
    pub holds: bool,
}

/// Tenants, what they ask, and what that brings undisturbed.
#[derive(Debug)]
pub struct Load<'a> {
    /// Keys of tenants `tenant0`, `tenant1` …
    pub keys: &'a [String],
    /// What each asks.
    pub bodies: Vec<Value>,
    /// The tokens of each.
    pub expected: &'a [Vec<u32>],
    /// An adapter that the base takes, to be uploaded.
    pub adapter: AdapterFiles,
}

/// The state of one run.
struct Run<'a> {
    cluster: &'a mut Cluster,
    disk: &'a SmallDisk,
    load: &'a Load<'a>,
    /// Whose disk is filled.
    full: usize,
    lines: Vec<Line>,
    /// Tokens that clients got.
    got: Tokens,
    /// Keys of tenants whose creation was acknowledged.
    created: Vec<String>,
}

/// Fills the disk of node `full` under streams through it and through the others, asks and changes what it can
/// meanwhile, gives the room back, kills the node, and says what held. Usage is counted from the cluster's beginning:
/// before, each tenant was answered once.
pub fn fill_under_load(cluster: &mut Cluster, disk: &SmallDisk, full: usize, load: &Load<'_>) -> Vec<Line> {
    let mut run = Run { cluster, disk, load, full, lines: Vec::new(), got: Tokens::new(), created: Vec::new() };
    load.expected.iter().enumerate().for_each(|(n, ids)| run.count(n, ids.len()));
    for tenant in ["upother", "upfull", "upagain"] {
        operator::tenant(&run.cluster.nodes[run.other()], tenant, &json!({"allow_base": true}));
    }
    run.streams();
    run.requests();
    run.changes();
    run.uploads();
    disk.free();
    run.is_well_again();
    run.nothing_is_lost("once there is room");
    run.cluster.nodes[full].kill_and_restart();
    run.nothing_is_lost("after kill -9 of the node");
    run.usage();
    run.lines
}

// === impl Run ===

impl Run<'_> {
    fn say(&mut self, what: String, holds: bool) {
        self.lines.push(Line { what, holds });
    }

    fn other(&self) -> usize {
        (self.full + 1) % self.cluster.nodes.len()
    }

    fn stream(&self, door: usize, n: usize) -> Streaming {
        Streaming::start(&self.cluster.nodes[door], &self.load.keys[n], &self.load.bodies[n])
    }

    fn count(&mut self, n: usize, n_tokens: usize) {
        *self.got.entry(format!("tenant{n}")).or_default() += n_tokens as u64;
    }

    /// Counts what a client got; true when it is what it should be.
    fn take(&mut self, n: usize, streamed: &Streamed) -> bool {
        self.count(n, streamed.ids.len());
        streamed.finish.is_some() && streamed.error.is_none() && streamed.ids == self.load.expected[n]
    }

    /// Streams of all tenants through another node, of some through the node whose disk fills up meanwhile.
    fn streams(&mut self) {
        let n_there = self.load.keys.len() / 4;
        let doors: Vec<(usize, usize)> =
            (0..self.load.keys.len()).map(|n| (self.other(), n)).chain((0..n_there).map(|n| (self.full, n))).collect();
        let streams: Vec<Streaming> = doors.iter().map(|(door, n)| self.stream(*door, *n)).collect();
        let n_tokens: usize = doors.iter().map(|(_, n)| self.load.expected[*n].len()).sum();
        while streams.iter().map(Streaming::n_tokens).sum::<usize>() < n_tokens / 4 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let n_bytes = self.disk.fill();
        let streamed: Vec<Streamed> = streams.into_iter().map(Streaming::join).collect();
        let wrong: Vec<String> =
            doors.iter().zip(&streamed).filter(|((_, n), one)| !self.take(*n, one)).map(wrong).collect();
        let n = doors.len();
        self.say(
            format!(
                "streams under way when {n_bytes} bytes were taken, {n_there} of them through the full node: {} of {n} failed or differ {wrong:?}",
                wrong.len()
            ),
            wrong.is_empty(),
        );
    }

    /// New requests: served through the others, refused clearly or served through the full node.
    fn requests(&mut self) {
        let mut n_right = 0;
        for n in 0..TRIES.min(self.load.keys.len()) {
            let streamed = self.stream(self.other(), n).join();
            n_right += usize::from(self.take(n, &streamed));
        }
        let n = TRIES.min(self.load.keys.len());
        self.say(format!("new requests through another node: {n_right} of {n} right"), n_right == n);
        let (mut n_served, mut n_refused, mut unclear, mut n_bytes) = (0, 0, Vec::new(), 0);
        for n in 0..n {
            // The node's own files shrink now and then, and what they give back would do for these records.
            n_bytes += self.disk.fill();
            let (node, key) = (&self.cluster.nodes[self.full], &self.load.keys[n]);
            let mut body = self.load.bodies[n].clone();
            body["return_token_ids"] = json!(true);
            let answer = node.post("/v1/completions", key, &body);
            let is_refusal = answer.code() == "metering_unavailable" && answer.header("retry-after").is_some();
            match answer.status {
                200 => {
                    let ids = crate::process::token_ids(&answer.body["choices"][0]);
                    n_served += 1;
                    self.count(n, ids.len());
                    if ids != self.load.expected[n] {
                        unclear.push("other tokens".to_owned());
                    }
                }
                503 if is_refusal => n_refused += 1,
                _ => unclear.push(answer.text),
            }
        }
        self.say(
            format!("new requests through the full node: {n_served} served, {n_refused} refused with 503 metering_unavailable and a time to retry, otherwise {unclear:?}; {n_bytes} bytes that the node gave back were taken"),
            unclear.is_empty() && n_refused > 0,
        );
    }

    /// Changes of the registry: acknowledged, or refused with a code.
    fn changes(&mut self) {
        for (door, name) in [(self.other(), "other"), (self.full, "full")] {
            let (mut n_made, mut refused) = (0, BTreeMap::<String, usize>::new());
            for n in 0..TRIES {
                let body = json!({"id": format!("made-{name}-{n}"), "contract": {"allow_base": true}}).to_string();
                let answer = self.cluster.nodes[door].admin("POST", "/admin/v1/tenants", &body);
                match answer.body["key"]["key"].as_str() {
                    Some(key) if answer.status == 201 => {
                        n_made += 1;
                        self.created.push(key.to_owned());
                    }
                    _ => *refused.entry(format!("{} {}", answer.status, answer.code())).or_default() += 1,
                }
            }
            let is_clear = |code: &String| code.starts_with("503 registry_") || code.starts_with("507 registry_");
            let holds = refused.keys().all(is_clear) && (door == self.full || n_made == TRIES);
            self.say(
                format!("tenants created through the {name} node: {n_made} of {TRIES}, refused {refused:?}"),
                holds,
            );
        }
    }

    /// Uploads: stored, or refused for want of room.
    fn uploads(&mut self) {
        let base = self.load.bodies[0]["model"].as_str().expect("a model").to_owned();
        for (door, name) in [(self.other(), "other"), (self.full, "full")] {
            let answer = self.upload(door, &base, name);
            let (status, code) = (answer.status, answer.code().to_owned());
            let holds = status == 201 || door == self.full && (status, code.as_str()) == (507, "storage_full");
            self.say(format!("upload through the {name} node: {status} {code}"), holds);
        }
    }

    fn upload(&self, door: usize, base: &str, tenant: &str) -> Answer {
        let node = &self.cluster.nodes[door];
        operator::upload(node, &format!("up{tenant}-support-{base}-v1.0.0"), &self.load.adapter)
    }

    /// With room again, the node takes requests, without a restart.
    fn is_well_again(&mut self) {
        let freed = SystemClock.now();
        let is_ready = |node: &NodeProcess| node.get("/readyz", "").status == 200;
        while !is_ready(&self.cluster.nodes[self.full]) && freed.elapsed() < WELL_WITHIN {
            std::thread::sleep(Duration::from_millis(20));
        }
        let took = freed.elapsed();
        let streamed = self.stream(self.full, 0).join();
        let is_right = self.take(0, &streamed);
        let base = self.load.bodies[0]["model"].as_str().expect("a model").to_owned();
        let again = self.upload(self.full, &base, "again");
        let ms = took.as_millis();
        self.say(
            format!(
                "with room again the node was ready after {ms} ms, answered {}, took an upload with {}",
                if is_right { "right" } else { "wrong" },
                again.status
            ),
            is_right && again.status == 201 && took < WELL_WITHIN,
        );
    }

    /// Every acknowledged change is known at every node.
    fn nothing_is_lost(&mut self, when: &str) {
        let started = SystemClock.now();
        let mut lost = Vec::new();
        for node in &self.cluster.nodes {
            for key in &self.created {
                while node.get("/v1/models", key).status != 200 {
                    if started.elapsed() > WELL_WITHIN {
                        lost.push(node.name().to_owned());
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
        let n = self.created.len() * self.cluster.nodes.len();
        self.say(
            format!("{when}: {} of {n} acknowledged tenants unknown at a node {lost:?}", lost.len()),
            lost.is_empty(),
        );
    }

    fn usage(&mut self) {
        let bill = bills::settle(&self.cluster.nodes, &self.got, BILLED_WITHIN);
        self.say(bill.to_string(), (bill.unbilled, bill.beyond) == (0, 0));
    }
}

fn wrong(((door, n), one): (&(usize, usize), &Streamed)) -> String {
    format!("tenant {n} through node {door}: {:?}, {} tokens", one.error, one.ids.len())
}
