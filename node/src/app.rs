//! Hops 2 to 6 in one place: from a checked request to one that waits for its turn. Read this file first.
//!
//! [`App::submit`] composes the request path top to bottom. It never waits for an actor: contracts come from
//! the registry's published snapshot, rates from one short lock, turns from the queue's.

mod encode;
pub mod serve;
mod change;
mod claim;
mod resume;
mod follow;
pub mod upload;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ::wire::client::Have;
use ::wire::node::{Resident, ServedBase};
use adapters::Store;
use coordinator::admission::{Admission, Demand, RateStatus, Reservation};
use coordinator::auth::{AuthError, AuthedTenant, Scope};
use coordinator::journal::idempotency::{Claims, RequestIds};
use coordinator::registry::Registry;
use coordinator::resolve::{Target, resolve, visible_models};
use coordinator::route::{Place, no_node};
use parking_lot::Mutex;
use shared::adapter::{AdapterRef, Residency};
use shared::clock::Clock;
use shared::cluster::{NodeLoad, NodePhase};
use shared::config::{ClusterConfig, NodeConfig};
use shared::error::{ErrorKind, RequestError};
use shared::id::{BaseName, NodeId, RequestId, Route, TenantId};
use shared::request::{BasePin, Emitted, Envelope, Generation};
use shared::tenant::TenantContract;
use tokio::sync::{Notify, Semaphore, watch};

use crate::base_room::BaseRoom;
use crate::base_text::BaseText;
use crate::base_texts::BaseTexts;
use crate::cluster::{ClusterNode, member_spec, place};
use crate::gateway::backend::{
    Backend, CancelOnDrop, Check, Events, ModelCard, Prepared, RateState, Refused, Resumed, Running, Served,
    node_stopping,
};
use crate::metering::Tap;
use crate::metering::journal::Journal;
use crate::metrics;
use crate::prewarm::Prewarmer;

/// Long inputs encoded at once: each may take 0.7 s of a core and 140 MB for 1 MiB of text.
const ENCODING_AT_ONCE: usize = 2;

/// One node: everything a request needs, shared by all doors.
pub struct App {
    config: ClusterConfig,
    node: NodeConfig,
    clock: Arc<dyn Clock>,
    registry: Registry,
    admission: Arc<Mutex<Admission>>,
    rooms: BTreeMap<BaseName, Arc<BaseRoom>>,
    texts: Arc<BaseTexts>,
    store: Store,
    journal: Journal,
    cluster: Option<Arc<ClusterNode>>,
    draining: AtomicBool,
    /// True ends what still runs.
    stop: watch::Sender<bool>,
    /// An operator wants the node to end.
    asked_to_end: Notify,
    prewarmer: Prewarmer,
    request_ids: RequestIds,
    /// Requests with idempotency keys that clients of this node are waiting for.
    claims: Arc<Mutex<Claims>>,
    /// Places for encoding long inputs and compiling grammars, so that they never crowd out the engine.
    encoding: Semaphore,
    /// Places for checking uploads, each of which holds a whole file in memory.
    checking: Semaphore,
    /// Held from the change of an adapter's name to that of its file, so that two changes never cross.
    changing: tokio::sync::Mutex<()>,
}

/// The parts an [`App`] is made of.
pub struct AppParts {
    /// Cluster configuration.
    pub config: ClusterConfig,
    /// This node's part of it.
    pub node: NodeConfig,
    /// The reader of time.
    pub clock: Arc<dyn Clock>,
    /// Tenants.
    pub registry: Registry,
    /// Bases that this node hosts, by name.
    pub rooms: BTreeMap<BaseName, Arc<BaseRoom>>,
    /// What takes requests for all bases of the cluster.
    pub texts: Arc<BaseTexts>,
    /// Adapter files.
    pub store: Store,
    /// Usage records.
    pub journal: Journal,
    /// The other nodes; `None` for a node alone.
    pub cluster: Option<Arc<ClusterNode>>,
    /// Ids of requests with idempotency keys; the same at every node.
    pub request_ids: RequestIds,
}

// === impl App ===

