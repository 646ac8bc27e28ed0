//! Admitted requests on the wire. The receiver trusts the sender's admission, but not that the bytes make sense:
//! a request that could hurt other tenants of the owner (another tenant's adapter, no end, no numbers) is refused.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::hash::ContentHash;
use shared::id::{RequestId, Route};
use shared::request::{AdapterPin, BasePin, Emitted, EmittedChoice, Envelope, Generation, Grammar, Sampling};
use shared::tenant::Tier;

use super::{Meaningless, ensure};
use crate::message as m;

/// Choices of one request; the gateway allows fewer.
const CHOICES_MAX: u32 = 64;
/// Longest name of an arithmetic; ours have 30 bytes.
const NUMERICS_BYTES_MAX: usize = 256;
/// Longest time left that makes sense: twice the longest deadline of a contract.
const DEADLINE_MS_MAX: u64 = 48 * 3600 * 1000;

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn to_wire(envelope: &Envelope, now: Instant) -> m::Envelope {
    m::Envelope {
        id: envelope.id.0,
        tenant: envelope.route.tenant.to_string(),
        task: envelope.route.task.as_ref().map(ToString::to_string),
        tier: match envelope.tier {
            Tier::Shared => m::Tier::Shared,
            Tier::Premium => m::Tier::Premium,
            Tier::Isolated => m::Tier::Isolated,
        },
        weight: envelope.weight,
        concurrency: envelope.concurrency,
        queue_depth: envelope.queue_depth,
        base: envelope.base.to_string(),
        adapter: envelope.adapter.as_ref().map(|pin| m::AdapterPin { name: pin.name.to_string(), hash: pin.hash.0 }),
        fell_back: envelope.fell_back,
        cache_secret: envelope.cache_secret,
        generation: generation_to_wire(&envelope.generation),
        contract_epoch: envelope.contract_epoch,
        admitted_ms_ago: ms(now.saturating_duration_since(envelope.admitted_at)),
        deadline_ms_left: ms(envelope.deadline.saturating_duration_since(now)),
    }
}

pub(super) fn pin_to_wire(pin: &BasePin) -> m::BasePin {
    m::BasePin { hash: pin.hash.map(|hash| hash.0), numerics: pin.numerics.clone() }
}

/// `pin` travels beside the envelope, whose layout has not changed since version 1.
pub(super) fn from_wire(envelope: m::Envelope, pin: m::BasePin, now: Instant) -> Result<Envelope, Meaningless> {
    let n_bytes = pin.numerics.as_ref().map_or(0, String::len);
    ensure(n_bytes <= NUMERICS_BYTES_MAX, || format!("a numerics id of {n_bytes} bytes, limit {NUMERICS_BYTES_MAX}"))?;
    let route = Route { tenant: envelope.tenant.parse()?, task: envelope.task.map(|task| task.parse()).transpose()? };
    let adapter = envelope
        .adapter
        .map(|pin| -> Result<_, Meaningless> {
            Ok(AdapterPin { name: pin.name.parse()?, hash: ContentHash(pin.hash) })
        })
        .transpose()?;
    if let Some(pin) = &adapter {
        let (owner, tenant) = (&pin.name.client, &route.tenant);
        ensure(owner == tenant, || format!("tenant {tenant} with an adapter of {owner}"))?;
    }
    let left = envelope.deadline_ms_left;
    ensure(left <= DEADLINE_MS_MAX, || format!("{left} ms left, limit {DEADLINE_MS_MAX}"))?;
    ensure(envelope.weight > 0 && envelope.concurrency > 0, || "weight or concurrency is 0".into())?;
    Ok(Envelope {
        id: RequestId(envelope.id),
        route,
        tier: match envelope.tier {
            m::Tier::Shared => Tier::Shared,
            m::Tier::Premium => Tier::Premium,
            m::Tier::Isolated => Tier::Isolated,
        },
        weight: envelope.weight,
        concurrency: envelope.concurrency,
        queue_depth: envelope.queue_depth,
        base: envelope.base.parse()?,
        pin: BasePin { hash: pin.hash.map(ContentHash), numerics: pin.numerics },
        adapter,
        fell_back: envelope.fell_back,
        cache_secret: envelope.cache_secret,
        generation: Arc::new(generation_from_wire(envelope.generation)?),
        contract_epoch: envelope.contract_epoch,
        // A node that has not been up for that long cannot say when it was; the deadline is what counts.
        admitted_at: now.checked_sub(Duration::from_millis(envelope.admitted_ms_ago)).unwrap_or(now),
        deadline: now + Duration::from_millis(left),
    })
}

