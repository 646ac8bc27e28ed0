//! Reading tool calls out of an answer, in the formats of the model families, and keeping half-written calls
//! out of a stream.
//!
//! | family | format |
//! |---|---|
//! | Qwen2, Hermes | `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, repeated |
//! | Llama 3.x | `{"name": …, "parameters": {…}}`, several joined by `;`, optional `<|python_tag|>` before |
//! | Mistral | `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]` or `[TOOL_CALLS]name{…}` |
//!
//! The reader takes any of them from any model: fine-tuned adapters mix them. Text that does not parse as a call
//! of a known name stays text.

use serde_json::Value;

use super::{Choice, ToolUse};

/// Texts, often control tokens, that belong to call formats and must reach the reader.
pub const MARKERS: [&str; 6] =
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<|eom_id|>"];

/// Markers that open calls.
const OPENERS: [&str; 3] = ["<tool_call>", "[TOOL_CALLS]", "<|python_tag|>"];

/// One call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Function name.
    pub name: String,
    /// JSON text.
    pub arguments: String,
}

/// An answer, read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reading {
    /// Text outside of calls.
    pub content: String,
    /// Calls in order.
    pub calls: Vec<Call>,
}

/// Lets plain text through and keeps back everything from where a call may begin until the answer is whole.
#[derive(Debug, Clone)]
pub struct CallGate {
    tools: ToolUse,
    held: String,
    passed_any: bool,
    shut: bool,
}

impl CallGate {
    /// A bound answer (`required`, named) is kept back as a whole.
    pub fn new(tools: ToolUse) -> Self {
        let shut = tools.choice != Choice::Auto;
        Self { tools, held: String::new(), passed_any: false, shut }
    }

    /// Adds text; returns what is certainly not part of a call.
    pub fn push(&mut self, text: &str) -> String {
        self.held.push_str(text);
        if self.shut {
            return String::new();
        }
        let start = self.held.trim_start();
        if !self.passed_any && start.is_empty() {
            return String::new();
        }
        // A whole answer that opens like JSON may be a call in Llama's format.
        if !self.passed_any && (start.starts_with('{') || start.starts_with('[')) {
            self.shut = !OPENERS.iter().any(|opener| opener.starts_with(start)) || start.starts_with('{');
            return String::new();
        }
        let (cut, shut) = first_opener(&self.held);
        self.shut = shut;
        let passed: String = self.held.drain(..cut).collect();
        self.passed_any |= !passed.trim().is_empty();
        passed
    }

    /// Reads what was kept back, at the end of the answer.
    pub fn finish(self) -> Reading {
        read(&self.held, &self.tools, self.passed_any)
    }
}

/// Where an opener begins and whether it is whole; the end of the text if there is none.
fn first_opener(text: &str) -> (usize, bool) {
    if let Some(at) = OPENERS.iter().filter_map(|opener| text.find(opener)).min() {
        return (at, true);
    }
    let partial = |at: &usize| OPENERS.iter().any(|opener| opener.starts_with(&text[*at..]));
    (text.char_indices().map(|(at, _)| at).find(partial).unwrap_or(text.len()), false)
}

/// Reads an answer, or the part of one that the gate kept back (`text_before` tells that text was let through).
fn read(text: &str, tools: &ToolUse, text_before: bool) -> Reading {
    let plain = || Reading { content: text.to_owned(), calls: Vec::new() };
    let mut reading = match &tools.choice {
        Choice::Named(name) => {
            // The grammar makes it the arguments object; cut off by length it is reported as far as it got.
            let call = Call { name: name.clone(), arguments: text.trim().to_owned() };
            return Reading { content: String::new(), calls: vec![call] };
        }
        Choice::Required => call_list(text),
        Choice::Auto => {
            if text.contains("<tool_call>") {
                hermes(text)
            } else if let Some((before, calls)) = text.split_once("[TOOL_CALLS]") {
                mistral(calls).map(|calls| Reading { content: before.trim().to_owned(), calls })
            } else if let Some((before, calls)) = text.split_once("<|python_tag|>") {
                joined_by_semicolons(calls).map(|calls| Reading { content: before.trim().to_owned(), calls })
            } else if !text_before && text.trim_start().starts_with('{') {
                joined_by_semicolons(text).map(|calls| Reading { content: String::new(), calls })
            } else if !text_before {
                call_list(text)
            } else {
                None
            }
        }
    }
    .filter(|reading| reading.calls.iter().all(|call| tools.names.contains(&call.name)))
    .unwrap_or_else(plain);
    if !tools.parallel {
        reading.calls.truncate(1);
    }
    reading
}

