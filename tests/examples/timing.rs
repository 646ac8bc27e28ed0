//! Looks for secrets in response times (RELIABILITY S4): whether a key id exists, whether a name belongs to another
//! tenant, whether a foreign schema, adapter or prompt is in a cache. Prints figures; decides nothing.
//!
//! `cargo run --release -p tests --example timing -- [rounds] [pairs per round]` with `TENANTRY_BIN` naming the
//! program; a generated tiny model, loopback, one connection. Each case asks two questions in random order and
//! compares the two samples with the Kolmogorov–Smirnov test; a control that must differ shows that the
//! measurement sees anything. Quiet machine, please.

use std::time::Duration;

use model::info::Linear;
use serde_json::{Value, json};
use shared::clock::{Clock, SystemClock};
use tests::operator::{self, GENEROUS};
use tests::process::{NodeProcess, NodeSpec, scratch};
use tests::tiny;

/// Two questions whose answers must not differ in time.
struct Case<'a> {
    name: &'static str,
    /// Asks the first (false) or the second (true) question for the n-th time.
    ask: Box<dyn Fn(usize, bool) + 'a>,
}

/// Two-sided Kolmogorov–Smirnov test of two samples: the largest distance of their distributions, and how likely
/// a distance as large is when both come from one (asymptotic series, Smirnov 1948).
fn kolmogorov_smirnov(a: &mut [f64], b: &mut [f64]) -> (f64, f64) {
    a.sort_by(f64::total_cmp);
    b.sort_by(f64::total_cmp);
    let (mut i, mut j, mut distance) = (0, 0, 0.0_f64);
    while i < a.len() && j < b.len() {
        let at = a[i].min(b[j]);
        i += a[i..].iter().take_while(|&&x| x <= at).count();
        j += b[j..].iter().take_while(|&&x| x <= at).count();
        distance = distance.max((i as f64 / a.len() as f64 - j as f64 / b.len() as f64).abs());
    }
    let n = (a.len() * b.len()) as f64 / (a.len() + b.len()) as f64;
    let lambda = (n.sqrt() + 0.12 + 0.11 / n.sqrt()) * distance;
    let term = |k: i32| f64::from(if k % 2 == 1 { 2 } else { -2 }) * (-2.0 * f64::from(k * k) * lambda * lambda).exp();
    let p = if lambda < 0.2 { 1.0 } else { (1..=100).map(term).sum() };
    (distance, p.clamp(0.0, 1.0))
}

fn median(sorted: &[f64]) -> f64 {
    sorted[sorted.len() / 2]
}

/// A reproducible coin (xorshift64).
struct Coin(u64);

impl Coin {
    fn toss(&mut self) -> bool {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 & 1 == 1
    }
}

fn measure(case: &Case<'_>, rounds: usize, pairs: usize) {
    let mut coin = Coin(0x9E37_79B9_7F4A_7C15);
    let (mut all, mut least_p): ([Vec<f64>; 2], f64) = (Default::default(), 1.0);
    let mut n = 0;
    for _ in 0..rounds {
        let mut round: [Vec<f64>; 2] = Default::default();
        for _ in 0..pairs {
            let first = coin.toss();
            for second in [first, !first] {
                n += 1;
                let started = SystemClock.now();
                (case.ask)(n, second);
                round[usize::from(second)].push(started.elapsed().as_secs_f64() * 1e6);
            }
        }
        for (all, round) in all.iter_mut().zip(&round) {
            all.extend(round);
        }
        let [a, b] = &mut round;
        least_p = least_p.min(kolmogorov_smirnov(a, b).1);
    }
    let [a, b] = &mut all;
    let (distance, p) = kolmogorov_smirnov(a, b);
    println!(
        "{:44} medians {:8.1} {:8.1} µs  D {distance:.4}  p {p:.2e}  least p of {rounds} rounds {least_p:.2e}",
        case.name,
        median(a),
        median(b)
    );
}

/// As [`measure`] for caches: the victim does something before every question, only in one case the same thing, and
/// only the question is timed.
fn measure_after(name: &str, questions: usize, prepare: &dyn Fn(usize), ask: &dyn Fn(usize)) {
    let mut coin = Coin(0xD1B5_4A32_D192_ED03);
    let mut samples: [Vec<f64>; 2] = Default::default();
    for n in 0..questions {
        let second = coin.toss();
        prepare(if second { n } else { 10_000_000 + n });
        let started = SystemClock.now();
        ask(n);
        samples[usize::from(second)].push(started.elapsed().as_secs_f64() * 1e6);
    }
    let [a, b] = &mut samples;
    let (distance, p) = kolmogorov_smirnov(a, b);
    println!("{name:44} medians {:8.1} {:8.1} µs  D {distance:.4}  p {p:.2e}", median(a), median(b));
}

