//! Tool calling: the request's `tools`, `tool_choice` and `parallel_tool_calls` → what the template sees, which
//! grammar binds the answer, and how the answer is read back ([`calls`]).
//!
//! `auto` lets the model write calls in its family's own format. `required` and a named function bind the
//! answer to JSON made from the tools' schemas, so that every model obeys.

pub mod calls;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use shared::error::RequestError;
use shared::request::Grammar;

use super::fields::Fields;
use super::json::type_name;
use super::limits::{SCHEMA_BYTES_MAX, TOOL_CALLS_MAX, TOOLS_MAX};
use super::request::{missing, unsupported};

/// The tools of a request whose `tool_choice` is not `none`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tools {
    definitions: Vec<Tool>,
    choice: Choice,
    parallel: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Tool {
    name: String,
    parameters: Map<String, Value>,
    /// As the client sent it, for the template.
    sent: Value,
}

/// Whether the model must call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Choice {
    /// If it wants.
    Auto,
    /// At least one of the tools.
    Required,
    /// Exactly this one.
    Named(String),
}

/// How the answer of a request with tools is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolUse {
    /// What was asked for.
    pub choice: Choice,
    /// Names that exist; a call of another name is plain text.
    pub names: Vec<String>,
    /// Whether more than one call may be reported.
    pub parallel: bool,
}

impl Tools {
    /// Reads and checks the fields. `None` without tools and for `tool_choice: "none"`.
    ///
    /// # Errors
    /// 400 naming the field.
    pub fn parse(fields: Fields<'_>) -> Result<Option<Self>, RequestError> {
        let parallel = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
        let sent = fields.array("tools", TOOLS_MAX)?.unwrap_or_default();
        let definitions =
            sent.iter().enumerate().map(|(idx, tool)| Tool::parse(idx, tool)).collect::<Result<Vec<_>, _>>()?;
        let Some(choice) = choice(fields)? else { return Ok(None) };
        if definitions.is_empty() {
            return match choice {
                Choice::Auto => Ok(None),
                _ => Err(RequestError::field("invalid_value", "tool_choice", "tool_choice needs tools")),
            };
        }
        let bytes: usize = sent.iter().map(|tool| tool.to_string().len()).sum();
        if bytes > SCHEMA_BYTES_MAX {
            let wanted = format_args!("at most {SCHEMA_BYTES_MAX} bytes together");
            return Err(fields.out_of_range("tools", wanted, format_args!("{bytes} bytes")));
        }
        if let Some(twice) =
            definitions.iter().enumerate().find(|(idx, tool)| definitions[..*idx].iter().any(|t| t.name == tool.name))
        {
            return Err(fields.out_of_range(
                "tools",
                "functions of different names",
                format_args!("{:?} twice", twice.1.name),
            ));
        }
        let known = |name: &String| definitions.iter().any(|tool| tool.name == *name);
        if let Choice::Named(name) = &choice
            && !known(name)
        {
            return Err(fields.out_of_range("tool_choice", "one of tools", format_args!("{name:?}")));
        }
        let strict = sent.iter().position(|tool| tool["function"]["strict"] == Value::Bool(true));
        if let (Choice::Auto, Some(idx)) = (&choice, strict) {
            let why = "with tool_choice \"auto\"; hint: set tool_choice to \"required\", which always obeys the schema";
            return Err(unsupported(&format!("tools[{idx}].function.strict"), why));
        }
        Ok(Some(Self { definitions, choice, parallel }))
    }

    /// The array for the chat template.
    pub fn template_value(&self) -> Value {
        Value::Array(self.definitions.iter().map(|tool| tool.sent.clone()).collect())
    }

    /// The constraint on the answer.
    pub fn grammar(&self) -> Option<Grammar> {
        let schema = match &self.choice {
            Choice::Auto => return None,
            Choice::Named(name) => {
                let tool = self.definitions.iter().find(|tool| tool.name == *name).expect("checked when parsed");
                Value::Object(tool.parameters.clone())
            }
            Choice::Required => self.required_schema(),
        };
        Some(Grammar::JsonSchema(schema.to_string()))
    }

