//! `tenantry ctl ca` and `tenantry ctl join`: who is let into the cluster. Works on folders of this machine (and, to
//! join, on the other nodes' peer ports), not through a node's admin port: a node that is not in has none.

use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use peer::Authority;
use peer::pki::Token;
use peer::pki::authority::Entry;
use serde_json::{Value, json};
use shared::clock::{Clock, SystemClock};
use shared::config::{ClusterConfig, NodeConfig};
use shared::id::NodeId;

/// Subcommands of `tenantry ctl ca`.
#[derive(Debug, Subcommand)]
pub(super) enum CaCommand {
    /// Found the authority in the folder that `[cluster] ca` names. Does nothing when it is there.
    Init,
    /// Let nodes in whose data folders are on this machine. Does nothing for those that are in.
    Admit {
        /// Which nodes.
        #[arg(required = true)]
        nodes: Vec<NodeId>,
    },
    /// Print the line with which a node of another machine joins; good once.
    Invite {
        /// Which node.
        node: NodeId,
        /// Minutes until it is too late.
        #[arg(long = "for", value_name = "MINUTES", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1440))]
        minutes: u64,
    },
    /// Who is in and who is invited.
    List,
}

/// Arguments of `tenantry ctl join`.
#[derive(Debug, Args)]
pub(super) struct JoinArgs {
    /// Name of this node in the cluster file.
    name: NodeId,
    /// What `tenantry ctl ca invite` printed.
    #[arg(long, env = "TENANTRY_INVITATION", hide_env_values = true)]
    token: Token,
}

pub(super) fn run(config: &ClusterConfig, command: &CaCommand) -> anyhow::Result<()> {
    let now = SystemClock.wall();
    match command {
        CaCommand::Init => {
            let data: Vec<_> = config.nodes.iter().map(|node| node.data.as_path()).collect();
            let authority = Authority::found(&config.ca, &data, now).context("found the authority")?;
            let fingerprint = authority.fingerprint().map(|byte| format!("{byte:02x}")).concat();
            super::print(&json!({"folder": config.ca, "fingerprint": fingerprint}))?;
            eprintln!(
                "next: tenantry ctl ca admit NODE … for nodes of this machine, tenantry ctl ca invite NODE for one of another; \
                 a node that ran alone so far is then started again with the cluster file that lists the others"
            );
            Ok(())
        }
        CaCommand::Admit { nodes } => {
            let authority = open(config, now)?;
            let mut admitted = serde_json::Map::new();
            for name in nodes {
                let data = &node(config, name)?.data;
                let is_new = authority.admit_here(name, data, now).with_context(|| format!("let node {name} in"))?;
                admitted.insert(name.to_string(), json!(if is_new { "let in" } else { "was in" }));
            }
            super::print(&admitted)
        }
        CaCommand::Invite { node: name, minutes } => {
            node(config, name)?;
            let token = open(config, now)?.invite(name, now, Duration::from_secs(60 * minutes))?;
            println!("tenantry ctl join {name} --token {token}");
            Ok(())
        }
        CaCommand::List => {
            let roll = open(config, now)?.roll()?;
            let lines = |entries: Vec<Entry>| -> Vec<Value> {
                let line = |entry: Entry| {
                    let left_s = entry.until.saturating_sub(now).as_secs();
                    json!({"node": entry.node, "until_s": entry.until.as_secs(), "left_s": left_s})
                };
                entries.into_iter().map(line).collect()
            };
            super::print(&json!({"nodes": lines(roll.nodes), "invitations": lines(roll.invitations)}))
        }
    }
}

pub(super) fn join(config: &ClusterConfig, args: &JoinArgs) -> anyhow::Result<()> {
    let data = &node(config, &args.name)?.data;
    let others = config.nodes.iter().filter(|node| node.name != args.name);
    let others: Vec<_> = others.filter_map(|node| Some((node.name.clone(), node.peer?))).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let by = runtime.block_on(peer::join(&args.name, &args.token, data, &others, SystemClock.wall()));
    let by = by.with_context(|| format!("join the cluster as node {}", args.name))?;
    super::print(&json!({"node": args.name, "let_in_by": by, "data": data}))
}

fn open(config: &ClusterConfig, now: Duration) -> anyhow::Result<Authority> {
    match Authority::open(&config.ca, now).context("open the authority")? {
        Some(authority) => Ok(authority),
        None => bail!(
            "find the authority: {} holds none; hint: tenantry ctl ca init, on the machine that is to hold it",
            config.ca.display()
        ),
    }
}

fn node<'a>(config: &'a ClusterConfig, name: &NodeId) -> anyhow::Result<&'a NodeConfig> {
    config.node(name).with_context(|| format!("find node {name} in the cluster file"))
}
