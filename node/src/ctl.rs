//! `tenantry ctl`: every admin call as a command. Finds the node's admin port and key through `cluster.toml`,
//! prints JSON or a short line, and decides nothing itself.

mod ca;
mod import;
mod upload;

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use serde_json::Value;
use shared::config::{ClusterConfig, NodeConfig};
use shared::id::{AdapterName, BaseName, NodeId, TaskName, TenantId};
use shared::tenant::{Fallback, Tier};

use crate::admin::api::{
    ContractPatch, CreateKey, CreateTenant, DrainNode, NewKey, PointTask, TenantCreated, TenantList, TenantView,
    UpdateTenant,
};
use crate::client::{Client, key_from};

/// Arguments of `tenantry ctl`.
#[derive(Debug, Args)]
pub struct CtlArgs {
    /// Cluster file.
    #[arg(long, global = true, default_value = "cluster.toml")]
    config: PathBuf,
    /// Node to ask; when left out, the first of the file that answers.
    #[arg(long, global = true)]
    node: Option<NodeId>,
    /// Admin address instead of the one in the cluster file.
    #[arg(long, global = true, env = "TENANTRY_ADMIN_URL")]
    url: Option<String>,
    /// Admin key; read from the node's data folder when left out.
    #[arg(long, global = true, env = "TENANTRY_ADMIN_KEY", hide_env_values = true)]
    admin_key: Option<String>,
    /// PEM file of a certificate authority to trust.
    #[arg(long, global = true)]
    ca: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// What the node is doing.
    Status,
    /// Who is in the cluster, alive, and home to how many tenants, as one node sees it.
    Cluster {
        /// List every tenant instead: who serves it, and what of it is in which node's memory.
        #[arg(long)]
        tenants: bool,
    },
    /// The cluster's authority: who is let in as a node.
    #[command(subcommand)]
    Ca(ca::CaCommand),
    /// Join the cluster as a node of this machine, with an invitation of `ctl ca invite`.
    Join(ca::JoinArgs),
    /// Let a node hand over what it has and end, as SIGTERM does.
    Drain {
        /// Which node.
        name: NodeId,
    },
    /// Tenants and their contracts.
    #[command(subcommand)]
    Tenant(TenantCommand),
    /// API keys.
    #[command(subcommand)]
    Key(KeyCommand),
    /// Adapter versions.
    #[command(subcommand)]
    Adapter(AdapterCommand),
    /// Tasks: a tenant's short names for adapter versions.
    #[command(subcommand)]
    Task(TaskCommand),
}

#[derive(Debug, Subcommand)]
enum TenantCommand {
    /// Create a tenant and print its first API key, which is shown only now.
    Create {
        /// Tenant id.
        id: TenantId,
        /// Name for people.
        #[arg(long)]
        display_name: Option<String>,
        /// Who to write to.
        #[arg(long)]
        contact: Option<String>,
        /// A task to prepare before its adapter exists; may be repeated.
        #[arg(long = "task")]
        tasks: Vec<TaskName>,
        #[command(flatten)]
        contract: Box<ContractArgs>,
        /// Also write the key to this new file, readable by you only.
        #[arg(long)]
        key_out: Option<PathBuf>,
    },
    /// Change parts of a contract.
    Set {
        /// Tenant id.
        id: TenantId,
        /// Name for people.
        #[arg(long)]
        display_name: Option<String>,
        /// Who to write to.
        #[arg(long)]
        contact: Option<String>,
        /// Refuse if the tenant changed since this epoch.
        #[arg(long)]
        expected_epoch: Option<u64>,
        #[command(flatten)]
        contract: Box<ContractArgs>,
    },
    /// List all tenants.
    List,
    /// Show one tenant.
    Show {
        /// Tenant id.
        id: TenantId,
    },
    /// Refuse the tenant's requests; nothing is deleted.
    Suspend {
        /// Tenant id.
        id: TenantId,
    },
    /// Serve a suspended tenant again.
    Resume {
        /// Tenant id.
        id: TenantId,
    },
    /// Delete a tenant for good: its key is destroyed, so that its adapters cannot be read any more.
    Delete {
        /// Tenant id.
        id: TenantId,
        /// Confirms.
        #[arg(long)]
        yes: bool,
    },
}

