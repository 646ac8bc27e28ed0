//! May this request come in, as far as the contract goes? (core)
//!
//! Checks the tenant's state, the request's size against the contract, and the two per-minute rates. Tokens
//! are reserved for the worst case (prompt and longest answers) and settled by what was used. The gateway
//! holds an [`Admission`] behind one short lock; queue depth and running sequences are the queue's business.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use shared::error::{ErrorKind, RequestError};
use shared::id::TenantId;
use shared::tenant::{Limits, TenantContract, TenantState};

use crate::limits::{Rate, TokenBucket};

/// Size of a request as far as limits care.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Prompt length in tokens.
    pub n_prompt_tokens: u64,
    /// Longest answer.
    pub max_tokens: u64,
    /// Answers wanted.
    pub n: u32,
}

impl Demand {
    /// Tokens reserved: the prompt once, each answer at its longest.
    pub fn tokens(&self) -> u64 {
        self.n_prompt_tokens.saturating_add(self.max_tokens.saturating_mul(self.n.into()))
    }
}

/// Where a tenant stands with its rates: the values of the `x-ratelimit-*` headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateStatus {
    /// Requests per minute.
    pub limit_requests: u64,
    /// Tokens per minute.
    pub limit_tokens: u64,
    /// Requests that could come at once now.
    pub remaining_requests: u64,
    /// Tokens that could be reserved now.
    pub remaining_tokens: u64,
    /// Until all requests are available again.
    pub reset_requests: Duration,
    /// Until all tokens are available again.
    pub reset_tokens: Duration,
}

/// Tokens held for an admitted request; give it to [`Admission::settle`] when the request ends. One that is
/// never settled counts as used up.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "settle it when the request ends"]
pub struct Reservation {
    tenant: TenantId,
    tokens: u64,
}

impl Reservation {
    /// Tokens held.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }
}

/// A request that may come in.
#[derive(Debug, PartialEq, Eq)]
pub struct Admitted {
    /// What it holds.
    pub reservation: Reservation,
    /// Where the tenant stands after it.
    pub rate: RateStatus,
}

/// A request that may not, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// What the client is told; `retry_after` is exact.
    pub error: Box<RequestError>,
    /// Where the tenant stands; a refusal costs nothing. `None` before rates were looked at.
    pub rate: Option<RateStatus>,
}

impl From<RequestError> for Refused {
    fn from(error: RequestError) -> Self {
        Self { error: Box::new(error), rate: None }
    }
}

struct Buckets {
    requests: TokenBucket,
    tokens: TokenBucket,
}

impl Buckets {
    fn status(&self, limits: &Limits) -> RateStatus {
        RateStatus {
            limit_requests: limits.requests_per_minute.into(),
            limit_tokens: limits.tokens_per_minute.into(),
            remaining_requests: self.requests.remaining(),
            remaining_tokens: self.tokens.remaining(),
            reset_requests: self.requests.reset_in(),
            reset_tokens: self.tokens.reset_in(),
        }
    }
}

fn request_rate(limits: &Limits) -> Rate {
    Rate { burst: limits.burst_requests.into(), per_minute: limits.requests_per_minute.into() }
}

/// The token bucket holds one minute's worth: the largest request is one that uses a whole minute.
fn token_rate(limits: &Limits) -> Rate {
    Rate { burst: limits.tokens_per_minute.into(), per_minute: limits.tokens_per_minute.into() }
}

/// What all tenants have used of their rates on this node. At most one entry per tenant of the registry.
#[derive(Default)]
pub struct Admission {
    buckets: HashMap<TenantId, Buckets>,
}

impl Admission {
    /// Nobody has used anything.
    pub fn new() -> Self {
        Self::default()
    }

    /// Refuses what can be refused before any work is spent on it. Takes nothing: [`Self::admit`] still decides.
    ///
    /// # Errors
    /// 403 `tenant_suspended`, and 429 `rate_limit_exceeded` when not even an empty request could come in.
    pub fn look(&mut self, contract: &TenantContract, now: Instant) -> Result<(), Refused> {
        check_state(contract)?;
        let buckets = self.buckets_of(contract, now);
        match buckets.requests.wait_for(1) {
            Some(wait) if wait > Duration::ZERO => {
                let error = Box::new(rate_error(&contract.limits, false, wait));
                Err(Refused { error, rate: Some(buckets.status(&contract.limits)) })
            }
            _ => Ok(()),
        }
    }

