//! `tenantry ctl adapter import`: a tree of adapters as hand-rolled servers keep them,
//! `<root>/<tenant>/adapter.gguf` or the two PEFT files, becomes versions in the registry. One line per tenant;
//! a tenant that fails does not stop the others.

use std::path::PathBuf;

use adapters::import::{ImportEntry, entries};
use anyhow::{Context, bail};
use clap::Args;
use serde_json::Value;
use shared::id::{AdapterName, BaseName, TaskName, TenantId};

use super::{CreateTenant, upload};
use crate::admin::api::{ContractPatch, TenantCreated, TenantList};
use crate::client::Client;

/// Largest adapter read; the node's own limit is checked by the node.
const FILES_BYTES_MAX: u64 = 512 << 20;

/// Arguments of `tenantry ctl adapter import`.
#[derive(Debug, Args)]
pub(super) struct ImportArgs {
    /// Folder with one folder per tenant, named by tenant id.
    root: PathBuf,
    /// Task that the adapters are for.
    #[arg(long)]
    task: TaskName,
    /// Base model they were trained on.
    #[arg(long)]
    base: BaseName,
    /// Their version.
    #[arg(long, default_value = "v1.0.0")]
    adapter_version: String,
    /// Create tenants that do not exist and write their API keys to new files `<tenant>.key` in this folder.
    #[arg(long, value_name = "FOLDER")]
    create_with_keys_in: Option<PathBuf>,
}

/// Imports the whole tree.
pub(super) fn run(client: &Client, args: &ImportArgs) -> anyhow::Result<()> {
    let (found, refused) = entries(&args.root).with_context(|| format!("list {}", args.root.display()))?;
    let known: TenantList = client.get("/admin/v1/tenants")?;
    let exists = |tenant: &TenantId| known.tenants.iter().any(|view| view.id == *tenant);
    let mut n_failed = refused.len();
    refused.iter().for_each(|error| println!("skipped: {error}"));
    for entry in &found {
        match one(client, args, entry, exists(&entry.tenant)) {
            Ok(name) => println!("imported: {name}"),
            Err(error) => {
                n_failed += 1;
                println!("failed: {}: {error:#}", entry.tenant);
            }
        }
    }
    if n_failed > 0 {
        bail!(
            "import {}: {n_failed} of {} entries were not imported",
            args.root.display(),
            found.len() + refused.len()
        );
    }
    Ok(())
}

fn one(client: &Client, args: &ImportArgs, entry: &ImportEntry, exists: bool) -> anyhow::Result<AdapterName> {
    let tenant = &entry.tenant;
    let name: AdapterName = format!("{tenant}-{}-{}-{}", args.task, args.base, args.adapter_version).parse()?;
    // Read before anything is created for it.
    let form = upload::Form::new(entry.read(FILES_BYTES_MAX)?)?;
    if !exists {
        let Some(keys) = &args.create_with_keys_in else {
            bail!("there is no such tenant; hint: create it first, or add --create-with-keys-in FOLDER");
        };
        std::fs::create_dir_all(keys).with_context(|| format!("create {}", keys.display()))?;
        let key_file = upload::create_private(&keys.join(format!("{tenant}.key")))?;
        let body = CreateTenant {
            id: tenant.clone(),
            display_name: None,
            contact: None,
            tasks: vec![args.task.clone()],
            contract: ContractPatch { bases: Some(vec![args.base.clone()]), ..ContractPatch::default() },
        };
        let created: TenantCreated = client.send("POST", "/admin/v1/tenants", &body)?;
        upload::write_line(key_file, &created.key.key)?;
    }
    form.send(client, &name)?;
    let target = format!("/admin/v1/tenants/{tenant}/tasks/{}", args.task);
    client.send::<Value>("PUT", &target, &super::PointTask { version: Some(name.clone()) })?;
    Ok(name)
}
