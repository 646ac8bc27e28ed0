//! The texts of all bases of the cluster, so that this node takes requests for each: its own, and copies of the others'.
//!
//! A text that this node's bases do not bring is fetched from a node that hosts its base, in the background from the start
//! on and again when somebody asks for it, and kept in the data folder under its hash, so that the next start needs
//! nobody. Nodes say in their hello which content and which text of a base they serve; the cluster's view settles which of
//! them counts ([`RoutingTable::agreed`](coordinator::route::RoutingTable::agreed)). Until the text of that content is
//! here, requests for the base are told to come back.

mod fetch;

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use coordinator::membership::detector::Health;
use coordinator::route::RoutingTable;
use model::info::Numerics;
use model::text::TEXT_BYTES_MAX;
use peer::PeerNet;
use shared::config::{BaseConfig, ClusterConfig};
use shared::error::{ErrorKind, RequestError};
use shared::hash::ContentHash;
use shared::id::{BaseName, NodeId, TenantId};
use tokio::sync::Notify;
use wire::node::{Request, Response, ServedBase, TEXT_PIECE_BYTES, TextPiece};

use self::fetch::{FetchError, Source, fetch};
use crate::app::App;
use crate::base_text::{BaseText, Block};

/// Longest wait for a piece of a MiB.
const PIECE_WITHIN: Duration = Duration::from_secs(5);
/// Pause after a text could not be fetched, unless somebody asks for it.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Shortest pause between two looks.
const PAUSE: Duration = Duration::from_millis(100);
/// A client may come back after this: a text is there within a second of a connection to a host.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The texts of this node.
pub struct BaseTexts {
    held: BTreeMap<BaseName, ArcSwapOption<BaseText>>,
    folder: PathBuf,
    /// Somebody asks for what is not here.
    wanted: Notify,
}

// === impl BaseTexts ===

impl BaseTexts {
    /// `own` are those of the bases that this node hosts; the others are read from `folder`, as far as they are there.
    pub fn open(config: &ClusterConfig, folder: PathBuf, own: &[Arc<BaseText>]) -> Self {
        let text = |base: &BaseConfig| {
            let own = own.iter().find(|text| text.name == base.name).cloned();
            own.or_else(|| read_copy(&folder, base, config).map(Arc::new))
        };
        let held = config.bases.iter().map(|base| (base.name.clone(), ArcSwapOption::from(text(base))));
        Self { held: held.collect(), folder, wanted: Notify::new() }
    }

    /// The text of a base. `agreed` is the content that counts in the cluster, where that is known.
    ///
    /// # Errors
    /// 503 as long as it is not here.
    pub fn get(&self, base: &BaseName, agreed: Option<ContentHash>) -> Result<Arc<BaseText>, RequestError> {
        let held = self.held.get(base).and_then(ArcSwapOption::load_full);
        if let Some(text) = held.filter(|text| agreed.is_none_or(|agreed| agreed == text.info.hash)) {
            return Ok(text);
        }
        self.wanted.notify_one();
        let message = format!(
            "this node has not fetched the tokenizer and chat template of the base {base} from a node that hosts it yet; hint: retry shortly, or ask another node"
        );
        Err(RequestError::new(ErrorKind::Unavailable, "base_text_missing", message).retry_after(RETRY_AFTER))
    }

    /// A piece of a text that is here, for a node that fetches it.
    ///
    /// # Errors
    /// 404 when it is not here, or has nothing at that offset.
    pub fn piece(&self, text: ContentHash, offset: u64) -> Result<TextPiece, RequestError> {
        let block = self.all().find(|held| held.block.hash == text).map(|held| held.block.bytes.clone());
        let missing = || RequestError::new(ErrorKind::NotFound, "not_found", format!("this node has no text {text}"));
        let bytes = block.ok_or_else(missing)?;
        let from = usize::try_from(offset).ok().filter(|from| *from < bytes.len()).ok_or_else(missing)?;
        let piece = bytes.slice(from..bytes.len().min(from.saturating_add(TEXT_PIECE_BYTES)));
        Ok(TextPiece { total: bytes.len() as u64, bytes: piece.into() })
    }

    /// A tenant is gone: its grammars go.
    pub fn forget(&self, tenant: &TenantId) {
        self.all().for_each(|text| text.grammars.forget(tenant));
    }

    fn all(&self) -> impl Iterator<Item = Arc<BaseText>> {
        self.held.values().filter_map(ArcSwapOption::load_full)
    }
}

/// Keeps the texts of `app` what the cluster agrees on, until it ends. Does nothing for a node alone.
pub fn spawn(app: &Arc<App>) {
    let Some(cluster) = app.cluster() else { return };
    let (weak, mut tables) = (Arc::downgrade(app), cluster.coordinator().tables());
    tokio::spawn(async move {
        let mut said = BTreeMap::new();
        loop {
            let Some(app) = weak.upgrade() else { return };
            let is_complete = look(&app, &tables.borrow_and_update(), &mut said).await;
            let texts = Arc::clone(app.texts());
            drop(app);
            tokio::time::sleep(PAUSE).await;
            tokio::select! {
                () = texts.wanted.notified() => {}
                () = tables.changed(), if is_complete => {}
                () = tokio::time::sleep(AGAIN_AFTER), if !is_complete => {}
            }
        }
    });
}

