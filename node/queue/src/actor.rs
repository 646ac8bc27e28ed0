//! `FairQueueActor`: the queue's timer.
//!
//! Supervised by the node supervisor, which restarts it with the same [`Queue`]: the requests live in the
//! queue, not in the actor, so a crash loses at most one tick of expiries, which the next tick finds. Only its
//! own timer sends to it, so its mailbox needs no credit. It ends when it is stopped; the queue stays open until
//! its owner closes it.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef};
use shared::clock::Clock;

use crate::handle::Queue;
use crate::item::Item;

/// Default time between ticks: a request that cannot be served in time learns it at most this much late.
pub const TICK_DEFAULT: Duration = Duration::from_millis(50);

/// What the actor is asked.
#[derive(Debug)]
pub enum FairQueueMsg {
    /// Sent by its own timer: answer what expired.
    Tick,
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
pub struct FairQueueState<T>(FairQueueArgs<T>);

impl<T: Send + 'static> Actor for FairQueueActor<T> {
    type Msg = FairQueueMsg;
    type State = FairQueueState<T>;
    type Arguments = FairQueueArgs<T>;

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        args: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        // The timer's task ends by itself when the actor is gone.
        myself.send_interval(args.tick, || FairQueueMsg::Tick);
        Ok(FairQueueState(args))
    }

    async fn handle(
        &self,
        _myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            FairQueueMsg::Tick => state.on_tick(),
        }
        Ok(())
    }
}

// === impl FairQueueState ===

impl<T> FairQueueState<T> {
    fn on_tick(&mut self) {
        for (item, payload) in self.0.queue.expire(self.0.clock.now()) {
            tracing::debug!(request_id = %item.id, tenant_id = %item.route.tenant, "deadline passed in the queue");
            (self.0.on_expired)(item, payload);
        }
    }
}

#[cfg(test)]
mod tests {
    use shared::clock::ManualClock;
    use shared::id::{RequestId, Route};
    use shared::tenant::Tier;
    use tokio::sync::mpsc;

    use super::*;
    use crate::item::FairConfig;

    #[tokio::test]
    async fn the_timer_answers_expired_requests_and_no_others() {
        let clock = ManualClock::default();
        let queue = Queue::new("tiny".parse().expect("a name"), FairConfig::default());
        let (expired, mut answered) = mpsc::unbounded_channel();
        let args = FairQueueArgs {
            queue: queue.clone(),
            clock: Arc::new(clock.clone()),
            tick: Duration::from_millis(2),
            on_expired: Arc::new(move |item: Item, payload: &str| expired.send((item.id, payload)).expect("listening")),
        };
        let (actor, ended) = Actor::spawn(None, FairQueueActor::default(), args).await.expect("starts");
        let now = clock.now();
        let item = |id, lives_s| Item {
            id: RequestId(id),
            route: Route { tenant: "acme".parse().expect("tenant"), task: None },
            tier: Tier::Shared,
            weight: 1,
            concurrency: 1,
            queue_depth: 8,
            adapter: None,
            n_sequences: 1,
            prompt_tokens: 4,
            kv_tokens: 4,
            admitted_at: now,
            deadline: now + Duration::from_secs(lives_s),
        };
        let _short = queue.submit(now, item(1, 1), "short").expect("accepted");
        let _long = queue.submit(now, item(2, 60), "long").expect("accepted");
        clock.advance(Duration::from_secs(2));
        assert_eq!(answered.recv().await, Some((RequestId(1), "short")));
        let stats = queue.stats(clock.now());
        assert_eq!((stats.classes[0].waiting, stats.classes[0].oldest_wait), (1, Duration::from_secs(2)));
        actor.stop(None);
        ended.await.expect("ends");
    }
}
