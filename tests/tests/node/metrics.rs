//! What scrapers and API readers see: Prometheus text, vLLM's names and buckets, and the API documents.

use std::collections::{BTreeMap, BTreeSet};

use model::info::Linear;
use serde_json::{Value, json};
use tests::operator::{agent, install, start, tenant};
use tests::process::{NodeProcess, NodeSpec, scratch};
use tests::tiny;

/// Name with sorted labels → value.
type Series = BTreeMap<String, f64>;

/// Reads Prometheus text strictly: every sample belongs to a family announced before it, every family says what it
/// means, no series comes twice.
fn parse(text: &str) -> (Series, BTreeMap<String, String>) {
    let (mut series, mut types, mut meanings) = (Series::new(), BTreeMap::new(), BTreeSet::new());
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(announced) = line.strip_prefix("# TYPE ") {
            let (name, kind) = announced.split_once(' ').unwrap_or_else(|| panic!("{line}"));
            assert!(["counter", "gauge", "histogram", "summary"].contains(&kind), "{line}");
            assert!(meanings.contains(name), "no meaning before {line}");
            assert_eq!(kind == "counter", name.ends_with("_total") && kind != "histogram", "{line}");
            assert!(types.insert(name.to_owned(), kind.to_owned()).is_none(), "announced twice: {line}");
            continue;
        }
        if line.starts_with('#') {
            let said = line.strip_prefix("# HELP ").unwrap_or_else(|| panic!("{line}"));
            meanings.insert(said.split(' ').next().expect("a name").to_owned());
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no value: {line}"));
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("no number: {line}"));
        let (family, labels) =
            name.split_once('{').map_or((name, ""), |(family, rest)| (family, rest.trim_end_matches('}')));
        assert!(
            family.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b':'),
            "a name that Prometheus refuses: {line}"
        );
        let stem =
            ["_bucket", "_sum", "_count"].iter().find_map(|suffix| family.strip_suffix(suffix)).unwrap_or(family);
        assert!(types.contains_key(family) || types.contains_key(stem), "no type before {line}");
        let labels: BTreeSet<&str> =
            labels.split("\",").map(|label| label.trim_end_matches('"')).filter(|l| !l.is_empty()).collect();
        let key = format!("{family}{labels:?}");
        assert!(series.insert(key, value).is_none(), "a series comes twice: {line}");
    }
    (series, types)
}

fn value(series: &Series, family: &str, labels: &[(&str, &str)]) -> f64 {
    let mut spelled: Vec<String> = labels.iter().map(|(name, value)| format!("{name}=\"{value}")).collect();
    spelled.sort();
    let key = format!("{family}{:?}", spelled.iter().map(String::as_str).collect::<BTreeSet<_>>());
    *series.get(&key).unwrap_or_else(|| {
        panic!("no {key} in {:#?}", series.keys().filter(|key| key.starts_with(family)).collect::<Vec<_>>())
    })
}

/// Upper bounds of a histogram's buckets as text, and that they count upwards.
fn buckets(text: &str, family: &str) -> Vec<f64> {
    let mut bounds = Vec::new();
    let mut before = 0.0;
    let prefix = format!("{family}_bucket{{");
    let first_labels = |line: &str| line.split(",le=").next().unwrap_or_default().to_owned();
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with(&prefix)).collect();
    let series = lines.first().map(|line| first_labels(line)).unwrap_or_else(|| panic!("no buckets of {family}"));
    for line in lines.into_iter().filter(|line| first_labels(line) == series) {
        let bound = line.split("le=\"").nth(1).and_then(|rest| rest.split('"').next()).expect("a bound");
        let count: f64 = line.rsplit(' ').next().and_then(|count| count.parse().ok()).expect("a count");
        assert!(count >= before, "buckets are cumulative: {line}");
        before = count;
        if bound != "+Inf" {
            bounds.push(bound.parse().expect("a number"));
        }
    }
    bounds
}