impl App {
    /// Puts the parts together.
    pub fn new(parts: AppParts) -> Self {
        let AppParts { config, node, clock, registry, rooms, texts, store, journal, cluster, request_ids } = parts;
        let (draining, encoding) = (AtomicBool::new(false), Semaphore::new(ENCODING_AT_ONCE));
        let (checking, changing) = (Semaphore::new(upload::CHECKED_AT_ONCE), tokio::sync::Mutex::default());
        let (admission, stop) = (Arc::default(), watch::Sender::new(false));
        Self {
            config,
            node,
            clock,
            registry,
            admission,
            rooms,
            texts,
            store,
            journal,
            cluster,
            draining,
            stop,
            asked_to_end: Notify::new(),
            prewarmer: Prewarmer::default(),
            request_ids,
            claims: Arc::default(),
            encoding,
            checking,
            changing,
        }
    }

    /// Cluster configuration.
    pub fn config(&self) -> &ClusterConfig {
        &self.config
    }

    /// This node's part of it.
    pub fn node(&self) -> &NodeConfig {
        &self.node
    }

    /// Tenants.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Bases that this node hosts, by name.
    pub fn rooms(&self) -> &BTreeMap<BaseName, Arc<BaseRoom>> {
        &self.rooms
    }

    /// What takes requests for all bases of the cluster.
    pub fn texts(&self) -> &Arc<BaseTexts> {
        &self.texts
    }

    /// Adapter files.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Usage records.
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// The other nodes; `None` for a node alone.
    pub fn cluster(&self) -> Option<&Arc<ClusterNode>> {
        self.cluster.as_ref()
    }

    /// What is likely to be asked for here.
    pub fn prewarmer(&self) -> &Prewarmer {
        &self.prewarmer
    }

    /// Wall time since the Unix epoch.
    pub fn wall(&self) -> Duration {
        self.clock.wall()
    }

    /// Seconds since the Unix epoch, for records.
    pub fn wall_s(&self) -> u64 {
        self.clock.wall().as_secs()
    }

    /// Monotonic time.
    pub fn now(&self) -> Instant {
        self.clock.now()
    }

