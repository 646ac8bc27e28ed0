//! A command's way to the node that leads, from whichever node it was asked of, and what other nodes send here.
//!
//! A command is tried again, under the same id, until there is an answer or its time is over; the log takes it once.
//! What is told afterwards keeps three things apart: too many commands at once (nothing was done), nobody took it
//! (nothing was done), and no answer (it may be applied, even later).

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, oneshot, watch};
use tokio::time::timeout;

use super::actor::RegistryMsg;
use super::cluster::TransportError;
use super::command::{Action, Applied, Command, CommandId, Proposal};
use super::error::RegistryError;
use super::keeper::{Claim, Job, Refusal, Reply};
use super::raft::network::{self, Told};
use super::status::Status;
use super::{COMMAND_BYTES_MAX, COMMANDS_WAITING_MAX, Registry, lock};
use shared::id::NodeId;

/// Longest wait for one answer of the leader, before it is asked again or another one is.
const ATTEMPT_WAIT_MAX: Duration = Duration::from_secs(3);
/// Pause before the next attempt.
const RETRY_AFTER: Duration = Duration::from_millis(50);
/// Longest wait for the own copy to show what the leader has applied.
const OWN_COPY_WAIT_MAX: Duration = Duration::from_secs(2);

/// A command on its way to the leader.
#[derive(Serialize, Deserialize)]
struct Forwarded {
    proposal: Proposal,
    within_ms: u64,
}

/// What is known of a call that has no answer yet.
#[derive(Default)]
struct Tried {
    /// An attempt ended without an answer.
    is_unclear: bool,
    /// The attempt under way on this node.
    here: Option<Claim>,
}

impl Tried {
    fn after(mut self, waited: Duration) -> RegistryError {
        let waited_ms = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
        self.end_attempt();
        if self.is_unclear {
            RegistryError::OutcomeUnknown { waited_ms }
        } else {
            RegistryError::NoLeader { waited_ms }
        }
    }

    /// What was waiting here is taken back; what is in the log already stays there.
    fn end_attempt(&mut self) {
        self.is_unclear |= self.here.take().is_some_and(|claim| !claim.give_up());
    }
}

impl Registry {
    /// Applies one command. When it returns `Ok`, the change is on the disks of a majority of the voters and in
    /// [`Self::snapshot`]. A command whose caller stops waiting may still be carried out.
    ///
    /// # Errors
    /// Why the command was refused; [`RegistryError::OutcomeUnknown`], [`RegistryError::Storage`] and
    /// [`RegistryError::Unavailable`] leave open whether it was carried out; after [`RegistryError::CopyLate`] it was.
    pub async fn apply(&self, command: impl Into<Command>) -> Result<Applied, RegistryError> {
        let proposal = Proposal { id: CommandId::random(), command: command.into() };
        self.check_wrapped_key(&proposal.command)?;
        let bytes = size_of(&proposal)?;
        let credit = self.credit()?;
        let within = self.inner.ground.cluster.timing.apply_within;
        let mut tried = Tried::default();
        match timeout(within, self.drive(&proposal, bytes, &credit, &mut tried)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(tried.after(within)),
        }
    }

    fn credit(&self) -> Result<Arc<OwnedSemaphorePermit>, RegistryError> {
        let busy = |_| RegistryError::Busy { max: COMMANDS_WAITING_MAX };
        self.inner.credits.clone().try_acquire_owned().map(Arc::new).map_err(busy)
    }

    /// Asks whoever leads until there is an answer.
    async fn drive(
        &self,
        proposal: &Proposal,
        bytes: usize,
        credit: &Arc<OwnedSemaphorePermit>,
        tried: &mut Tried,
    ) -> Result<Applied, RegistryError> {
        let ground = &self.inner.ground;
        let mut status = ground.status.subscribe();
        let mut hint = None;
        loop {
            let leader = hint.take().or_else(|| status.borrow_and_update().leader.clone());
            let reply = match leader {
                Some(leader) if leader != ground.cluster.me => self.ask(&leader, proposal, tried, &mut status).await,
                // Alone among its voters, or between two leaders: the keeper knows.
                _ => Some(self.propose(proposal.clone(), bytes, credit.clone(), tried).await?),
            };
            match reply {
                Some(Ok(applied)) => {
                    self.show(applied.epoch).await?;
                    return Ok(applied);
                }
                // With others there, one that takes over may know.
                Some(Err(Refusal::Error(error))) if is_unclear(&error) && !ground.cluster.is_alone() => {
                    tried.is_unclear = true;
                }
                Some(Err(Refusal::Error(error))) => return Err(error),
                Some(Err(Refusal::NotLeader(leader))) => hint = leader,
                None => {}
            }
            // Woken early by a new leader.
            let _ = timeout(RETRY_AFTER, status.changed()).await;
        }
    }

    /// Gives the command to this node's keeper.
    async fn propose(
        &self,
        proposal: Proposal,
        bytes: usize,
        credit: Arc<OwnedSemaphorePermit>,
        tried: &mut Tried,
    ) -> Result<Reply, RegistryError> {
        let (reply, answer) = oneshot::channel();
        let claim = Claim::default();
        tried.here = Some(claim.clone());
        let job = Box::new(Job { proposal, bytes, reply, claim, credit });
        let actor = lock(&self.inner.actor).clone().ok_or(RegistryError::Unavailable)?;
        actor.send_message(RegistryMsg::Apply(job)).map_err(|_| RegistryError::Unavailable)?;
        let reply = answer.await.map_err(|_| RegistryError::Unavailable)?;
        tried.here = None;
        Ok(reply)
    }

