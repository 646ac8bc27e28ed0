//! `NodeSupervisor`: starts the node's actors and decides what their failures mean.
//!
//! | child | on failure | what a failure loses |
//! |---|---|---|
//! | Registry | start again from disk | changes under way; reads go on |
//! | Coordinator (in a cluster) | start again | one tick of the cluster's view, which is kept outside |
//! | FairQueue (per base) | start again | at most one tick of expiries |
//! | AdapterCache (per base) | end the node | it only passes commands on; loads run on threads that catch panics |
//! | BaseModel (per base) | end the node | it restarts its engine itself and fails only when that is hopeless |
//!
//! More than three failures of one child within ten seconds end the node. Nobody sends to it but ractor and the
//! node's own shutdown; it ends when it is stopped or gives up, which [`crate::serve`] waits for.

use std::collections::HashMap;
use std::sync::Arc;

use adapters::actor::{AdapterCacheActor, AdapterCacheArgs};
use coordinator::actor::Coordinator;
use coordinator::registry::Registry;
use queue::actor::{FairQueueActor, FairQueueArgs, TICK_DEFAULT};
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use shared::clock::Clock;
use shared::id::BaseName;

use crate::base_model::{BaseModelActor, BaseModelArgs};
use crate::base_room::BaseRoom;
use crate::engine_source::{Payload, deadline_passed};
use crate::restart::{RestartLimiter, Verdict};

/// The supervisor takes no messages of its own.
#[derive(Debug)]
pub enum SupervisorMsg {}

/// What it looks after.
pub struct SupervisorArgs {
    /// Bases of this node.
    pub rooms: Vec<Arc<BaseRoom>>,
    /// The tenants' registry, already open.
    pub registry: Registry,
    /// This node's view of its cluster, if there is one.
    pub coordinator: Option<Coordinator>,
    /// Where children read the time.
    pub clock: Arc<dyn Clock>,
}

/// The actor.
#[derive(Debug, Default)]
pub struct NodeSupervisor;

/// A kind of child, by base where there is one per base.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Child {
    Registry,
    Coordinator,
    FairQueue(BaseName),
    AdapterCache(BaseName),
    BaseModel(BaseName),
}

/// The actor's working state.
pub struct SupervisorState {
    args: SupervisorArgs,
    children: HashMap<ActorId, Child>,
    limiters: HashMap<Child, RestartLimiter>,
}

impl Actor for NodeSupervisor {
    type Msg = SupervisorMsg;
    type State = SupervisorState;
    type Arguments = SupervisorArgs;

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        args: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        let mut state = SupervisorState { args, children: HashMap::new(), limiters: HashMap::new() };
        let names: Vec<BaseName> = state.args.rooms.iter().map(|room| room.name.clone()).collect();
        match state.args.registry.link(myself.get_cell()) {
            Some(id) => drop(state.children.insert(id, Child::Registry)),
            None => state.start(Child::Registry, myself.get_cell()).await?,
        }
        if state.args.coordinator.is_some() {
            state.start(Child::Coordinator, myself.get_cell()).await?;
        }
        for name in names {
            for child in [Child::FairQueue(name.clone()), Child::AdapterCache(name.clone()), Child::BaseModel(name)] {
                state.start(child, myself.get_cell()).await?;
            }
        }
        Ok(state)
    }

    /// Overrides ractor's default, which stops the supervisor with any child.
    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<Self::Msg>,
        event: SupervisionEvent,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorFailed(who, reason) => {
                state.on_failed(who.get_id(), &reason.to_string(), myself.get_cell()).await
            }
            SupervisionEvent::ActorTerminated(who, last_state, reason) => {
                // Its parts must be free before a new one starts: the registry's holds the writer.
                drop(last_state);
                let reason = reason.unwrap_or_else(|| "it ended without a reason".to_owned());
                state.on_ended(who.get_id(), &reason, myself.get_cell()).await
            }
            SupervisionEvent::ActorStarted(_) | SupervisionEvent::ProcessGroupChanged(_) => Ok(()),
        }
    }
}

// === impl SupervisorState ===

impl SupervisorState {
    async fn on_failed(&mut self, id: ActorId, reason: &str, myself: ActorCell) -> Result<(), ActorProcessingErr> {
        let Some(child) = self.children.remove(&id) else {
            tracing::error!(%id, reason, "an actor that is not a child failed");
            return Ok(());
        };
        tracing::error!(?child, reason, "child failed");
        if matches!(child, Child::BaseModel(_) | Child::AdapterCache(_)) {
            return Err(format!("{child:?} failed for good: {reason}").into());
        }
        match self.limiters.entry(child.clone()).or_default().on_failure(self.args.clock.now()) {
            Verdict::Restart => self.start(child, myself).await,
            Verdict::Escalate => Err(format!("{child:?} fails again and again: {reason}").into()),
        }
    }

    /// Only a base model whose queue is closed and drained ends in order while the supervisor runs.
    async fn on_ended(&mut self, id: ActorId, reason: &str, myself: ActorCell) -> Result<(), ActorProcessingErr> {
        match self.children.get(&id) {
            Some(Child::BaseModel(name)) if self.room(name).queue.is_closed() => {
                self.children.remove(&id);
                Ok(())
            }
            Some(_) => self.on_failed(id, reason, myself).await,
            // The one before a restart.
            None => Ok(()),
        }
    }

    async fn start(&mut self, child: Child, myself: ActorCell) -> Result<(), ActorProcessingErr> {
        let id = match &child {
            Child::Registry => {
                self.args.registry.respawn(Some(myself)).await?;
                self.args.registry.actor_id()
            }
            Child::Coordinator => match &self.args.coordinator {
                Some(coordinator) => Some(coordinator.spawn(Some(myself)).await?.get_id()),
                None => None,
            },
            Child::FairQueue(name) => {
                let args = FairQueueArgs {
                    queue: self.room(name).queue.clone(),
                    clock: Arc::clone(&self.args.clock),
                    tick: TICK_DEFAULT,
                    on_expired: Arc::new(|item, payload: Payload| payload.fail(deadline_passed(&item))),
                };
                Some(FairQueueActor::spawn_linked(None, FairQueueActor::default(), args, myself).await?.0.get_id())
            }
            Child::AdapterCache(name) => {
                let args = self.adapter_cache_args(name)?;
                Some(AdapterCacheActor::spawn_linked(None, AdapterCacheActor, args, myself).await?.0.get_id())
            }
            Child::BaseModel(name) => {
                let args = BaseModelArgs { room: self.room(name), clock: Arc::clone(&self.args.clock) };
                Some(BaseModelActor::spawn_linked(None, BaseModelActor, args, myself).await?.0.get_id())
            }
        };
        if let Some(id) = id {
            self.children.insert(id, child);
        }
        Ok(())
    }

    fn adapter_cache_args(&self, name: &BaseName) -> Result<AdapterCacheArgs, ActorProcessingErr> {
        let room = self.room(name);
        let loading = &room.adapter_loading;
        let commands = loading.commands.lock().take().ok_or("the adapter cache's commands are taken")?;
        Ok(AdapterCacheArgs {
            cache: room.cache.clone(),
            commands,
            loader: Arc::clone(&loading.loader),
            clock: Arc::clone(&self.args.clock),
            base: name.clone(),
            tenant_label: crate::metrics::tenant_label,
        })
    }

    fn room(&self, name: &BaseName) -> Arc<BaseRoom> {
        let found = self.args.rooms.iter().find(|room| room.name == *name);
        Arc::clone(found.expect("children are named after rooms"))
    }
}
