//! Every endpoint with every kind of name that is another tenant's: nothing works, and a foreign name and one
//! that nobody has cannot be told apart (RELIABILITY S5).

use model::info::Linear;
use serde_json::{Value, json};
use tests::operator;
use tests::process::{Answer, NodeProcess, NodeSpec, read, scratch};
use tests::tiny;

/// `victim` has everything that could be reached for; `thief` has a task and an adapter of its own and may not
/// name the base.
struct Scene {
    node: NodeProcess,
    thief: String,
    victim: String,
    victim_key_id: String,
    victim_hash: String,
}

fn scene(name: &str) -> Scene {
    let folder = scratch(name);
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")).with(operator::GENEROUS));
    let victim = operator::tenant(&node, "victim", &json!({}));
    operator::install(&node, "victim-secret-tiny-v1.0.0", &tiny::adapter(1, 4, &Linear::ALL));
    let thief = operator::tenant(&node, "thief", &json!({"allow_base": false}));
    operator::install(&node, "thief-own-tiny-v1.0.0", &tiny::adapter(2, 4, &Linear::ALL));
    let shown = node.admin("GET", "/admin/v1/tenants/victim", "").body;
    let text = |value: &Value| value.as_str().expect("a string").to_owned();
    let (victim_key_id, victim_hash) = (text(&shown["keys"][0]["id"]), text(&shown["adapters"][0]["hash"]));
    Scene { node, thief, victim, victim_key_id, victim_hash }
}

impl Scene {
    /// Names that mean something for the victim, each with one of the same form that means nothing to anybody.
    fn pairs(&self) -> Vec<(String, String)> {
        let hash = &self.victim_hash;
        [
            ("secret", "absent"),
            ("victim-secret-tiny-v1.0.0", "nobody-absent-tiny-v1.0.0"),
            ("victim-secret-tiny-v1.0.0", "victim-secret-tiny-v9.9.9"),
            ("victim-secret", "nobody-absent"),
            ("victim/secret", "nobody/absent"),
            ("victim", "nobody"),
            (hash, &"0".repeat(64)),
            (&hash[..16], "0000000000000000"),
            (&self.victim_key_id, "0000000000000000"),
            (&self.victim, &format!("tnt_0000000000000000_{}", "A".repeat(43))),
        ]
        .map(|(foreign, unknown)| (foreign.to_owned(), unknown.to_owned()))
        .to_vec()
    }

    fn generate(&self, path: &str, body: &Value) -> Answer {
        self.node.post(path, &self.thief, body)
    }
}

/// What a caller can see of an answer, without what differs between any two requests.
pub(crate) fn visible(answer: &Answer) -> (u16, String, Vec<(String, String)>) {
    let varies = ["x-request-id", "date", "openai-processing-ms"];
    let kept = answer.headers.iter().filter(|(name, _)| !varies.contains(&name.as_str())).cloned();
    (answer.status, answer.text.clone(), kept.collect())
}

/// As [`visible`], where the answer may repeat the name that was asked for.
fn visible_less(answer: &Answer, name: &str) -> (u16, String, Vec<(String, String)>) {
    let (status, text, mut headers) = visible(answer);
    headers.retain(|(header, _)| header != "content-length");
    (status, text.replace(name, "NAME"), headers)
}