/// vLLM's buckets, copied from its documentation and not from our code.
const VLLM_TTFT: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const VLLM_TPOT: [f64; 19] =
    [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
/// In rows: its name says tokens, its help "number of tokens per engine_step".
const VLLM_ITERATION: [f64; 13] =
    [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const VLLM_REQUEST: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];

#[test]
fn counters_add_up_to_what_was_sent_under_the_names_dashboards_know() {
    let folder = scratch("metrics");
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")));
    let acme = tenant(&node, "acme", &json!({"tier": "premium"}));
    let other = tenant(&node, "other", &json!({}));
    let version = "acme-support-tiny-v1.0.0";
    install(&node, version, &tiny::adapter(1, 4, &Linear::ALL));
    let ask = |key: &str, model: &str, max_tokens: u32| {
        let body = json!({"model": model, "prompt": [70, 71, 72, 73], "max_tokens": max_tokens, "ignore_eos": true, "temperature": 0});
        node.post("/v1/completions", key, &body).status
    };
    assert_eq!([ask(&acme, "support", 5), ask(&acme, "support", 6), ask(&other, "tiny", 7)], [200, 200, 200]);
    assert_eq!([ask(&acme, "nothing", 1), ask(&other, "support", 1), ask("tnt_wrong", "tiny", 1)], [404, 404, 401]);
    // The records of the last answers follow by a moment.
    let mut text = node.metrics();
    for _ in 0..40 {
        if text.contains("tenantry_requests_total{tenant=\"other\"") {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        text = node.metrics();
    }
    let (series, types) = parse(&text);

    let base = [("model_name", "tiny"), ("engine", "0")];
    assert_eq!(value(&series, "vllm:prompt_tokens_total", &base), 12.0);
    assert_eq!(value(&series, "vllm:generation_tokens_total", &base), 18.0);
    let length = [("model_name", "tiny"), ("engine", "0"), ("finished_reason", "length")];
    assert_eq!(value(&series, "vllm:request_success_total", &length), 3.0);
    for family in ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"] {
        assert!(value(&series, family, &base) >= 0.0);
        assert_eq!(types.get(family).map(String::as_str), Some("gauge"), "{family}");
    }
    for family in ["vllm:num_preemptions_total", "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"] {
        assert!(value(&series, family, &base) >= 0.0);
        assert_eq!(types.get(family).map(String::as_str), Some("counter"), "{family}");
    }
    for (family, bounds) in [
        ("vllm:time_to_first_token_seconds", &VLLM_TTFT[..]),
        ("vllm:time_per_output_token_seconds", &VLLM_TPOT[..]),
        ("vllm:e2e_request_latency_seconds", &VLLM_REQUEST[..]),
        ("vllm:request_queue_time_seconds", &VLLM_REQUEST[..]),
        ("vllm:request_inference_time_seconds", &VLLM_REQUEST[..]),
        ("vllm:request_prefill_time_seconds", &VLLM_REQUEST[..]),
        ("vllm:request_decode_time_seconds", &VLLM_REQUEST[..]),
        ("vllm:iteration_tokens_total", &VLLM_ITERATION[..]),
        ("tenantry_time_to_first_token_seconds", &VLLM_TTFT[..]),
        ("tenantry_inter_token_seconds", &VLLM_TPOT[..]),
    ] {
        assert_eq!(buckets(&text, family), bounds, "{family}");
    }
    assert!(
        [0.05, 0.1, 0.2, 0.5, 2.0, 10.0].iter().all(|bound| buckets(&text, "tenantry_request_seconds").contains(bound))
    );
    assert_eq!(buckets(&text, "vllm:request_params_n"), [1.0, 2.0, 5.0, 10.0, 20.0]);
    for family in ["vllm:time_to_first_token_seconds", "vllm:e2e_request_latency_seconds"] {
        assert_eq!(value(&series, &format!("{family}_count"), &base), 3.0, "{family}");
    }
    let sum = |family: &str| value(&series, &format!("{family}_sum"), &base);
    let (prefill, decode) = (sum("vllm:request_prefill_time_seconds"), sum("vllm:request_decode_time_seconds"));
    let inference = sum("vllm:request_inference_time_seconds");
    assert!(prefill > 0.0 && decode > 0.0, "{prefill} {decode}");
    assert!((prefill + decode - inference).abs() < 1e-6, "{prefill} + {decode} = {inference}");
    // Each request computed its prompt of 4 and all its tokens but the last, whose successor nobody asked for.
    assert_eq!(sum("vllm:iteration_tokens_total"), 12.0 + 15.0);
    assert_eq!(
        value(&series, "vllm:iteration_tokens_total_count", &base),
        value(&series, "tenantry_engine_steps_total", &base[..1])
    );
    assert_eq!((sum("vllm:request_params_n"), sum("vllm:request_params_max_tokens")), (3.0, 18.0));
    assert!(text.contains("vllm:cache_config_info{model_name=\"tiny\",engine=\"0\",block_size=\"16\",num_gpu_blocks="));
    assert_eq!(value(&series, "vllm:request_generation_tokens_sum", &base), 18.0);
    assert_eq!(value(&series, "vllm:time_per_output_token_seconds_count", &base), 15.0, "gaps, not tokens");

    assert_eq!(finished(&series, "tiny", "acme", "support", version, "premium"), 2.0);
    assert_eq!(finished(&series, "tiny", "other", "_base", "_base", "shared"), 1.0);
    let tokens = |tenant, tier, kind| {
        value(&series, "tenantry_tokens_total", &[("tenant", tenant), ("tier", tier), ("kind", kind)])
    };
    assert_eq!((tokens("acme", "premium", "prompt"), tokens("acme", "premium", "answer")), (8.0, 11.0));
    assert_eq!((tokens("other", "shared", "prompt"), tokens("other", "shared", "answer")), (4.0, 7.0));
    let refused = |tenant, tier, code| {
        value(&series, "tenantry_rejections_total", &[("tenant", tenant), ("tier", tier), ("code", code)])
    };
    assert_eq!(refused("acme", "premium", "model_not_found"), 1.0);
    assert_eq!(refused("other", "shared", "model_not_found"), 1.0);
    assert_eq!(refused("_none", "_none", "invalid_api_key"), 1.0);
    let first_token = [("model_name", "tiny"), ("tenant", "acme"), ("adapter", version), ("tier", "premium")];
    assert_eq!(value(&series, "tenantry_time_to_first_token_seconds_count", &first_token), 2.0);
}

/// Requests that finished.
fn finished(series: &Series, base: &str, tenant: &str, task: &str, adapter: &str, tier: &str) -> f64 {
    let of = [("model_name", base), ("tenant", tenant), ("task", task), ("adapter", adapter), ("tier", tier)];
    value(series, "tenantry_requests_total", &[&of[..], &[("outcome", "finished")]].concat())
}

#[test]
fn two_bases_are_told_apart_and_a_missed_deadline_is_its_tenants() {
    let folder = scratch("two-bases");
    let mini = tiny::TinySpec { seed: 77, ..tiny::TinySpec::llama() }.write_hf(&folder.join("mini"));
    let spec = NodeSpec::tiny(&folder.join("model")).with_base("mini", mini).with("[engine]\nkv_mib = 16");
    let node = NodeProcess::start(&folder, &spec);
    let acme = tenant(&node, "acme", &json!({"tier": "premium", "bases": ["tiny", "mini"]}));
    let version = "acme-support-tiny-v1.0.0";
    install(&node, version, &tiny::adapter(1, 4, &Linear::ALL));
    for model in ["support", "support", "tiny", "mini", "mini", "mini", "mini"] {
        let body = json!({"model": model, "prompt": [70, 71], "max_tokens": 3});
        let answer = node.post("/v1/completions", &acme, &body);
        assert_eq!(answer.status, 200, "{}", answer.text);
    }
    let long = json!({"model": "mini", "prompt": [70], "n": 8, "max_tokens": 1000, "ignore_eos": true, "logprobs": 5});
    let request = agent().post(format!("{}/v1/completions", node.url())).header("x-tenantry-timeout-ms", "40");
    let request = request.header("authorization", format!("Bearer {acme}")).header("content-type", "application/json");
    let late = tests::process::read(request.send(long.to_string()).expect("the node answers"));
    assert_eq!(late.status, 504, "{}", late.text);

    // The record of the last answer follows by a moment.
    let failed = |text: &str| text.contains("tenantry_failures_total{tenant=\"acme\"");
    let settled = |text: &String| {
        failed(text) && !text.contains("sequences{model_name=\"mini\",tenant=\"acme\",tier=\"premium\"} 8")
    };
    let mut texts = (0..100).map(|_| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        node.metrics()
    });
    let (series, _) = parse(&texts.find(settled).expect("the failure is counted"));
    let of_tenant = [("tenant", "acme"), ("tier", "premium")];
    assert_eq!(value(&series, "tenantry_failures_total", &[&of_tenant[..], &[("code", late.code())]].concat()), 1.0);
    assert_eq!(value(&series, "tenantry_invariant_violations_total", &[]), 0.0);
    assert_eq!(finished(&series, "tiny", "acme", "support", version, "premium"), 2.0);
    assert_eq!(finished(&series, "tiny", "acme", "_base", "_base", "premium"), 1.0);
    assert_eq!(finished(&series, "mini", "acme", "_base", "_base", "premium"), 4.0);
    for (base, queued, wanted, resident) in [("tiny", 3.0, 2.0, 1.0), ("mini", 5.0, 0.0, 0.0)] {
        let of = |family: &str| value(&series, family, &[("model_name", base)]);
        let by_tier = |family: &str| value(&series, family, &[("model_name", base), ("tier", "premium")]);
        assert_eq!(by_tier("tenantry_queue_requests_submitted_total"), queued, "{base}");
        assert_eq!(of("tenantry_adapter_hits_total") + of("tenantry_adapter_misses_total"), wanted, "{base}");
        assert_eq!(of("tenantry_adapter_resident"), resident, "{base}");
        assert!(of("tenantry_base_bytes") > 1e4, "{base}");
        assert!((8e6..=16.0 * 1024.0 * 1024.0).contains(&of("tenantry_kv_bytes")), "{base}");
        for family in ["tenantry_tenant_waiting_requests", "tenantry_tenant_running_sequences"] {
            assert_eq!(value(&series, family, &[&[("model_name", base)], &of_tenant[..]].concat()), 0.0, "{base}");
        }
    }
    let loads: BTreeMap<_, _> =
        series.iter().filter(|(key, _)| key.starts_with("tenantry_adapter_load_seconds_count")).collect();
    assert!(!loads.is_empty() && loads.keys().all(|key| key.contains("acme") && key.contains("tiny")), "{loads:?}");
    let (told, real) = (value(&series, "process_resident_memory_bytes", &[]), node.resident_bytes() as f64);
    assert!(told > real / 2.0 && told < real * 2.0, "{told} told, {real} found");
}

