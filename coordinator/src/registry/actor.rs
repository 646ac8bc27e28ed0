//! The registry's actor: hands commands to the keeper and reports its end.
//!
//! Supervised by the node; only [`super::Registry`] sends to it, each message holding a credit. It ends when
//! stopped or when the keeper ends. A crash loses commands that were not answered yet (their outcome
//! is told as unknown) and nothing that was; readers keep the last snapshot until
//! [`super::Registry::respawn`].

use std::sync::{Arc, Mutex};

use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::error::RegistryError;
use super::keeper::{Job, Keeper, Refusal};

/// What the actor is told.
pub(super) enum RegistryMsg {
    /// A command arrived; sent by the handle.
    Apply(Box<Job>),
    /// The keeper ended by itself, which only a panic does; sent by its guard.
    KeeperEnded,
}

/// What it starts with: a copy that is open already, so that errors of opening have names.
pub(super) struct RegistryArgs {
    pub(super) keeper: Keeper,
    /// Joined before the next start, so that two keepers never meet.
    pub(super) task: Arc<Mutex<Option<JoinHandle<()>>>>,
}

/// Stateless: everything is in the keeper.
pub(super) struct RegistryActor;

/// The way to the keeper. Its queue is as long as there are credits.
pub(super) struct RegistryActorState {
    jobs: mpsc::UnboundedSender<Job>,
}

/// Tells the actor when the task unwinds or returns.
struct EndGuard(ActorRef<RegistryMsg>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        // The actor is gone already when the end is a normal one.
        let _ = self.0.send_message(RegistryMsg::KeeperEnded);
    }
}

impl Actor for RegistryActor {
    type Msg = RegistryMsg;
    type State = RegistryActorState;
    type Arguments = RegistryArgs;

    async fn pre_start(
        &self,
        myself: ActorRef<RegistryMsg>,
        args: RegistryArgs,
    ) -> Result<RegistryActorState, ActorProcessingErr> {
        let (jobs, receiver) = mpsc::unbounded_channel();
        let RegistryArgs { keeper, task } = args;
        let guard = EndGuard(myself);
        let run = async move {
            let _guard = guard;
            keeper.run(receiver).await;
        };
        *task.lock().map_err(|_| "a thread panicked with the keeper's handle")? = Some(tokio::spawn(run));
        Ok(RegistryActorState { jobs })
    }

    async fn handle(
        &self,
        _myself: ActorRef<RegistryMsg>,
        message: RegistryMsg,
        state: &mut RegistryActorState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            RegistryMsg::Apply(job) => state.on_apply(*job),
            RegistryMsg::KeeperEnded => Err("the registry's keeper ended".into()),
        }
    }
}

impl RegistryActorState {
    fn on_apply(&mut self, job: Job) -> Result<(), ActorProcessingErr> {
        self.jobs.send(job).map_err(|mpsc::error::SendError(job)| {
            let _ = job.reply.send(Err(Refusal::Error(RegistryError::Unavailable)));
            "the registry's keeper ended".into()
        })
    }
}