    /// A list of calls; each tool's schema is a definition of its own, so that its local references still hold.
    fn required_schema(&self) -> Value {
        let mut definitions = Map::new();
        let mut any_of = Vec::new();
        for (idx, tool) in self.definitions.iter().enumerate() {
            let key = format!("tool_{idx}");
            let mut schema = Value::Object(tool.parameters.clone());
            move_references(&mut schema, &format!("#/$defs/{key}"));
            definitions.insert(key.clone(), schema);
            any_of.push(json!({
                "type": "object",
                "properties": {"name": {"const": tool.name}, "arguments": {"$ref": format!("#/$defs/{key}")}},
                "required": ["name", "arguments"],
                "additionalProperties": false
            }));
        }
        let calls_max = if self.parallel { TOOL_CALLS_MAX } else { 1 };
        json!({"type": "array", "minItems": 1, "maxItems": calls_max, "items": {"anyOf": any_of}, "$defs": definitions})
    }

    /// How the answer is to be read.
    pub fn tool_use(&self) -> ToolUse {
        let names = self.definitions.iter().map(|tool| tool.name.clone()).collect();
        ToolUse { choice: self.choice.clone(), names, parallel: self.parallel }
    }
}

impl Tool {
    fn parse(idx: usize, tool: &Value) -> Result<Self, RequestError> {
        let path = format!("tools[{idx}]");
        let Some(map) = tool.as_object() else {
            let text = format!("{path} must be an object, found {}", type_name(tool));
            return Err(RequestError::field("invalid_type", path, text));
        };
        let outer = Fields::nested(map, &path);
        match outer.text("type", 64)? {
            Some("function") => {}
            Some(other) => {
                return Err(unsupported(&outer.param("type"), &format!("when it is {other:?}; only functions are")));
            }
            None => return Err(missing(&outer.param("type"))),
        }
        let function = outer.object("function")?.ok_or_else(|| missing(&outer.param("function")))?;
        let function_path = outer.param("function");
        let inner = Fields::nested(function, &function_path);
        let name = inner.text("name", 64)?.ok_or_else(|| missing(&inner.param("name")))?;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if name.is_empty() || !name.bytes().all(plain) {
            return Err(inner.out_of_range("name", "1 to 64 of a-z, A-Z, 0-9, '_' and '-'", format_args!("{name:?}")));
        }
        inner.text("description", SCHEMA_BYTES_MAX)?;
        inner.boolean("strict")?;
        let parameters = inner.object("parameters")?.cloned().unwrap_or_else(|| {
            let empty = json!({"type": "object", "properties": {}, "additionalProperties": false});
            empty.as_object().expect("just made").clone()
        });
        Ok(Self { name: name.to_owned(), parameters, sent: tool.clone() })
    }
}

/// `tool_choice`; `None` for `"none"`.
fn choice(fields: Fields<'_>) -> Result<Option<Choice>, RequestError> {
    let map = match fields.value("tool_choice") {
        None => return Ok(Some(Choice::Auto)),
        Some(Value::String(word)) => {
            return match word.as_str() {
                "auto" => Ok(Some(Choice::Auto)),
                "none" => Ok(None),
                "required" => Ok(Some(Choice::Required)),
                _ => Err(fields.out_of_range(
                    "tool_choice",
                    "\"auto\", \"none\", \"required\" or a function",
                    "another text",
                )),
            };
        }
        Some(Value::Object(map)) => map,
        Some(other) => return Err(fields.wrong_type("tool_choice", "a string or an object", other)),
    };
    let nested = Fields::nested(map, "tool_choice");
    match nested.text("type", 64)? {
        Some("function") => {
            let function = nested.object("function")?.ok_or_else(|| missing("tool_choice.function"))?;
            let inner = Fields::nested(function, "tool_choice.function");
            let name = inner.text("name", 64)?.ok_or_else(|| missing("tool_choice.function.name"))?;
            Ok(Some(Choice::Named(name.to_owned())))
        }
        Some(other) => Err(unsupported("tool_choice.type", &format!("when it is {other:?}; only \"function\" is"))),
        None => Err(missing("tool_choice.type")),
    }
}

