//! A real node as a process: started from a generated cluster file, driven over its real ports, killed as
//! tests please. Used by the end-to-end tests; nothing here knows the node's insides.

use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

/// What a node is started with.
#[derive(Debug, Clone)]
pub struct NodeSpec {
    /// Base model file or folder.
    pub model: PathBuf,
    /// Name of the base.
    pub base: &'static str,
    /// Names under which adapters may declare the base; empty goes by shapes alone.
    pub aliases: &'static [&'static str],
    /// `fast` or `exact`.
    pub numerics: &'static str,
    /// Folder for the packed copy of the base; throw-away models have none.
    pub panels: &'static str,
    /// Further bases: names and model files or folders.
    pub more_bases: Vec<(&'static str, PathBuf)>,
    /// Further lines of the cluster file: whole tables.
    pub tables: String,
}

impl NodeSpec {
    /// A node with the real model.
    pub fn real() -> Self {
        Self {
            model: crate::model_file(),
            base: "smollm2",
            aliases: &["SmolLM2-135M-Instruct"],
            numerics: "fast",
            panels: "~/.cache/tenantry/panels",
            more_bases: Vec::new(),
            tables: String::new(),
        }
    }

    /// A node with a generated tiny model in `folder`.
    pub fn tiny(folder: &Path) -> Self {
        Self {
            model: crate::tiny::model(folder),
            base: "tiny",
            aliases: &[],
            numerics: "exact",
            panels: "",
            more_bases: Vec::new(),
            tables: String::new(),
        }
    }

    /// Adds a base with the same numerics, which takes any adapter of its shapes.
    #[must_use]
    pub fn with_base(mut self, name: &'static str, model: PathBuf) -> Self {
        self.more_bases.push((name, model));
        self
    }

    /// Adds tables to the cluster file, such as `"[adapters]\nslots = 4"`.
    #[must_use]
    pub fn with(mut self, tables: &str) -> Self {
        self.tables.push_str(tables);
        self.tables.push('\n');
        self
    }
}

/// A running node. Killed when dropped.
#[derive(Debug)]
pub struct NodeProcess {
    child: Child,
    /// Where `cluster.toml` is.
    folder: PathBuf,
    place: NodePlace,
    /// What is started, and what `tenantry ctl` is.
    program: PathBuf,
    agent: ureq::Agent,
}

/// One node of a cluster file.
#[derive(Debug, Clone)]
pub struct NodePlace {
    /// Name.
    pub name: String,
    /// Client port.
    pub http: SocketAddr,
    /// Operator port.
    pub admin: SocketAddr,
    /// UDP port for the other nodes.
    pub peer: Option<SocketAddr>,
    /// Clients over QUIC, in a cluster.
    pub quic: Option<SocketAddr>,
    /// Further lines of its table.
    pub lines: String,
    /// The network namespace it runs in; `None` is that of the tests.
    pub namespace: Option<String>,
}

/// An HTTP answer.
#[derive(Debug)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Headers by lower-case name.
    pub headers: Vec<(String, String)>,
    /// JSON body; `null` if it was none.
    pub body: Value,
    /// The body as it came.
    pub text: String,
}

impl Answer {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// `error.code` of the body.
    pub fn code(&self) -> &str {
        self.body["error"]["code"].as_str().unwrap_or_default()
    }
}

/// The program under test: `TENANTRY_BIN`, else the debug build beside the test's own executable.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("TENANTRY_BIN") {
        return path.into();
    }
    let own = std::env::current_exe().expect("the test knows its executable");
    let path = own.parent().and_then(Path::parent).expect("tests lie in target/<profile>/deps").join("tenantry");
    assert!(path.is_file(), "no program at {}; hint: cargo build --package node", path.display());
    path
}

/// A fresh folder for one test, below the target folder of the build.
pub fn scratch(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("tenantry-{name}-{}", std::process::id()));
    if folder.exists() {
        std::fs::remove_dir_all(&folder).expect("an old scratch folder can go");
    }
    std::fs::create_dir_all(&folder).expect("a scratch folder can be made");
    folder
}

/// An address on loopback whose port nobody uses, be it for TCP or for UDP. Outside the ports that the system gives to
/// those who ask for any, since a node takes it later; and processes that run at once begin at different ones.
fn free_address() -> SocketAddr {
    const FIRST: u16 = 20_000;
    const N_PORTS: u32 = 12_000;
    /// More than one test takes.
    const PER_PROCESS: u32 = 61;
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    loop {
        let n = std::process::id().wrapping_mul(PER_PROCESS).wrapping_add(TAKEN.fetch_add(1, Ordering::Relaxed));
        let address = SocketAddr::from(([127, 0, 0, 1], FIRST + (n % N_PORTS) as u16));
        if TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok() {
            return address;
        }
    }
}

