//! What is asked: prompts of a given number of tokens that no cache has seen, and the request body around them.

use serde_json::{Value, json};

use crate::random::Random;
use crate::tenants::Tenant;

/// Short English words; with a space in front each is one token in the vocabularies of GPT-2, Llama and their
/// kin. The report has the number of tokens that the server counted, so another vocabulary shows.
const WORDS: [&str; 64] = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "member",
    "law",
    "car",
];

/// Random words, about one token each: 64 to the power of `n_tokens` different prompts.
pub fn words(n_tokens: usize, random: &mut Random) -> String {
    let mut text = String::with_capacity(n_tokens * 8);
    for _ in 0..n_tokens {
        text.push(' ');
        text.push_str(WORDS[random.below(WORDS.len())]);
    }
    text
}

/// Body of a streamed, greedy completion of exactly `output_tokens` tokens.
pub fn body(tenant: &Tenant, prompt: &str, output_tokens: usize) -> Value {
    let mut body = json!({
        "model": tenant.model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": true,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    for (key, value) in &tenant.body {
        body[key] = value.clone();
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_distinct_from_the_first_tokens_on() {
        let mut random = Random::new(9);
        let prompts: std::collections::BTreeSet<String> =
            (0..1000).map(|_| words(96, &mut random).split(' ').take(17).collect()).collect();
        assert_eq!(prompts.len(), 1000, "no two share a cache page of 16 tokens");
    }

    #[test]
    fn a_tenant_adds_fields_to_the_body() {
        let tenant: Tenant =
            serde_json::from_value(json!({"name": "a", "model": "m", "body": {"lora": [{"id": 1, "scale": 1.0}]}}))
                .expect("a tenant");
        let body = body(&tenant, " x", 8);
        assert_eq!((&body["max_tokens"], &body["lora"][0]["id"]), (&json!(8), &json!(1)));
    }
}