fn main() {
    let mut words = std::env::args().skip(1).filter_map(|word| word.parse::<usize>().ok());
    let (rounds, pairs) = (words.next().unwrap_or(20), words.next().unwrap_or(250));
    let folder = scratch("timing");
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")).with(GENEROUS));
    let (key, victim) = (operator::tenant(&node, "acme", &json!({})), operator::tenant(&node, "victim", &json!({})));
    let foreign = "victim-secret-tiny-v1.0.0";
    operator::install(&node, foreign, &tiny::adapter(1, 4, &Linear::ALL));
    let agent = operator::agent();
    let ask = |key: &str, body: &Value, wanted: u16| {
        let answer = operator::post(&agent, &node, "/v1/completions", key, &body.to_string());
        assert_eq!(answer.status, wanted, "{}", answer.text);
    };
    let completion =
        |model: &str, prompt: &str| json!({"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0});
    let with_schema = |schema: &Value| {
        let format = json!({"type": "json_schema", "json_schema": {"name": "s", "schema": schema}});
        json!({"model": "tiny", "prompt": "x", "max_tokens": 1, "response_format": format})
    };
    // Warm: the victim uses its adapter, a schema and a long prompt.
    let id = victim.split('_').nth(1).expect("a key names its id").to_owned();
    let known_wrong = format!("tnt_{id}_{}", "B".repeat(43));
    let schema = |n: usize| json!({"type": "object", "properties": {format!("field{n}"): {"type": "string"}}});
    let prompt = |n: usize| format!("{n} {}", "a secret document of the victim, ".repeat(12));
    ask(&victim, &completion("secret", "x"), 200);
    std::thread::sleep(Duration::from_millis(200));

    let look = |key: &str, path: &str, wanted: u16| {
        let request = agent.get(format!("{}{path}", node.url())).header("authorization", format!("Bearer {key}"));
        let answer = tests::process::read(request.call().expect("the node answers"));
        assert_eq!(answer.status, wanted, "{}", answer.text);
    };
    let of_other = format!("/v1/models/{foreign}");
    let cases = [
        Case {
            name: "key: unknown id / known id, wrong secret",
            ask: Box::new(|n, second| {
                let unknown = format!("tnt_{n:016x}_{}", "B".repeat(43));
                look(if second { &known_wrong } else { &unknown }, "/v1/models", 401);
            }),
        },
        Case {
            name: "model card: nobody's / another tenant's",
            ask: Box::new(|_, second| {
                look(&key, if second { &of_other } else { "/v1/models/nobody-secret-tiny-v1.0.0" }, 404);
            }),
        },
        Case {
            name: "completion: nobody's / another tenant's",
            ask: Box::new(|_, second| {
                ask(&key, &completion(if second { foreign } else { "nobody-secret-tiny-v1.0.0" }, "x"), 404);
            }),
        },
        Case {
            name: "CONTROL wrong key / foreign model card",
            ask: Box::new(
                |_, second| {
                    if second { look(&key, &of_other, 404) } else { look(&known_wrong, "/v1/models", 401) }
                },
            ),
        },
    ];
    println!("{rounds} rounds of {pairs} + {pairs}");
    cases.iter().for_each(|case| measure(case, rounds, pairs));

    let questions = rounds.div_ceil(10) * pairs * 2;
    measure_after(
        "schema cache: another / same as the victim's",
        questions,
        &|n| ask(&victim, &with_schema(&schema(n)), 200),
        &|n| ask(&key, &with_schema(&schema(n)), 200),
    );
    measure_after(
        "prefix cache: another / same as the victim's",
        questions,
        &|n| ask(&victim, &completion("tiny", &prompt(n)), 200),
        &|n| ask(&key, &completion("tiny", &prompt(n)), 200),
    );
    measure_after(
        "CONTROL prefix cache: another / its own",
        questions,
        &|n| ask(&key, &completion("tiny", &prompt(n)), 200),
        &|n| ask(&key, &completion("tiny", &prompt(n)), 200),
    );
}