/// Contract settings on the command line.
#[derive(Debug, Default, Args)]
struct ContractArgs {
    /// shared, premium or isolated.
    #[arg(long, value_parser = parse_tier)]
    tier: Option<Tier>,
    /// Share among the tenants of the tier.
    #[arg(long)]
    weight: Option<u32>,
    /// Base model; may be repeated, the first is the default.
    #[arg(long = "base")]
    bases: Option<Vec<BaseName>>,
    /// Whether requests may name the base itself.
    #[arg(long)]
    allow_base: Option<bool>,
    /// refuse or base: what a task without adapter does.
    #[arg(long, value_parser = parse_fallback)]
    fallback: Option<Fallback>,
    /// Region or data boundary.
    #[arg(long)]
    region: Option<String>,
    /// Nodes of one pool of the cluster file.
    #[arg(long)]
    pool: Option<String>,
    /// Where usage rolls up.
    #[arg(long)]
    cost_center: Option<String>,
    /// Sequences at once.
    #[arg(long)]
    concurrency: Option<u32>,
    /// Waiting requests per task.
    #[arg(long)]
    queue_depth: Option<u32>,
    /// Milliseconds from admission to the last token.
    #[arg(long)]
    deadline_ms: Option<u64>,
    /// Requests per minute.
    #[arg(long)]
    requests_per_minute: Option<u32>,
    /// Tokens per minute.
    #[arg(long)]
    tokens_per_minute: Option<u32>,
    /// Requests at once before the rate binds.
    #[arg(long)]
    burst_requests: Option<u32>,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Make another key and print it; it is shown only now.
    Add {
        /// Tenant id.
        tenant: TenantId,
        /// Seconds until it stops working.
        #[arg(long)]
        expires_in_s: Option<u64>,
    },
    /// List a tenant's keys without their secrets.
    List {
        /// Tenant id.
        tenant: TenantId,
    },
    /// Stop accepting a key.
    Revoke {
        /// Tenant id.
        tenant: TenantId,
        /// Id of the key, as listed.
        key_id: String,
    },
}

#[derive(Debug, Subcommand)]
enum AdapterCommand {
    /// Upload a version: a PEFT folder (adapter_config.json, adapter_model.safetensors) or a GGUF LoRA file.
    Upload {
        /// Full name: {client}-{task}-{base}-v{major}.{minor}.{patch}.
        name: AdapterName,
        /// Folder or file.
        path: PathBuf,
        /// Also point the task of the name at this version.
        #[arg(long)]
        point: bool,
    },
    /// Upload a whole tree `<root>/<tenant>/adapter.gguf` (or PEFT files) and point each tenant's task at it.
    Import(import::ImportArgs),
    /// List a tenant's versions.
    List {
        /// Tenant id.
        tenant: TenantId,
    },
    /// Remove a version that no task points at.
    Remove {
        /// Full name.
        name: AdapterName,
    },
}

#[derive(Debug, Subcommand)]
enum TaskCommand {
    /// Point a task at a version; running requests finish on the version they started with.
    Point {
        /// Full name; tenant and task are part of it unless --task names another task.
        name: AdapterName,
        /// Task, when it differs from the name's.
        #[arg(long)]
        task: Option<TaskName>,
    },
    /// Leave a task without adapter.
    Clear {
        /// Tenant id.
        tenant: TenantId,
        /// Task.
        task: TaskName,
    },
    /// Remove a task.
    Remove {
        /// Tenant id.
        tenant: TenantId,
        /// Task.
        task: TaskName,
    },
}