    /// Asks another node. `None` when it gave no answer before another leader was found.
    async fn ask(
        &self,
        leader: &NodeId,
        proposal: &Proposal,
        tried: &mut Tried,
        status: &mut watch::Receiver<Status>,
    ) -> Option<Reply> {
        let within_ms = u64::try_from(ATTEMPT_WAIT_MAX.as_millis()).unwrap_or(u64::MAX);
        let message = network::encode(&Forwarded { proposal: proposal.clone(), within_ms });
        let was_unclear = std::mem::replace(&mut tried.is_unclear, true);
        let answer = tokio::select! {
            answer = self.inner.ground.cluster.transport.forward(leader, message, ATTEMPT_WAIT_MAX) => answer,
            _ = status.wait_for(|now| now.leader.as_ref().is_some_and(|now| now != leader)) => return None,
        };
        match answer.and_then(|bytes| network::decode::<Reply>(&bytes)) {
            Ok(Err(Refusal::Error(error))) if is_unclear(&error) => None,
            Ok(reply) => {
                tried.is_unclear = was_unclear;
                Some(reply)
            }
            Err(error) => {
                tracing::debug!(%leader, %error, "the registry's leader gave no answer");
                tried.is_unclear = was_unclear || matches!(error, TransportError::NoAnswer(_));
                None
            }
        }
    }

    /// Waits until this node's copy shows what was applied elsewhere.
    async fn show(&self, epoch: u64) -> Result<(), RegistryError> {
        let mut snapshots = self.subscribe();
        let shown = timeout(OWN_COPY_WAIT_MAX, snapshots.wait_for(|snapshot| snapshot.epoch() >= epoch)).await;
        shown.map(drop).map_err(|_| {
            tracing::warn!(epoch, "this node's copy of the registry is late");
            RegistryError::CopyLate { waited_ms: u64::try_from(OWN_COPY_WAIT_MAX.as_millis()).unwrap_or(u64::MAX) }
        })
    }

    /// A tenant whose key does not open here would make the whole registry unreadable.
    fn check_wrapped_key(&self, command: &Command) -> Result<(), RegistryError> {
        let Action::CreateTenant { spec, wrapped_key, .. } = &command.action else { return Ok(()) };
        self.secrets().unwrap(&spec.tenant, wrapped_key).map(drop).map_err(|error| RegistryError::Invalid {
            field: "wrapped_key".into(),
            found: "a key that does not open".to_owned(),
            rule: error.to_string(),
        })
    }

    /// Answers a command that another node forwarded because it takes this one for the leader. It is not passed on
    /// a second time. For the node's peer door; `message` comes from a node of this cluster.
    pub async fn on_forwarded(&self, message: &[u8]) -> Vec<u8> {
        network::encode(&self.take_forwarded(message).await.unwrap_or_else(|error| Err(Refusal::Error(error))))
    }

    async fn take_forwarded(&self, message: &[u8]) -> Result<Reply, RegistryError> {
        let invalid = |error: TransportError| RegistryError::Invalid {
            field: "command".into(),
            found: "bytes that are no command".to_owned(),
            rule: error.to_string(),
        };
        let Forwarded { proposal, within_ms } = network::decode(message).map_err(invalid)?;
        self.check_wrapped_key(&proposal.command)?;
        let bytes = size_of(&proposal)?;
        let credit = self.credit()?;
        let within = Duration::from_millis(within_ms).min(ATTEMPT_WAIT_MAX);
        let mut tried = Tried::default();
        let proposed = timeout(within, self.propose(proposal, bytes, credit, &mut tried)).await;
        match proposed {
            Ok(reply) => reply,
            Err(_) => {
                tried.end_attempt();
                if tried.is_unclear { Err(tried.after(within)) } else { Ok(Err(Refusal::NotLeader(None))) }
            }
        }
    }

    /// Answers a message of the agreement protocol from node `from`, as the transport has authenticated it. For the
    /// node's peer door.
    pub async fn on_raft(&self, from: &NodeId, message: &[u8]) -> Vec<u8> {
        let told = match network::decode(message) {
            Err(error) => Told::Refused(error.to_string()),
            Ok(message) => {
                let replica = self.inner.ground.replica.borrow().clone();
                match replica {
                    Some(replica) => replica.on_message(from, message).await,
                    None => Told::Refused("the registry is starting".to_owned()),
                }
            }
        };
        network::encode(&told)
    }
}

/// Whether a command may have been applied in spite of this error.
fn is_unclear(error: &RegistryError) -> bool {
    matches!(error, RegistryError::OutcomeUnknown { .. } | RegistryError::Storage(_) | RegistryError::Unavailable)
}

fn size_of(proposal: &Proposal) -> Result<usize, RegistryError> {
    let bytes = network::encode(proposal).len();
    if bytes <= COMMAND_BYTES_MAX {
        return Ok(bytes);
    }
    Err(RegistryError::Invalid {
        field: "command".into(),
        found: format!("{bytes} bytes"),
        rule: format!("use at most {COMMAND_BYTES_MAX} bytes"),
    })
}