fn bodies(model: &str) -> [(&'static str, Value); 4] {
    let chat = json!({"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2});
    let text = json!({"model": model, "prompt": "hi", "max_tokens": 2});
    let streaming = |body: &Value| {
        let mut body = body.clone();
        body["stream"] = json!(true);
        body
    };
    [
        ("/v1/chat/completions", streaming(&chat)),
        ("/v1/completions", streaming(&text)),
        ("/v1/chat/completions", chat),
        ("/v1/completions", text),
    ]
}

#[test]
fn foreign_names_do_nothing_and_look_like_unknown_ones() {
    let scene = scene("matrix");
    let mut n_tried = 0;
    for (foreign, unknown) in scene.pairs() {
        for ((path, with_foreign), (_, with_unknown)) in bodies(&foreign).iter().zip(&bodies(&unknown)) {
            let (theirs, nobodys) = (scene.generate(path, with_foreign), scene.generate(path, with_unknown));
            assert_eq!((theirs.status, theirs.code()), (404, "model_not_found"), "{path} {foreign}: {}", theirs.text);
            assert_eq!(visible(&theirs), visible(&nobodys), "{path} {foreign}");
            n_tried += 1;
        }
        let card = |name: &str| scene.node.get(&format!("/v1/models/{}", name.replace('/', "%2F")), &scene.thief);
        let (theirs, nobodys) = (card(&foreign), card(&unknown));
        assert_eq!(theirs.status, 404, "{foreign}: {}", theirs.text);
        assert_eq!(visible_less(&theirs, &foreign), visible_less(&nobodys, &unknown), "{foreign}");
        n_tried += 1;
        // A name that hides in an own task's body changes nothing or is refused by name, never followed.
        for field in ["lora", "lora_path", "adapter", "adapter_id", "lora_request"] {
            let mut body = bodies("own")[3].1.clone();
            body[field] = json!(foreign);
            let answer = scene.generate("/v1/completions", &body);
            let own = answer.header("x-tenantry-adapter") == Some("thief-own-tiny-v1.0.0");
            assert!(answer.status == 400 || (answer.status == 200 && own), "{field}: {}", answer.text);
            n_tried += 1;
        }
    }
    // Pairs with the base: it exists, the contract forbids it, and nothing of it is served.
    for (path, body) in bodies("tiny") {
        let answer = scene.generate(path, &body);
        assert_eq!((answer.status, answer.code()), (403, "model_not_allowed"), "{}", answer.text);
        n_tried += 1;
    }
    assert_eq!(scene.node.get("/v1/models/tiny", &scene.thief).status, 404);
    println!("{n_tried} foreign requests, 0 successes");
}

#[test]
fn lists_show_only_what_is_the_callers_own() {
    let scene = scene("matrix-lists");
    let answer = scene.node.get("/v1/models", &scene.thief);
    let ids: Vec<&str> = answer.body["data"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|card| card["id"].as_str().expect("an id"))
        .collect();
    assert_eq!(ids, ["own", "thief-own-tiny-v1.0.0"]);
    for secret in ["victim", "secret", &scene.victim_hash, &scene.victim_key_id] {
        assert!(!answer.text.contains(secret), "{secret} in {}", answer.text);
    }
}

#[test]
fn naming_another_tenant_is_refused_alike_whether_it_exists() {
    let scene = scene("matrix-tenant");
    let agent = operator::agent();
    let with_header = |path: &str, header: &str, tenant: &str, body: Option<&Value>| {
        let request = ureq::http::Request::builder()
            .method(if body.is_some() { "POST" } else { "GET" })
            .uri(format!("{}{path}", scene.node.url()))
            .header("authorization", format!("Bearer {}", scene.thief))
            .header("content-type", "application/json")
            .header(header, tenant)
            .body(body.map(Value::to_string).unwrap_or_default())
            .expect("a well-formed request");
        read(agent.run(request).expect("the node answers"))
    };
    let body = &bodies("own")[3].1;
    for header in ["x-tenant-id", "x-tenant", "x-tenantry-tenant"] {
        let routes: [(&str, Option<&Value>); 5] = [
            ("/v1/completions", Some(body)),
            ("/v1/chat/completions", Some(&bodies("own")[2].1.clone())),
            ("/v1/embeddings", Some(body)),
            ("/v1/models", None),
            ("/v1/models/own", None),
        ];
        for (path, body) in routes {
            let theirs = with_header(path, header, "victim", body);
            assert_eq!((theirs.status, theirs.code()), (403, "tenant_mismatch"), "{path} {header}: {}", theirs.text);
            assert_eq!(visible(&theirs), visible(&with_header(path, header, "nobody", body)), "{path} {header}");
        }
    }
    for field in ["tenant", "tenant_id"] {
        for (path, body) in bodies("own") {
            let naming = |tenant: Value| {
                let mut body = body.clone();
                body[field] = tenant;
                scene.generate(path, &body)
            };
            let theirs = naming(json!("victim"));
            assert_eq!((theirs.status, theirs.code()), (403, "tenant_mismatch"), "{field}: {}", theirs.text);
            assert_eq!(visible(&theirs), visible(&naming(json!("nobody"))));
            assert_eq!(naming(json!(["victim"])).status, 403);
            assert_eq!(naming(json!("thief")).status, 200, "one's own name is harmless");
        }
    }
    let counted = scene.node.metrics();
    let line = counted.lines().find(|line| line.contains("impersonation") && line.contains("thief"));
    assert!(line.is_some(), "attempts are counted: {counted}");
}

#[test]
fn a_tenants_key_opens_no_admin_route_and_the_admin_key_no_client_route() {
    let scene = scene("matrix-ports");
    let agent = operator::agent();
    let call = |method: &str, url: String, key: Option<&str>| {
        let mut request = ureq::http::Request::builder().method(method).uri(url);
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        read(agent.run(request.body("{}".to_owned()).expect("a request")).expect("the node answers"))
    };
    let document: Value = call("GET", format!("{}/openapi.json", scene.node.admin_url()), None).body;
    let mut n_routes = 0;
    for (path, methods) in document["paths"].as_object().expect("paths") {
        let path = path.replace("{tenant}", "thief").replace("{name}", "thief-own-tiny-v1.0.0");
        let path = path.replace("{task}", "own").replace("{key}", &scene.victim_key_id);
        if ["/healthz", "/readyz", "/openapi.json"].contains(&path.as_str()) {
            continue;
        }
        for method in methods.as_object().expect("methods").keys() {
            for key in [None, Some(scene.thief.as_str()), Some(scene.victim.as_str()), Some("tnt_admin_x"), Some("")] {
                let url = format!("{}{path}", scene.node.admin_url());
                let answer = call(&method.to_uppercase(), url, key);
                assert_eq!((answer.status, answer.code()), (401, "invalid_admin_key"), "{method} {path}");
            }
            n_routes += 1;
        }
    }
    assert!(n_routes >= 15, "the document lists the admin routes: {n_routes}");
    // Unlisted paths are behind the key as well.
    for path in ["/", "/admin", "/admin/v1/", "/admin/v1/keys", "/debug/pprof", "/metrics/"] {
        assert_eq!(call("GET", format!("{}{path}", scene.node.admin_url()), None).status, 401, "{path}");
    }

    let document: Value = call("GET", format!("{}/openapi.json", scene.node.url()), None).body;
    let open = ["/healthz", "/livez", "/readyz", "/health", "/version", "/openapi.json"];
    let admin_key = scene.node.admin_key();
    for (path, methods) in document["paths"].as_object().expect("paths") {
        for method in methods.as_object().expect("methods").keys() {
            let url = format!("{}{}", scene.node.url(), path.replace("{model}", "own"));
            for key in [None, Some(admin_key.as_str()), Some("tnt_0000000000000000_AAAA"), Some("")] {
                let answer = call(&method.to_uppercase(), url.clone(), key);
                let expected = if open.contains(&path.as_str()) { 200 } else { 401 };
                assert_eq!(answer.status, expected, "{method} {path}: {}", answer.text);
            }
        }
    }
    for path in ["/", "/v1", "/v1/engines", "/metrics", "/admin/v1/status", "/v1/load_lora_adapter", "/pause"] {
        assert_eq!(call("GET", format!("{}{path}", scene.node.url()), None).status, 401, "{path}");
    }
    assert_eq!(scene.node.get("/admin/v1/status", &scene.thief).status, 404);
}