/// Makes references into the schema's own root point at `root` instead. The depth is bounded by the parser.
fn move_references(schema: &mut Value, root: &str) {
    match schema {
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                match value {
                    Value::String(target) if key == "$ref" && target.starts_with('#') => {
                        *target = format!("{root}{}", &target[1..]);
                    }
                    value => move_references(value, root),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| move_references(value, root)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: Value) -> Result<Option<Tools>, RequestError> {
        Tools::parse(Fields::new(body.as_object().expect("object")))
    }

    fn weather() -> Value {
        json!([{"type": "function", "function": {"name": "weather", "parameters": {
            "type": "object", "properties": {"at": {"$ref": "#/$defs/place"}}, "$defs": {"place": {"type": "string"}}
        }}}])
    }

    #[test]
    fn required_keeps_the_references_of_each_tools_schema_valid() {
        let tools = parse(json!({"tools": weather(), "tool_choice": "required", "parallel_tool_calls": false}));
        let Some(Grammar::JsonSchema(schema)) = tools.expect("valid").expect("present").grammar() else {
            panic!("no schema")
        };
        let schema: Value = serde_json::from_str(&schema).expect("JSON");
        let reference = schema["$defs"]["tool_0"]["properties"]["at"]["$ref"].as_str().expect("reference");
        assert_eq!(schema.pointer(&reference[1..]), Some(&json!({"type": "string"})));
        assert_eq!(schema["maxItems"], 1);
        assert_eq!(schema["items"]["anyOf"][0]["properties"]["name"]["const"], "weather");
    }

    #[test]
    fn a_named_function_binds_the_answer_to_its_parameters() {
        let choice = json!({"type": "function", "function": {"name": "weather"}});
        let tools = parse(json!({"tools": weather(), "tool_choice": choice})).expect("valid").expect("present");
        let Some(Grammar::JsonSchema(schema)) = tools.grammar() else { panic!("no schema") };
        assert_eq!(serde_json::from_str::<Value>(&schema).expect("JSON"), weather()[0]["function"]["parameters"]);
    }

    #[test]
    fn none_hides_the_tools_and_auto_binds_nothing() {
        assert_eq!(parse(json!({"tools": weather(), "tool_choice": "none"})).expect("valid"), None);
        assert_eq!(parse(json!({"tools": weather()})).expect("valid").expect("present").grammar(), None);
        assert_eq!(parse(json!({"tools": []})).expect("valid"), None);
    }

    #[test]
    fn what_is_not_done_is_refused_by_name() {
        for (body, param) in [
            (json!({"tools": [{"type": "custom", "custom": {}}]}), "tools[0].type"),
            (json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}), "tools[0].function.name"),
            (
                json!({"tools": [{"type": "function", "function": {"name": "a", "strict": true}}]}),
                "tools[0].function.strict",
            ),
            (json!({"tools": [{"type": "function", "function": {}}]}), "tools[0].function.name"),
            (json!({"tools": [1]}), "tools[0]"),
            (json!({"tools": "all"}), "tools"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tools": weather(), "tool_choice": "perhaps"}), "tool_choice"),
            (
                json!({"tools": weather(), "tool_choice": {"type": "function", "function": {"name": "x"}}}),
                "tool_choice",
            ),
            (json!({"tools": weather(), "tool_choice": {"type": "allowed_tools"}}), "tool_choice.type"),
        ] {
            let error = parse(body.clone()).expect_err(&body.to_string());
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
        }
    }
}