// === impl NodePlace ===

impl NodePlace {
    /// A node alone, on free ports.
    pub fn alone() -> Self {
        Self {
            name: "a".to_owned(),
            http: free_address(),
            admin: free_address(),
            peer: None,
            quic: None,
            lines: String::new(),
            namespace: None,
        }
    }

    /// Nodes `a`, `b`, `c` … of one cluster, on free ports.
    pub fn cluster(n: usize) -> Vec<Self> {
        let names = ('a'..='z').map(String::from);
        names
            .take(n)
            .map(|name| Self { name, peer: Some(free_address()), quic: Some(free_address()), ..Self::alone() })
            .collect()
    }

    /// Its data folder, relative to the cluster file.
    pub fn data(&self) -> String {
        if self.peer.is_some() { format!("data-{}", self.name) } else { "data".to_owned() }
    }
}

/// Writes `cluster.toml` for these nodes.
pub fn write_config(folder: &Path, spec: &NodeSpec, places: &[NodePlace]) {
    write_config_as(&folder.join("cluster.toml"), spec, places);
}

/// The same under any name. A file `cluster-NODE.toml` is for that node alone.
pub fn write_config_as(path: &Path, spec: &NodeSpec, places: &[NodePlace]) {
    let mut config = format!("{}\n", spec.tables);
    for place in places {
        let NodePlace { name, http, admin, .. } = place;
        let data = place.data();
        config += &format!("[[nodes]]\nname = \"{name}\"\nhttp = \"{http}\"\nadmin = \"{admin}\"\ndata = \"{data}\"\n");
        if let Some(peer) = place.peer {
            config += &format!("peer = \"{peer}\"\n");
        }
        if let Some(quic) = place.quic {
            config += &format!("clients_quic = \"{quic}\"\n");
        }
        config += &place.lines;
        config.push('\n');
    }
    let NodeSpec { model, base, aliases, numerics, panels, more_bases, .. } = spec;
    let more = more_bases.iter().map(|(name, model)| (name, model, &[][..]));
    for (name, model, aliases) in std::iter::once((base, model, *aliases)).chain(more) {
        config += &format!(
            "[[bases]]\nname = \"{name}\"\npath = \"{}\"\npanels = \"{panels}\"\naliases = {aliases:?}\nnumerics = \"{numerics}\"\n",
            model.display()
        );
    }
    std::fs::write(path, config).expect("the scratch folder is writable");
}

// === impl NodeProcess ===

impl NodeProcess {
    /// Starts a node in `folder` and waits until it is ready.
    pub fn start(folder: &Path, spec: &NodeSpec) -> Self {
        let place = NodePlace::alone();
        write_config(folder, spec, std::slice::from_ref(&place));
        let mut node = Self::launch(folder, place);
        node.wait_ready();
        node
    }