#[test]
fn adapters_in_use_are_named_while_their_requests_wait_or_run() {
    let folder = scratch("in-use");
    let node = NodeProcess::start(
        &folder,
        &NodeSpec::tiny(&folder.join("model"))
            .with("[engine]\nsequences = 1\nrows_per_step = 16\n[adapters]\nslots = 3"),
    );
    let key = tenant(&node, "acme", &json!({}));
    let (first, second) = ("acme-support-tiny-v1.0.0", "acme-sales-tiny-v1.0.0");
    install(&node, first, &tiny::adapter(1, 4, &Linear::ALL));
    install(&node, second, &tiny::adapter(2, 4, &Linear::ALL));
    let info = |running: &str, waiting: &str| {
        format!(
            "vllm:lora_requests_info{{model_name=\"tiny\",engine=\"0\",max_lora=\"3\",running_lora_adapters=\"{running}\",waiting_lora_adapters=\"{waiting}\"}} "
        )
    };
    let shows = |line: &str| {
        (0..200).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            node.metrics().contains(line)
        })
    };
    assert!(shows(&info("", "")));
    let ask = |model: &str| {
        let body = json!({"model": model, "prompt": "x", "max_tokens": 1000, "ignore_eos": true, "stream": true, "logprobs": 5});
        start(node.http(), "/v1/completions", &key, &body.to_string())
    };
    // One runs, the others wait, and there are enough of them to outlast the test's questions.
    let mut clients: Vec<_> = (0..30).map(|_| ask("support")).collect();
    assert!(shows(&info(first, first)), "{}", node.metrics());
    clients.push(ask("sales"));
    let both = format!("{second},{first}");
    assert!(shows(&info(first, &both)) || shows(&info(second, first)), "{}", node.metrics());
    let status = tests::operator::base_status(&node);
    let (queue, shared) = (&status["queue"], &status["queue"]["classes"][0]);
    assert!(queue["waiting"].as_u64() > Some(1) && shared["waiting"].as_u64() > Some(1), "{queue}");
    assert_eq!((&shared["tier"], &shared["tenants_waiting"]), (&json!("shared"), &json!(1)));
    assert!(shared["oldest_wait_s"].as_f64() > Some(0.0), "{shared}");
    assert_eq!(queue["tenants"][0]["tenant"], "acme", "{queue}");
    let (series, _) = parse(&node.metrics());
    let of_tenant = |family| value(&series, family, &[("model_name", "tiny"), ("tenant", "acme"), ("tier", "shared")]);
    assert!(of_tenant("tenantry_tenant_waiting_requests") > 1.0);
    assert_eq!(of_tenant("tenantry_tenant_running_sequences"), 1.0);
    drop(clients);
    assert!(shows(&info("", "")), "{}", node.metrics());
}

