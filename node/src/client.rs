//! The small blocking HTTP client of `ctl` and `chat`: base URL, bearer key, optional CA, readable errors.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A node that does not say within this time that it lives is passed over for another one.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest answer read into memory: ten times the largest listing of 10,000 tenants seen in tests.
const ANSWER_BYTES_MAX: u64 = 256 << 20;

/// Talks to one server with one key.
pub struct Client {
    agent: ureq::Agent,
    url: String,
    key: String,
}

impl Client {
    /// `url` without a trailing slash; `ca` is a PEM file to trust instead of the built-in roots.
    pub fn new(url: &str, key: &str, ca: Option<&Path>) -> anyhow::Result<Self> {
        let mut config =
            ureq::Agent::config_builder().http_status_as_error(false).timeout_connect(Some(CONNECT_TIMEOUT));
        if let Some(path) = ca {
            let pem = std::fs::read(path).with_context(|| format!("read the CA file {}", path.display()))?;
            let certificate =
                Certificate::from_pem(&pem).with_context(|| format!("parse the CA file {}", path.display()))?;
            let roots = RootCerts::Specific(Arc::new(vec![certificate]));
            config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
        }
        Ok(Self { agent: config.build().into(), url: url.trim_end_matches('/').to_owned(), key: key.to_owned() })
    }

    /// Whether the server is there.
    ///
    /// # Errors
    /// When it does not answer, whatever it would say.
    pub fn look(&self) -> anyhow::Result<()> {
        let request = self.agent.get(format!("{}/healthz", self.url));
        let looked = request.config().timeout_global(Some(LOOK_TIMEOUT)).build().call();
        looked.map(drop).map_err(|error| anyhow::anyhow!("{} does not answer ({error})", self.url))
    }

    /// GET.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let request = self.agent.get(format!("{}{path}", self.url)).header("authorization", self.bearer());
        self.read(request.call(), path)
    }

    /// DELETE.
    pub fn delete<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        let request = self.agent.delete(format!("{}{path}", self.url)).header("authorization", self.bearer());
        self.read(request.call(), path)
    }

    /// POST, PUT or PATCH with a JSON body.
    pub fn send<T: DeserializeOwned>(&self, method: &str, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        let bytes = serde_json::to_vec(body).context("encode the request")?;
        self.send_bytes(method, path, "application/json", &bytes)
    }

    /// POST, PUT or PATCH with any body.
    pub fn send_bytes<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        content_type: &str,
        body: &[u8],
    ) -> anyhow::Result<T> {
        self.read(self.call(method, path, content_type, body), path)
    }

    /// POST with a JSON body; the answer is read by the caller as it arrives.
    pub fn stream(&self, path: &str, body: &Value) -> anyhow::Result<ureq::BodyReader<'static>> {
        let bytes = serde_json::to_vec(body).context("encode the request")?;
        let response = self.call("POST", path, "application/json", &bytes).map_err(|error| self.unreachable(&error))?;
        if response.status().is_success() {
            return Ok(response.into_body().into_reader());
        }
        Err(self
            .read::<Value>(Ok(response), path)
            .err()
            .unwrap_or_else(|| anyhow::anyhow!("understand the answer of {path}")))
    }

    fn bearer(&self) -> String {
        format!("Bearer {}", self.key)
    }

    fn call(
        &self,
        method: &str,
        path: &str,
        content_type: &str,
        body: &[u8],
    ) -> Result<ureq::http::Response<ureq::Body>, ureq::Error> {
        let url = format!("{}{path}", self.url);
        let request = match method {
            "PUT" => self.agent.put(url),
            "PATCH" => self.agent.patch(url),
            _ => self.agent.post(url),
        };
        request.header("authorization", self.bearer()).header("content-type", content_type).send(body)
    }

    fn read<T: DeserializeOwned>(
        &self,
        answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
        path: &str,
    ) -> anyhow::Result<T> {
        let mut response = answer.map_err(|error| self.unreachable(&error))?;
        let status = response.status();
        let text = response
            .body_mut()
            .with_config()
            .limit(ANSWER_BYTES_MAX)
            .read_to_string()
            .with_context(|| format!("read the answer of {path}"))?;
        if status.is_success() {
            let text = if text.is_empty() { "null" } else { &text };
            return serde_json::from_str(text).with_context(|| format!("understand the answer of {path}"));
        }
        let body: Value = serde_json::from_str(&text).unwrap_or_default();
        match body["error"]["message"].as_str() {
            Some(message) => bail!("do this ({}): {message}", status.as_u16()),
            None => bail!("do this: {} answered {status}", self.url),
        }
    }

    fn unreachable(&self, error: &ureq::Error) -> anyhow::Error {
        anyhow::anyhow!("reach {}: {error}; hint: is the node running, and is this the right port?", self.url)
    }
}

/// The key given directly, or else the first line of the file.
pub fn key_from(given: Option<&str>, file: Option<&PathBuf>) -> anyhow::Result<String> {
    match (given, file) {
        (Some(key), _) => Ok(key.trim().to_owned()),
        (None, Some(path)) => {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("read the key file {}", path.display()))?;
            Ok(text.lines().next().unwrap_or_default().trim().to_owned())
        }
        (None, None) => bail!("find a key; hint: pass --key, or set the environment variable named in --help"),
    }
}
