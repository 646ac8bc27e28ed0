//! Schemas made to be expensive: each is decided within a second, others are served meanwhile, and memory comes
//! back (RELIABILITY B5, B6).

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use shared::clock::{Clock, SystemClock};
use tests::operator::{self, GENEROUS};
use tests::process::{Answer, NodeProcess, NodeSpec, scratch};

use super::{assert_serves, scaled};

const DECIDED: Duration = Duration::from_secs(1);

fn nested(n: usize, wrap: impl Fn(Value) -> Value) -> Value {
    (0..n).fold(json!({"type": "string"}), |inner, _| wrap(inner))
}

fn bombs() -> Vec<(&'static str, Value)> {
    let pattern = |pattern: &str| json!({"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}, "required": ["a"]});
    let doubling: serde_json::Map<String, Value> = (0..30)
        .map(|i| {
            let next = format!("#/$defs/d{}", i + 1);
            (format!("d{i}"), json!({"anyOf": [{"type": "array", "items": {"$ref": next}}, {"type": "object", "properties": {"x": {"$ref": next}}}]}))
        })
        .chain([("d30".to_owned(), json!({"type": "null"}))])
        .collect();
    let properties: serde_json::Map<String, Value> =
        (0..1500).map(|i| (format!("property{i}"), json!({"type": "integer"}))).collect();
    vec![
        ("nested quantifiers", pattern("^(a+)+$")),
        ("nested quantifiers, deeper", pattern("^((((a*)*)*)*)*b$")),
        ("counted repetition", pattern("^(a{1,1000}){1,1000}$")),
        ("huge count", pattern("^a{1,2000000000}$")),
        ("counts in counts", pattern("^((a{0,99}){0,99}){0,99}$")),
        ("alternation", pattern(&format!("^({})*$", (0..2000).map(|i| format!("a{i}")).collect::<Vec<_>>().join("|")))),
        ("dot counts", pattern("^(.*a){200}.*$")),
        ("exponential states", pattern("^(a|b)*a(a|b){40}$")),
        ("unicode classes", pattern("^(\\p{L}\\p{N}\\p{S}){500}$")),
        ("back reference", pattern("^(a)\\1$")),
        ("look around", pattern("^(?=a)(?!b)a$")),
        ("a reference to itself", json!({"$ref": "#"})),
        (
            "a loop of references",
            json!({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        ),
        ("a reference outside", json!({"$ref": "http://169.254.169.254/latest/meta-data"})),
        ("a file reference", json!({"$ref": "file:///etc/passwd"})),
        ("doubling references", json!({"$defs": doubling, "$ref": "#/$defs/d0"})),
        ("5000 values", json!({"enum": (0..5000).map(|i| format!("v{i:05}")).collect::<Vec<_>>()})),
        ("deep anyOf", nested(24, |inner| json!({"anyOf": [inner.clone(), {"type": "null"}]}))),
        (
            "wide allOf",
            json!({"allOf": (0..300).map(|i| json!({"type": "object", "properties": {format!("p{i}"): {"type": "string"}}, "required": [format!("p{i}")]})).collect::<Vec<_>>()}),
        ),
        (
            "oneOf that overlaps",
            json!({"oneOf": (0..300).map(|i| json!({"type": "string", "minLength": i})).collect::<Vec<_>>()}),
        ),
        ("1500 properties", json!({"type": "object", "properties": properties})),
        (
            "1500 optional, closed",
            json!({"type": "object", "properties": properties, "additionalProperties": false, "minProperties": 700}),
        ),
        ("long string", json!({"type": "string", "minLength": 1_000_000_000, "maxLength": 2_000_000_000})),
        ("long array", json!({"type": "array", "items": {"type": "string"}, "minItems": 1_000_000_000})),
        ("wide number", json!({"type": "integer", "minimum": -1e300, "maximum": 1e300, "multipleOf": 7})),
        ("many remainders", json!({"type": "integer", "multipleOf": 999_983})),
        ("many remainders after the point", json!({"type": "number", "multipleOf": 0.999_983})),
        ("tiny steps", json!({"type": "number", "multipleOf": 1e-300})),
        ("not", json!({"not": {"not": {"not": {"type": "string"}}}})),
        ("pattern properties", json!({"type": "object", "patternProperties": {"^(a+)+$": {}, "^(b|bb)*$": {}}})),
        (
            "arrays in arrays",
            nested(25, |inner| json!({"type": "array", "items": inner, "minItems": 3, "maxItems": 1000})),
        ),
        ("false", json!({"type": "object", "properties": {"a": false}, "required": ["a"]})),
        ("unknown format", json!({"type": "string", "format": "(((("})),
        ("types that are none", json!({"type": ["string", 7, {}]})),
    ]
}

fn ask(node: &NodeProcess, agent: &ureq::Agent, key: &str, schema: &Value) -> Answer {
    let body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 48,
        "response_format": {"type": "json_schema", "json_schema": {"name": "bomb", "schema": schema}}});
    operator::post(agent, node, "/v1/chat/completions", key, &body.to_string())
}

#[test]
fn every_schema_bomb_is_decided_within_a_second_and_costs_no_lasting_memory() {
    let folder = scratch("schemas");
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")).with(GENEROUS));
    let (key, bystander) = (operator::tenant(&node, "acme", &json!({})), operator::tenant(&node, "other", &json!({})));
    let agent = operator::agent();
    assert_eq!(ask(&node, &agent, &key, &json!({"type": "object"})).status, 200);
    let before = node.resident_bytes();
    let over = AtomicBool::new(false);
    let (slowest_bystander, slowest) = thread::scope(|scope| {
        let others = scope.spawn(|| {
            let (agent, mut slowest, mut n) = (operator::agent(), Duration::ZERO, 0);
            while !over.load(Ordering::Relaxed) {
                let started = SystemClock.now();
                let body = json!({"model": "tiny", "prompt": "hi", "max_tokens": 4}).to_string();
                let answer = operator::post(&agent, &node, "/v1/completions", &bystander, &body);
                assert_eq!(answer.status, 200, "{}", answer.text);
                // A schema that is not remembered, so that it needs a compiler.
                n += 1;
                let answer = ask(&node, &agent, &bystander, &json!({"type": "integer", "minimum": n}));
                assert_eq!(answer.status, 200, "{}", answer.text);
                slowest = slowest.max(started.elapsed());
            }
            slowest
        });
        let mut slowest = Duration::ZERO;
        for (what, schema) in bombs() {
            let started = SystemClock.now();
            let answer = ask(&node, &agent, &key, &schema);
            let took = started.elapsed();
            slowest = slowest.max(took);
            println!("{what}: {} {} in {} ms", answer.status, answer.code(), took.as_millis());
            // 503 says that the compilers are still busy with the bombs before this one.
            assert!([200, 400, 422, 429, 503].contains(&answer.status), "{what}: {}", answer.text);
            assert!(answer.text.len() < 4000, "{what}: {}", answer.text);
            assert!(took < DECIDED, "{what} took {took:?}");
        }
        over.store(true, Ordering::Relaxed);
        (others.join().expect("others are served"), slowest)
    });
    // Compilations that were given up on end by their fuel.
    thread::sleep(Duration::from_secs(2));
    let grown = node.resident_bytes().saturating_sub(before);
    // Again and again, each a little different: what it costs does not add up.
    for round in 0..3 {
        for (_, mut schema) in bombs() {
            schema["title"] = json!(format!("round {round}"));
            assert!(ask(&node, &agent, &key, &schema).status < 504);
        }
    }
    thread::sleep(Duration::from_secs(1));
    let again = node.resident_bytes().saturating_sub(before);
    println!("memory +{} MiB after the first round, +{} MiB after four", grown >> 20, again >> 20);
    assert!(again < grown + (64 << 20), "{grown} bytes, then {again}");
    println!("slowest {slowest:?}, slowest bystander {slowest_bystander:?}, memory +{} MiB", grown >> 20);
    assert!(slowest_bystander < Duration::from_secs(2), "{slowest_bystander:?}");
    assert!(grown < 64 << 20, "{grown} bytes");
    assert_eq!(ask(&node, &agent, &key, &json!({"type": "object", "maxProperties": 3})).status, 200);
    assert_serves(&node, &key);
}

#[test]
fn many_different_schemas_fill_neither_memory_nor_disk() {
    let folder = scratch("many-schemas");
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")).with(GENEROUS));
    let key = operator::tenant(&node, "acme", &json!({}));
    let agent = operator::agent();
    let schema = |i: usize| json!({"type": "object", "properties": {format!("field{i}"): {"enum": ["a", i]}}, "required": [format!("field{i}")]});
    let mut memory = Vec::new();
    for i in 0..scaled(300) {
        let answer = ask(&node, &agent, &key, &schema(i));
        assert_eq!(answer.status, 200, "{}", answer.text);
        if i % 100 == 50 {
            memory.push(node.resident_bytes());
        }
    }
    let grown = node.resident_bytes().saturating_sub(memory[0]);
    println!("different schemas: memory +{} KiB after the first 50", grown >> 10);
    assert!(grown < 32 << 20, "{grown} bytes");
    let files = std::fs::read_dir(node.data()).expect("a folder").count();
    assert!(files < 10, "nothing but the node's own files: {files}");
}
