//! An operator in a hurry: the admin calls as direct HTTP, for tests that make dozens of tenants and uploads,
//! where starting `tenantry ctl` for each would take longer than the test. Used with [`NodeProcess`].

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use model::adapter::AdapterFiles;
use serde_json::{Value, json};

use crate::process::{Answer, NodeProcess};

/// Rates that no test reaches, for a cluster file: a test of something else must not meet the rate limiter.
pub const GENEROUS: &str = "[tiers.shared]\nrequests_per_minute = 1000000\ntokens_per_minute = 1000000000\nburst_requests = 1000000\nqueue_depth = 10000\n";

/// Creates a tenant with these fields of a contract and returns its first key.
///
/// # Panics
/// When the node refuses.
pub fn tenant(node: &NodeProcess, id: &str, contract: &Value) -> String {
    let answer = node.admin("POST", "/admin/v1/tenants", &json!({"id": id, "contract": contract}).to_string());
    assert_eq!(answer.status, 201, "{}", answer.text);
    answer.body["key"]["key"].as_str().expect("a key").to_owned()
}

/// Uploads files under a full version name, whatever the answer.
pub fn upload(node: &NodeProcess, name: &str, files: &AdapterFiles) -> Answer {
    let tenant = name.split('-').next().expect("a name has parts");
    let parts: Vec<(&str, &[u8])> = match files {
        AdapterFiles::Peft { config, weights } => vec![("config", config), ("weights", weights)],
        AdapterFiles::Gguf(bytes) => vec![("gguf", bytes)],
    };
    form(node, &format!("/admin/v1/tenants/{tenant}/adapters/{name}"), &parts)
}

/// PUT of a form with these parts on the admin port.
///
/// # Panics
/// When the node does not answer.
pub fn form(node: &NodeProcess, path: &str, parts: &[(&str, &[u8])]) -> Answer {
    try_form(node, path, parts).expect("the node answers")
}

/// As [`form`]; `None` when the node cut the connection while the form was still being sent.
pub fn try_form(node: &NodeProcess, path: &str, parts: &[(&str, &[u8])]) -> Option<Answer> {
    const BOUNDARY: &str = "a-line-that-no-weight-contains-7f3e";
    let mut body = Vec::new();
    for (name, bytes) in parts {
        let head = format!(
            "--{BOUNDARY}\r\ncontent-disposition: form-data; name=\"{name}\"; filename=\"{name}\"\r\ncontent-type: application/octet-stream\r\n\r\n"
        );
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(bytes);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("--{BOUNDARY}--\r\n").as_bytes());
    let agent = agent();
    let request = agent
        .put(format!("{}{path}", node.admin_url()))
        .header("authorization", format!("Bearer {}", node.admin_key()))
        .header("content-type", format!("multipart/form-data; boundary={BOUNDARY}"));
    request.send(&body[..]).ok().map(crate::process::read)
}

/// Uploads files under a full version name, which must succeed, and points the name's task at them.
///
/// # Panics
/// When the node refuses either.
pub fn install(node: &NodeProcess, name: &str, files: &AdapterFiles) {
    let answer = upload(node, name, files);
    assert_eq!(answer.status, 201, "{name}: {}", answer.text);
    point(node, name);
}

/// Points the task in `name` at this version.
///
/// # Panics
/// When the node refuses.
pub fn point(node: &NodeProcess, name: &str) {
    let mut words = name.split('-');
    let (tenant, task) = (words.next().expect("a tenant"), words.next().expect("a task"));
    let path = format!("/admin/v1/tenants/{tenant}/tasks/{task}");
    let answer = node.admin("PUT", &path, &json!({"version": name}).to_string());
    assert_eq!(answer.status, 200, "{name}: {}", answer.text);
}

/// What `GET /admin/v1/status` says about the only base.
pub fn base_status(node: &NodeProcess) -> Value {
    node.admin("GET", "/admin/v1/status", "").body["bases"][0].clone()
}

/// A client that keeps its connection; one per thread.
pub fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(120)))
        .build()
        .into()
}

/// POST of JSON with a client that keeps its connection.
pub fn post(agent: &ureq::Agent, node: &NodeProcess, path: &str, key: &str, body: &str) -> Answer {
    let request = agent
        .post(format!("{}{path}", node.url()))
        .header("authorization", format!("Bearer {key}"))
        .header("content-type", "application/json");
    crate::process::read(request.send(body).expect("the node answers"))
}

/// Sends a request and returns the socket, from which nothing has been read: dropping it is a client that goes
/// away.
pub fn start(address: SocketAddr, path: &str, key: &str, body: &str) -> TcpStream {
    let mut socket = TcpStream::connect(address).expect("the port is open");
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: node\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).and_then(|()| socket.write_all(body.as_bytes())).expect("the node reads");
    socket
}

/// Sends raw bytes and reads until the node closes, or `wait` passes without a byte. Returns what came.
pub fn raw(address: SocketAddr, bytes: &[u8], wait: Duration) -> String {
    let mut socket = TcpStream::connect(address).expect("the port is open");
    socket.set_read_timeout(Some(wait)).expect("a socket has timeouts");
    // The node may answer and close before it has read everything; what it said is then still to be read.
    let _ = socket.write_all(bytes);
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(n @ 1..) = socket.read(&mut chunk) {
        answer.extend_from_slice(&chunk[..n]);
    }
    String::from_utf8_lossy(&answer).into_owned()
}
