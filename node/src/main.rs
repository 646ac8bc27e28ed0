//! The binary `tenantry`: `node` serves, `ctl` operates, `chat` talks. Decides exit codes and logging only.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong command line, 78 wrong configuration (EX_CONFIG).

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use node::{chat, ctl, serve};

/// One language model per customer: multi-tenant LoRA inference.
#[derive(Parser)]
#[command(name = "tenantry", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start one node of the cluster.
    Node(serve::NodeArgs),
    /// Operate a cluster: tenants, keys, adapters, status.
    Ctl(ctl::CtlArgs),
    /// Talk to a model from the terminal.
    Chat(chat::ChatArgs),
}

fn main() -> ExitCode {
    kernels::memory::bound_arenas();
    let cli = Cli::parse();
    let outcome = match cli.command {
        Command::Node(args) => serve::run(&args),
        Command::Ctl(args) => ctl::run(&args),
        Command::Chat(args) => chat::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<shared::config::ConfigError>() => {
            eprintln!("tenantry: {error}");
            ExitCode::from(78)
        }
        Err(error) => {
            eprintln!("tenantry: failed to {error:#}");
            ExitCode::FAILURE
        }
    }
}