    /// Decides on one request and, if it may come in, takes what it needs.
    ///
    /// # Errors
    /// - 403 `tenant_suspended`,
    /// - 400 `invalid_value` when `n` is beyond the contract's concurrency,
    /// - 400 `tokens_per_minute_exceeded` when the request needs more tokens than a minute allows,
    /// - 429 `rate_limit_exceeded` with the exact time to wait.
    pub fn admit(&mut self, contract: &TenantContract, demand: Demand, now: Instant) -> Result<Admitted, Refused> {
        check_state(contract)?;
        let limits = &contract.limits;
        check_size(limits, demand)?;
        let buckets = self.buckets_of(contract, now);
        let tokens = demand.tokens();
        let waits = (buckets.requests.wait_for(1), buckets.tokens.wait_for(tokens));
        let (Some(for_request), Some(for_tokens)) = waits else {
            return Err(Refused {
                error: Box::new(too_many_tokens(limits, tokens)),
                rate: Some(buckets.status(limits)),
            });
        };
        let wait = for_request.max(for_tokens);
        if wait > Duration::ZERO {
            let error = Box::new(rate_error(limits, for_tokens >= for_request, wait));
            return Err(Refused { error, rate: Some(buckets.status(limits)) });
        }
        buckets.requests.take(1);
        buckets.tokens.take(tokens);
        let reservation = Reservation { tenant: contract.tenant.clone(), tokens };
        Ok(Admitted { reservation, rate: buckets.status(limits) })
    }

    /// Ends a request: what it reserved and did not use flows back at once, what it used beyond is taken.
    pub fn settle(&mut self, reservation: Reservation, used_tokens: u64) {
        let Some(buckets) = self.buckets.get_mut(&reservation.tenant) else { return };
        if used_tokens <= reservation.tokens {
            buckets.tokens.put_back(reservation.tokens - used_tokens);
        } else {
            buckets.tokens.take(used_tokens - reservation.tokens);
        }
    }

    /// Takes back an admission whose request was refused further on (queue full): it costs nothing.
    pub fn undo(&mut self, reservation: Reservation) {
        if let Some(buckets) = self.buckets.get_mut(&reservation.tenant) {
            buckets.requests.put_back(1);
        }
        self.settle(reservation, 0);
    }

    /// Where a tenant stands now.
    #[cfg(test)]
    fn status(&mut self, contract: &TenantContract, now: Instant) -> RateStatus {
        self.buckets_of(contract, now).status(&contract.limits)
    }

    /// Drops what is known of a tenant that was deleted.
    pub fn forget(&mut self, tenant: &TenantId) {
        self.buckets.remove(tenant);
    }

    fn buckets_of(&mut self, contract: &TenantContract, now: Instant) -> &mut Buckets {
        let (requests, tokens) = (request_rate(&contract.limits), token_rate(&contract.limits));
        let fresh = || Buckets { requests: TokenBucket::new(requests, now), tokens: TokenBucket::new(tokens, now) };
        let buckets = self.buckets.entry(contract.tenant.clone()).or_insert_with(fresh);
        buckets.requests.refill(requests, now);
        buckets.tokens.refill(tokens, now);
        buckets
    }
}

fn check_state(contract: &TenantContract) -> Result<(), RequestError> {
    if contract.state != TenantState::Suspended {
        return Ok(());
    }
    let message = "this tenant is suspended; hint: ask your operator";
    Err(RequestError::new(ErrorKind::Forbidden, "tenant_suspended", message))
}

fn check_size(limits: &Limits, demand: Demand) -> Result<(), RequestError> {
    if demand.n == 0 || demand.n > limits.concurrency {
        let message = format!("n is {}, this contract allows 1 to {} answers at once", demand.n, limits.concurrency);
        return Err(RequestError::field("invalid_value", "n", message));
    }
    Ok(())
}

fn too_many_tokens(limits: &Limits, tokens: u64) -> RequestError {
    let max = limits.tokens_per_minute;
    let message = format!(
        "the request may use {tokens} tokens, this contract allows {max} a minute; hint: lower max_tokens or shorten the prompt"
    );
    RequestError::field("tokens_per_minute_exceeded", "max_tokens", message)
}

fn rate_error(limits: &Limits, by_tokens: bool, wait: Duration) -> RequestError {
    let (max, what) =
        if by_tokens { (limits.tokens_per_minute, "tokens") } else { (limits.requests_per_minute, "requests") };
    let message = format!("over the contract's {max} {what} per minute; hint: retry in {:.1} s", wait.as_secs_f64());
    // Doors tell clients by this mark which of the two rates bound.
    let param = by_tokens.then(|| what.into());
    RequestError { param, ..RequestError::new(ErrorKind::Throttled, "rate_limit_exceeded", message).retry_after(wait) }
}

#[cfg(test)]
mod tests;
