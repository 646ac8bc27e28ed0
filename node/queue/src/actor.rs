//! `FairQueueActor`: the queue's timers, configuration and metrics.
//!
//! Supervised by the node supervisor, which restarts it with the same [`Queue`]: the requests live in the
//! queue, not in the actor, so a crash loses at most one tick of expiries, which the next tick finds. Its
//! senders are the node's configuration and admin parts, a handful of messages a minute, so its mailbox needs
//! no credit. It ends when it is stopped; the queue stays open until its owner closes it.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use shared::clock::Clock;

use crate::fair::QueueStats;
use crate::handle::Queue;
use crate::item::{FairConfig, Item};
use crate::metrics;

/// Default time between ticks: a request that cannot be served in time learns it at most this much late.
pub const TICK_DEFAULT: Duration = Duration::from_millis(50);
/// Gauges are sampled every this many ticks: counting visits every tenant.
const TICKS_PER_SAMPLE: u32 = 20;

/// What the actor is asked.
#[derive(Debug)]
pub enum FairQueueMsg {
    /// Sent by its own timer: answer what expired, sample metrics.
    Tick,
    /// Sent when the configuration changed.
    Configure(FairConfig),
    /// Sent by operators' tools that want numbers per tenant.
    Stats(RpcReplyPort<QueueStats>),
}

/// Called with each request whose deadline passed in the queue, on the actor's task: it must not block.
pub type OnExpired<T> = Arc<dyn Fn(Item, T) + Send + Sync>;

/// What the actor needs to start.
pub struct FairQueueArgs<T> {
    /// The queue it looks after.
    pub queue: Queue<T>,
    /// Where it reads the time.
    pub clock: Arc<dyn Clock>,
    /// Time between ticks; [`TICK_DEFAULT`] unless a test wants another.
    pub tick: Duration,
    /// Answers the client of an expired request.
    pub on_expired: OnExpired<T>,
}

impl<T> fmt::Debug for FairQueueArgs<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FairQueueArgs").field("tick", &self.tick).finish_non_exhaustive()
    }
}

/// The actor.
#[derive(Debug)]
pub struct FairQueueActor<T>(PhantomData<fn(T)>);

impl<T> Default for FairQueueActor<T> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

/// The actor's working state.
pub struct FairQueueState<T> {
    args: FairQueueArgs<T>,
    ticks: u32,
}

impl<T: Send + 'static> Actor for FairQueueActor<T> {
    type Msg = FairQueueMsg;
    type State = FairQueueState<T>;
    type Arguments = FairQueueArgs<T>;

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        args: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        metrics::describe();
        // The timer's task ends by itself when the actor is gone.
        myself.send_interval(args.tick, || FairQueueMsg::Tick);
        Ok(FairQueueState { args, ticks: 0 })
    }

    async fn handle(
        &self,
        _myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            FairQueueMsg::Tick => state.on_tick(),
            FairQueueMsg::Configure(config) => state.args.queue.configure(config),
            FairQueueMsg::Stats(reply) => {
                // An asker that stopped waiting is not an error.
                let _ = reply.send(state.args.queue.stats(state.args.clock.now()));
            }
        }
        Ok(())
    }
}

// === impl FairQueueState ===

impl<T> FairQueueState<T> {
    fn on_tick(&mut self) {
        let now = self.args.clock.now();
        for (item, payload) in self.args.queue.expire(now) {
            tracing::debug!(request_id = %item.id, tenant_id = %item.route.tenant, "deadline passed in the queue");
            (self.args.on_expired)(item, payload);
        }
        self.ticks = self.ticks.wrapping_add(1);
        if self.ticks.is_multiple_of(TICKS_PER_SAMPLE) {
            metrics::sample(&self.args.queue.stats(now));
        }
    }
}