fn hermes(text: &str) -> Option<Reading> {
    let mut reading = Reading::default();
    let mut parts = text.split("<tool_call>");
    reading.content = parts.next().unwrap_or_default().trim().to_owned();
    for part in parts {
        // Models forget the closing tag at the end of an answer.
        let (inside, after) = part.split_once("</tool_call>").unwrap_or((part, ""));
        reading.calls.push(call(&serde_json::from_str(inside.trim()).ok()?)?);
        let after = after.trim();
        if !after.is_empty() {
            reading.content.push_str(after);
        }
    }
    Some(reading)
}

fn mistral(text: &str) -> Option<Vec<Call>> {
    let text = text.trim();
    if text.starts_with('[') && !text.starts_with("[ARGS]") {
        return calls_of(&serde_json::from_str(text).ok()?);
    }
    text.split("[TOOL_CALLS]")
        .map(|one| {
            let one = one.trim();
            let (name, arguments) = match one.split_once("[ARGS]") {
                Some(halves) => halves,
                None => one.split_at(one.find('{')?),
            };
            let arguments: Value = serde_json::from_str(arguments.trim()).ok()?;
            arguments.is_object().then(|| Call { name: name.trim().to_owned(), arguments: arguments.to_string() })
        })
        .collect()
}

fn joined_by_semicolons(text: &str) -> Option<Vec<Call>> {
    let mut rest = text.trim().trim_end_matches("<|eom_id|>").trim_end();
    let mut calls = Vec::new();
    while !rest.is_empty() {
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        calls.push(call(&values.next()?.ok()?)?);
        rest = rest[values.byte_offset()..].trim_start();
        if !rest.is_empty() {
            rest = rest.strip_prefix(';')?.trim_start();
        }
    }
    (!calls.is_empty()).then_some(calls)
}

fn call_list(text: &str) -> Option<Reading> {
    let calls = calls_of(&serde_json::from_str(text.trim()).ok()?)?;
    Some(Reading { content: String::new(), calls })
}

fn calls_of(value: &Value) -> Option<Vec<Call>> {
    let calls: Vec<Call> = value.as_array()?.iter().map(call).collect::<Option<_>>()?;
    (!calls.is_empty()).then_some(calls)
}