/// Runs one command.
pub fn run(args: &CtlArgs) -> anyhow::Result<()> {
    let node = match &args.command {
        // These need no node.
        Command::Ca(command) => return ca::run(&ClusterConfig::load(&args.config)?, command),
        Command::Join(join) => return ca::join(&ClusterConfig::load(&args.config)?, join),
        Command::Drain { name } => Some(name),
        _ => args.node.as_ref(),
    };
    let client = connect(args, node)?;
    match &args.command {
        Command::Status => print(&client.get::<Value>("/admin/v1/status")?),
        Command::Cluster { tenants: false } => print(&client.get::<Value>("/admin/v1/cluster")?),
        Command::Cluster { tenants: true } => print(&client.get::<Value>("/admin/v1/cluster/tenants")?),
        Command::Drain { name } => {
            print(&client.send::<Value>("POST", "/admin/v1/drain", &DrainNode { node: name.clone() })?)
        }
        Command::Ca(_) | Command::Join(_) => unreachable!("handled above, without a node"),
        Command::Tenant(command) => tenant(&client, command),
        Command::Key(command) => key(&client, command),
        Command::Adapter(command) => adapter(&client, command),
        Command::Task(command) => task(&client, command),
    }
}

/// The named node, or the first of the cluster file that answers.
fn connect(args: &CtlArgs, node: Option<&NodeId>) -> anyhow::Result<Client> {
    if let (Some(url), Some(key)) = (&args.url, &args.admin_key) {
        return Client::new(url, key, args.ca.as_deref());
    }
    let config = ClusterConfig::load(&args.config)?;
    let node = match (node, &config.nodes[..]) {
        (Some(name), _) => {
            Some(config.node(name).with_context(|| format!("find node {name} in {}", args.config.display()))?)
        }
        (None, [first, others @ ..]) if others.is_empty() || args.url.is_some() => Some(first),
        (None, _) => None,
    };
    if let Some(node) = node {
        return client_of(args, &config, node);
    }
    let mut silent = Vec::new();
    for node in &config.nodes {
        match client_of(args, &config, node).and_then(|client| client.look().map(|()| client)) {
            Ok(client) => {
                if !silent.is_empty() {
                    eprintln!("asking node {}: {}", node.name, silent.join("; "));
                }
                return Ok(client);
            }
            Err(error) => silent.push(format!("node {}: {error:#}", node.name)),
        }
    }
    bail!("find a node that answers: {}", silent.join("; "))
}

/// A node's admin port and key, from the command line or the cluster file.
fn client_of(args: &CtlArgs, config: &ClusterConfig, node: &NodeConfig) -> anyhow::Result<Client> {
    let scheme = if config.tls.is_some() { "https" } else { "http" };
    let host = match node.admin.ip() {
        ip if ip.is_unspecified() => IpAddr::from([127, 0, 0, 1]).to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
        IpAddr::V4(ip) => ip.to_string(),
    };
    let url = args.url.clone().unwrap_or_else(|| format!("{scheme}://{host}:{}", node.admin.port()));
    let key_file = node.data.join("admin.key");
    let key = key_from(args.admin_key.as_deref(), Some(&key_file))?;
    Client::new(&url, &key, args.ca.as_deref())
}

fn tenant(client: &Client, command: &TenantCommand) -> anyhow::Result<()> {
    match command {
        TenantCommand::Create { id, display_name, contact, tasks, contract, key_out } => {
            let body = CreateTenant {
                id: id.clone(),
                display_name: display_name.clone(),
                contact: contact.clone(),
                tasks: tasks.clone(),
                contract: contract.patch(),
            };
            // Opened before the call: a key that cannot be written must not be made.
            let key_file = key_out.as_deref().map(upload::create_private).transpose()?;
            let created: TenantCreated = client.send("POST", "/admin/v1/tenants", &body)?;
            print(&created)?;
            key_file.map_or(Ok(()), |file| upload::write_line(file, &created.key.key))
        }
        TenantCommand::Set { id, display_name, contact, expected_epoch, contract } => {
            let body = UpdateTenant {
                display_name: display_name.clone(),
                contact: contact.clone(),
                expected_epoch: *expected_epoch,
                contract: contract.patch(),
            };
            print(&client.send::<TenantView>("PATCH", &format!("/admin/v1/tenants/{id}"), &body)?)
        }
        TenantCommand::List => print(&client.get::<TenantList>("/admin/v1/tenants")?),
        TenantCommand::Show { id } => print(&client.get::<TenantView>(&format!("/admin/v1/tenants/{id}"))?),
        TenantCommand::Suspend { id } => {
            print(&client.send::<Value>("POST", &format!("/admin/v1/tenants/{id}/suspend"), &())?)
        }
        TenantCommand::Resume { id } => {
            print(&client.send::<Value>("POST", &format!("/admin/v1/tenants/{id}/resume"), &())?)
        }
        TenantCommand::Delete { id, yes: true } => print(&client.delete::<Value>(&format!("/admin/v1/tenants/{id}"))?),
        TenantCommand::Delete { id, yes: false } => {
            bail!("delete {id}: this cannot be undone; hint: repeat with --yes if you mean it")
        }
    }
}

