//! Everything of a base that takes requests and no weights: tokenizer, template, vocabulary, grammars, longest sequence.
//!
//! A node has one for every base of its cluster, so that any node takes any request, and a
//! [`BaseRoom`](crate::base_room::BaseRoom) only for those it hosts, which shares its text. [`crate::base_texts`] says
//! where those of other bases come from.

use std::sync::Arc;

use bytes::Bytes;
use kernels::kv::PAGE_TOKENS;
use model::base::BaseModel;
use model::info::ModelInfo;
use model::template::ChatTemplate;
use model::text::ModelText;
use model::tokenizer::Tokenizer;
use scheduler::grammar::GrammarCompiler;
use scheduler::vocab::Vocabulary;
use shared::config::ClusterConfig;
use shared::hash::ContentHash;
use shared::id::BaseName;

/// The text of one base.
pub struct BaseText {
    /// Name that requests use.
    pub name: BaseName,
    /// Facts of the model.
    pub info: ModelInfo,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Chat template, when the model has one.
    pub template: Option<Arc<ChatTemplate>>,
    /// Text and kinds of its tokens.
    pub vocabulary: Arc<Vocabulary>,
    /// Compiles answer constraints.
    pub grammars: GrammarCompiler,
    /// Longest sequence served: the model's context, or what the KV memory holds if that is less.
    pub context: usize,
    /// The same as bytes, for nodes that do not host the base.
    pub block: Block,
}

/// A text as it travels.
#[derive(Debug, Clone)]
pub struct Block {
    /// What [`model::text::pack`] made.
    pub bytes: Bytes,
    /// Their hash.
    pub hash: ContentHash,
}

// === impl Block ===

impl From<Vec<u8>> for Block {
    fn from(bytes: Vec<u8>) -> Self {
        let hash = ContentHash::of(&bytes);
        Self { bytes: bytes.into(), hash }
    }
}

// === impl BaseText ===

impl BaseText {
    /// The text of a model that is loaded here.
    ///
    /// # Errors
    /// When the tokenizer cannot drive grammars.
    pub fn of(name: BaseName, model: &BaseModel, block: Block, config: &ClusterConfig) -> anyhow::Result<Self> {
        let BaseModel { info, tokenizer, template, .. } = model;
        let text = ModelText { info: info.clone(), tokenizer: tokenizer.clone(), template: template.clone() };
        Self::new(name, text, block, config)
    }

    /// Makes ready what requests need. Takes seconds for a large vocabulary.
    ///
    /// # Errors
    /// When the tokenizer cannot drive grammars.
    pub fn new(name: BaseName, text: ModelText, block: Block, config: &ClusterConfig) -> anyhow::Result<Self> {
        let ModelText { info, tokenizer, template } = text;
        let vocabulary = Arc::new(vocabulary(&info, &tokenizer));
        let grammars = GrammarCompiler::new(&vocabulary)?;
        let context = context(&info, config);
        Ok(Self { name, info, tokenizer, template, vocabulary, grammars, context, block })
    }
}

/// Text and kinds of a model's tokens.
pub fn vocabulary(info: &ModelInfo, tokenizer: &Tokenizer) -> Vocabulary {
    let n_tokens = u32::try_from(info.vocab.max(tokenizer.vocab_size())).unwrap_or(u32::MAX);
    let spelling = |id: u32| match tokenizer.special_text(id) {
        Some(text) => (text.as_bytes().to_vec(), true),
        None => (tokenizer.token_bytes(id).to_vec(), false),
    };
    Vocabulary::new((0..n_tokens).map(spelling), info.eos.clone())
}

/// The same at every node: all have one configuration.
fn context(info: &ModelInfo, config: &ClusterConfig) -> usize {
    info.context.min(kv_pages(info, config) * PAGE_TOKENS)
}

/// Pages of the engine's KV memory.
pub fn kv_pages(info: &ModelInfo, config: &ClusterConfig) -> usize {
    config.engine.kv_bytes / model::forward::kv_layout(info).bytes_per_page().max(1)
}
