//! Reading a request body within bounds of size, time and memory, before anything looks inside. Used by the
//! routes.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, Response};
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use parking_lot::Mutex;
use serde_json::{Map, Value};
use shared::error::{ErrorKind, RequestError};
use shared::id::TenantId;

use super::json;
use super::limits::BODY_BYTES_MAX;
use super::reply::{self, HttpRefusal};

/// When a refused body is worth sending again: bodies are read within seconds.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Part of the budget that one tenant may hold: others always find room for a body of the largest size.
const TENANT_SHARE: usize = 4;

/// Bytes of the bodies that are being read, in all and per tenant; clones share them.
#[derive(Debug, Clone)]
pub struct BodyBudget {
    bytes_max: usize,
    held: Arc<Mutex<HashMap<TenantId, usize>>>,
}

impl BodyBudget {
    /// Nothing held yet, `bytes_max` at most.
    pub fn new(bytes_max: usize) -> Self {
        Self { bytes_max, held: Arc::default() }
    }

    /// What a body that begins to arrive holds: nothing yet.
    fn open(&self, tenant: &TenantId) -> Held {
        Held { budget: self.clone(), tenant: tenant.clone(), bytes: 0 }
    }
}

/// Bytes of one body; given back when it is dropped.
struct Held {
    budget: BodyBudget,
    tenant: TenantId,
    bytes: usize,
}

impl Held {
    /// Counts bytes that have arrived.
    fn grow(&mut self, bytes: usize) -> Result<(), RequestError> {
        let mut held = self.budget.held.lock();
        let of_tenant = held.get(&self.tenant).copied().unwrap_or_default();
        if of_tenant + bytes > self.budget.bytes_max / TENANT_SHARE {
            let message = "this tenant sends too many large requests at once; hint: retry after the Retry-After header";
            return Err(RequestError::new(ErrorKind::Throttled, "too_many_bodies", message).retry_after(RETRY_AFTER));
        }
        if held.values().sum::<usize>() + bytes > self.budget.bytes_max {
            let message = "this node is reading too many large requests; hint: retry after the Retry-After header";
            return Err(RequestError::new(ErrorKind::Unavailable, "node_overloaded", message).retry_after(RETRY_AFTER));
        }
        held.insert(self.tenant.clone(), of_tenant + bytes);
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut held = self.budget.held.lock();
        let Some(of_tenant) = held.get_mut(&self.tenant) else { return };
        *of_tenant -= self.bytes;
        if *of_tenant == 0 {
            held.remove(&self.tenant);
        }
    }
}

/// The body as a JSON object, with its hash, or the response that refuses it.
pub async fn read_object(
    headers: &HeaderMap,
    body: Body,
    wait: Duration,
    budget: &BodyBudget,
    tenant: &TenantId,
) -> Result<(Map<String, Value>, [u8; 32]), Box<Response<Body>>> {
    check_type(headers)?;
    let claimed = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if claimed.is_some_and(|bytes| bytes > BODY_BYTES_MAX as u64) {
        return Err(Box::new(too_large()));
    }
    let mut held = budget.open(tenant);
    let read = tokio::time::timeout(wait, read(body, &mut held)).await;
    let bytes = read.unwrap_or_else(|_| Err(Box::new(reply::http_refusal(HttpRefusal::BodyTimeout))))?;
    let object = json::parse_object(&bytes).map_err(|error| Box::new(reply::failed(&error)))?;
    Ok((object, *blake3::hash(&bytes).as_bytes()))
}

/// Takes the bytes as they come: a client that only claims a length holds nothing.
async fn read(body: Body, held: &mut Held) -> Result<Bytes, Box<Response<Body>>> {
    let mut body = Limited::new(body, BODY_BYTES_MAX);
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            let too_long = error.is::<LengthLimitError>();
            Box::new(if too_long { too_large() } else { reply::http_refusal(HttpRefusal::BodyBroken) })
        })?;
        if let Some(data) = frame.data_ref() {
            held.grow(data.len()).map_err(|error| Box::new(reply::failed(&error)))?;
            bytes.extend_from_slice(data);
        }
    }
    Ok(bytes.freeze())
}

fn too_large() -> Response<Body> {
    let message = format!("the request body is larger than {BODY_BYTES_MAX} bytes");
    reply::failed(&RequestError::new(ErrorKind::TooLarge, "body_too_large", message))
}

/// JSON, or nothing said; anything else is a mistake worth telling.
fn check_type(headers: &HeaderMap) -> Result<(), Box<Response<Body>>> {
    let encoded = headers.get(CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity");
    let is_json = headers.get(CONTENT_TYPE).is_none_or(|value| {
        let kind = value.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        kind == "application/json"
            || kind == "text/json"
            || (kind.starts_with("application/") && kind.ends_with("+json"))
    });
    if is_json && !encoded { Ok(()) } else { Err(Box::new(reply::http_refusal(HttpRefusal::MediaType))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_tenant_holds_a_quarter_at_most_and_what_ends_is_given_back() {
        let budget = BodyBudget::new(100);
        let tenant = |name: &str| name.parse::<TenantId>().expect("valid");
        let mut first = budget.open(&tenant("a"));
        first.grow(25).expect("a quarter");
        let mut second = budget.open(&tenant("a"));
        assert_eq!(second.grow(1).expect_err("more than a quarter").code, "too_many_bodies");
        let others: Vec<Held> = ["b", "c", "d"]
            .map(|name| {
                let mut held = budget.open(&tenant(name));
                held.grow(20).and_then(|()| held.grow(5)).expect("room");
                held
            })
            .into();
        let mut fifth = budget.open(&tenant("e"));
        assert_eq!(fifth.grow(1).expect_err("full").kind, ErrorKind::Unavailable);
        drop(first);
        fifth.grow(25).expect("room again");
        drop((second, others, fifth));
        assert!(budget.held.lock().is_empty());
    }
}
