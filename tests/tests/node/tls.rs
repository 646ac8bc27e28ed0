//! Ports that speak only TLS, clients that trust one CA, and certificates that change while serving.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use tests::process::{binary, scratch};
use tests::tiny;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// A certificate authority: its own certificate as a PEM file, and what it signs with.
pub(super) struct Authority {
    file: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(super) fn new(folder: &Path, name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("signs itself");
        let file = folder.join(format!("{name}.pem"));
        std::fs::write(&file, certificate.pem()).expect("writable");
        Self { file, issuer: Issuer::new(params, key) }
    }

    /// Puts a server certificate for loopback and its key where the node looks for them.
    fn issue(&self, folder: &Path) {
        let params = CertificateParams::new(vec!["127.0.0.1".into(), "localhost".into()]).expect("names");
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("signs");
        std::fs::write(folder.join("server.pem"), certificate.pem()).expect("writable");
        std::fs::write(folder.join("server.key"), key.serialize_pem()).expect("writable");
    }

    /// A client without any connection yet that trusts this authority only.
    fn agent(&self) -> ureq::Agent {
        let pem = std::fs::read(&self.file).expect("readable");
        let roots = RootCerts::Specific(Arc::new(vec![Certificate::from_pem(&pem).expect("PEM")]));
        ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(20)))
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .build()
            .into()
    }
}

/// A node with TLS. Killed when dropped.
pub(super) struct SecureNode {
    child: Child,
    folder: PathBuf,
    pub(super) http: String,
    admin: String,
}

impl Drop for SecureNode {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl SecureNode {
    pub(super) fn start(folder: &Path, authority: &Authority) -> Self {
        authority.issue(folder);
        let free = || {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has ports");
            listener.local_addr().expect("an address").to_string()
        };
        let (http, admin) = (free(), free());
        let model = tiny::model(&folder.join("model"));
        let config = format!(
            "[tls]\ncertificate = \"server.pem\"\nkey = \"server.key\"\n[[nodes]]\nname = \"a\"\nhttp = \"{http}\"\nadmin = \"{admin}\"\ndata = \"data\"\n[[bases]]\nname = \"tiny\"\npath = \"{}\"\nnumerics = \"exact\"\n",
            model.display()
        );
        std::fs::write(folder.join("cluster.toml"), config).expect("writable");
        let log = std::fs::File::create(folder.join("node.log")).expect("writable");
        let mut child = Command::new(binary())
            .args(["node", "--name", "a", "--config"])
            .arg(folder.join("cluster.toml"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the node starts");
        let agent = authority.agent();
        let is_ready = (0..600).any(|_| {
            assert!(child.try_wait().expect("the child can be asked").is_none(), "the node ended");
            std::thread::sleep(Duration::from_millis(50));
            agent.get(format!("https://{http}/readyz")).call().is_ok_and(|answer| answer.status() == 200)
        });
        assert!(is_ready, "the node is not ready over TLS");
        Self { child, folder: folder.to_owned(), http, admin }
    }

    fn greets(&self, authority: &Authority) -> bool {
        let agent = authority.agent();
        let greets =
            |port: &str| agent.get(format!("https://{port}/healthz")).call().is_ok_and(|answer| answer.status() == 200);
        let (clients, operators) = (greets(&self.http), greets(&self.admin));
        assert_eq!(clients, operators, "both ports show the same certificate");
        clients
    }

    fn hang_up(&self, log_line: &str) {
        let status = Command::new("kill").args(["-HUP", &self.child.id().to_string()]).status().expect("kill runs");
        assert!(status.success());
        let is_told = (0..200).any(|_| {
            std::thread::sleep(Duration::from_millis(20));
            self.log().contains(log_line)
        });
        assert!(is_told, "the log does not say {log_line:?}:\n{}", self.log());
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("node.log")).unwrap_or_default()
    }

    pub(super) fn run(&self, words: &[&str]) -> Output {
        Command::new(binary()).args(words).current_dir(&self.folder).output().expect("the program runs")
    }
}

#[test]
fn both_ports_speak_only_tls_and_the_tools_trust_the_ca_they_are_given() {
    let folder = scratch("tls");
    let authority = Authority::new(&folder, "ca");
    let node = SecureNode::start(&folder, &authority);
    for port in [&node.http, &node.admin] {
        let plain: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let answer = plain.get(format!("http://{port}/healthz")).call();
        assert!(answer.is_err(), "plain HTTP was answered: {answer:?}");
    }

    let created = node.run(&["ctl", "--ca", "ca.pem", "tenant", "create", "acme", "--key-out", "acme.key"]);
    assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
    let created: Value = serde_json::from_slice(&created.stdout).expect("JSON");
    let key = created["key"]["key"].as_str().expect("a key");
    let without_ca = node.run(&["ctl", "tenant", "list"]);
    assert!(!without_ca.status.success(), "an unknown CA is not trusted");
    let text = String::from_utf8_lossy(&without_ca.stderr).into_owned();
    assert!(text.contains("certificate") || text.contains("UnknownIssuer"), "{text}");

    let url = format!("https://{}", node.http);
    let body = json!({"model": "tiny", "prompt": "x", "max_tokens": 3, "stream": true}).to_string();
    let request =
        authority.agent().post(format!("{url}/v1/completions")).header("authorization", format!("Bearer {key}"));
    let answer =
        tests::process::read(request.header("content-type", "application/json").send(body).expect("the node answers"));
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert!(answer.text.trim_end().ends_with("data: [DONE]"), "{}", answer.text);

    let chat = |ca: &[&str]| {
        let words = ["chat", "--url", &url, "--key-file", "acme.key", "--max-tokens", "4", "hello"];
        node.run(&[&words[..], ca].concat())
    };
    let answered = chat(&["--ca", "ca.pem"]);
    assert!(answered.status.success(), "{}", String::from_utf8_lossy(&answered.stderr));
    assert!(!chat(&[]).status.success(), "chat does not trust an unknown CA either");
}

#[test]
fn a_replaced_certificate_is_shown_after_sighup_and_a_broken_one_is_not() {
    let folder = scratch("tls-reload");
    let (first, second) = (Authority::new(&folder, "first"), Authority::new(&folder, "second"));
    let node = SecureNode::start(&folder, &first);
    assert!(node.greets(&first) && !node.greets(&second));

    second.issue(&folder);
    assert!(node.greets(&first), "nothing changes before the signal");
    node.hang_up("TLS certificate reloaded");
    assert!(node.greets(&second), "new handshakes show the new certificate");
    assert!(!node.greets(&first));

    std::fs::write(folder.join("server.pem"), "not a certificate").expect("writable");
    node.hang_up("not reloaded");
    assert!(node.greets(&second), "a broken replacement changes nothing");
    // A key that belongs to another certificate is as broken.
    second.issue(&folder);
    std::fs::write(folder.join("server.key"), KeyPair::generate().expect("a key").serialize_pem()).expect("writable");
    node.hang_up("KeyMismatch");
    assert!(node.greets(&second));
}