    /// From now on every new request is refused with a hint to go elsewhere.
    pub fn start_draining(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// The node ends as on SIGTERM, now or as soon as it listens for this.
    pub fn ask_to_end(&self) {
        self.asked_to_end.notify_one();
    }

    /// Ends when an operator wants the node to.
    pub async fn asked_to_end(&self) {
        self.asked_to_end.notified().await;
    }

    /// Ends what still runs with an error that says the node is stopping.
    pub fn fail_running(&self) {
        self.stop.send_replace(true);
    }

    /// Whether the node is stopping.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Tells the other nodes, if there are any, what this one does.
    pub fn say(&self, phase: NodePhase) {
        if let Some(cluster) = &self.cluster {
            cluster.say(phase, self.load());
        }
    }

    /// How busy the node is, all bases together.
    pub fn load(&self) -> NodeLoad {
        let mut load = NodeLoad::default();
        for room in self.rooms.values() {
            let engine = room.stats.load().snapshot();
            load.running += engine.sequences_running as u32;
            load.places += room.engine.scheduling.sequences_max as u32;
            load.waiting += room.queue.n_waiting() as u32;
        }
        load
    }

    /// Requests that wait or run.
    pub fn n_in_flight(&self) -> u64 {
        let of = |room: &Arc<BaseRoom>| room.queue.n_waiting() as u64 + room.stats.load().snapshot().requests;
        self.rooms.values().map(of).sum()
    }

    /// Adapters in the memory of this node's engines.
    pub fn residents(&self) -> Vec<Resident> {
        let of = |room: &Arc<BaseRoom>| {
            let (base, cache) = (room.name.clone(), &room.cache);
            let ready = |adapter: &AdapterRef| cache.residency(&adapter.id()) == Residency::Ready;
            let adapters = cache.residents().into_iter().map(|resident| resident.adapter).filter(ready);
            adapters.map(|adapter| Resident { base: base.clone(), adapter }).collect::<Vec<_>>()
        };
        self.rooms.values().flat_map(of).collect()
    }

    fn room(&self, base: &BaseName) -> Result<&Arc<BaseRoom>, RequestError> {
        self.rooms.get(base).ok_or_else(|| {
            RequestError::new(
                ErrorKind::Unavailable,
                "base_not_loaded",
                format!("this node does not serve the base {base}"),
            )
        })
    }

    /// What takes requests for a base, in the content that counts in this cluster.
    fn text(&self, base: &BaseName) -> Result<Arc<BaseText>, RequestError> {
        self.texts.get(base, self.agreed(base).map(|agreed| agreed.hash))
    }

    fn agreed(&self, base: &BaseName) -> Option<ServedBase> {
        self.cluster.as_ref()?.coordinator().tables().borrow().agreed(base).cloned()
    }

    /// False on a node that has just joined and has not heard of any tenant: what it does not know, others may.
    fn knows_tenants(&self) -> bool {
        self.registry.snapshot().epoch() > 0 || self.registry.status().borrow().leader.is_some()
    }

    /// False in the first second of a new cluster: its founder decides alone, and nobody could follow it yet.
    fn voters_vote(&self) -> bool {
        let status = self.registry.status();
        let members = &status.borrow().members;
        let votes = |node: &NodeId| members.iter().any(|member| member.votes && member.node == *node);
        self.registry.configured().iter().filter(|member| member.votes).all(|member| votes(&member.node))
    }

    /// Whether new work may come in, admitted here or at another node.
    pub(crate) fn check_works(&self) -> Result<(), RequestError> {
        if self.is_draining() { Err(node_stopping()) } else { Ok(()) }
    }

    /// Whether requests may be admitted here, whose usage this node records.
    fn check_open(&self) -> Result<(), RequestError> {
        let wait = Duration::from_secs(1);
        self.check_works()?;
        if !self.journal.is_healthy() {
            let message = "this node cannot record usage and admits nothing until it can; hint: retry later";
            return Err(RequestError::new(ErrorKind::Unavailable, "metering_unavailable", message).retry_after(wait));
        }
        Ok(())
    }

    async fn admit(&self, who: &AuthedTenant, mut request: Prepared) -> Result<Running, Refused> {
        // May this node and this key serve at all?
        self.check_open()?;
        who.require(Scope::Infer)?;
        let contract = self.registry.snapshot().contract(who).ok_or(AuthError::Invalid).map_err(RequestError::from)?;
        // Before any work is spent on it.
        self.admission.lock().look(&contract, self.clock.now()).map_err(refused)?;

        // Which weights? A name that is not the tenant's own goes nowhere.
        let target = resolve(&contract, &request.model)?;
        let place = place(&target.base, &contract);
        if self.cluster.is_none() && !place.admits(&member_spec(&self.node)) {
            return Err(no_node().into());
        }
        let text = self.text(&target.base)?;

        // What exactly is to be generated? Template, tokenizer, context, vocabulary, grammar.
        let mut generation = encode::encode(&text, &contract.tenant, &mut request, &self.encoding).await?;
        if request.max_tokens.is_none() {
            encode::clamp_answer(&mut generation, contract.limits.tokens_per_minute);
        }
        let generation = Arc::new(generation);

        // Rates. Everything taken here is given back if a later step refuses.
        let demand = Demand {
            n_prompt_tokens: generation.prompt.len() as u64,
            max_tokens: u64::from(generation.max_tokens),
            n: generation.n,
        };
        let now = self.clock.now();
        let admitted = self.admission.lock().admit(&contract, demand, now).map_err(refused)?;

        let reserved = Reserved::new(&self.admission, admitted.reservation);

        // Where does it run? Alone: here, and the queue answers at once (waiting, or 429). Otherwise where the
        // cluster says, and whatever is wrong there comes as an event.
        let envelope = self.envelope(who, &contract, &target, &request, Arc::clone(&generation), now);
        let pin = BasePin { hash: Some(text.info.hash), numerics: None };
        let envelope = Arc::new(Envelope { pin, ..envelope });
        let numerics = self.numerics(&text, &envelope, &place);
        let serving = match &self.cluster {
            Some(cluster) => {
                let answer = request.answering.take().map(|answering| self.kept(who, &contract, &request, answering));
                cluster.forward(Envelope::clone(&envelope), &contract, Emitted::default(), 0, answer)
            }
            None => match self.serve(Arc::clone(&envelope), Emitted::default(), 0).await {
                Ok(serving) => serving,
                Err(error) => return Err(Refused { error, rate: Some(rate_state(admitted.rate)) }),
            },
        };

        let tap = self.tap(who, &contract, &envelope, reserved.keep());
        let events = Events::new(serving.events, Box::new(tap)).until(self.stop.subscribe());
        Ok(running(&text, numerics, request.model, &envelope, events, Some(admitted.rate), serving.cancel))
    }

    /// Names the arithmetic of an answer: that of the tokens there are, or of the node that is likely to compute it.
    fn numerics(&self, text: &BaseText, envelope: &Envelope, place: &Place) -> String {
        let likely = || {
            let table = self.cluster.as_ref()?.coordinator().tables().borrow();
            let first = table.candidates(place, &envelope.route.tenant).into_iter().next()?;
            table.says(&first.node, &place.base).map(|said| said.numerics_id.clone())
        };
        envelope.pin.numerics.clone().or_else(likely).unwrap_or_else(|| text.info.numerics_id())
    }

    fn kept(&self, who: &AuthedTenant, contract: &TenantContract, request: &Prepared, answering: Vec<u8>) -> Vec<u8> {
        let (key, cost_center, model) = (who.key_id().to_string(), contract.cost_center.clone(), request.model.clone());
        resume::Kept { key, cost_center, model, answering }.write()
    }

    fn envelope(
        &self,
        who: &AuthedTenant,
        contract: &TenantContract,
        target: &Target,
        request: &Prepared,
        generation: Arc<Generation>,
        now: Instant,
    ) -> Envelope {
        let longest = Duration::from_millis(contract.limits.deadline_ms);
        Envelope {
            id: request.id,
            route: Route { tenant: contract.tenant.clone(), task: target.task.clone() },
            tier: contract.tier,
            weight: contract.weight,
            concurrency: contract.limits.concurrency,
            queue_depth: contract.limits.queue_depth,
            base: target.base.clone(),
            pin: BasePin::default(),
            adapter: target.adapter.clone(),
            fell_back: target.fell_back,
            cache_secret: *who.cache_secret(),
            generation,
            contract_epoch: contract.epoch,
            admitted_at: now,
            deadline: now + request.timeout.map_or(longest, |wanted| wanted.min(longest)),
        }
    }

    fn tap(
        &self,
        who: &AuthedTenant,
        contract: &TenantContract,
        envelope: &Arc<Envelope>,
        reservation: Reservation,
    ) -> Tap {
        let admission = Arc::clone(&self.admission);
        let settle = Box::new(move |used| match used {
            Some(used) => admission.lock().settle(reservation, used),
            None => admission.lock().undo(reservation),
        });
        let (key, cost_center) = (who.key_id().to_string(), contract.cost_center.clone());
        Tap::new(Arc::clone(envelope), key, cost_center, settle, self.journal.clone(), Arc::clone(&self.clock))
    }
}

impl Backend for App {
    type Who = AuthedTenant;

