//! Constraints hold for every token, rebuild from emitted tokens, and hostile schemas cost little.

use std::fmt::Write;

use proptest::prelude::*;
use shared::clock::{Clock, SystemClock};

use super::*;

const EOS: u32 = 258;

/// Every byte, two longer tokens, then the end token.
fn compiler() -> GrammarCompiler {
    let bytes = (0..=255_u8).map(|byte| (vec![byte], false));
    let longer = [(b"\":".to_vec(), false), (b"true".to_vec(), false), (b"<|im_end|>".to_vec(), true)];
    GrammarCompiler::new(&Vocabulary::new(bytes.chain(longer), vec![EOS])).expect("compiles")
}

/// Waits for a compilation.
fn compile(compiler: &GrammarCompiler, tenant: &TenantId, grammar: &Grammar) -> Result<CompiledGrammar, GrammarError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(compiler.compile(tenant, grammar))
}

fn tenant(name: &str) -> TenantId {
    name.parse().expect("valid")
}

fn schema(text: &str) -> Grammar {
    Grammar::JsonSchema(text.to_owned())
}

fn accepts(grammar: &CompiledGrammar, text: &str) -> bool {
    let mut state = grammar.start();
    if text.bytes().any(|byte| state.commit(u32::from(byte)).is_err()) {
        return false;
    }
    state.is_complete() || state.mask().expect("within limits").is_allowed(EOS)
}