/// `{"name": …, "arguments" | "parameters": {…}}`, also inside `{"type": "function", "function": …}`.
fn call(value: &Value) -> Option<Call> {
    let value = value.get("function").filter(|inner| inner.is_object()).unwrap_or(value);
    let name = value.get("name")?.as_str()?.to_owned();
    let arguments = match value.get("arguments").or_else(|| value.get("parameters")) {
        None => "{}".to_owned(),
        Some(Value::String(text)) => serde_json::from_str::<Value>(text).ok().filter(Value::is_object)?.to_string(),
        Some(object @ Value::Object(_)) => object.to_string(),
        Some(_) => return None,
    };
    Some(Call { name, arguments })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools(choice: Choice) -> ToolUse {
        ToolUse { choice, names: vec!["add".to_owned(), "weather".to_owned()], parallel: true }
    }

    fn run(choice: Choice, text: &str) -> (String, Reading) {
        // One character at a time is the hardest way to stream.
        let mut gate = CallGate::new(tools(choice));
        let passed = text.chars().map(|c| gate.push(&c.to_string())).collect();
        (passed, gate.finish())
    }

    fn calls(text: &str) -> Vec<(String, String)> {
        let (passed, reading) = run(Choice::Auto, text);
        assert_eq!(passed.trim(), "", "nothing of a call may be streamed as text: {text}");
        assert_eq!(reading.content, "");
        reading.calls.into_iter().map(|call| (call.name, call.arguments)).collect()
    }

    fn pair(name: &str, arguments: &str) -> (String, String) {
        (name.to_owned(), arguments.to_owned())
    }

    #[test]
    fn calls_of_every_family_are_read() {
        let add = pair("add", r#"{"a":1}"#);
        let weather = pair("weather", r#"{"at":"Ulm"}"#);
        assert_eq!(
            calls(
                "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>\n<tool_call>{\"name\":\"weather\",\"arguments\":{\"at\":\"Ulm\"}}</tool_call>"
            ),
            [add.clone(), weather.clone()]
        );
        assert_eq!(calls(r#"{"name": "add", "parameters": {"a": 1}}"#), std::slice::from_ref(&add));
        assert_eq!(
            calls(
                r#"<|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "weather", "parameters": {"at": "Ulm"}}<|eom_id|>"#
            ),
            [add.clone(), weather.clone()]
        );
        assert_eq!(calls(r#"[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]"#), std::slice::from_ref(&add));
        assert_eq!(calls(r#"[TOOL_CALLS]add{"a": 1}[TOOL_CALLS]weather[ARGS]{"at": "Ulm"}"#), [add.clone(), weather]);
        assert_eq!(calls(r#"<tool_call>{"name": "add", "arguments": "{\"a\": 1}"}"#), [add]);
    }

    #[test]
    fn text_before_a_call_is_streamed_and_the_call_is_not() {
        let (passed, reading) =
            run(Choice::Auto, "Let me see. <tool_call>{\"name\":\"add\",\"arguments\":{}}</tool_call>");
        assert_eq!(passed, "Let me see. ");
        assert_eq!(
            reading,
            Reading { content: String::new(), calls: vec![Call { name: "add".into(), arguments: "{}".into() }] }
        );
    }

    #[test]
    fn what_is_no_call_of_a_known_tool_stays_text() {
        for text in [
            "<b>bold</b> a <tool",
            "{\"name\":\"rm\",\"parameters\":{}}",
            "{not json",
            "<tool_call>oops</tool_call>",
            "[1, 2, 3]",
            "[T",
            "[see] this",
            "  {",
            "",
            "<tool_call>",
            "1 < 2 and [x]",
        ] {
            let (passed, reading) = run(Choice::Auto, text);
            assert_eq!(format!("{passed}{}", reading.content), text);
            assert!(reading.calls.is_empty());
        }
    }

    #[test]
    fn bound_answers_are_read_as_json() {
        let (passed, reading) = run(Choice::Required, r#"[{"name":"add","arguments":{"a":1}}]"#);
        assert_eq!((passed.as_str(), reading.calls.len()), ("", 1));
        let (_, reading) = run(Choice::Named("weather".into()), r#"{"at":"Ul"#);
        assert_eq!(reading.calls, [Call { name: "weather".into(), arguments: r#"{"at":"Ul"#.into() }]);
        let (_, reading) = run(Choice::Required, r#"[{"name":"add","argu"#);
        assert_eq!(reading.content, r#"[{"name":"add","argu"#);
    }

    #[test]
    fn without_parallel_calls_only_the_first_is_reported() {
        let mut gate = CallGate::new(ToolUse { parallel: false, ..tools(Choice::Auto) });
        gate.push(r#"[TOOL_CALLS][{"name":"add","arguments":{}},{"name":"weather","arguments":{}}]"#);
        assert_eq!(gate.finish().calls.len(), 1);
    }
}
