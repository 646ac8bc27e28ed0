//! From the client's words to what the engine runs: prompt tokens, lengths that fit, a grammar that compiles.
//!
//! Everything that needs the model's tokenizer, template, context or vocabulary is checked here; the rest was
//! checked by the gateway. Long texts are encoded on a blocking thread.

use std::borrow::Cow;
use std::sync::Arc;

use model::template::encode_chat;
use scheduler::vocab::Vocabulary;
use shared::error::RequestError;
use shared::id::TenantId;
use shared::request::{Generation, Sampling};
use tokio::sync::Semaphore;

use crate::base_text::BaseText;
use crate::gateway::backend::{Input, Piece, Prepared, TokenText};

/// Bytes of input above which encoding leaves the async thread: about a millisecond of tokenising.
const INLINE_BYTES_MAX: usize = 4 << 10;

/// Shortens an answer whose length the client left open to what a minute of the tenant's tokens allows.
pub(super) fn clamp_answer(generation: &mut Generation, tokens_per_minute: u32) {
    let prompt = u32::try_from(generation.prompt.len()).unwrap_or(u32::MAX);
    let each = tokens_per_minute.saturating_sub(prompt) / generation.n.max(1);
    generation.max_tokens = generation.max_tokens.min(each.max(1));
    generation.min_tokens = generation.min_tokens.min(generation.max_tokens);
}

/// Encodes and checks a request against the base it will run on.
pub(super) async fn encode(
    text: &Arc<BaseText>,
    tenant: &TenantId,
    request: &mut Prepared,
    places: &Semaphore,
) -> Result<Generation, RequestError> {
    let prompt = if input_bytes(&request.input) > INLINE_BYTES_MAX {
        let _place = places.acquire().await.map_err(|_| RequestError::internal())?;
        let input = std::mem::replace(&mut request.input, Input::Tokens(Vec::new()));
        let text = Arc::clone(text);
        tokio::task::spawn_blocking(move || tokens(&text, &input)).await.map_err(|_| RequestError::internal())??
    } else {
        tokens(text, &request.input)?
    };
    let max_tokens = fit(text, &prompt, request)?;
    check_vocabulary(text, &prompt, request)?;
    check_grammar(text, tenant, request).await?;
    let seed = request.seed.unwrap_or_else(|| seed_of(request));
    Ok(Generation {
        prompt: prompt.into(),
        n: request.n,
        max_tokens,
        min_tokens: request.min_tokens.min(max_tokens),
        ignore_eos: request.ignore_eos,
        stop_token_ids: request.stop_token_ids.clone(),
        stop: request.stop.clone(),
        sampling: Sampling { seed, ..request.sampling.clone() },
        logprobs: request.logprobs,
        prompt_logprobs: request.prompt_logprobs,
        grammar: request.grammar.clone(),
    })
}

/// Without a client's seed the stream is keyed by the request id, so that the request can be resumed.
fn seed_of(request: &Prepared) -> u64 {
    let bytes = request.id.0.to_le_bytes();
    u64::from_le_bytes(blake3::hash(&bytes).as_bytes()[..8].try_into().expect("a hash has 32 bytes"))
}

fn input_bytes(input: &Input) -> usize {
    match input {
        Input::Chat(chat) => {
            let texts = chat.messages.iter().chain(&chat.tools).map(|value| value.to_string().len());
            texts.chain(chat.template_kwargs.values().map(|value| value.to_string().len())).sum()
        }
        Input::Text { text, .. } => text.len(),
        Input::Tokens(_) => 0,
    }
}

fn tokens(base: &BaseText, input: &Input) -> Result<Vec<u32>, RequestError> {
    let tokenizer = &base.tokenizer;
    let tokens = match input {
        Input::Chat(chat) => {
            let template = base.template.as_ref().ok_or_else(|| {
                let message = format!("the base {} has no chat template; hint: use /v1/completions", base.name);
                RequestError::field("unsupported_parameter", "messages", message)
            })?;
            let tools = chat.tools.as_ref();
            encode_chat(template, tokenizer, &chat.messages, tools, chat.add_generation_prompt, &chat.template_kwargs)
                .map_err(|error| RequestError::field("invalid_messages", "messages", error.to_string()))?
        }
        Input::Text { text, add_special } => {
            let front = tokenizer.front_token().filter(|_| *add_special);
            front.into_iter().chain(tokenizer.encode_text(text)).collect()
        }
        Input::Tokens(ids) => ids.clone(),
    };
    if tokens.is_empty() {
        return Err(RequestError::field(
            "invalid_value",
            "prompt",
            "the prompt is empty; hint: send at least one token",
        ));
    }
    Ok(tokens)
}

/// The longest answer that the request asks for and the context allows.
fn fit(text: &BaseText, prompt: &[u32], request: &Prepared) -> Result<u32, RequestError> {
    let context = text.context;
    let left = context.saturating_sub(prompt.len());
    let wanted = request.max_tokens.map(|wanted| wanted as usize);
    if left == 0 || wanted.is_some_and(|wanted| wanted > left) {
        let answer = wanted.map_or_else(|| "at least 1 token".to_owned(), |wanted| format!("{wanted} tokens"));
        let message = format!(
            "this model's context is {context} tokens; the prompt has {} and the answer asks for {answer}; hint: shorten the prompt or lower max_tokens",
            prompt.len()
        );
        let param = if left == 0 { "messages" } else { "max_tokens" };
        return Err(RequestError::field("context_length_exceeded", param, message));
    }
    Ok(u32::try_from(wanted.unwrap_or(left)).unwrap_or(u32::MAX))
}

fn check_vocabulary(text: &BaseText, prompt: &[u32], request: &Prepared) -> Result<(), RequestError> {
    let vocab = text.info.vocab;
    let is_outside = |id: &u32| *id as usize >= vocab;
    let fields: [(&'static str, Option<u32>); 3] = [
        ("prompt", prompt.iter().copied().find(is_outside)),
        ("stop_token_ids", request.stop_token_ids.iter().copied().find(is_outside)),
        ("logit_bias", request.sampling.logit_bias.iter().map(|&(id, _)| id).find(is_outside)),
    ];
    match fields.into_iter().find_map(|(param, id)| id.map(|id| (param, id))) {
        Some((param, id)) => Err(RequestError::field(
            "invalid_value",
            param,
            format!("token id {id} is outside the vocabulary of {vocab}"),
        )),
        None => Ok(()),
    }
}

/// Compiles the grammar, which is then remembered: it is wanted again where the request runs.
async fn check_grammar(text: &BaseText, tenant: &TenantId, request: &Prepared) -> Result<(), RequestError> {
    let Some(grammar) = &request.grammar else { return Ok(()) };
    let compiled = text.grammars.compile(tenant, grammar).await;
    compiled.map(drop).map_err(|error| error.to_request_error("response_format"))
}

/// The vocabulary as the gateway's detokenizer sees it.
pub(super) struct TokenTexts(pub(super) Arc<Vocabulary>);

impl TokenText for TokenTexts {
    fn piece(&self, id: u32) -> Piece<'_> {
        Piece { bytes: Cow::Borrowed(self.0.spelling(id)), special: self.0.is_special(id) }
    }
}
