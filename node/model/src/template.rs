//! Chat templates: a conversation to the text and the tokens the model was trained on.
//!
//! The template comes with the model (an operator's file, never a tenant's) and is still bounded: instructions
//! by fuel, output by the size of its input, source and each expression by caps. Jinja as Hugging Face runs it: `trim_blocks`,
//! `lstrip_blocks`, Python's string methods, `raise_exception`, `strftime_now`, Python's JSON spacing.
//! One thing is not allowed that Jinja allows: the `*` operator, which can ask for 100 MB with nine characters
//! and is not used by chat templates. Messages are data here; what a request may contain is the gateway's
//! decision, except that roles are those of [`ROLES`].

mod functions;

use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind as JinjaErrorKind};
use regex::{Captures, Regex};
use serde_json::{Map, Value};

use crate::tokenizer::Tokenizer;
use crate::tokenizer::guard::Guard;

use self::functions::Raised;

/// Roles a message may have; a template assembles markers from them, so they are never free text.
pub const ROLES: [&str; 7] = ["system", "developer", "user", "assistant", "tool", "function", "ipython"];

/// Instructions per rendering: 10,000 messages through the longest templates we know take 2 million, and these
/// are spent in well under 100 ms.
const FUEL: u64 = 3_000_000;

/// Longest template source; the longest real ones have 20 KB.
const SOURCE_BYTES_MAX: usize = 256 << 10;

/// Most bytes of one expression or statement, texts in quotes aside; real ones have 170. Half of what the compiler takes
/// on a stack of 2 MiB without optimisation.
const CODE_BYTES_MAX: usize = 1024;

/// Most `elif` in a source; real ones have 20. A third of what that stack takes.
const ELIF_MAX: usize = 256;

/// Output allowed on top of four times the input: a template's own words, such as a tool-calling preamble.
const OUTPUT_BYTES_BASE: usize = 64 << 10;

/// Name the template has inside its environment; the ending keeps HTML escaping off.
const NAME: &str = "chat.txt";

/// Why a conversation has no rendering.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template itself is not valid; it comes with the model.
    #[error("the model's chat template is invalid in line {line}: {reason}")]
    Source {
        /// Line in the template.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A message has no role or an unknown one.
    #[error("message {idx} has the role {found}; hint: use system, developer, user, assistant or tool")]
    Role {
        /// Position of the message.
        idx: usize,
        /// What was found.
        found: String,
    },
    /// A message's content has a part that is no text.
    #[error("message {idx} has a content part of type {found}; hint: this model reads text only")]
    Part {
        /// Position of the message.
        idx: usize,
        /// Type of the part.
        found: String,
    },
    /// The template refuses the conversation in its own words.
    #[error("the model's chat template refuses this conversation: {0}")]
    Raised(String),
    /// The conversation needs more work than allowed.
    #[error("rendering the conversation takes more than {FUEL} steps; hint: send fewer messages")]
    Fuel,
    /// The rendering is out of proportion to the conversation.
    #[error(
        "the rendered conversation exceeds {bytes_max} bytes, four times its input; hint: send fewer or shorter messages"
    )]
    Output {
        /// The limit it passed.
        bytes_max: usize,
    },
    /// The template cannot process this conversation.
    #[error(
        "the model's chat template cannot render this conversation (line {line}): {reason}; hint: check that every message has a content text and that roles come in the usual order"
    )]
    Render {
        /// Line in the template.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// The conversation uses up every character we could mark texts with.
    #[error("the conversation contains all of U+F0000 to U+F0FFF; hint: remove the private-use characters")]
    Marks,
}

/// A compiled chat template; rendering takes it by reference and leaves nothing behind.
pub struct ChatTemplate {
    source: String,
    environment: Environment<'static>,
    globals: Map<String, Value>,
}

