//! Constraints on the text of an answer: compiled off the engine thread, applied as a mask per token.
//!
//! The node calls [`GrammarCompiler::compile`] at admission and puts the result into
//! [`crate::source::Work`]; the engine clones a [`GrammarState`] per choice. A state is a function of the emitted
//! tokens, so that a request can be resumed anywhere. Limits come before work: size, depth, fuel and time
//! (RELIABILITY T4). Compiled grammars are remembered in memory only, per tenant, never across tenants.

mod pool;
mod numbers;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use shared::error::{ErrorKind, RequestError};
use shared::hash::ContentHash;
use shared::id::TenantId;
use shared::request::Grammar;
use tokio::sync::oneshot;
use tokio::time::timeout;
use toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};

use self::pool::{Full, JOBS_PER_TENANT_MAX, Pool};
use crate::vocab::Vocabulary;

/// Longest grammar text in bytes: real schemas are below 20 KiB.
pub const GRAMMAR_BYTES_MAX: usize = 64 * 1024;
/// Deepest nesting of a schema, as of a request body: compiling recurses with it.
pub const SCHEMA_DEPTH_MAX: usize = 32;
/// Longest a caller waits for a compilation; larger grammars are refused, not awaited.
const COMPILE_TIME_MAX: Duration = Duration::from_millis(200);
/// Longest a grammar waits for its turn: with the above, every schema is decided within a second.
const TURN_WAIT_MAX: Duration = Duration::from_millis(500);
/// Compiled grammars kept per tenant: a client uses a handful.
const KEPT_PER_TENANT_MAX: usize = 16;
/// Compiled grammars kept in all: a compiled schema takes up to a few MB.
const KEPT_MAX: usize = 256;
/// Longest error text passed on from the grammar library.
const MESSAGE_CHARS_MAX: usize = 300;

/// Why a constraint cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// The client should send a smaller schema.
    #[error("the grammar has {bytes} bytes, at most {GRAMMAR_BYTES_MAX} are allowed")]
    TooLarge {
        /// Size found.
        bytes: usize,
    },
    /// The client should flatten the schema.
    #[error("the schema nests deeper than {SCHEMA_DEPTH_MAX} levels")]
    TooDeep,
    /// The client should fix or simplify the schema; the text says where.
    #[error("the grammar was refused: {0}")]
    Refused(String),
    /// The client should simplify the schema.
    #[error("compiling the grammar takes longer than 200 ms; hint: use fewer alternatives and bounded repetitions")]
    TooSlow,
    /// Other tenants' grammars, or an earlier one of this tenant, keep the compilers busy; the client should retry.
    #[error("the grammar compilers are busy; hint: retry after the Retry-After header")]
    Busy,
    /// This tenant sends grammars faster than they compile; the client should reuse fewer, simpler schemas.
    #[error(
        "{JOBS_PER_TENANT_MAX} grammars of this tenant are being compiled already; hint: reuse schemas, they are remembered, or retry after the Retry-After header"
    )]
    TooMany,
    /// The constraint ran into its limits while the answer was written.
    #[error("the grammar became too complex while generating: {0}")]
    TooComplex(String),
}

impl GrammarError {
    /// What the client is told; `param` is the request field that carried the grammar.
    pub fn to_request_error(&self, param: &'static str) -> RequestError {
        let (kind, code, retry) = match self {
            Self::TooLarge { .. } | Self::TooDeep | Self::Refused(_) | Self::TooSlow => {
                (ErrorKind::Invalid, "invalid_schema", false)
            }
            Self::Busy => (ErrorKind::Unavailable, "grammar_compiler_busy", true),
            Self::TooMany => (ErrorKind::Throttled, "too_many_grammars", true),
            Self::TooComplex(_) => (ErrorKind::Unprocessable, "grammar_too_complex", false),
        };
        let error = RequestError { param: Some(param.into()), ..RequestError::new(kind, code, self.to_string()) };
        // A compiler is free again within this time, whatever it works on.
        if retry { error.retry_after(Duration::from_secs(1)) } else { error }
    }
}

/// A grammar ready to start answers from; cheap to clone.
#[derive(Clone)]
pub struct CompiledGrammar(Arc<Mutex<Matcher>>);

impl CompiledGrammar {
    /// The state at the start of an answer.
    pub fn start(&self) -> GrammarState {
        // A deep clone keeps one answer's lexer states, which count against a limit, from another's.
        let matcher = self.0.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        GrammarState { matcher }
    }
}

impl fmt::Debug for CompiledGrammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CompiledGrammar")
    }
}

/// Where one answer stands in its grammar.
pub struct GrammarState {
    matcher: Matcher,
}