    fn authenticate(&self, bearer: &str) -> Result<AuthedTenant, RequestError> {
        if !self.knows_tenants() {
            let message = "this node has not heard of any tenant yet; hint: retry shortly, or ask another node";
            let error = RequestError::new(ErrorKind::Unavailable, "registry_unknown", message);
            return Err(error.retry_after(Duration::from_secs(1)));
        }
        self.registry.snapshot().authenticate(bearer, self.wall_s()).map_err(|error| {
            metrics::rejected(None, "invalid_api_key");
            error.into()
        })
    }

    fn tenant<'a>(&self, who: &'a AuthedTenant) -> &'a TenantId {
        who.tenant()
    }

    fn impersonation_refused(&self, who: &AuthedTenant) {
        tracing::warn!(tenant_id = %who.tenant(), key = %who.key_id(), "a request named another tenant than its key's");
        metrics::impersonation(who.tenant());
    }

    fn models(&self, who: &AuthedTenant) -> Vec<ModelCard> {
        let snapshot = self.registry.snapshot();
        let Some(view) = snapshot.tenant(who.tenant()) else { return Vec::new() };
        let record = view.record();
        let models = visible_models(view.contract()).into_iter().map(|model| {
            let context = self.text(&model.base).ok().map(|text| text.context);
            let stored = model.version.as_ref().and_then(|name| record.adapters.get(name));
            ModelCard {
                created: stored.map_or(record.created_at_s, |adapter| adapter.uploaded_at_s),
                owned_by: if stored.is_some() { record.tenant().to_string() } else { "tenantry".to_owned() },
                root: model.version.as_ref().map(ToString::to_string),
                parent: (model.id != model.base.as_str()).then(|| model.base.to_string()),
                max_model_len: context.map(|context| u32::try_from(context).unwrap_or(u32::MAX)),
                adapter_generation: stored.map(|adapter| adapter.hash.to_string()),
                id: model.id,
            }
        });
        models.collect()
    }

    async fn submit(&self, who: &AuthedTenant, request: Prepared) -> Result<Running, Refused> {
        let outcome = self.admit(who, request).await;
        if let Err(refused) = &outcome {
            metrics::rejected(Some((who.tenant(), who.contract().tier)), refused.error.code);
        }
        outcome
    }

    fn keeps_records(&self) -> bool {
        self.cluster.is_some()
    }

    fn request_id(&self, who: &AuthedTenant, key: &[u8]) -> RequestId {
        self.request_ids.of(who.tenant(), key)
    }

    async fn claim(&self, request: RequestId) -> Result<CancelOnDrop, RequestError> {
        self.claim_once(request).await
    }

    async fn resume(&self, who: &AuthedTenant, request: RequestId, have: &[Have]) -> Result<Resumed, RequestError> {
        self.go_on(who, request, have).await
    }

    fn checks(&self) -> Vec<Check> {
        let mut checks: Vec<Check> = Vec::new();
        for room in self.rooms.values() {
            let detail = format!("base {}", room.name);
            checks.push(Check { name: "engine_running", ok: room.is_up(), detail });
        }
        let backlog = self.journal.backlog();
        checks.push(Check {
            name: "usage_journal",
            ok: self.journal.is_healthy(),
            detail: format!("{backlog} records wait for the disk"),
        });
        checks.push(Check { name: "admitting", ok: !self.is_draining(), detail: String::new() });
        if let Some(cluster) = &self.cluster {
            let detail = "every other node has been heard, or waited for".to_owned();
            checks.push(Check { name: "cluster", ok: cluster.has_looked_round(), detail });
            let missing = |base: &BaseName| {
                self.text(base).is_err() && self.agreed(base).is_some_and(|agreed| agreed.text.is_some())
            };
            let ok = !self.config.bases.iter().any(|base| missing(&base.name));
            let detail = "the texts of all bases that other nodes offer are here".to_owned();
            checks.push(Check { name: "base_texts", ok, detail });
            let detail = "tenants are known, and every voter of the cluster file votes".to_owned();
            checks.push(Check { name: "registry", ok: self.knows_tenants() && self.voters_vote(), detail });
        }
        checks
    }

    fn clock(&self) -> &dyn Clock {
        self.clock.as_ref()
    }
}

