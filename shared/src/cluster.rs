//! What nodes tell one another about themselves. Sent by every node's coordinator, carried by `wire` and `peer`,
//! judged by every other coordinator's failure detector; no policy here.

/// What a node does with requests, in its own words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NodePhase {
    /// Takes requests.
    Serving,
    /// Takes no new ones, finishes what it has.
    Draining,
    /// The grace is over: what still runs should go on elsewhere now.
    Leaving,
}

/// How busy a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NodeLoad {
    /// Sequences in the batch.
    pub running: u32,
    /// Sequences the batch has room for.
    pub places: u32,
    /// Requests that wait for a place.
    pub waiting: u32,
}

/// What a node says of itself to every other node, ten times a second. Fixed size: it fits one datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    /// Names one life of the node's process; a later life has a greater one (start time, ms of wall time).
    pub incarnation: u64,
    /// Counts up within a life; an overtaken datagram is told by it.
    pub seq: u64,
    /// How long this life has been serving, in ms: a young one has cold caches.
    pub uptime_ms: u64,
    /// Epoch of the sender's routing table.
    pub epoch: u64,
    /// What it does with requests.
    pub phase: NodePhase,
    /// How busy it is.
    pub load: NodeLoad,
}