    /// Starts a node of the cluster file in `folder`; it may not be ready yet.
    pub fn launch(folder: &Path, place: NodePlace) -> Self {
        let program = binary();
        let child = spawn(&program, folder, &place);
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(120)))
            .build()
            .into();
        Self { child, folder: folder.to_owned(), place, program, agent }
    }

    /// Waits until the node says that it is ready.
    ///
    /// # Panics
    /// After 30 seconds, or when the node ended.
    pub fn wait_ready(&mut self) {
        for _ in 0..600 {
            if let Some(status) = self.child.try_wait().expect("the child can be asked") {
                panic!("the node ended with {status}:\n{}", self.log());
            }
            let ready = self.agent.get(format!("{}/readyz", self.url())).call();
            if ready.is_ok_and(|answer| answer.status() == 200) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("the node is not ready after 30 s:\n{}", self.log());
    }

    /// The log so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(log_file(&self.folder, &self.place.name)).unwrap_or_default()
    }

    /// Its name in the cluster file.
    pub fn name(&self) -> &str {
        &self.place.name
    }

    /// The node's data folder.
    pub fn data(&self) -> PathBuf {
        self.folder.join(self.place.data())
    }

    /// Base URL of the client API.
    pub fn url(&self) -> String {
        format!("http://{}", self.place.http)
    }

    /// Address of the client port.
    pub fn http(&self) -> SocketAddr {
        self.place.http
    }

    /// Where it stands.
    pub fn place(&self) -> &NodePlace {
        &self.place
    }

    /// Base URL of the admin API.
    pub fn admin_url(&self) -> String {
        format!("http://{}", self.place.admin)
    }

    /// The operator's key.
    pub fn admin_key(&self) -> String {
        std::fs::read_to_string(self.data().join("admin.key"))
            .expect("a started node has an admin key")
            .trim()
            .to_owned()
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory in bytes.
    pub fn resident_bytes(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// The most it had resident since the process started, or since [`NodeProcess::forget_peak`].
    pub fn peak_bytes(&self) -> u64 {
        self.memory("VmHWM:")
    }

    /// Starts counting the peak anew.
    pub fn forget_peak(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.pid()), "5").expect("one's own children can be reset");
    }

    fn memory(&self, line: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("the process lives");
        let line = status.lines().find_map(|found| found.strip_prefix(line)).expect("Linux tells the resident size");
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().expect("a number of kB") << 10
    }

    /// kill -9, then a new process on the same data.
    pub fn kill_and_restart(&mut self) {
        self.kill();
        self.restart();
        self.wait_ready();
    }

    /// kill -9.
    pub fn kill(&mut self) {
        self.child.kill().expect("the process can be killed");
        self.child.wait().expect("a killed process ends");
    }

    /// A new process on the same data; the old one has ended.
    pub fn restart(&mut self) {
        self.child = spawn(&self.program, &self.folder, &self.place);
    }

    /// Another program is started next time, such as an older one.
    pub fn run_next(&mut self, program: &Path) {
        program.clone_into(&mut self.program);
    }

    /// Sends a signal by name, such as `TERM`.
    pub fn signal(&self, name: &str) {
        let status =
            Command::new("kill").arg(format!("-{name}")).arg(self.pid().to_string()).status().expect("kill runs");
        assert!(status.success(), "the process can be signalled");
    }

    /// SIGTERM; returns how the node ended.
    pub fn stop(mut self) -> ExitStatus {
        self.signal("TERM");
        self.child.wait().expect("a terminated process ends")
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().expect("the process ends")
    }

    /// Runs `tenantry ctl` and returns everything.
    pub fn ctl_output(&self, words: &[&str]) -> Output {
        let mut command = Command::new(&self.program);
        command.arg("ctl").arg("--config").arg(self.folder.join("cluster.toml"));
        command.args(["--node", &self.place.name]).args(words);
        command.output().expect("tenantry ctl runs")
    }

    /// Runs `tenantry ctl`, which must succeed, and returns its JSON.
    pub fn ctl(&self, words: &[&str]) -> Value {
        let output = self.ctl_output(words);
        assert!(output.status.success(), "ctl {words:?}: {}", String::from_utf8_lossy(&output.stderr));
        let mut documents = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>();
        documents.next().and_then(Result::ok).unwrap_or_default()
    }

    /// Creates a tenant and returns its key.
    pub fn tenant(&self, id: &str, words: &[&str]) -> String {
        let mut all = vec!["tenant", "create", id];
        all.extend_from_slice(words);
        self.ctl(&all)["key"]["key"].as_str().expect("a key").to_owned()
    }

    /// Uploads adapter files under `name` and points the name's task at them.
    pub fn adapter(&self, name: &str, path: &Path) {
        self.ctl(&["adapter", "upload", name, path.to_str().expect("UTF-8 path"), "--point"]);
    }

    /// GET on the client port.
    pub fn get(&self, path: &str, key: &str) -> Answer {
        let request = self.agent.get(format!("{}{path}", self.url())).header("authorization", format!("Bearer {key}"));
        read(request.call().expect("the node answers"))
    }

    /// POST of JSON on the client port.
    pub fn post(&self, path: &str, key: &str, body: &Value) -> Answer {
        self.post_bytes(path, key, body.to_string().as_bytes())
    }

    /// POST of any bytes as JSON on the client port.
    pub fn post_bytes(&self, path: &str, key: &str, body: &[u8]) -> Answer {
        let request = self.agent.post(format!("{}{path}", self.url()));
        let request =
            request.header("authorization", format!("Bearer {key}")).header("content-type", "application/json");
        read(request.send(body).expect("the node answers"))
    }

    /// POST of JSON on the client port with one more header.
    pub fn post_with(&self, path: &str, key: &str, header: (&str, &str), body: &Value) -> Answer {
        let request = self.agent.post(format!("{}{path}", self.url())).header(header.0, header.1);
        let request =
            request.header("authorization", format!("Bearer {key}")).header("content-type", "application/json");
        read(request.send(body.to_string()).expect("the node answers"))
    }

    /// Any request on the admin port with the operator's key; an empty body is none.
    pub fn admin(&self, method: &str, path: &str, body: &str) -> Answer {
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.admin_url()))
            .header("authorization", format!("Bearer {}", self.admin_key()))
            .header("content-type", "application/json")
            .body(body.to_owned())
            .expect("a well-formed request");
        read(self.agent.run(request).expect("the node answers"))
    }

    /// A greedy completion; returns the ids of the answer.
    pub fn complete(&self, key: &str, model: &str, prompt: &str, max_tokens: u32) -> Vec<u32> {
        let body = json!({"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
        let answer = self.post("/v1/completions", key, &body);
        assert_eq!(answer.status, 200, "{}", answer.text);
        token_ids(&answer.body["choices"][0])
    }

    /// A streamed chat; returns its events' JSON up to `[DONE]`, calling `seen` after each.
    pub fn stream(&self, path: &str, key: &str, body: &Value, mut seen: impl FnMut(&Value) -> bool) -> Vec<Value> {
        let request = self.agent.post(format!("{}{path}", self.url())).header("authorization", format!("Bearer {key}"));
        let response =
            request.header("content-type", "application/json").send(body.to_string()).expect("the node answers");
        assert_eq!(response.status(), 200, "a stream begins");
        let mut events = Vec::new();
        for line in BufReader::new(response.into_body().into_reader()).lines() {
            let Ok(line) = line else { break };
            let Some(data) = line.strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                break;
            }
            events.push(serde_json::from_str(data).expect("an event is JSON"));
            if !seen(events.last().expect("just pushed")) {
                break;
            }
        }
        events
    }

    /// `tenantry ctl status`.
    pub fn status(&self) -> Value {
        self.ctl(&["status"])
    }

    /// The metrics page.
    pub fn metrics(&self) -> String {
        self.admin("GET", "/metrics", "").text
    }

    /// Usage records, once there are `n`: they reach the disk within some milliseconds of a request's end.
    ///
    /// # Panics
    /// When there are fewer after five seconds.
    pub fn usage_of(&self, n: usize) -> Vec<Value> {
        for _ in 0..100 {
            let records = self.usage();
            if records.len() >= n {
                return records;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("fewer than {n} usage records: {:?}", self.usage());
    }

    /// Every usage record written so far.
    pub fn usage(&self) -> Vec<Value> {
        let mut files: Vec<PathBuf> = std::fs::read_dir(self.data().join("usage"))
            .expect("a started node has a journal")
            .map(|entry| entry.expect("a readable entry").path())
            .collect();
        files.sort();
        let text: String =
            files.iter().map(|path| std::fs::read_to_string(path).expect("a readable segment")).collect();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        // Already ended is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn log_file(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("node-{name}.log"))
}

fn spawn(program: &Path, folder: &Path, place: &NodePlace) -> Child {
    let name = &place.name;
    let log = std::fs::OpenOptions::new().create(true).append(true).open(log_file(folder, name)).expect("a log file");
    let own = folder.join(format!("cluster-{name}.toml"));
    let mut command = match &place.namespace {
        // It becomes the program: signals reach it.
        Some(namespace) => {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", namespace]).arg(program);
            command
        }
        None => Command::new(program),
    };
    command
        .args(["node", "--name", name, "--config"])
        .arg(if own.exists() { own } else { folder.join("cluster.toml") })
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("the node starts")
}

/// The whole of an HTTP answer.
pub fn read(response: ureq::http::Response<ureq::Body>) -> Answer {
    let (parts, body) = response.into_parts();
    let headers =
        parts.headers.iter().map(|(name, value)| (name.to_string(), value.to_str().unwrap_or_default().to_owned()));
    let mut text = String::new();
    // A body that breaks off is an empty one here; tests of broken bodies use sockets.
    let _ = body.into_reader().read_to_string(&mut text);
    let body = serde_json::from_str(&text).unwrap_or_default();
    Answer { status: parts.status.as_u16(), headers: headers.collect(), body, text }
}

/// `token_ids` of a choice.
pub fn token_ids(choice: &Value) -> Vec<u32> {
    let ids = choice["token_ids"].as_array().unwrap_or_else(|| panic!("no token_ids in {choice}"));
    ids.iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}