#[test]
fn a_schema_allows_its_documents_only() {
    let grammar = compile(
        &compiler(),
        &tenant("a"),
        &schema(
            r##"{"type":"object","properties":{"n":{"type":"integer"},"of":{"$ref":"#/$defs/kind"}},
            "required":["n","of"],"additionalProperties":false,"$defs":{"kind":{"enum":["x","yy"]}}}"##,
        ),
    );
    let grammar = grammar.expect("compiles");
    assert!(accepts(&grammar, r#"{"n": 12, "of": "yy"}"#));
    for text in [r#"{"n": "12", "of": "yy"}"#, r#"{"n": 12, "of": "z"}"#, r#"{"n": 12}"#, "[]", ""] {
        assert!(!accepts(&grammar, text), "{text}");
    }
}

#[test]
fn any_object_is_json() {
    let grammar = compile(&compiler(), &tenant("a"), &Grammar::JsonObject).expect("compiles");
    assert!(accepts(&grammar, r#"{"a": [1, {"b": null}], "c": true}"#));
    assert!(!accepts(&grammar, "[1]") && !accepts(&grammar, r#"{"a": }"#));
}

#[test]
fn a_complete_grammar_allows_nothing_but_the_end() {
    let grammar = compile(&compiler(), &tenant("a"), &Grammar::Lark("start: \"ab\"".to_owned())).expect("compiles");
    let mut state = grammar.start();
    state.commit(u32::from(b'a')).expect("follows");
    assert_eq!(state.mask().expect("within limits").to_list(), [u32::from(b'b')]);
    state.commit(u32::from(b'b')).expect("follows");
    assert!(state.is_complete());
    assert_eq!(state.mask().expect("within limits").to_list(), [EOS]);
    assert!(matches!(grammar.start().commit(u32::from(b'x')), Err(GrammarError::TooComplex(_))));
}

#[test]
fn control_tokens_are_never_text() {
    let grammar = compile(&compiler(), &tenant("a"), &Grammar::Lark("start: /(.|\\n)+/".to_owned())).expect("compiles");
    let mut state = grammar.start();
    let mask = state.mask().expect("within limits");
    assert!(mask.is_allowed(u32::from(b'<')) && mask.is_allowed(257) && !mask.is_allowed(EOS));
}

#[test]
fn large_and_deep_schemas_are_refused_before_compiling() {
    let compiler = compiler();
    let large = schema(&format!("{{\"const\":\"{}\"}}", "x".repeat(GRAMMAR_BYTES_MAX)));
    assert!(
        matches!(compile(&compiler, &tenant("a"), &large), Err(GrammarError::TooLarge { bytes }) if bytes > GRAMMAR_BYTES_MAX)
    );
    let nested = |levels: usize| schema(&format!("{}{{}}{}", "{\"not\":".repeat(levels), "}".repeat(levels)));
    assert_eq!(compile(&compiler, &tenant("a"), &nested(40)).err(), Some(GrammarError::TooDeep));
    assert!(matches!(compile(&compiler, &tenant("a"), &nested(5000)), Err(GrammarError::Refused(_))));
    let error = compile(&compiler, &tenant("a"), &schema("{\"type\":\"nonsense\"}")).expect_err("unknown type");
    let told = error.to_request_error("response_format");
    assert_eq!(
        (told.kind, told.code, told.param.as_deref()),
        (ErrorKind::Invalid, "invalid_schema", Some("response_format"))
    );
    assert!(!told.message.contains("backtrace") && told.message.chars().count() < 400, "{told}");
}

/// Patterns, products and references that explode in engines without limits (RELIABILITY B5).
fn bombs() -> Vec<(&'static str, Grammar)> {
    let mut many = String::from("{\"enum\":[");
    (0..6000).for_each(|n| write!(many, "\"v{n}\",").expect("fits"));
    many.push_str("0]}");
    let any_of = |levels: usize| {
        (0..levels).fold("{\"type\":\"string\"}".to_owned(), |inner, _| {
            if inner.len() > 20_000 {
                inner
            } else {
                format!("{{\"anyOf\":[{inner},{{\"type\":\"array\",\"items\":{inner}}}]}}")
            }
        })
    };
    let wide = (0..800)
        .map(|n| format!("\"k{n}\":{{\"type\":\"string\",\"pattern\":\"^[a-z]{{1,9}}$\"}}"))
        .collect::<Vec<_>>()
        .join(",");
    vec![
        ("nested quantifiers", schema(r#"{"type":"string","pattern":"^((a+)+)+$"}"#)),
        ("counted quantifiers", schema(r#"{"type":"string","pattern":"^((((a{1,50}){1,50}){1,50}){1,50})$"}"#)),
        ("suffix determinization", schema(r#"{"type":"string","pattern":"^.*a.{30}$"}"#)),
        ("huge bounds", schema(r#"{"type":"string","minLength":1000000,"maxLength":2000000}"#)),
        ("huge array", schema(r#"{"type":"array","minItems":1000000,"items":{"type":"integer"}}"#)),
        (
            "reference loop",
            schema(r##"{"$ref":"#/$defs/a","$defs":{"a":{"$ref":"#/$defs/b"},"b":{"$ref":"#/$defs/a"}}}"##),
        ),
        (
            "recursive type",
            schema(
                r##"{"$ref":"#/$defs/n","$defs":{"n":{"type":"object","properties":{"l":{"$ref":"#/$defs/n"},"r":{"$ref":"#/$defs/n"}}}}}"##,
            ),
        ),
        ("remote reference", schema(r#"{"$ref":"http://169.254.169.254/latest"}"#)),
        ("many values", schema(&many)),
        ("deep anyOf", schema(&any_of(8))),
        ("many patterns", schema(&format!("{{\"type\":\"object\",\"properties\":{{{wide}}}}}"))),
        (
            "all of patterns",
            schema(
                r#"{"allOf":[{"type":"string","pattern":"a.{40}b"},{"type":"string","pattern":"c.{40}d"},{"type":"string","pattern":"e.{40}f"}]}"#,
            ),
        ),
        ("large multiple", schema(r#"{"type":"integer","multipleOf":999983,"minimum":1000000000}"#)),
        ("bad escape", schema(r#"{"type":"string","pattern":"(?<=a)b\\k<x>"}"#)),
    ]
}

#[test]
fn schema_bombs_are_decided_in_bounded_time() {
    let compiler = compiler();
    for (name, grammar) in bombs() {
        let started = SystemClock.now();
        let mut steps = 0;
        let result = compile(&compiler, &tenant("a"), &grammar).and_then(|grammar| {
            // Those that compile must also bound the work of every mask.
            let mut state = grammar.start();
            for _ in 0..100 {
                let mask = state.mask()?;
                let next = mask.to_list().into_iter().rev().find(|&id| id != EOS);
                let Some(next) = next else { break };
                state.commit(next)?;
                steps += 1;
            }
            Ok(())
        });
        let took = SystemClock.now() - started;
        // At most 500 ms for a turn and 200 ms for compiling, and masks of a few ms; generous for a busy machine.
        assert!(took.as_millis() < 700 + 20 * (steps + 1), "{name}: {took:?} for {steps} steps, {result:?}");
    }
}

#[test]
fn tenants_do_not_share_compiled_grammars_and_the_memory_is_bounded() {
    let compiler = compiler();
    for n in 0..40 {
        compile(&compiler, &tenant("a"), &schema(&format!("{{\"const\":{n}}}"))).expect("compiles");
    }
    compile(&compiler, &tenant("b"), &schema("{\"const\":39}")).expect("compiles");
    let kept = |name: &str| compiler.kept().tenants.get(&tenant(name)).map_or(0, Vec::len);
    assert_eq!((kept("a"), kept("b")), (KEPT_PER_TENANT_MAX, 1));
    let found = compile(&compiler, &tenant("a"), &schema("{\"const\":39}")).expect("kept");
    let again = compile(&compiler, &tenant("a"), &schema("{\"const\":39}")).expect("kept");
    let other = compile(&compiler, &tenant("b"), &schema("{\"const\":39}")).expect("kept");
    assert!(Arc::ptr_eq(&found.0, &again.0) && !Arc::ptr_eq(&found.0, &other.0));
    compiler.forget(&tenant("a"));
    assert_eq!(kept("a"), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 30, ..ProptestConfig::default() })]

    /// A state rebuilt from emitted tokens goes on like the one that was there all along.
    #[test]
    fn a_replayed_state_equals_the_original(picks in prop::collection::vec(any::<prop::sample::Index>(), 1..25)) {
        let text = r#"{"type":"object","properties":{"a":{"type":"array","items":{"type":"number"}},"b":{"type":"boolean"}},"required":["a"]}"#;
        let grammar = compile(&compiler(), &tenant("a"), &schema(text)).expect("compiles");
        let mut state = grammar.start();
        let mut emitted = Vec::new();
        for pick in &picks {
            let allowed = state.mask().expect("within limits").to_list();
            let id = *pick.get(&allowed);
            state.commit(id).expect("allowed");
            emitted.push(id);
            if state.is_complete() {
                break;
            }
        }
        let mut replayed = grammar.start();
        emitted.iter().for_each(|&id| replayed.commit(id).expect("allowed"));
        prop_assert_eq!(replayed.is_complete(), state.is_complete());
        prop_assert_eq!(replayed.mask().expect("mask").to_list(), state.mask().expect("mask").to_list());
    }
}