/// Paths of a document with their methods.
fn operations(document: &Value) -> BTreeMap<String, BTreeSet<String>> {
    let paths = document["paths"].as_object().expect("a document has paths");
    let methods = |item: &Value| item.as_object().expect("an item").keys().cloned().collect();
    paths.iter().map(|(path, item)| (path.clone(), methods(item))).collect()
}

/// Every path given to `.route(…)` in a source file of the node.
fn routes(source: &str) -> BTreeSet<String> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../node/src").join(source);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.split(".route(\"").skip(1).map(|rest| rest.split('"').next().expect("a path").to_owned()).collect()
}

#[test]
fn the_api_documents_name_every_route_and_every_route_behaves_as_documented() {
    let folder = scratch("documents");
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")));
    let key = tenant(&node, "acme", &json!({}));
    let open = ["/healthz", "/livez", "/readyz", "/health", "/version", "/openapi.json"];
    for (url, source, key) in [(node.url(), "gateway.rs", key), (node.admin_url(), "admin.rs", node.admin_key())] {
        let agent = agent();
        let call = |method: &str, path: &str, key: Option<&str>| {
            let request =
                ureq::http::Request::builder().method(method.to_uppercase().as_str()).uri(format!("{url}{path}"));
            let request = request.header("content-type", "application/json");
            let request =
                key.into_iter().fold(request, |request, key| request.header("authorization", format!("Bearer {key}")));
            let request = request.body("{}".to_owned()).expect("well formed");
            let request = agent.configure_request(request).allow_non_standard_methods(true).build();
            tests::process::read(agent.run(request).expect("the node answers"))
        };
        let document = call("get", "/openapi.json", None);
        assert_eq!(document.status, 200);
        assert!(
            document.body["openapi"].as_str().is_some_and(|version| version.starts_with("3.")),
            "{}",
            document.text
        );
        let documented = operations(&document.body);
        assert_eq!(documented.keys().cloned().collect::<BTreeSet<_>>(), routes(source), "{source}");
        for (path, methods) in &documented {
            let real =
                path.replace("{tenant}", "nobody").replace("{name}", "nobody-x-tiny-v1.0.0").replace("{task}", "x");
            let real = real.replace("{key}", "none").replace("{model}", "none");
            for method in methods {
                let without_key = call(method, &real, None).status;
                let expected = if open.contains(&path.as_str()) { 200 } else { 401 };
                assert_eq!(without_key, expected, "{method} {path} without a key");
                let with_key = call(method, &real, Some(&key));
                assert_ne!(with_key.status, 405, "{method} {path} exists");
                assert_ne!(with_key.code(), "unknown_url", "{method} {path} exists");
            }
        }
    }
}
