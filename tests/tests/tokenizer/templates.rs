//! Chat templates of the families render byte for byte as transformers renders them (`data/templates`).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use model::template::{ChatTemplate, TemplateError, encode_chat};
use serde_json::{Map, Value};

use crate::goldens::BASE;

/// Conversation name → what is given to the template.
type Cases = BTreeMap<String, Value>;
/// Template file → conversation name → what came out.
type Goldens = BTreeMap<String, BTreeMap<String, BTreeMap<String, String>>>;

/// Where templates, conversations and goldens are; `TENANTRY_TEMPLATES` names another folder made by `make.py`.
fn folder() -> PathBuf {
    std::env::var_os("TENANTRY_TEMPLATES").map_or_else(|| tests::data("templates"), PathBuf::from)
}

fn read() -> (Cases, Goldens) {
    let text = |name| std::fs::read_to_string(folder().join(name)).expect("the folder has it");
    let cases = serde_json::from_str(&text("cases.json")).expect("it is JSON");
    (cases, serde_json::from_str(&text("goldens.json")).expect("it is JSON"))
}

fn template(name: &str) -> ChatTemplate {
    let source = std::fs::read_to_string(folder().join(name)).expect("the golden's template");
    let template = ChatTemplate::from_source(&source).unwrap_or_else(|error| panic!("{name}: {error}"));
    template.with_global("bos_token", "<s>").with_global("eos_token", "</s>")
}

struct Case<'a> {
    messages: &'a [Value],
    tools: Option<&'a Value>,
    add_generation_prompt: bool,
    extra: Map<String, Value>,
}

impl<'a> Case<'a> {
    fn new(case: &'a Value) -> Self {
        Self {
            messages: case["messages"].as_array().expect("a list"),
            tools: case.get("tools"),
            add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap_or(true),
            extra: case["extra"].as_object().cloned().unwrap_or_default(),
        }
    }

    fn render(&self, template: &ChatTemplate) -> Result<String, TemplateError> {
        template.render(self.messages, self.tools, self.add_generation_prompt, &self.extra)
    }
}

/// The text with today's date where the golden has a format, by the system's own `date`.
fn dated(golden: &str) -> String {
    let mut parts = golden.split(['⟦', '⟧']);
    let mut text = parts.next().unwrap_or_default().to_owned();
    while let (Some(format), Some(rest)) = (parts.next(), parts.next()) {
        let date = Command::new("date").env("LC_ALL", "C").args(["-u", &format!("+{format}")]).output().expect("date");
        text += String::from_utf8(date.stdout).expect("UTF-8").trim_end();
        text += rest;
    }
    text
}

/// Where two texts part, with a little around.
fn parting(found: &str, expected: &str) -> String {
    let same = found.chars().zip(expected.chars()).take_while(|(a, b)| a == b).count();
    let around = |text: &str| text.chars().skip(same.saturating_sub(40)).take(100).collect::<String>();
    format!("from character {same} on\n  found    {:?}\n  expected {:?}", around(found), around(expected))
}

/// What is wrong with what came out; midnight may pass between two looks at the clock.
fn difference(found: impl Fn() -> Result<String, TemplateError>, golden: &BTreeMap<String, String>) -> Option<String> {
    let (kind, expected) = golden.first_key_value().expect("text, raised or failed");
    let once = || match (kind.as_str(), found()) {
        ("text", Ok(text)) if text == dated(expected) => None,
        ("raised", Err(TemplateError::Raised(message))) if message == *expected => None,
        ("failed", Err(TemplateError::Render { .. })) => None,
        ("text", Ok(text)) => Some(parting(&text, &dated(expected))),
        (_, found) => Some(format!("found {found:?}, expected {kind} {expected:?}")),
    };
    once().and_then(|_| once())
}

#[test]
fn templates_of_the_families_render_as_transformers_renders_them() {
    let (cases, goldens) = read();
    let mut wrong = Vec::new();
    for (name, goldens) in &goldens {
        let template = template(name);
        assert_eq!(goldens.len(), cases.len(), "{name} was rendered with every conversation");
        for (case, golden) in goldens {
            let found = || Case::new(&cases[case]).render(&template);
            wrong.extend(difference(found, golden).map(|why| format!("{name}, {case}:\n  {why}")));
        }
    }
    let n = goldens.len() * cases.len();
    assert!(wrong.is_empty(), "{} of {n} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn what_guards_the_texts_of_users_changes_no_rendering() {
    let (cases, goldens) = read();
    // The other one measures texts and turns them around: a marked token counts as one character there.
    for (name, goldens) in goldens.iter().filter(|(name, _)| *name != "constructs.jinja") {
        let template = template(name);
        for (case, golden) in goldens.iter().filter(|(_, golden)| golden.contains_key("text")) {
            let Case { messages, tools, add_generation_prompt, extra } = Case::new(&cases[case]);
            let decoded = || {
                let ids = encode_chat(&template, &BASE.tokenizer, messages, tools, add_generation_prompt, &extra)?;
                Ok(BASE.tokenizer.decode(&ids, false))
            };
            assert_eq!(difference(decoded, golden), None, "{name}, {case}");
        }
    }
}