/// Rates taken for a request that is not on its way yet; given back when dropped.
struct Reserved<'a> {
    admission: &'a Mutex<Admission>,
    reservation: Option<Reservation>,
}

impl<'a> Reserved<'a> {
    fn new(admission: &'a Mutex<Admission>, reservation: Reservation) -> Self {
        Self { admission, reservation: Some(reservation) }
    }

    fn keep(mut self) -> Reservation {
        self.reservation.take().expect("kept once")
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if let Some(reservation) = self.reservation.take() {
            self.admission.lock().undo(reservation);
        }
    }
}

fn running(
    text: &BaseText,
    numerics_id: String,
    model: String,
    envelope: &Envelope,
    events: Events,
    rate: Option<RateStatus>,
    cancel: CancelOnDrop,
) -> Running {
    let served = Served {
        model,
        base: envelope.base.to_string(),
        adapter: envelope.adapter.as_ref().map(|pin| pin.name.to_string()),
        adapter_hash: envelope.adapter.as_ref().map(|pin| pin.hash.to_string()),
        fell_back: envelope.fell_back,
        numerics_id,
    };
    Running {
        events,
        cancel,
        served,
        prompt_tokens: Arc::clone(&envelope.generation.prompt),
        token_text: Arc::new(encode::TokenTexts(Arc::clone(&text.vocabulary))),
        rate: rate.map(rate_state),
    }
}

fn refused(refused: coordinator::admission::Refused) -> Refused {
    Refused { error: *refused.error, rate: refused.rate.map(rate_state) }
}

fn rate_state(rate: RateStatus) -> RateState {
    RateState {
        limit_requests: rate.limit_requests,
        remaining_requests: rate.remaining_requests,
        reset_requests: rate.reset_requests,
        limit_tokens: rate.limit_tokens,
        remaining_tokens: rate.remaining_tokens,
        reset_tokens: rate.reset_tokens,
    }
}
