//! Every numeric field with every absurd value: 400 or a documented meaning, never a 5xx (RELIABILITY B3).

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tests::operator::{self, GENEROUS};
use tests::process::{NodeProcess, NodeSpec, scratch};

use super::assert_serves;

const FIELDS: [&str; 20] = [
    "max_tokens",
    "n",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "prompt_logprobs",
    "logprobs",
    "best_of",
    "max_completion_tokens",
    "top_logprobs",
    "length_penalty",
    "truncate_prompt_tokens",
    "priority",
    "echo",
];

const VALUES: [&str; 24] = [
    "-1",
    "0",
    "1",
    "-0",
    "-0.0",
    "0.5",
    "1e-45",
    "1e-308",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e308",
    "-1e308",
    "\"1\"",
    "true",
    "[1]",
    "{\"1\":1}",
    "null",
];

#[test]
fn absurd_numbers_are_refused_by_name_or_mean_what_is_documented() {
    let folder = scratch("numbers");
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")).with(GENEROUS));
    let key = operator::tenant(&node, "acme", &json!({}));
    let agent = operator::agent();
    let mut seen: BTreeMap<u16, usize> = BTreeMap::new();
    for (path, start) in [
        ("/v1/completions", "\"prompt\":\"hi\""),
        ("/v1/chat/completions", "\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]"),
    ] {
        for field in FIELDS {
            for value in VALUES {
                let short =
                    if ["max_tokens", "max_completion_tokens"].contains(&field) { "" } else { "\"max_tokens\":2," };
                let body = format!("{{\"model\":\"tiny\",{start},{short}\"{field}\":{value}}}");
                let answer = operator::post(&agent, &node, path, &key, &body);
                assert!([200, 400].contains(&answer.status), "{body}: {}", answer.text);
                if answer.status == 400 {
                    assert!(!answer.code().is_empty(), "{body}: {}", answer.text);
                }
                *seen.entry(answer.status).or_default() += 1;
            }
        }
        for (field, values) in [
            (
                "logit_bias",
                &[
                    "{\"0\":101}",
                    "{\"-1\":1}",
                    "{\"289\":1}",
                    "{\"99999999999\":1}",
                    "{\"x\":1}",
                    "{\"1\":\"1\"}",
                    "{\"+1\":1}",
                ][..],
            ),
            ("stop_token_ids", &["[-1]", "[289]", "[4294967296]", "[1.5]", "[\"1\"]", "5"][..]),
            ("stop", &["[\"\"]", "\"\"", "[1]", "{}", "7"][..]),
            ("stream_options", &["5", "{\"include_usage\":1}"][..]),
        ] {
            for value in values {
                let body = format!("{{\"model\":\"tiny\",{start},\"max_tokens\":2,\"{field}\":{value}}}");
                let answer = operator::post(&agent, &node, path, &key, &body);
                assert_eq!(answer.status, 400, "{body}: {}", answer.text);
                *seen.entry(answer.status).or_default() += 1;
            }
        }
    }
    println!("absurd numbers by status: {seen:?}");
    assert_eq!(seen.keys().copied().collect::<Vec<_>>(), [200, 400]);
    assert_serves(&node, &key);
}

#[test]
fn extreme_but_valid_sampling_still_answers() {
    let folder = scratch("extremes");
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")).with(GENEROUS));
    let key = operator::tenant(&node, "acme", &json!({}));
    let everything_banned: Value =
        (0..289).map(|id| (id.to_string(), json!(-100))).collect::<serde_json::Map<_, _>>().into();
    for more in [
        json!({"temperature": 1e-30}),
        json!({"temperature": 2.0, "top_p": 1e-30}),
        json!({"top_p": 0}),
        json!({"min_p": 1.0}),
        json!({"top_k": 1_000_000}),
        json!({"repetition_penalty": 0.01}),
        json!({"repetition_penalty": 10, "presence_penalty": 2, "frequency_penalty": -2}),
        json!({"logit_bias": everything_banned}),
        json!({"n": 8, "seed": -9_223_372_036_854_775_808_i64}),
        json!({"logprobs": 5, "echo": true, "prompt_logprobs": 20}),
        json!({"stop_token_ids": (0..64).collect::<Vec<u32>>(), "min_tokens": 8}),
    ] {
        let mut body = json!({"model": "tiny", "prompt": "hi there", "max_tokens": 8});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let answer = node.post("/v1/completions", &key, &body);
        assert_eq!(answer.status, 200, "{body}: {}", answer.text);
        assert!(!answer.text.contains("NaN"), "{}", answer.text);
    }
    assert_serves(&node, &key);
}
