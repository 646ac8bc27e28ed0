//! The program `bench`: one run against one server, figures as JSON. `scripts/bench` calls it.
//!
//! ```text
//! cargo run --release -p bench -- --url http://127.0.0.1:8080 --key KEY --model smollm2 --streams 16
//! ```

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bench::arrivals::Arrivals;
use bench::cpu::{Memory, Used};
use bench::drive::{self, Load};
use bench::report::Report;
use bench::tenants::{Draw, Tenant};
use clap::Parser;
use serde_json::{Map, Value, json};
use shared::clock::{Clock, SystemClock};

/// Asks a server that speaks the OpenAI completions API, within bounds, and says how it answered.
#[derive(Debug, Parser)]
#[command(name = "bench")]
struct Options {
    /// Where the server listens; plain HTTP.
    #[arg(long)]
    url: String,
    /// Path of the completions call.
    #[arg(long, default_value = "/v1/completions")]
    path: String,
    /// JSON array of tenants: name, key, model, group, streams, prompt_tokens, output_tokens, body.
    #[arg(long, conflicts_with_all = ["key", "model"])]
    tenants: Option<PathBuf>,
    /// API key of the only tenant.
    #[arg(long, default_value = "")]
    key: String,
    /// Model of the only tenant.
    #[arg(long, default_value = "")]
    model: String,
    /// How requests fall on tenants: pinned, cycle, uniform, zipf:1.0, 80-20.
    #[arg(long, default_value = "uniform")]
    draw: Draw,
    /// Closed loop with this many streams; pinned tenants have their own.
    #[arg(long, default_value_t = 1)]
    streams: usize,
    /// Poisson arrivals at this many requests per second instead of a closed loop.
    #[arg(long)]
    rate: Option<f64>,
    /// Most requests.
    #[arg(long, default_value_t = 48)]
    requests: usize,
    /// No request is sent after this many seconds.
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
    /// Seconds that answers may take after that.
    #[arg(long, default_value_t = 30.0)]
    drain: f64,
    /// Requests of each stream before the measurement.
    #[arg(long, default_value_t = 0)]
    warmup: usize,
    /// Prompt tokens.
    #[arg(long, default_value_t = 96)]
    prompt_tokens: usize,
    /// Output tokens.
    #[arg(long, default_value_t = 64)]
    output_tokens: usize,
    /// Seed of prompts, picks and arrival times.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Processes of the server, whose CPU time and memory are reported with those of their children.
    #[arg(long)]
    pid: Vec<u32>,
    /// Words kept in the report.
    #[arg(long, default_value = "")]
    label: String,
    /// File for the report; standard output if not given.
    #[arg(long)]
    out: Option<PathBuf>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let load = load(&options)?;
    let asked = json!({
        "url": options.url, "path": options.path, "draw": options.draw.to_string(), "streams": options.streams,
        "rate_per_s": options.rate, "requests": options.requests, "seconds": options.seconds,
        "drain": options.drain, "warmup": options.warmup, "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens, "seed": options.seed, "n_tenants": load.tenants.len(),
    });
    let tenants = load.tenants.clone();
    let (pids, own) = (options.pid.clone(), [std::process::id()]);
    // Warm-up is not measured, so the counters are read when the measurement starts.
    let before = Rc::new(RefCell::new((Used::default(), Used::default())));
    let counters = before.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    let started_unix_s = SystemClock.wall().as_secs();
    let outcome = runtime.block_on(drive::run(load, move || {
        *counters.borrow_mut() = (Used::of(&pids), Used::of(&own));
    }));
    let server = Used::of(&options.pid).since(&before.borrow().0);
    let generator = Used::of(&own).since(&before.borrow().1);
    let report = Report::of(&tenants, &outcome.due, &outcome.records);
    let tokens = report.all.output_tokens.max(1) as f64;
    let mut json = serde_json::to_value(&report).context("write the report")?;
    json["label"] = json!(options.label);
    json["started_unix_s"] = json!(started_unix_s);
    json["options"] = asked;
    json["n_dropped"] = json!(outcome.n_dropped);
    json["cpu"] = json!({
        "generator_s": generator.total_s,
        "server_s": server.total_s,
        "server_s_per_1000_output_tokens": server.total_s * 1e3 / tokens,
        "server_threads_s": server.by_thread_s,
        "server_memory": Memory::of(&options.pid),
    });
    let text = serde_json::to_string_pretty(&json).context("write the report")? + "\n";
    match &options.out {
        Some(path) => std::fs::write(path, text).with_context(|| format!("write {}", path.display())),
        None => {
            print!("{text}");
            Ok(())
        }
    }
}

fn load(options: &Options) -> Result<Load> {
    let Some(authority) = options.url.strip_prefix("http://") else {
        bail!("the URL {:?} does not start with http://; the generator speaks nothing else", options.url)
    };
    let tenants: Vec<Tenant> = match &options.tenants {
        Some(path) => {
            let text = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
            serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))?
        }
        None => vec![Tenant {
            name: "only".to_owned(),
            key: options.key.clone(),
            model: options.model.clone(),
            group: String::new(),
            streams: options.streams,
            prompt_tokens: None,
            output_tokens: None,
            body: Map::<String, Value>::new(),
        }],
    };
    ensure!(!tenants.is_empty(), "the tenants file is empty");
    let arrivals = match options.rate {
        Some(rate_per_s) => {
            ensure!(rate_per_s > 0.0 && rate_per_s <= 1e5, "a rate of {rate_per_s} is not between 0 and 100000");
            Arrivals::Poisson { rate_per_s }
        }
        None => Arrivals::Closed { n_streams: options.streams },
    };
    let seconds = |name: &str, s: f64| {
        Duration::try_from_secs_f64(s).with_context(|| format!("{name} must be a time in seconds, not {s}"))
    };
    Ok(Load {
        authority: authority.trim_end_matches('/').to_owned(),
        path: options.path.clone(),
        tenants,
        draw: options.draw,
        arrivals,
        n_requests: options.requests,
        sending: seconds("--seconds", options.seconds)?,
        draining: seconds("--drain", options.drain)?,
        n_warmup: options.warmup,
        prompt_tokens: options.prompt_tokens,
        output_tokens: options.output_tokens,
        seed: options.seed,
    })
}
