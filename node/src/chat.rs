//! `tenantry chat`: a conversation in the terminal over the public streaming API, or one question and answer.

mod quic;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::client::{Client, key_from};

/// Arguments of `tenantry chat`.
#[derive(Debug, clap::Args)]
pub struct ChatArgs {
    /// Address of any node.
    #[arg(long, env = "TENANTRY_URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// API key of the tenant.
    #[arg(long, env = "TENANTRY_API_KEY", hide_env_values = true)]
    key: Option<String>,
    /// File whose first line is the API key.
    #[arg(long)]
    key_file: Option<PathBuf>,
    /// PEM file of a certificate authority to trust.
    #[arg(long)]
    ca: Option<PathBuf>,
    /// A task, a full adapter version, or a base model; the first one offered when left out.
    #[arg(long)]
    model: Option<String>,
    /// System prompt.
    #[arg(long)]
    system: Option<String>,
    /// Longest answer in tokens.
    #[arg(long)]
    max_tokens: Option<u32>,
    /// 0 always picks the most likely token.
    #[arg(long, default_value_t = 0.7)]
    temperature: f32,
    /// Ask over QUIC instead, at any node of the cluster file: an answer goes on when its node dies.
    #[arg(long, value_name = "CLUSTER_FILE", conflicts_with = "url")]
    quic: Option<PathBuf>,
    /// One question; without it the terminal becomes a conversation.
    question: Option<String>,
}

/// The way in.
enum Door {
    Http(Client),
    Quic(Box<quic::Quic>),
}

impl Door {
    fn name<'a>(&self, args: &'a ChatArgs) -> &'a str {
        match self {
            Self::Http(_) => &args.url,
            Self::Quic(_) => "any node",
        }
    }
}

/// Runs the conversation until end of input.
pub fn run(args: &ChatArgs) -> anyhow::Result<()> {
    let key = key_from(args.key.as_deref(), args.key_file.as_ref())?;
    let door = match &args.quic {
        Some(config) => Door::Quic(Box::new(quic::Quic::new(config, args.ca.as_deref(), key.to_string())?)),
        None => Door::Http(Client::new(&args.url, &key, args.ca.as_deref())?),
    };
    let model = match (&args.model, &door) {
        (Some(model), _) => model.clone(),
        (None, Door::Http(client)) => first_model(client)?,
        (None, Door::Quic(_)) => bail!("pick a model: over QUIC there is no list; hint: --model"),
    };
    let mut messages = Vec::new();
    if let Some(system) = &args.system {
        messages.push(json!({"role": "system", "content": system}));
    }
    if let Some(question) = &args.question {
        messages.push(json!({"role": "user", "content": question}));
        answer(&door, args, &model, &messages)?;
        return Ok(());
    }
    eprintln!("{model} at {}; end with Ctrl-D", door.name(args));
    loop {
        eprint!("> ");
        let mut line = String::new();
        if std::io::stdin().read_line(&mut line).context("read your line")? == 0 {
            return Ok(());
        }
        if line.trim().is_empty() {
            continue;
        }
        messages.push(json!({"role": "user", "content": line.trim()}));
        let text = answer(&door, args, &model, &messages)?;
        messages.push(json!({"role": "assistant", "content": text}));
    }
}

fn first_model(client: &Client) -> anyhow::Result<String> {
    let list: Value = client.get("/v1/models")?;
    match list["data"][0]["id"].as_str() {
        Some(id) => Ok(id.to_owned()),
        None => bail!("pick a model: this key may use none; hint: point a task at an adapter with tenantry ctl"),
    }
}

/// Prints the answer as it arrives and returns it.
fn answer(door: &Door, args: &ChatArgs, model: &str, messages: &[Value]) -> anyhow::Result<String> {
    let mut body = json!({"model": model, "messages": messages, "stream": true, "temperature": args.temperature});
    if let Some(max_tokens) = args.max_tokens {
        body["max_tokens"] = json!(max_tokens);
    }
    let mut out = std::io::stdout().lock();
    let show = |delta: &str| {
        out.write_all(delta.as_bytes())?;
        out.flush()
    };
    let text = match door {
        Door::Http(client) => each_delta(client.stream("/v1/chat/completions", &body)?, show)?,
        Door::Quic(quic) => quic.each_delta(&body, show)?,
    };
    writeln!(out).context("write to the terminal")?;
    Ok(text)
}

/// Calls `show` with every piece of text of an SSE chat stream and returns the whole.
fn each_delta(reader: impl Read, mut show: impl FnMut(&str) -> std::io::Result<()>) -> anyhow::Result<String> {
    let mut text = String::new();
    for line in BufReader::new(reader).lines() {
        let line = line.context("read the answer")?;
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            return Ok(text);
        }
        let event: Value = serde_json::from_str(data).context("understand the answer")?;
        if let Some(message) = event["error"]["message"].as_str() {
            bail!("finish the answer: {message}");
        }
        if let Some(delta) = event["choices"][0]["delta"]["content"].as_str() {
            show(delta).context("write to the terminal")?;
            text.push_str(delta);
        }
    }
    bail!("finish the answer: the server closed the stream early; hint: the node may have stopped, ask again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deltas_are_joined_until_done() {
        let sse = ": hi\n\ndata: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"b\"}}]}\n\ndata: [DONE]\n\n";
        let mut shown = Vec::new();
        let text = each_delta(sse.as_bytes(), |delta| {
            shown.push(delta.to_owned());
            Ok(())
        });
        assert_eq!(text.expect("complete"), "ab");
        assert_eq!(shown, ["a", "b"]);
    }

    #[test]
    fn errors_and_early_ends_are_reported() {
        let failed = each_delta("data: {\"error\":{\"message\":\"no room\"}}\n".as_bytes(), |_| Ok(()));
        assert!(failed.expect_err("failed").to_string().contains("no room"));
        assert!(each_delta("data: {\"choices\":[]}\n".as_bytes(), |_| Ok(())).is_err());
    }
}