/// Fetches what is missing. `said` holds what was logged of each base. True when nothing that is offered is missing.
async fn look(app: &Arc<App>, table: &RoutingTable, said: &mut BTreeMap<BaseName, String>) -> bool {
    let mut is_complete = true;
    for base in &app.config().bases {
        let Some(agreed) = table.agreed(&base.name) else { continue };
        let Some(slot) = app.texts().held.get(&base.name) else { continue };
        if slot.load().as_ref().is_some_and(|text| text.info.hash == agreed.hash) {
            continue;
        }
        let own = app.rooms().get(&base.name).map(|room| &room.text);
        if let Some(own) = own.filter(|own| own.info.hash == agreed.hash) {
            slot.store(Some(Arc::clone(own)));
            continue;
        }
        match obtain(app, table, base, agreed).await {
            Ok(text) => {
                tracing::info!(base = %base.name, hash = %agreed.hash.short(), bytes = text.block.bytes.len(), "fetched a base's text: requests for it are taken");
                said.remove(&base.name);
                slot.store(Some(Arc::new(text)));
            }
            Err(error) => {
                is_complete = false;
                let error = format!("{error:#}");
                // In the first moments nobody is connected yet.
                let is_news = said.get(&base.name) != Some(&error);
                if is_news && app.cluster().is_some_and(|cluster| cluster.has_looked_round()) {
                    tracing::warn!(base = %base.name, error, "a base's text cannot be fetched: requests for it are refused here");
                    said.insert(base.name.clone(), error);
                }
            }
        }
    }
    is_complete
}

async fn obtain(
    app: &Arc<App>,
    table: &RoutingTable,
    base: &BaseConfig,
    agreed: &ServedBase,
) -> anyhow::Result<BaseText> {
    let (Some(cluster), Some(wanted)) = (app.cluster(), agreed.text) else {
        anyhow::bail!("the nodes that host it speak an older wire version; hint: upgrade them");
    };
    let hosts = hosts(table, agreed);
    let bytes = fetch(&Peers(cluster.net()), &hosts, wanted).await?;
    let (app, base, hash) = (Arc::clone(app), base.clone(), agreed.hash);
    let made = tokio::task::spawn_blocking(move || {
        let text = understand(bytes.into(), &base, app.config())?;
        anyhow::ensure!(text.info.hash == hash, "it belongs to the content {}, not to {hash}", text.info.hash);
        if let Err(error) = keep(&app.texts().folder, &text) {
            tracing::warn!(base = %base.name, %error, "a base's text cannot be kept: the next start fetches it again");
        }
        Ok(text)
    });
    made.await?
}

/// Living nodes that have the text, other than this one.
fn hosts(table: &RoutingTable, agreed: &ServedBase) -> Vec<NodeId> {
    let lives = |health| !matches!(health, Health::Dead | Health::Absent);
    let has = |node: &NodeId| table.says(node, &agreed.name).is_some_and(|said| said.text == agreed.text);
    let others = table.members().iter().filter(|(node, member)| *node != table.me() && lives(member.health));
    others.map(|(node, _)| node).filter(|node| has(node)).cloned().collect()
}

/// The other nodes as where texts come from.
struct Peers<'a>(&'a PeerNet);

impl Source for Peers<'_> {
    async fn piece(&self, host: &NodeId, text: ContentHash, offset: u64) -> Result<TextPiece, FetchError> {
        let failed = |reason: String| FetchError::Answer { host: host.clone(), reason };
        match self.0.call(host, &Request::BaseText { text, offset }, PIECE_WITHIN).await {
            Ok(Response::BaseText(piece)) => Ok(piece),
            Ok(Response::Refused(error)) => Err(failed(error.message.into_owned())),
            Ok(_) => Err(failed("it answered something else".to_owned())),
            Err(error) => Err(failed(error.to_string())),
        }
    }
}

fn understand(block: Block, base: &BaseConfig, config: &ClusterConfig) -> anyhow::Result<BaseText> {
    // Which device computes it is its hosts' affair; what is served of it is the same for all.
    let numerics = if base.exact { Numerics::Exact } else { Numerics::Fast };
    let text = model::text::read(&block.bytes, numerics)?;
    BaseText::new(base.name.clone(), text, block, config)
}

// === on disk: `<base>.<hash>`, one of each base ===

fn copies(folder: &Path, base: &BaseName) -> Vec<(PathBuf, String)> {
    let prefix = format!("{base}.");
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let copy = |file: std::fs::DirEntry| {
        // The names of other bases may begin in the same way; what follows is no hash then.
        let hash = file.file_name().to_str()?.strip_prefix(&prefix)?.to_owned();
        (hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| (file.path(), hash))
    };
    files.filter_map(copy).collect()
}

/// The copy that an earlier life of this node kept, unless it was damaged since.
fn read_copy(folder: &Path, base: &BaseConfig, config: &ClusterConfig) -> Option<BaseText> {
    copies(folder, &base.name).into_iter().find_map(|(path, hash)| {
        let read = || -> anyhow::Result<BaseText> {
            let n_bytes = std::fs::metadata(&path)?.len();
            anyhow::ensure!(n_bytes <= TEXT_BYTES_MAX, "{n_bytes} bytes, the limit is {TEXT_BYTES_MAX}");
            let block = Block::from(std::fs::read(&path)?);
            anyhow::ensure!(block.hash.to_string() == hash, "its content is not what its name says");
            understand(block, base, config)
        };
        read().inspect_err(|error| tracing::warn!(file = %path.display(), %error, "a base's text is fetched anew")).ok()
    })
}

/// Appears complete or not at all; the copy before it goes.
fn keep(folder: &Path, text: &BaseText) -> std::io::Result<()> {
    let name = format!("{}.{}", text.name, text.block.hash);
    let (path, temporary) = (folder.join(&name), folder.join(format!("{name}.new")));
    std::fs::create_dir_all(folder)?;
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(&text.block.bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, &path)?;
    for (before, _) in copies(folder, &text.name).into_iter().filter(|(copy, _)| *copy != path) {
        std::fs::remove_file(before)?;
    }
    std::fs::File::open(folder)?.sync_all()
}
