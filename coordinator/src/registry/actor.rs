//! The registry's actor: hands commands to the writer thread and reports its end.
//!
//! Supervised by the node; only [`super::Registry`] sends to it, each message holding a credit. It ends when
//! stopped or when its writer thread ends. A crash loses commands that were not answered yet (their outcome
//! is told as unknown) and nothing that was; readers keep the last snapshot until
//! [`super::Registry::respawn`].

use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;

use ractor::{Actor, ActorProcessingErr, ActorRef};

use super::error::RegistryError;
use super::writer::{Job, Writer};

/// What the actor is told.
pub(super) enum RegistryMsg {
    /// A command arrived; sent by the handle.
    Apply(Job),
    /// The writer thread ended by itself, which only a panic does; sent by its guard.
    WriterEnded,
}

/// What it starts with: a store that is open already, so that errors of opening have names.
pub(super) struct RegistryArgs {
    pub(super) writer: Writer,
    /// Joined before the next start, so that two writers never meet.
    pub(super) thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

/// Stateless: everything is in the writer.
pub(super) struct RegistryActor;

/// The way to the writer.
pub(super) struct RegistryActorState {
    jobs: mpsc::Sender<Job>,
}

/// Tells the actor when the thread unwinds or returns.
struct EndGuard(ActorRef<RegistryMsg>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        // The actor is gone already when the end is a normal one.
        let _ = self.0.send_message(RegistryMsg::WriterEnded);
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
        let (jobs, receiver) = mpsc::channel();
        let RegistryArgs { writer, thread } = args;
        let guard = EndGuard(myself);
        let run = move || {
            let _guard = guard;
            writer.run(&receiver);
        };
        let handle = std::thread::Builder::new().name("registry".to_owned()).spawn(run)?;
        *thread.lock().map_err(|_| "a thread panicked with the writer's handle")? = Some(handle);
        Ok(RegistryActorState { jobs })
    }

    async fn handle(
        &self,
        _myself: ActorRef<RegistryMsg>,
        message: RegistryMsg,
        state: &mut RegistryActorState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            RegistryMsg::Apply(job) => state.on_apply(job),
            RegistryMsg::WriterEnded => Err("the registry's writer thread ended".into()),
        }
    }
}

impl RegistryActorState {
    fn on_apply(&mut self, job: Job) -> Result<(), ActorProcessingErr> {
        self.jobs.send(job).map_err(|mpsc::SendError(job)| {
            let _ = job.reply.send(Err(RegistryError::Unavailable));
            "the registry's writer thread ended".into()
        })
    }
}