impl GrammarState {
    /// The tokens that may follow; only end-of-answer tokens when the grammar is complete.
    ///
    /// # Errors
    /// When the grammar exceeds its step limits.
    pub fn mask(&mut self) -> Result<SimpleVob, GrammarError> {
        self.matcher.compute_mask_or_eos().map_err(|error| GrammarError::TooComplex(first_line(&error.to_string())))
    }

    /// Advances by a token.
    ///
    /// # Errors
    /// When the token does not follow the grammar or a limit is exceeded.
    pub fn commit(&mut self, id: u32) -> Result<(), GrammarError> {
        self.matcher.consume_token(id).map_err(|error| GrammarError::TooComplex(first_line(&error.to_string())))
    }

    /// True when nothing but the end of the answer may follow.
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped()
    }
}

impl fmt::Debug for GrammarState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GrammarState({:?})", self.matcher.stop_reason())
    }
}

/// Compiles grammars for one base model.
pub struct GrammarCompiler {
    factory: Arc<ParserFactory>,
    kept: Mutex<Kept>,
    pool: Pool,
}

impl fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GrammarCompiler")
    }
}

impl GrammarCompiler {
    /// A compiler for this vocabulary; takes some 100 ms for 50,000 tokens.
    ///
    /// # Errors
    /// When the vocabulary is empty, has no end-of-answer token or cannot be indexed.
    pub fn new(vocabulary: &Vocabulary) -> Result<Self, GrammarError> {
        let env = token_env(vocabulary)?;
        let mut factory = ParserFactory::new_simple(&env).map_err(|error| refused(&error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        let pool = Pool::start().map_err(|error| refused(&format!("no thread to compile on: {error}")))?;
        Ok(Self { factory: Arc::new(factory), kept: Mutex::default(), pool })
    }

    /// The grammar, compiled or remembered from this tenant's earlier requests. Waits up to 700 ms in the worst
    /// case (500 ms for its turn, 200 ms for compiling); needs a tokio timer.
    ///
    /// # Errors
    /// See [`GrammarError`].
    pub async fn compile(&self, tenant: &TenantId, grammar: &Grammar) -> Result<CompiledGrammar, GrammarError> {
        let (tag, text) = match grammar {
            Grammar::JsonObject => (0, ""),
            Grammar::JsonSchema(text) => (1, text.as_str()),
            Grammar::Lark(text) => (2, text.as_str()),
        };
        if text.len() > GRAMMAR_BYTES_MAX {
            return Err(GrammarError::TooLarge { bytes: text.len() });
        }
        let key = ContentHash::of(&[&[tag], text.as_bytes()].concat());
        if let Some(found) = self.kept().find(tenant, key) {
            return Ok(found);
        }
        let compiled = self.compile_in_turn(tenant, grammar.clone()).await?;
        self.kept().insert(tenant, key, compiled.clone());
        Ok(compiled)
    }

    /// Forgets what a tenant compiled (erasure, suspension).
    pub fn forget(&self, tenant: &TenantId) {
        self.kept().tenants.remove(tenant);
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Compiles on the pool, because fuel bounds the work but not exactly the time.
    async fn compile_in_turn(&self, tenant: &TenantId, grammar: Grammar) -> Result<CompiledGrammar, GrammarError> {
        let (begin, begun) = oneshot::channel();
        let (done, result) = oneshot::channel();
        let factory = Arc::clone(&self.factory);
        let work = move || {
            // A caller that gave up, or whose client left, wants nothing.
            if begin.send(()).is_ok() {
                drop(done.send(compile_now(&factory, &grammar)));
            }
        };
        self.pool.submit(tenant, work).map_err(|full| match full {
            Full::Tenant => GrammarError::TooMany,
            Full::All => GrammarError::Busy,
        })?;
        let failed = || refused("the compiler failed on it");
        match timeout(TURN_WAIT_MAX, begun).await {
            Ok(begun) => begun.map_err(|_| failed())?,
            Err(_) => return Err(GrammarError::Busy),
        }
        match timeout(COMPILE_TIME_MAX, result).await {
            Ok(matcher) => Ok(CompiledGrammar(Arc::new(Mutex::new(matcher.map_err(|_| failed())??)))),
            Err(_) => Err(GrammarError::TooSlow),
        }
    }
}

fn compile_now(factory: &ParserFactory, grammar: &Grammar) -> Result<Matcher, GrammarError> {
    let parser = factory.create_parser(top_level(grammar)?).map_err(|error| refused(&error.to_string()))?;
    let matcher = Matcher::new(Ok(parser));
    matcher.get_error().map_or(Ok(matcher), |error| Err(refused(&error)))
}

/// Least recently used first out, per tenant and in all.
#[derive(Default)]
struct Kept {
    tenants: BTreeMap<TenantId, Vec<(u64, ContentHash, CompiledGrammar)>>,
    uses: u64,
}

impl Kept {
    fn find(&mut self, tenant: &TenantId, key: ContentHash) -> Option<CompiledGrammar> {
        self.uses += 1;
        let (used, _, grammar) = self.tenants.get_mut(tenant)?.iter_mut().find(|(_, found, _)| *found == key)?;
        *used = self.uses;
        Some(grammar.clone())
    }

    fn insert(&mut self, tenant: &TenantId, key: ContentHash, grammar: CompiledGrammar) {
        self.uses += 1;
        let entries = self.tenants.entry(tenant.clone()).or_default();
        entries.retain(|(_, found, _)| *found != key);
        entries.push((self.uses, key, grammar));
        if entries.len() > KEPT_PER_TENANT_MAX {
            remove_oldest(entries);
        }
        while self.tenants.values().map(Vec::len).sum::<usize>() > KEPT_MAX {
            let oldest = |entries: &Vec<(u64, ContentHash, CompiledGrammar)>| entries.iter().map(|entry| entry.0).min();
            let owner =
                self.tenants.iter().filter_map(|(tenant, entries)| Some((oldest(entries)?, tenant.clone()))).min();
            let (_, owner) = owner.expect("more than KEPT_MAX entries exist");
            remove_oldest(self.tenants.get_mut(&owner).expect("found above"));
        }
        self.tenants.retain(|_, entries| !entries.is_empty());
    }
}

fn remove_oldest(entries: &mut Vec<(u64, ContentHash, CompiledGrammar)>) {
    if let Some(at) = (0..entries.len()).min_by_key(|&at| entries[at].0) {
        entries.swap_remove(at);
    }
}

/// Far below the library's defaults, which allow half a gigabyte of lexer states for one request.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 1_000,
        // At 50,000 units a millisecond: 10 ms.
        initial_lexer_fuel: 500_000,
        // At 14,000 units a millisecond: 5 ms for the worst mask.
        step_lexer_fuel: 70_000,
        // At 20,000 items a millisecond: 1 ms.
        step_max_items: 20_000,
        // At 1-2 KB a state: 20-40 MB.
        max_lexer_states: 20_000,
        max_grammar_size: 100_000,
        precompute_large_lexemes: false,
        // Verbose errors would carry the answer's text.
        verbose_errors: false,
    }
}

fn top_level(grammar: &Grammar) -> Result<TopLevelGrammar, GrammarError> {
    match grammar {
        Grammar::JsonObject => Ok(TopLevelGrammar::from_json_schema(json!({"type": "object"}))),
        Grammar::JsonSchema(text) => {
            let schema: Value = serde_json::from_str(text).map_err(|error| refused(&format!("not JSON: {error}")))?;
            if depth(&schema) > SCHEMA_DEPTH_MAX {
                return Err(GrammarError::TooDeep);
            }
            numbers::check(&schema).map_err(|message| refused(&message))?;
            Ok(TopLevelGrammar::from_json_schema(schema))
        }
        Grammar::Lark(text) => Ok(TopLevelGrammar::from_lark(text.clone())),
    }
}

/// Nesting depth; recursion is bounded by the JSON parser's own limit of 128.
fn depth(value: &Value) -> usize {
    let inner = match value {
        Value::Array(items) => items.iter().map(depth).max(),
        Value::Object(fields) => fields.values().map(depth).max(),
        _ => return 0,
    };
    1 + inner.unwrap_or(0)
}

/// The library's view of the vocabulary. Control tokens carry its marker byte, so that no text grammar can
/// produce them; the tokenization is declared not canonical, so that it never forces tokens of its own choice.
fn token_env(vocabulary: &Vocabulary) -> Result<TokEnv, GrammarError> {
    let eos = vocabulary.eos();
    let n_tokens =
        u32::try_from(vocabulary.n_tokens()).map_err(|_| refused("the vocabulary has 2^32 tokens or more"))?;
    let Some(&first) = eos.first() else {
        return Err(refused("the vocabulary has no end-of-answer token"));
    };
    let word = |id: u32| {
        let bytes = vocabulary.spelling(id);
        // The library cannot hold longer tokens in its trie; no grammar needs them.
        if bytes.len() > 255 {
            Vec::new()
        } else if vocabulary.is_special(id) || eos.contains(&id) {
            [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
        } else {
            bytes.to_vec()
        }
    };
    let words: Vec<Vec<u8>> = (0..n_tokens).map(word).collect();
    let trie = TokTrie::from(&TokRxInfo::new(n_tokens, first), &words).with_eos_tokens(eos);
    Ok(Arc::new(ApproximateTokEnv::new(trie)))
}

fn refused(message: &str) -> GrammarError {
    GrammarError::Refused(first_line(message))
}

fn first_line(message: &str) -> String {
    message.lines().next().unwrap_or_default().chars().take(MESSAGE_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests;