fn generation_to_wire(generation: &Generation) -> m::Generation {
    let sampling = &generation.sampling;
    m::Generation {
        prompt: generation.prompt.to_vec(),
        n: generation.n,
        max_tokens: generation.max_tokens,
        min_tokens: generation.min_tokens,
        ignore_eos: generation.ignore_eos,
        stop_token_ids: generation.stop_token_ids.clone(),
        stop: generation.stop.clone(),
        sampling: m::Sampling {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            logit_bias: sampling.logit_bias.iter().map(|&(token, bias)| m::Bias { token, bias }).collect(),
            seed: sampling.seed,
        },
        logprobs: generation.logprobs,
        prompt_logprobs: generation.prompt_logprobs,
        grammar: generation.grammar.as_ref().map(|grammar| match grammar {
            Grammar::JsonObject => m::Grammar::JsonObject,
            Grammar::JsonSchema(schema) => m::Grammar::JsonSchema(schema.clone()),
            Grammar::Lark(text) => m::Grammar::Lark(text.clone()),
        }),
    }
}

fn generation_from_wire(generation: m::Generation) -> Result<Generation, Meaningless> {
    let m::Generation { n, max_tokens, sampling, .. } = generation;
    ensure(!generation.prompt.is_empty(), || "the prompt is empty".into())?;
    ensure((1..=CHOICES_MAX).contains(&n), || format!("{n} choices, limit {CHOICES_MAX}"))?;
    ensure(max_tokens > 0, || "an answer of no tokens".into())?;
    let numbers = [
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    ];
    let biases = sampling.logit_bias.iter().map(|entry| entry.bias);
    ensure(numbers.into_iter().chain(biases).all(f32::is_finite), || "a sampling number is not finite".into())?;
    Ok(Generation {
        prompt: generation.prompt.into(),
        n,
        max_tokens,
        min_tokens: generation.min_tokens,
        ignore_eos: generation.ignore_eos,
        stop_token_ids: generation.stop_token_ids,
        stop: generation.stop,
        sampling: Sampling {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            logit_bias: sampling.logit_bias.into_iter().map(|m::Bias { token, bias }| (token, bias)).collect(),
            seed: sampling.seed,
        },
        logprobs: generation.logprobs,
        prompt_logprobs: generation.prompt_logprobs,
        grammar: generation.grammar.map(|grammar| match grammar {
            m::Grammar::JsonObject => Grammar::JsonObject,
            m::Grammar::JsonSchema(schema) => Grammar::JsonSchema(schema),
            m::Grammar::Lark(text) => Grammar::Lark(text),
        }),
    })
}

pub(super) fn emitted_to_wire(emitted: &Emitted) -> Vec<m::EmittedChoice> {
    let choice = |choice: &EmittedChoice| m::EmittedChoice { tokens: choice.tokens.clone(), finished: choice.finished };
    emitted.0.iter().map(choice).collect()
}

pub(super) fn emitted_from_wire(
    emitted: Vec<m::EmittedChoice>,
    generation: &Generation,
) -> Result<Emitted, Meaningless> {
    let (found, n) = (emitted.len(), generation.n);
    ensure(found <= n as usize, || format!("{found} choices were delivered of {n}"))?;
    let longest = emitted.iter().map(|choice| choice.tokens.len()).max().unwrap_or(0);
    let max = generation.max_tokens;
    ensure(longest <= max as usize, || format!("{longest} tokens were delivered of at most {max}"))?;
    let choice = |choice: m::EmittedChoice| EmittedChoice { tokens: choice.tokens, finished: choice.finished };
    Ok(Emitted(emitted.into_iter().map(choice).collect()))
}