// === impl ChatTemplate ===

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// [`TemplateError::Source`] names the line.
    pub fn from_source(source: &str) -> Result<Self, TemplateError> {
        if source.len() > SOURCE_BYTES_MAX {
            let reason = format!("it has {} bytes, the limit is {SOURCE_BYTES_MAX}", source.len());
            return Err(TemplateError::Source { line: 1, reason });
        }
        if let Some((line, reason)) = refused(source) {
            return Err(TemplateError::Source { line, reason: reason.to_owned() });
        }
        let mut environment = Environment::new();
        environment.set_syntax(
            SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().expect("standard delimiters"),
        );
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        functions::register(&mut environment);
        environment.add_template_owned(NAME, without_generation_marks(source)).map_err(|error| {
            TemplateError::Source {
                line: error.line().unwrap_or(1),
                reason: error.detail().unwrap_or("syntax error").to_owned(),
            }
        })?;
        Ok(Self { source: source.to_owned(), environment, globals: Map::new() })
    }

    /// Adds a variable that every rendering sees, such as `bos_token`.
    #[must_use]
    pub fn with_global(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.globals.insert(name.to_owned(), value.into());
        self
    }

    /// The source it was made from.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation. `extra` adds or overrides variables (`enable_thinking`, `date_string`, …).
    ///
    /// The text mixes what the template and what users wrote: encode it with [`encode_chat`] instead, unless
    /// every message is trusted.
    ///
    /// # Errors
    /// When a role is unknown, the template refuses or fails, or a bound is passed.
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String, TemplateError> {
        let messages = prepare(messages)?;
        self.render_prepared(messages, tools, add_generation_prompt, extra)
    }

    fn render_prepared(
        &self,
        messages: Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String, TemplateError> {
        let n_input = n_text_bytes(&messages) + tools.map_or(0, n_text_bytes);
        let bytes_max = OUTPUT_BYTES_BASE + 4 * n_input;
        let mut context = self.globals.clone();
        context.insert("messages".to_owned(), messages);
        context.insert("tools".to_owned(), tools.cloned().unwrap_or(Value::Null));
        context.insert("add_generation_prompt".to_owned(), Value::Bool(add_generation_prompt));
        context.extend(extra.iter().map(|(name, value)| (name.clone(), value.clone())));
        let template = self.environment.get_template(NAME).expect("added by from_source");
        let mut out = Capped { bytes: Vec::new(), bytes_max, over: false };
        // The engine has its bugs (3.0.5 panics on `''[::-1]`); nothing that a panic leaves behind is used.
        let render = || template.render_captured_to(minijinja::Value::from(Serde(&context)), &mut out).map(drop);
        let result = catch_unwind(AssertUnwindSafe(render)).map_err(|_| {
            let reason = "the template engine failed; hint: the log says where, change the template there".to_owned();
            TemplateError::Render { line: 1, reason }
        })?;
        if out.over {
            return Err(TemplateError::Output { bytes_max });
        }
        result.map_err(|error| render_error(&error))?;
        String::from_utf8(out.bytes)
            .map_err(|_| TemplateError::Render { line: 1, reason: "the output is not UTF-8".to_owned() })
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("source_bytes", &self.source.len()).finish_non_exhaustive()
    }
}

/// Renders and encodes a conversation. Control tokens come from the template alone: the same texts inside
/// messages and tools are encoded as plain text.
///
/// # Errors
/// As [`ChatTemplate::render`].
pub fn encode_chat(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    messages: &[Value],
    tools: Option<&Value>,
    add_generation_prompt: bool,
    extra: &Map<String, Value>,
) -> Result<Vec<u32>, TemplateError> {
    let messages = prepare(messages)?;
    let extra = Value::Object(extra.clone());
    let inputs: Vec<&Value> = [Some(&messages), tools, Some(&extra)].into_iter().flatten().collect();
    let mut guard = Guard::new(tokenizer, &inputs).ok_or(TemplateError::Marks)?;
    let messages = guard.protect(&messages);
    let tools = tools.map(|tools| guard.protect(tools));
    let Value::Object(extra) = guard.protect(&extra) else { unreachable!("protecting keeps the kind of a value") };
    let rendered = template.render_prepared(messages, tools.as_ref(), add_generation_prompt, &extra)?;
    Ok(guard.encode(&rendered))
}

/// Checks roles and joins contents given as text parts, line by line.
fn prepare(messages: &[Value]) -> Result<Value, TemplateError> {
    let prepare_one = |(idx, message): (usize, &Value)| {
        let role = message.get("role").and_then(Value::as_str);
        if !role.is_some_and(|role| ROLES.contains(&role)) {
            let found = role.map_or_else(|| "nothing".to_owned(), |role| format!("{:?}", clip(role)));
            return Err(TemplateError::Role { idx, found });
        }
        let mut message = message.clone();
        if let Some(Value::Array(parts)) = message.get("content") {
            let texts: Result<Vec<&str>, _> = parts.iter().map(|part| text_part(part, idx)).collect();
            message["content"] = Value::String(texts?.join("\n"));
        }
        Ok(message)
    };
    messages.iter().enumerate().map(prepare_one).collect::<Result<Vec<_>, _>>().map(Value::Array)
}

