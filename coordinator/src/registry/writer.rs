//! The one thread that changes the registry: decides, writes to disk, publishes, answers.
//!
//! Commands that wait together are written together (one disk sync for all of them). Nothing is published or
//! answered before it is durable. After a failed write the outcome is unknown, so the store is opened and
//! read again before the next command. Started and watched by [`super::actor`].

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;

use tokio::sync::{OwnedSemaphorePermit, oneshot, watch};

use super::command::{Action, Applied, Command};
use super::error::RegistryError;
use super::secrets::Secrets;
use super::snapshot::Snapshot;
use super::state::{Change, RegistryState};
use super::store::{Store, StoreError};

/// Commands written with one disk sync: bounds how long the first of them waits.
const BATCH_MAX: usize = 128;

/// A command and where its answer goes.
pub(super) struct Job {
    pub(super) command: Command,
    pub(super) reply: oneshot::Sender<Result<Applied, RegistryError>>,
    /// The sender's credit, given back when the job is done.
    pub(super) credit: OwnedSemaphorePermit,
}

/// Everything the thread owns.
pub(super) struct Writer {
    dir: PathBuf,
    secrets: Arc<Secrets>,
    /// `None` after a failed write, until it is opened again.
    store: Option<Store>,
    state: RegistryState,
    published: Arc<watch::Sender<Arc<Snapshot>>>,
}

/// The registry's content as read from disk, before a writer runs.
pub(super) fn open(
    dir: &std::path::Path,
    secrets: &Arc<Secrets>,
) -> Result<(Store, RegistryState, Snapshot), RegistryError> {
    let opened = Store::open(dir, &secrets.fingerprint());
    let (store, state) = opened.map_err(|error| RegistryError::Open(error.to_string()))?;
    let snapshot = Snapshot::build(&state, secrets.clone()).map_err(|error| RegistryError::Open(error.to_string()))?;
    Ok((store, state, snapshot))
}

impl Writer {
    pub(super) fn new(
        dir: PathBuf,
        secrets: Arc<Secrets>,
        (store, state): (Store, RegistryState),
        published: Arc<watch::Sender<Arc<Snapshot>>>,
    ) -> Self {
        Self { dir, secrets, store: Some(store), state, published }
    }

    /// Works until every sender is gone.
    pub(super) fn run(mut self, jobs: &mpsc::Receiver<Job>) {
        while let Ok(first) = jobs.recv() {
            let batch: Vec<Job> = std::iter::once(first).chain(jobs.try_iter().take(BATCH_MAX - 1)).collect();
            self.work(batch);
        }
    }

    fn work(&mut self, batch: Vec<Job>) {
        if let Err(error) = self.ensure_open() {
            tracing::error!(%error, "registry stays closed");
            return answer_all(batch, &error);
        }
        let (mut answers, mut changes) = (Vec::with_capacity(batch.len()), Vec::new());
        for job in &batch {
            let decided = check_wrapped_key(&self.secrets, &job.command).and_then(|()| self.state.decide(&job.command));
            answers.push(decided.map(|decision| {
                changes.extend(decision.change.clone());
                let applied = decision.applied.clone();
                self.state.commit(decision);
                applied
            }));
        }
        if let Err(error) = self.persist(&changes) {
            tracing::error!(%error, "registry write failed; reading it again before the next command");
            self.store = None;
            return answer_all(batch, &RegistryError::Storage(error));
        }
        for (job, answer) in batch.into_iter().zip(answers) {
            drop(job.credit);
            // A caller that went away does not undo its command.
            let _ = job.reply.send(answer);
        }
    }

    /// Disk first, then readers.
    fn persist(&mut self, changes: &[Change]) -> Result<(), String> {
        if changes.is_empty() {
            return Ok(());
        }
        let store = self.store.as_mut().ok_or("the registry is closed")?;
        // Built before the write: what cannot be read must not reach the disk.
        let next = self.published.borrow().with(changes, self.state.epoch()).map_err(|error| error.to_string())?;
        store.write(changes, self.state.epoch()).map_err(|error| error.to_string())?;
        self.published.send_replace(Arc::new(next));
        if store.scrub_pending() {
            self.scrub();
        }
        Ok(())
    }

    /// The deletion itself is durable and published; a failure here is finished when the store opens again.
    fn scrub(&mut self) {
        let Some(store) = self.store.take() else { return };
        match store.scrub() {
            Ok(store) => self.store = Some(store),
            Err(error) => {
                tracing::error!(%error, "could not overwrite an erased tenant's key; it is tried again at the next command")
            }
        }
    }

    fn ensure_open(&mut self) -> Result<(), RegistryError> {
        if self.store.is_some() {
            return Ok(());
        }
        let (store, state, snapshot) = open(&self.dir, &self.secrets)?;
        (self.store, self.state) = (Some(store), state);
        self.published.send_replace(Arc::new(snapshot));
        tracing::warn!(epoch = self.state.epoch(), "registry was read again after a failed write");
        Ok(())
    }
}

/// A tenant whose key does not open here would make the whole registry unreadable.
fn check_wrapped_key(secrets: &Secrets, command: &Command) -> Result<(), RegistryError> {
    let Action::CreateTenant { spec, wrapped_key, .. } = &command.action else { return Ok(()) };
    secrets.unwrap(&spec.tenant, wrapped_key).map(drop).map_err(|error| RegistryError::Invalid {
        field: "wrapped_key",
        found: "a key that does not open".to_owned(),
        rule: error.to_string(),
    })
}

fn answer_all(batch: Vec<Job>, error: &RegistryError) {
    for job in batch {
        let _ = job.reply.send(Err(error.clone()));
    }
}

impl From<StoreError> for RegistryError {
    fn from(error: StoreError) -> Self {
        Self::Storage(error.to_string())
    }
}
