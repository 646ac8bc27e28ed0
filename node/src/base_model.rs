//! `BaseModelActor`: starts, watches and restarts the engine thread of one base.
//!
//! Supervised by the node supervisor. Its only sender is the engine thread, once per engine, so its mailbox
//! needs no credit. When an engine panics, the requests inside it have already been failed with
//! `internal_error`; requests in the queue wait for the next engine. A fourth panic within ten seconds stops
//! the actor with an error, which ends the node. It ends normally when the queue is closed and drained.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use model::forward::{Runtime, RuntimeError};
use model::step::Forward;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use scheduler::engine::{Engine, EngineEnd};
use shared::clock::Clock;

use crate::base_room::BaseRoom;
use crate::engine_source::EngineSource;
use crate::metrics;
use crate::restart::{RestartLimiter, Verdict};

/// What the actor is told.
#[derive(Debug)]
pub enum BaseModelMsg {
    /// Sent by the engine thread as its last act.
    EngineEnded(Result<EngineEnd, String>),
}

/// What the actor needs.
pub struct BaseModelArgs {
    /// The base it runs.
    pub room: Arc<BaseRoom>,
    /// Where engine and limiter read the time.
    pub clock: Arc<dyn Clock>,
}

/// The actor.
#[derive(Debug, Default)]
pub struct BaseModelActor;

/// The actor's working state.
pub struct BaseModelState {
    args: BaseModelArgs,
    limiter: RestartLimiter,
}

impl Actor for BaseModelActor {
    type Msg = BaseModelMsg;
    type State = BaseModelState;
    type Arguments = BaseModelArgs;

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        args: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        start_engine(&args, &myself)?;
        Ok(BaseModelState { args, limiter: RestartLimiter::default() })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            BaseModelMsg::EngineEnded(end) => state.on_engine_ended(end, &myself),
        }
    }
}

// === impl BaseModelState ===

impl BaseModelState {
    fn on_engine_ended(
        &mut self,
        end: Result<EngineEnd, String>,
        myself: &ActorRef<BaseModelMsg>,
    ) -> Result<(), ActorProcessingErr> {
        let room = &self.args.room;
        room.set_up(false);
        let reason = match end {
            Ok(EngineEnd::Drained) => {
                tracing::info!(base = %room.name, "engine drained");
                myself.stop(None);
                return Ok(());
            }
            Ok(EngineEnd::Panicked(reason)) => reason,
            // No memory or no thread: trying again at once would not help.
            Err(reason) => return Err(reason.into()),
        };
        metrics::engine_restarted(&room.name);
        match self.limiter.on_failure(self.args.clock.now()) {
            Verdict::Restart => {
                tracing::error!(base = %room.name, %reason, "engine panicked, starting another one");
                start_engine(&self.args, myself)
            }
            Verdict::Escalate => Err(format!("the engine of {} keeps panicking: {reason}", room.name).into()),
        }
    }
}

/// Starts the engine on a thread of its own; the thread reports its end to the actor.
fn start_engine(args: &BaseModelArgs, myself: &ActorRef<BaseModelMsg>) -> Result<(), ActorProcessingErr> {
    let (room, clock, myself) = (Arc::clone(&args.room), Arc::clone(&args.clock), myself.clone());
    std::thread::Builder::new().name(format!("engine-{}", room.name)).spawn(move || {
        let end = guarded(|| run_engine(&room, clock));
        room.set_up(false);
        // The actor may already be gone when the node stops.
        let _ = myself.cast(BaseModelMsg::EngineEnded(end));
    })?;
    Ok(())
}

/// Turns a panic outside the engine's own steps into an end that the actor hears of.
fn guarded(run: impl FnOnce() -> Result<EngineEnd, String>) -> Result<EngineEnd, String> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        Ok(EngineEnd::Panicked(text.unwrap_or("a panic without text").to_owned()))
    })
}

fn run_engine(room: &Arc<BaseRoom>, clock: Arc<dyn Clock>) -> Result<EngineEnd, String> {
    let runtime = runtime(room).map_err(|error| error.to_string())?;
    let source = EngineSource::new(Arc::clone(room));
    let engine = Engine::new(runtime, source, Arc::clone(&room.text.vocabulary), clock, room.engine.scheduling.clone());
    room.engine_started(engine.stats());
    room.set_up(true);
    tracing::info!(base = %room.name, context = room.context(), "engine running");
    Ok(engine.run())
}

/// What computes the steps: a GPU if the model was loaded for one, else the CPU.
fn runtime(room: &BaseRoom) -> Result<Box<dyn Forward>, RuntimeError> {
    let options = room.engine.runtime.clone();
    #[cfg(feature = "cuda")]
    if room.model.info.numerics == model::info::Numerics::Gpu {
        let gpu = kernels::cuda::device::Device::new(0)?;
        tracing::info!(base = %room.name, device = %gpu.describe(), "computing on a GPU");
        return Ok(Box::new(model::gpu::GpuRuntime::new(gpu, &room.model, options)?));
    }
    Ok(Box::new(Runtime::new(Arc::clone(&room.model), options)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_outside_a_step_is_an_end_like_any_other() {
        let end = guarded(|| panic!("no room for {} pages", 3));
        assert_eq!(end, Ok(EngineEnd::Panicked("no room for 3 pages".to_owned())));
        assert_eq!(guarded(|| Ok(EngineEnd::Drained)), Ok(EngineEnd::Drained));
        assert_eq!(guarded(|| Err("no memory".to_owned())), Err("no memory".to_owned()));
    }
}