fn text_part(part: &Value, idx: usize) -> Result<&str, TemplateError> {
    let kind = part["type"].as_str().unwrap_or("none");
    let text = if kind == "text" { part["text"].as_str() } else { None };
    text.ok_or_else(|| TemplateError::Part { idx, found: clip(kind) })
}

fn clip(text: &str) -> String {
    text.chars().take(40).collect()
}

fn render_error(error: &minijinja::Error) -> TemplateError {
    let mut source = Some(error as &(dyn std::error::Error + 'static));
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref::<Raised>() {
            return TemplateError::Raised(message.clone());
        }
        source = cause.source();
    }
    if error.kind() == JinjaErrorKind::OutOfFuel {
        return TemplateError::Fuel;
    }
    let reason = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    TemplateError::Render { line: error.line().unwrap_or(1), reason }
}

fn n_text_bytes(value: &Value) -> usize {
    // Punctuation and quotes of JSON, which `tojson` may write out.
    const PER_VALUE: usize = 8;
    PER_VALUE
        + match value {
            Value::String(text) => text.len(),
            Value::Array(items) => items.iter().map(n_text_bytes).sum(),
            Value::Object(entries) => entries.iter().map(|(key, value)| key.len() + n_text_bytes(value)).sum(),
            Value::Number(_) => 16,
            Value::Null | Value::Bool(_) => 0,
        }
}

/// `{% generation %}` … `{% endgeneration %}` mark for training what an assistant wrote; a rendering is the same without.
/// The blocks they become leave the same white space behind.
fn without_generation_marks(source: &str) -> String {
    static MARK: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("a valid expression"));
    let block = |mark: &Captures<'_>| {
        let word = if mark.get(2).is_some() { "endif" } else { "if true" };
        format!("{{%{} {word} {}%}}", &mark[1], &mark[3])
    };
    MARK.replace_all(source, block).into_owned()
}

/// What keeps a source from being compiled, and in which line: a `*` outside of quoted texts, or code so long that the
/// compiler, which calls itself for each operator and each `elif`, might run out of stack.
fn refused(source: &str) -> Option<(usize, &'static str)> {
    let bytes = source.as_bytes();
    let line = |at: usize| 1 + bytes[..at].iter().filter(|&&byte| byte == b'\n').count();
    let (mut at, mut n_elif) = (0, 0);
    while at + 1 < bytes.len() {
        let close: &[u8] = match &bytes[at..at + 2] {
            b"{{" => b"}}",
            b"{%" => b"%}",
            b"{#" => {
                at += 2 + source[at + 2..].find("#}")?;
                continue;
            }
            _ => {
                at += 1;
                continue;
            }
        };
        at += 2;
        n_elif += usize::from(source[at..].trim_start_matches(['-', '+', ' ', '\n']).starts_with("elif"));
        if n_elif > ELIF_MAX {
            return Some((line(at), "there are more than 256 elif"));
        }
        let (mut quote, mut n_code) = (None, 0);
        while at < bytes.len() && (quote.is_some() || !bytes[at..].starts_with(close)) {
            match (quote, bytes[at]) {
                (Some(_), b'\\') => at += 1,
                (Some(open), byte) if byte == open => quote = None,
                (None, byte @ (b'"' | b'\'')) => quote = Some(byte),
                (None, b'*') => return Some((line(at), "the operator * is not supported in chat templates")),
                (None, _) => n_code += 1,
                _ => {}
            }
            if n_code > CODE_BYTES_MAX {
                return Some((line(at), "an expression or statement has more than 1024 bytes outside of quotes"));
            }
            at += 1;
        }
    }
    None
}

/// Collects output and fails beyond a bound.
struct Capped {
    bytes: Vec<u8>,
    bytes_max: usize,
    over: bool,
}

impl Write for Capped {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        if part.len() > self.bytes_max - self.bytes.len() {
            self.over = true;
            return Err(io::Error::other("output bound passed"));
        }
        self.bytes.extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