fn key(client: &Client, command: &KeyCommand) -> anyhow::Result<()> {
    match command {
        KeyCommand::Add { tenant, expires_in_s } => {
            let body = CreateKey { expires_in_s: *expires_in_s };
            print(&client.send::<NewKey>("POST", &format!("/admin/v1/tenants/{tenant}/keys"), &body)?)
        }
        KeyCommand::List { tenant } => print(&client.get::<TenantView>(&format!("/admin/v1/tenants/{tenant}"))?.keys),
        KeyCommand::Revoke { tenant, key_id } => {
            print(&client.delete::<Value>(&format!("/admin/v1/tenants/{tenant}/keys/{key_id}"))?)
        }
    }
}

fn adapter(client: &Client, command: &AdapterCommand) -> anyhow::Result<()> {
    match command {
        AdapterCommand::Upload { name, path, point } => {
            print(&upload::Form::from_path(path)?.send(client, name)?)?;
            if *point {
                point_task(client, name, &name.task)?;
            }
            Ok(())
        }
        AdapterCommand::Import(args) => import::run(client, args),
        AdapterCommand::List { tenant } => {
            print(&client.get::<TenantView>(&format!("/admin/v1/tenants/{tenant}"))?.adapters)
        }
        AdapterCommand::Remove { name } => {
            print(&client.delete::<Value>(&format!("/admin/v1/tenants/{}/adapters/{name}", name.client))?)
        }
    }
}

fn task(client: &Client, command: &TaskCommand) -> anyhow::Result<()> {
    match command {
        TaskCommand::Point { name, task } => point_task(client, name, task.as_ref().unwrap_or(&name.task)),
        TaskCommand::Clear { tenant, task } => {
            let target = format!("/admin/v1/tenants/{tenant}/tasks/{task}");
            print(&client.send::<Value>("PUT", &target, &PointTask { version: None })?)
        }
        TaskCommand::Remove { tenant, task } => {
            print(&client.delete::<Value>(&format!("/admin/v1/tenants/{tenant}/tasks/{task}"))?)
        }
    }
}

fn point_task(client: &Client, name: &AdapterName, task: &TaskName) -> anyhow::Result<()> {
    let target = format!("/admin/v1/tenants/{}/tasks/{task}", name.client);
    print(&client.send::<Value>("PUT", &target, &PointTask { version: Some(name.clone()) })?)
}

fn print(value: &impl serde::Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value).context("show the answer")?);
    Ok(())
}

fn parse_tier(text: &str) -> Result<Tier, String> {
    Tier::ALL.into_iter().find(|tier| tier.as_str() == text).ok_or_else(|| "use shared, premium or isolated".to_owned())
}

fn parse_fallback(text: &str) -> Result<Fallback, String> {
    match text {
        "refuse" => Ok(Fallback::Refuse),
        "base" => Ok(Fallback::Base),
        _ => Err("use refuse or base".to_owned()),
    }
}

// === impl ContractArgs ===

impl ContractArgs {
    fn patch(&self) -> ContractPatch {
        ContractPatch {
            tier: self.tier,
            weight: self.weight,
            bases: self.bases.clone(),
            allow_base: self.allow_base,
            fallback: self.fallback,
            region: self.region.clone(),
            pool: self.pool.clone(),
            cost_center: self.cost_center.clone(),
            concurrency: self.concurrency,
            queue_depth: self.queue_depth,
            deadline_ms: self.deadline_ms,
            requests_per_minute: self.requests_per_minute,
            tokens_per_minute: self.tokens_per_minute,
            burst_requests: self.burst_requests,
        }
    }
}
