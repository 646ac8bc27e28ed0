//! Bounds on everything a command carries, each with its reason. Called by the state before it decides.

use shared::id::BaseName;
use shared::tenant::Limits;

use super::command::{TenantPatch, TenantSpec};
use super::error::RegistryError;
use super::record::AdapterRecord;
use crate::auth::KeyRecord;

/// Tenants of one registry: all of them fit in memory (about 3 KB each) and in a snapshot.
pub const TENANTS_MAX: usize = 100_000;
/// Tenants plus tombstones: bounds what create-and-delete in a loop can leave behind.
pub const NAMES_EVER_MAX: usize = 1_000_000;
/// Keys per tenant, revoked ones included: room for rotation in several services.
pub const KEYS_MAX: usize = 16;
/// Adapter versions per tenant.
pub const VERSIONS_MAX: usize = 256;
/// Versions per tenant that ever existed: their names stay bound to their content.
pub const VERSIONS_EVER_MAX: usize = 1024;
/// Tasks per tenant.
pub const TASKS_MAX: usize = 64;
/// Base models per tenant.
pub const BASES_MAX: usize = 16;
/// Weight inside a tier; a wider span starves the light.
pub const WEIGHT_MAX: u32 = 1000;
/// Bytes of names and addresses for people.
pub const TEXT_BYTES_MAX: usize = 200;
/// Bytes of a region or a pool.
pub const REGION_BYTES_MAX: usize = 63;
/// Bytes of one adapter.
pub const ADAPTER_BYTES_MAX: u64 = 512 << 20;
/// Rank of an adapter.
pub const RANK_MAX: u32 = 256;

fn number(field: &'static str, found: u64, min: u64, max: u64) -> Result<(), RegistryError> {
    if (min..=max).contains(&found) {
        return Ok(());
    }
    Err(RegistryError::Invalid { field: field.into(), found: found.to_string(), rule: format!("use {min} to {max}") })
}

fn text(field: &'static str, found: &str, max: usize) -> Result<(), RegistryError> {
    let fits = (1..=max).contains(&found.len());
    if fits && found.trim() == found && !found.chars().any(char::is_control) {
        return Ok(());
    }
    Err(RegistryError::Invalid {
        field: field.into(),
        found: format!("{:?}", found.chars().take(80).collect::<String>()),
        rule: format!("use 1 to {max} bytes of text without control characters and outer spaces"),
    })
}

fn optional_text(field: &'static str, found: Option<&String>, max: usize) -> Result<(), RegistryError> {
    found.map_or(Ok(()), |found| text(field, found, max))
}

fn bases(found: &[BaseName]) -> Result<(), RegistryError> {
    number("number of bases", found.len() as u64, 1, BASES_MAX as u64)?;
    let twice = found.iter().enumerate().find(|(i, base)| found[..*i].contains(base));
    twice.map_or(Ok(()), |(_, base)| {
        Err(RegistryError::Invalid {
            field: "bases".into(),
            found: base.to_string(),
            rule: "name each base once".to_owned(),
        })
    })
}

fn limits(limits: &Limits) -> Result<(), RegistryError> {
    let Limits { concurrency, queue_depth, deadline_ms, requests_per_minute, tokens_per_minute, burst_requests } =
        *limits;
    number("limits.concurrency", concurrency.into(), 1, 4096)?;
    number("limits.queue_depth", queue_depth.into(), 0, 100_000)?;
    number("limits.deadline_ms", deadline_ms, 1, 24 * 3600 * 1000)?;
    number("limits.requests_per_minute", requests_per_minute.into(), 1, 10_000_000)?;
    number("limits.tokens_per_minute", tokens_per_minute.into(), 1, u32::MAX.into())?;
    number("limits.burst_requests", burst_requests.into(), 1, 1_000_000)
}

/// Checks a new tenant.
pub(super) fn check_spec(spec: &TenantSpec) -> Result<(), RegistryError> {
    text("display_name", &spec.display_name, TEXT_BYTES_MAX)?;
    optional_text("contact", spec.contact.as_ref(), TEXT_BYTES_MAX)?;
    number("weight", spec.weight.into(), 1, WEIGHT_MAX.into())?;
    bases(&spec.bases)?;
    limits(&spec.limits)?;
    optional_text("region", spec.region.as_ref(), REGION_BYTES_MAX)?;
    optional_text("pool", spec.pool.as_ref(), REGION_BYTES_MAX)?;
    optional_text("cost_center", spec.cost_center.as_ref(), TEXT_BYTES_MAX)?;
    number("number of tasks", spec.tasks.len() as u64, 0, TASKS_MAX as u64)
}

/// Checks changed fields.
pub(super) fn check_patch(patch: &TenantPatch) -> Result<(), RegistryError> {
    optional_text("display_name", patch.display_name.as_ref(), TEXT_BYTES_MAX)?;
    optional_text("contact", patch.contact.as_ref().and_then(Option::as_ref), TEXT_BYTES_MAX)?;
    patch.weight.map_or(Ok(()), |weight| number("weight", weight.into(), 1, WEIGHT_MAX.into()))?;
    patch.bases.as_ref().map_or(Ok(()), |found| bases(found))?;
    patch.limits.as_ref().map_or(Ok(()), limits)?;
    optional_text("region", patch.region.as_ref().and_then(Option::as_ref), REGION_BYTES_MAX)?;
    optional_text("pool", patch.pool.as_ref().and_then(Option::as_ref), REGION_BYTES_MAX)?;
    optional_text("cost_center", patch.cost_center.as_ref().and_then(Option::as_ref), TEXT_BYTES_MAX)
}

/// Checks a new API key.
pub(super) fn check_key(key: &KeyRecord) -> Result<(), RegistryError> {
    number("number of scopes", key.scopes.len() as u64, 1, 3)?;
    match key.expires_at_s {
        Some(at) if at <= key.created_at_s => Err(RegistryError::Invalid {
            field: "expires_at".into(),
            found: at.to_string(),
            rule: format!("use a time after its creation at {}", key.created_at_s),
        }),
        _ => Ok(()),
    }
}

/// Checks an adapter's own facts.
pub(super) fn check_adapter(adapter: &AdapterRecord) -> Result<(), RegistryError> {
    number("adapter bytes", adapter.bytes, 1, ADAPTER_BYTES_MAX)?;
    number("adapter rank", adapter.rank.into(), 1, RANK_MAX.into())?;
    if adapter.base == adapter.name.base {
        return Ok(());
    }
    Err(RegistryError::Invalid {
        field: "adapter base".into(),
        found: adapter.base.to_string(),
        rule: format!("use {}, as in the version's name", adapter.name.base),
    })
}
